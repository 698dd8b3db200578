"""Linear classifiers on the outputs of frozen layers; all classifiers of a sweep are computed as one product.

A sweep trains one head for every combination of layers and learning rate. Heads with the same input differ only in
their weights, which lie side by side in one block of memory: one matrix product gives the outputs of all of them,
another one all gradients. To the outside (optimizers, checkpoints) each head is a module with parameters of its own.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinov3 import distributed

logger = logging.getLogger("dinov3")

TokensList = Sequence[tuple[Tensor, Tensor]]


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
        """Logits by name, each `[B, num_classes]`."""
        logits = {name: row for group in self._groups for name, row in group.logits(x_tokens_list).items()}
        return {name: logits[name] for name in self.classifiers_dict}

    def loss(self, x_tokens_list: TokensList, labels: Tensor, criterion: nn.Module) -> Tensor:
        """Sum over the heads of the mean loss.

        Args:
            x_tokens_list: outputs of layers.
            labels: class numbers `[B]`, or multi-hot rows `[B, num_classes]`.
            criterion: averages over its input: `nn.CrossEntropyLoss()` or `nn.BCEWithLogitsLoss()`.
        """
        total: Any = 0
        for group in self._groups:
            outputs = group.outputs(x_tokens_list)  # [B, H, C]
            repeated = labels[:, None].expand(*outputs.shape[:2], *labels.shape[1:])
            # All heads have equally many samples: the sum of their means is their number times the common mean.
            total = total + outputs.shape[1] * criterion(outputs.flatten(0, 1), repeated.flatten(0, 1))
        result: Tensor = total
        return result


class _HeadGroup:
    """Heads with the same input, and their weights in one block of memory."""

    def __init__(self, names: list[str], heads: list[LinearClassifier]) -> None:
        self.names, self.heads = names, heads
        self._weight, self._bias = self._stack()

    def logits(self, x_tokens_list: TokensList) -> dict[str, Tensor]:
        return dict(zip(self.names, self.outputs(x_tokens_list).unbind(1), strict=True))

    def outputs(self, x_tokens_list: TokensList) -> Tensor:
        """Logits of all heads, `[B, H, C]`."""
        head = self.heads[0]
        x = create_linear_input(x_tokens_list, head.use_n_blocks, head.use_avgpool)
        weights, biases = self._parameters()
        if not self._in_one_block(weights, biases):  # after a move to another device or dtype
            self._weight, self._bias = self._stack()
        outputs: Tensor = _BatchedLinear.apply(x, self._weight, self._bias, *weights, *biases)
        return outputs

    def _parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        return [head.linear.weight for head in self.heads], [head.linear.bias for head in self.heads]

    def _stack(self) -> tuple[Tensor, Tensor]:
        """Copy the weights into one block and let the parameters be views of it."""
        blocks = []
        for parameters in self._parameters():
            block = torch.stack([parameter.detach() for parameter in parameters])
            for parameter, view in zip(parameters, block, strict=True):
                parameter.data = view
            blocks.append(block)
        return blocks[0], blocks[1]

    def _in_one_block(self, weights: list[Tensor], biases: list[Tensor]) -> bool:
        pairs = zip((*weights, *biases), (*self._weight, *self._bias), strict=True)
        return all(parameter.data_ptr() == view.data_ptr() for parameter, view in pairs)


class _BatchedLinear(torch.autograd.Function):
    """Linear layers with one input: `[B, I]`, weights `[H, C, I]` and biases `[H, C]` give `[B, H, C]`.

    The parameters of the layers, views of the blocks, are arguments only to receive their gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.flatten(0, 1), bias.flatten()).unflatten(1, weight.shape[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.flatten(1)  # [B, H C]
        x_grad = grad @ weight.flatten(0, 1) if ctx.needs_input_grad[0] else None
        weight_grad = (grad.T @ x).view_as(weight)
        bias_grad = grad.sum(0).view(weight.shape[:2])
        return (x_grad, None, None, *weight_grad.unbind(), *bias_grad.unbind())


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
