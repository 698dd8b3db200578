"""Milliseconds per iteration of the linear evaluation's sweep as one product, beside one module per classifier.

Compared are all heads of a sweep, 13 learning rates times 4, as `dinov3.eval.linear` trains them, and one `nn.Linear`
per head in plain PyTorch: input made of the tokens, mean cross-entropy summed over the heads, gradients, SGD with
momentum and the cosine schedule. The two get the same batch in each round; the losses must agree.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.frame.bench import Bench
from dinov3.eval.linear import OptimizerType, SchedulerType, TrainConfig
from dinov3.eval.linear_heads import create_linear_input, setup_linear_classifiers

TARGETS = {(384, 10, 64): (4.0, None), (768, 100, 128): (1.3, None), (768, 1000, 128): (1.0, 8.0)}
"""Ratios wanted on a CPU and on an accelerator, by width of the heads' input, classes, batch."""
_N_HEADS = 4
_ITERATIONS = 10_000  # of the schedule

Tokens = list[tuple[Tensor, Tensor]]
Step = Callable[[Tokens, Tensor], Tensor]


def make_steps(width: int, classes: int, batch: int, device: torch.device) -> tuple[Step, Step]:
    """One training step of this package and one of plain PyTorch, from the same weights."""
    torch.manual_seed(0)
    rates = TrainConfig().learning_rates
    heads, groups = setup_linear_classifiers(
        make_batch(width, classes, batch, device)[0], [1] * _N_HEADS, rates, batch, classes, world_size=1
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


def make_batch(width: int, classes: int, batch: int, device: torch.device) -> tuple[Tokens, Tensor]:
    """Tokens of one layer, one patch each: the heads are measured, not the pooling. Labels."""
    tokens = [(torch.randn(batch, 1, width // 2, device=device), torch.randn(batch, width // 2, device=device))]
    return tokens, torch.randint(classes, (batch,), device=device)


def run(bench: Bench) -> None:
    """The three sizes."""
    for size, targets in TARGETS.items():
        name = "linear sweep, width {}, {} classes, batch {}".format(*size)
        if not bench.wants(name):
            continue
        steps = dict(zip(("ours", "one module per head"), make_steps(*size, bench.device), strict=True))
        for seed in range(3):
            torch.manual_seed(seed)
            tokens, labels = make_batch(*size, bench.device)
            torch.testing.assert_close(*(step(tokens, labels) for step in steps.values()), rtol=1e-5, atol=0)
        bench.time(
            name,
            {label: partial(partial, step, tokens, labels) for label, step in steps.items()},
            table="linear sweep, 52 heads, per iteration",
            target=targets[bench.device.type != "cpu"],
        )
