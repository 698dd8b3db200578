"""Heads computed as one product against heads computed one by one."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from dinov3.eval import linear_heads
from dinov3.eval.config import LossType
from dinov3.eval.linear_heads import (
    AllClassifiers,
    LinearClassifier,
    create_linear_input,
    scale_lr,
    setup_linear_classifiers,
)

Tokens = list[tuple[Tensor, Tensor]]


def _tokens(batch: int = 6, dtype: torch.dtype = torch.float32) -> Tokens:
    return [(torch.randn(batch, 4, 5, dtype=dtype), torch.randn(batch, 5, dtype=dtype)) for _ in range(3)]


def _heads(num_classes: int = 4) -> tuple[AllClassifiers, list[dict[str, Any]]]:
    heads, groups = setup_linear_classifiers(_tokens(), [1, 3], [0.1, 0.02, 0.5], 64, num_classes)
    for head in heads.classifiers_dict.values():
        nn.init.normal_(head.linear.bias)
    return heads, groups


_CLASSES, _ROWS = torch.tensor([0, 3, 1, 1, 2, 0]), torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]] * 2)


@pytest.mark.parametrize(
    ("loss_type", "labels", "loss"),
    [
        (LossType.CROSS_ENTROPY, _CLASSES, lambda x: cross_entropy(x, _CLASSES)),
        (LossType.CROSS_ENTROPY, _ROWS, lambda x: cross_entropy(x, _ROWS.float())),
        (LossType.BINARY_CROSS_ENTROPY, _ROWS, lambda x: binary_cross_entropy_with_logits(x, _ROWS.float())),
    ],
    ids=["classes", "multi-hot", "binary"],
)
@pytest.mark.parametrize("cached", [1, 50, 2**19], ids=["one head", "two heads", "all heads"])
def test_loss_and_gradients_are_those_of_single_heads(
    loss_type: LossType, labels: Tensor, loss: Any, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_heads, "_CACHED", cached)
    heads, _ = _heads()
    tokens = _tokens()
    single = copy.deepcopy(heads)
    wanted = torch.stack([loss(head(tokens)) for head in single.classifiers_dict.values()]).sum()
    wanted.backward()
    for _ in range(2):  # gradients are not added up
        torch.testing.assert_close(heads.loss_and_gradients(tokens, labels, loss_type), wanted.detach())
        for ours, theirs in zip(heads.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_class_numbers_for_the_binary_loss_are_named() -> None:
    with pytest.raises(ValueError, match=r"needs multi-hot labels \[B, classes\], got class numbers \(6,\)"):
        _heads()[0].loss_and_gradients(_tokens(), _CLASSES, LossType.BINARY_CROSS_ENTROPY)


def test_a_label_that_is_no_class_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        _heads()[0].loss_and_gradients(_tokens(), torch.tensor([0, 1, 2, 3, -1, 0]))


@pytest.mark.parametrize("grad", [True, False])
def test_outputs_are_those_of_single_heads(grad: bool) -> None:
    heads, _ = _heads()
    tokens = _tokens()
    with torch.set_grad_enabled(grad):
        outputs = heads(tokens)
    assert list(outputs) == list(heads.classifiers_dict)
    for name, head in heads.classifiers_dict.items():
        assert outputs[name].requires_grad == grad
        torch.testing.assert_close(outputs[name], head(tokens))


@pytest.mark.parametrize("change", ["step", "load", "assign", "double", "copy"])
def test_weights_stay_in_step_with_the_product(change: str) -> None:
    heads, groups = _heads()
    tokens = _tokens()
    if change == "step":
        heads.loss_and_gradients(tokens, torch.zeros(6).long())
        torch.optim.SGD(groups, momentum=0.9).step()
    elif change in ("load", "assign"):
        state = {k: torch.randn_like(v) for k, v in heads.state_dict().items()}
        heads.load_state_dict(state, assign=change == "assign")
    elif change == "double":
        heads.to(torch.float64).to(torch.float32)
    else:
        heads = copy.deepcopy(heads)
        nn.init.constant_(next(iter(heads.classifiers_dict.values())).linear.weight, 0.3)
    with torch.no_grad():
        outputs = heads(tokens)
    for name, logits in outputs.items():
        torch.testing.assert_close(logits, heads.classifiers_dict[name](tokens))


def test_heads_without_pooling_and_layers_of_several_widths() -> None:
    tokens = [(torch.randn(6, 4, width), torch.randn(6, width)) for width in (3, 5, 7)]
    widths = {(1, True): 14, (3, True): 22, (2, False): 12}
    heads = AllClassifiers({f"{k}": LinearClassifier(width, *k, 4) for k, width in widths.items()})
    with torch.no_grad():
        for name, logits in heads(tokens).items():
            torch.testing.assert_close(logits, heads.classifiers_dict[name](tokens))


def test_inputs_are_class_tokens_of_the_last_layers_and_the_mean_patch() -> None:
    tokens = _tokens(dtype=torch.bfloat16)
    x = create_linear_input(tokens, 2, use_avgpool=True)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x[:, :5], tokens[1][1].float())
    torch.testing.assert_close(x[:, 10:], tokens[2][0].mean(1).float())
    assert create_linear_input(tokens, 2, use_avgpool=False).shape == (6, 10)
    with pytest.raises(ValueError, match="the last 4 layers, got 3"):
        create_linear_input(tokens, 4, use_avgpool=True)


def test_heads_of_equal_names_are_all_trained(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dinov3"):
        heads, groups = setup_linear_classifiers(_tokens(), [1], [1e-6, 2e-6, 0.1], 256)
    names = list(heads.classifiers_dict)
    assert names[1] == f"{names[0]}_2"
    assert "becomes classifier_1_blocks_avgpool_True_lr_0_00000_2" in caplog.text
    assert len(names) == len(groups) == 3
    owned = {id(p) for p in heads.parameters()}
    assert {id(p) for group in groups for p in group["params"]} == owned


def test_rates_grow_with_the_batch_of_all_processes() -> None:
    assert scale_lr(0.1, 128) == pytest.approx(0.05)
    assert scale_lr(0.1, 128, world_size=8) == pytest.approx(0.4)


def test_a_head_starts_small() -> None:
    head = LinearClassifier(300, 1, True, 200)
    assert head.linear.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert (head.linear.bias == 0).all()
