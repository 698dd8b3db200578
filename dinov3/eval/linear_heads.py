"""Linear classifiers on the outputs of frozen layers; all classifiers of a sweep are computed as one product.

A sweep trains one head for every combination of layers and learning rate. Heads with the same input differ only in
their weights, which lie side by side in one block of memory: one matrix product gives the outputs of all of them,
another one all gradients, whose formula is simple enough to be written out (`loss_and_gradients`). To the outside
(optimizers, checkpoints) each head is a module with parameters of its own.
"""

import logging
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.eval.config import LossType

logger = logging.getLogger("dinov3")

TokensList = Sequence[tuple[Tensor, Tensor]]

# Numbers of a block of outputs: half a MiB in float32, and half a GiB.
_CACHED, _AT_ONCE = 2**17, 2**27


def create_linear_input(x_tokens_list: TokensList, use_n_blocks: int, use_avgpool: bool) -> Tensor:
    """Input of a linear head, float32 `[B, (n + 1) D]`.

    It holds the class tokens of the last n layers and, with pooling, the mean patch token of the last one.

    Args:
        x_tokens_list: (patch tokens `[B, P, D]`, class token `[B, D]`) per layer.
        use_n_blocks: n.
        use_avgpool: append the mean; otherwise the width is `n D`.
    """
    if not 1 <= use_n_blocks <= len(x_tokens_list):
        raise ValueError(f"the head needs the last {use_n_blocks} layers, got {len(x_tokens_list)}")
    parts = [class_token for _, class_token in x_tokens_list[-use_n_blocks:]]
    if use_avgpool:
        parts.append(x_tokens_list[-1][0].mean(1))
    return torch.cat(parts, dim=-1).float()


class LinearClassifier(nn.Module):
    """One linear head.

    Args:
        out_dim: width of its input.
        use_n_blocks, use_avgpool: as in `create_linear_input`.
        num_classes: number of outputs.
    """

    def __init__(self, out_dim: int, use_n_blocks: int, use_avgpool: bool, num_classes: int = 1000) -> None:
        super().__init__()
        self.out_dim, self.num_classes = out_dim, num_classes
        self.use_n_blocks, self.use_avgpool = use_n_blocks, use_avgpool
        self.learning_rate: float | None = None  # what it is trained with, scaled
        self.linear = nn.Linear(out_dim, num_classes)
        nn.init.normal_(self.linear.weight, mean=0.0, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_tokens_list: TokensList) -> Tensor:
        """Logits, `[B, num_classes]`."""
        logits: Tensor = self.linear(create_linear_input(x_tokens_list, self.use_n_blocks, self.use_avgpool))
        return logits


class AllClassifiers(nn.Module):
    """All heads of a sweep.

    Args:
        classifiers_dict: heads by name.
    """

    def __init__(self, classifiers_dict: Mapping[str, LinearClassifier]) -> None:
        super().__init__()
        self.classifiers_dict = nn.ModuleDict(classifiers_dict)
        by_input: dict[tuple[int, bool, int], list[str]] = {}
        for name, head in classifiers_dict.items():
            by_input.setdefault((head.use_n_blocks, head.use_avgpool, head.num_classes), []).append(name)
        self._groups = [_HeadGroup(names, [classifiers_dict[name] for name in names]) for names in by_input.values()]

    def forward(self, x_tokens_list: TokensList) -> dict[str, Tensor]:
        """Logits by name, each `[B, num_classes]`; where gradients are recorded, head by head."""
        if torch.is_grad_enabled():
            return {name: head(x_tokens_list) for name, head in self.classifiers_dict.items()}
        inputs = _SharedInput(x_tokens_list)
        logits = {name: row for group in self._groups for name, row in group.logits(inputs).items()}
        return {name: logits[name] for name in self.classifiers_dict}

    @torch.no_grad()
    def loss_and_gradients(
        self, x_tokens_list: TokensList, labels: Tensor, loss_type: LossType = LossType.CROSS_ENTROPY
    ) -> Tensor:
        """Sum over the heads of the mean loss; `grad` of all parameters becomes its gradient (nothing is added up).

        Args:
            x_tokens_list: outputs of layers.
            labels: class numbers, int64 `[B]`, or multi-hot rows `[B, num_classes]`.
            loss_type: averaged over samples, the binary cross-entropy also over classes.

        Raises:
            ValueError: class numbers for the binary cross-entropy.
        """
        if labels.ndim == 1 and loss_type is LossType.BINARY_CROSS_ENTROPY:
            raise ValueError(
                "train.loss_type=BINARY_CROSS_ENTROPY needs multi-hot labels [B, classes], got class numbers "
                f"{tuple(labels.shape)}: use CROSS_ENTROPY"
            )
        inputs = _SharedInput(x_tokens_list)
        return torch.stack([group.loss_and_gradients(inputs, labels, loss_type) for group in self._groups]).sum()


class _SharedInput:
    """The inputs of all heads as columns of one table: each token is pooled and converted once."""

    def __init__(self, x_tokens_list: TokensList) -> None:
        class_tokens = [class_token for _, class_token in x_tokens_list]
        self._table = create_linear_input(x_tokens_list, len(x_tokens_list), use_avgpool=True)
        # Where the class token of each layer begins, and where the mean patch does.
        self._starts = [0, *accumulate(token.shape[1] for token in class_tokens)]

    def columns(self, head: LinearClassifier) -> Tensor:
        """`create_linear_input` for this head."""
        first = self._starts[-1 - head.use_n_blocks]
        return self._table[:, first:] if head.use_avgpool else self._table[:, first : self._starts[-1]]


class _HeadGroup:
    """Heads with the same input; their weights are one block of memory, and so are their gradients.

    Outputs are laid out `[H, C, B]`: the weights times the transposed input. So the softmax over classes runs along
    samples, which lie side by side, and its gradient times the input is that of the weights as they are stored.
    """

    def __init__(self, names: list[str], heads: list[LinearClassifier]) -> None:
        self.names, self.heads = names, heads
        self._stack()

    def logits(self, inputs: _SharedInput) -> dict[str, Tensor]:
        """By name, `[B, C]`."""
        self._keep_in_one_block()
        outputs = _outputs(inputs.columns(self.heads[0]), self._weight, self._bias)
        return dict(zip(self.names, outputs.mT, strict=True))

    def loss_and_gradients(self, inputs: _SharedInput, labels: Tensor, loss_type: LossType) -> Tensor:
        """Sum of the losses of these heads; see `AllClassifiers`."""
        self._keep_in_one_block()
        x = inputs.columns(self.heads[0])
        # Heads are taken so many at a time that their outputs stay in the processor's cache from one step to the next.
        n_heads = max(1, (_CACHED if x.device.type == "cpu" else _AT_ONCE) // (self.heads[0].num_classes * len(x)))
        blocks = (self._weight, self._bias, self._weight_grad, self._bias_grad)
        losses = []
        for weight, bias, weight_grad, bias_grad in zip(*(block.split(n_heads) for block in blocks), strict=True):
            loss, residuals = _loss_and_residuals(_outputs(x, weight, bias), labels, loss_type)
            torch.mm(residuals.flatten(0, 1), x, out=weight_grad.flatten(0, 1))
            torch.sum(residuals, 2, out=bias_grad)
            losses.append(loss)
        for parameter, grad in zip(self._parameters, self._grads, strict=True):
            parameter.grad = grad
        return torch.stack(losses).sum()

    def _stack(self) -> None:
        """Copy the weights into one block and let the parameters be views of it; make room for the gradients."""
        self._weight = torch.stack([head.linear.weight.detach() for head in self.heads])
        self._bias = torch.stack([head.linear.bias.detach() for head in self.heads])
        for head, weight, bias in zip(self.heads, self._weight, self._bias, strict=True):
            head.linear.weight.data, head.linear.bias.data = weight, bias
        self._parameters = [p for head in self.heads for p in (head.linear.weight, head.linear.bias)]
        self._addresses = [p.data_ptr() for p in self._parameters]
        self._weight_grad, self._bias_grad = torch.empty_like(self._weight), torch.empty_like(self._bias)
        pairs = zip(self._weight_grad, self._bias_grad, strict=True)
        self._grads = [grad for pair in pairs for grad in pair]

    def _keep_in_one_block(self) -> None:
        """Gather the weights again after a move to another device or dtype, or a copy."""
        replaced = self.heads[0].linear.weight is not self._parameters[0]
        if replaced or [parameter.data_ptr() for parameter in self._parameters] != self._addresses:
            self._stack()


def _outputs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`[B, I]`, weights `[H, C, I]` and biases `[H, C]` give `[H, C, B]`."""
    return torch.addmm(bias.flatten()[:, None], weight.flatten(0, 1), x.T).view(*bias.shape, len(x))


def _loss_and_residuals(outputs: Tensor, labels: Tensor, loss_type: LossType) -> tuple[Tensor, Tensor]:
    """Sum over heads of the mean loss of outputs `[H, C, B]`, and its derivative with respect to them."""
    n_heads, n_classes, n_samples = outputs.shape
    if loss_type is LossType.BINARY_CROSS_ENTROPY:
        wanted = labels.T.to(outputs.dtype).expand_as(outputs)
        loss = F.binary_cross_entropy_with_logits(outputs, wanted, reduction="sum")
        return loss / (n_classes * n_samples), (outputs.sigmoid() - wanted).div_(n_classes * n_samples)
    residuals = outputs.softmax(1)
    # The logarithm of the sum of exponentials: the largest probability, at least 1 / C, can't underflow.
    log_sums = outputs.amax(1) - residuals.amax(1).log()  # [H, B]
    if labels.ndim == 1:
        index = labels.expand(n_heads, 1, n_samples)
        loss = log_sums.sum() - outputs.gather(1, index).sum()
        residuals.scatter_add_(1, index, residuals.new_full((), -1.0).expand(index.shape))
    else:
        wanted = labels.T.to(outputs.dtype)  # [C, B]
        loss = (log_sums * wanted.sum(0)).sum() - (outputs * wanted).sum()
        residuals.mul_(wanted.sum(0)).sub_(wanted)
    return loss / n_samples, residuals.div_(n_samples)


def scale_lr(learning_rate: float, batch_size: int, world_size: int | None = None) -> float:
    """The learning rate for the batch of all processes: `learning_rate * batch_size * world_size / 256`."""
    world_size = distributed.get_world_size() if world_size is None else world_size
    return learning_rate * (batch_size * world_size) / 256.0


def setup_linear_classifiers(
    sample_output: TokensList,
    n_last_blocks_list: Sequence[int],
    learning_rates: Sequence[float],
    batch_size: int,
    num_classes: int = 1000,
    *,
    world_size: int | None = None,
) -> tuple[AllClassifiers, list[dict[str, Any]]]:
    """The heads of a sweep over layers and learning rates, and their parameter groups.

    Args:
        sample_output: what the backbone gives, for the widths.
        n_last_blocks_list: numbers of last layers.
        learning_rates: for a batch of 256 over all processes.
        batch_size: per process.
        num_classes: number of outputs.
        world_size: number of processes; default: of the world.
    """
    heads: dict[str, LinearClassifier] = {}
    groups = []
    for n in n_last_blocks_list:
        for learning_rate in learning_rates:
            lr = scale_lr(learning_rate, batch_size, world_size)
            width = create_linear_input(sample_output, n, use_avgpool=True).shape[1]
            head = LinearClassifier(width, n, True, num_classes).to(sample_output[0][1].device)
            head.learning_rate = lr
            heads[_unused_name(f"classifier_{n}_blocks_avgpool_True_lr_{lr:.5f}".replace(".", "_"), heads)] = head
            groups.append({"params": list(head.parameters()), "lr": lr})
    return AllClassifiers(heads), groups


def _unused_name(name: str, taken: Mapping[str, Any]) -> str:
    """The name itself, or with a number if an earlier head has it: rates may agree to five decimals."""
    if name not in taken:
        return name
    number = next(i for i in range(2, len(taken) + 2) if f"{name}_{i}" not in taken)
    logger.info("two learning rates are called %s: the second one becomes %s_%d", name, name, number)
    return f"{name}_{number}"
