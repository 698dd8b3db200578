"""Heads computed as one product against heads computed one by one."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

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


def test_outputs_and_gradients_are_those_of_single_heads() -> None:
    heads, _ = _heads()
    tokens, labels = _tokens(), torch.randint(4, (6,))
    single = copy.deepcopy(heads)
    outputs = heads(tokens)
    assert list(outputs) == list(heads.classifiers_dict)
    wanted = torch.zeros(())
    for name, head in single.classifiers_dict.items():
        torch.testing.assert_close(outputs[name], head(tokens))
        wanted = wanted + cross_entropy(head(tokens), labels)
    loss = heads.loss(tokens, labels, nn.CrossEntropyLoss())
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    for ours, theirs in zip(heads.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_losses_of_multi_hot_labels() -> None:
    heads, _ = _heads()
    tokens, labels = _tokens(), torch.randint(2, (6, 4)).float()
    wanted = sum(binary_cross_entropy_with_logits(x, labels) for x in heads(tokens).values())
    torch.testing.assert_close(heads.loss(tokens, labels, nn.BCEWithLogitsLoss()), wanted)


@pytest.mark.parametrize("change", ["step", "load", "double", "copy"])
def test_weights_stay_in_step_with_the_product(change: str) -> None:
    heads, groups = _heads()
    tokens = _tokens()
    if change == "step":
        heads.loss(tokens, torch.zeros(6).long(), nn.CrossEntropyLoss()).backward()
        torch.optim.SGD(groups, momentum=0.9).step()
    elif change == "load":
        heads.load_state_dict({k: torch.randn_like(v) for k, v in heads.state_dict().items()})
    elif change == "double":
        heads.to(torch.float64).to(torch.float32)
    else:
        heads = copy.deepcopy(heads)
        nn.init.constant_(next(iter(heads.classifiers_dict.values())).linear.weight, 0.3)
    for name, logits in heads(tokens).items():
        torch.testing.assert_close(logits, heads.classifiers_dict[name](tokens))


def test_the_gradient_of_the_input() -> None:
    heads, _ = _heads()
    heads.double()

    def total(class_token: Tensor) -> Tensor:
        return torch.stack(list(_double_outputs(heads, class_token).values())).sum()

    assert torch.autograd.gradcheck(total, torch.randn(2, 5, dtype=torch.float64, requires_grad=True))


def _double_outputs(heads: AllClassifiers, x: Tensor) -> dict[str, Tensor]:
    from dinov3.eval.linear_heads import _BatchedLinear

    weight = torch.stack([head.linear.weight[:, :5] for head in heads.classifiers_dict.values()]).detach()
    bias = torch.stack([head.linear.bias for head in heads.classifiers_dict.values()]).detach()
    outputs = _BatchedLinear.apply(x, weight, bias, *weight.unbind(), *bias.unbind())
    return dict(enumerate(outputs.unbind(1)))


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
