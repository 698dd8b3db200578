"""Milliseconds per iteration of the linear evaluation's sweep, as a Markdown table.

    python -m benchmarks.linear_sweep [--rounds 40] [--threads 1]

Compared are all heads of a sweep, 13 learning rates times 4, as `dinov3.eval.linear` trains them, and one `nn.Linear`
per head in plain PyTorch: input made of the tokens, mean cross-entropy summed over the heads, gradients, SGD with
momentum and the cosine schedule. The two take turns on equal batches, so that a change of the machine's load meets both
alike; reported is the median. The losses must agree.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from dinov3.eval.linear import OptimizerType, SchedulerType, TrainConfig
from dinov3.eval.linear_heads import create_linear_input, setup_linear_classifiers
from dinov3.utils.device import default_device

SIZES = ((384, 10, 64), (768, 100, 128), (768, 1000, 128))
"""Width of the heads' input, classes, batch."""
BARS = {(384, 10, 64): 4.0, (768, 100, 128): 1.3, (768, 1000, 128): 1.0}
_N_HEADS = 4
_ITERATIONS = 10_000  # of the schedule

Tokens = list[tuple[Tensor, Tensor]]
Step = Callable[[Tokens, Tensor], Tensor]


def make_steps(width: int, classes: int, batch: int) -> tuple[Step, Step]:
    """One training step of this package and one of plain PyTorch, from the same weights."""
    torch.manual_seed(0)
    device = default_device()
    rates = TrainConfig().learning_rates
    heads, groups = setup_linear_classifiers(
        make_batch(width, classes, batch)[0], [1] * _N_HEADS, rates, batch, classes, world_size=1
    )
    modules = [nn.Linear(width, classes, device=device) for _ in groups]
    for module, weight, bias in zip(modules, *[iter(heads.state_dict().values())] * 2, strict=True):
        module.load_state_dict({"weight": weight, "bias": bias})

    optimizer = OptimizerType.SGD.get_optimizer(groups)
    scheduler = SchedulerType.COSINE_ANNEALING.get_scheduler(optimizer, epoch_length=_ITERATIONS, epochs=1)

    def ours(tokens: Tokens, labels: Tensor) -> Tensor:
        loss = heads.loss_and_gradients(tokens, labels)
        optimizer.step()
        scheduler.step()
        return loss

    plain = torch.optim.SGD(
        [{"params": m.parameters(), "lr": group["lr"]} for m, group in zip(modules, groups, strict=True)], momentum=0.9
    )
    plain_scheduler = CosineAnnealingLR(plain, _ITERATIONS)
    criterion = nn.CrossEntropyLoss()

    def theirs(tokens: Tokens, labels: Tensor) -> Tensor:
        outputs = [module(create_linear_input(tokens, 1, use_avgpool=True)) for module in modules]
        loss = torch.stack([criterion(output, labels) for output in outputs]).sum()
        plain.zero_grad()
        loss.backward()
        plain.step()
        plain_scheduler.step()
        return loss.detach()

    return ours, theirs


def make_batch(width: int, classes: int, batch: int) -> tuple[Tokens, Tensor]:
    """Tokens of one layer, one patch each: the heads are measured, not the pooling. Labels."""
    device = default_device()
    tokens = [(torch.randn(batch, 1, width // 2, device=device), torch.randn(batch, width // 2, device=device))]
    return tokens, torch.randint(classes, (batch,), device=device)


def measure(size: tuple[int, int, int], rounds: int) -> tuple[float, float]:
    """Median seconds per iteration, ours and theirs."""
    steps = make_steps(*size)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 2):  # two to warm up
        tokens, labels = make_batch(*size)
        losses = []
        for step, times in zip(steps, seconds, strict=True):
            _wait()
            start = time.perf_counter()
            losses.append(step(tokens, labels))
            _wait()
            times.append(time.perf_counter() - start)
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    return median(seconds[0][2:]), median(seconds[1][2:])


def _wait() -> None:
    if default_device().type != "cpu":
        torch.accelerator.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="iterations of the smallest size; a tenth of the others")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {default_device()}, {args.threads} threads, {13 * _N_HEADS} heads\n")
    print("| width / classes / batch | one by one, ms | as one product, ms | ratio | wanted |\n|---|---|---|---|---|")
    for size in SIZES:
        ours, theirs = measure(size, args.rounds if size == SIZES[0] else max(args.rounds // 10, 5))
        name = " / ".join(map(str, size))
        print(f"| {name} | {1e3 * theirs:.1f} | {1e3 * ours:.1f} | {theirs / ours:.2f} | {BARS[size]} |")


if __name__ == "__main__":
    main()
