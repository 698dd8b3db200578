"""Our logistic regression against scikit-learn's optimum, and its corners."""

import logging
from typing import Any

import pytest
import sklearn.datasets
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dinov3.eval import logistic
from dinov3.eval.logistic import LogisticModel, LogisticRegression, SklearnLogisticRegression

_OPTIONS: dict[str, Any] = dict(tolerance=1e-10, max_iterations=2000)


def _data(count: int = 150, width: int = 7, classes: int = 4, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    """Features of very different scales, far from zero."""
    labels = torch.arange(count) % classes
    features = torch.randn(classes, width)[labels] + spread * torch.randn(count, width)
    return features * torch.logspace(-2, 1, width) + 5, labels


def _objective(model: LogisticModel, features: Tensor, labels: Tensor, C: float) -> float:
    outputs = features.double() @ model.weight.T + model.bias
    return (cross_entropy(outputs, labels) + model.weight.square().sum() / (2 * C * len(labels))).item()


@pytest.mark.parametrize("C", [1e-4, 0.1, 10.0, 1e4])
def test_the_optimum_is_that_of_scikit_learn(C: float) -> None:
    features, labels = _data()
    ours = LogisticRegression(features, labels).fit(C, **_OPTIONS)
    theirs = SklearnLogisticRegression(features, labels).fit(C, **(_OPTIONS | {"max_iterations": 20000}))
    best = _objective(theirs, features, labels, C)
    assert _objective(ours, features, labels, C) <= best * (1 + 1e-9)
    if C > 100:  # so flat there that scikit-learn stops before the probabilities have settled
        return
    torch.testing.assert_close(ours.predict_proba(features), theirs.predict_proba(features), atol=1e-4, rtol=0)


def _real_data(name: str) -> tuple[Tensor, Tensor]:
    """Standardised features and labels of a data set that comes with scikit-learn, in random order."""
    features, labels = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    features = torch.from_numpy(features)[order].float()
    return (features - features.mean(0)) / (features.std(0) + 1e-3), torch.from_numpy(labels)[order].long()


@pytest.mark.parametrize("C", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("name", ["digits", "wine", "breast_cancer"])
def test_loss_and_accuracy_on_real_data_are_those_of_scikit_learn(name: str, C: float) -> None:
    features, labels = _real_data(name)
    half = len(labels) // 2
    train, test = (features[:half], labels[:half]), (features[half:], labels[half:])
    ours = LogisticRegression(*train).fit(C, **_OPTIONS)
    theirs = SklearnLogisticRegression(*train).fit(C, **(_OPTIONS | {"max_iterations": 20000}))

    def loss(model: LogisticModel) -> float:
        probabilities = model.predict_proba(train[0]).gather(1, train[1][:, None])
        return (-probabilities.log().mean() + model.weight.square().sum() / (2 * C * half)).item()

    assert loss(ours) == pytest.approx(loss(theirs), rel=1e-6)
    right = [int((model.predict_proba(test[0]).argmax(1) == test[1]).sum()) for model in (ours, theirs)]
    assert right[0] == right[1]
    assert C < 1 or right[0] > 0.9 * len(test[1])


@pytest.mark.parametrize("solver", [LogisticRegression, SklearnLogisticRegression])
def test_the_gradient_vanishes_at_the_optimum(solver: Any) -> None:
    features, labels = _data()
    model = solver(features, labels).fit(1.0, **_OPTIONS)
    weight, bias = model.weight.clone().requires_grad_(), model.bias.clone().requires_grad_()
    loss = cross_entropy(features.double() @ weight.T + bias, labels) + weight.square().sum() / (2 * len(labels))
    loss.backward()
    assert weight.grad.abs().max() < 1e-5
    assert bias.grad.abs().max() < 1e-5


def test_blocks_of_samples_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = _data()
    whole = LogisticRegression(features, labels).fit(1.0, **_OPTIONS)
    for name in ("_MAX_OUTPUTS", "_CACHED_OUTPUTS", "_MIN_ROWS"):
        monkeypatch.setattr(logistic, name, 64 if name != "_MIN_ROWS" else 4)
    blocks = LogisticRegression(features, labels).fit(1.0, **_OPTIONS)
    torch.testing.assert_close(blocks.predict_proba(features), whole.predict_proba(features), atol=1e-8, rtol=0)


def test_a_start_elsewhere_ends_at_the_same_optimum() -> None:
    features, labels = _data()
    problem = LogisticRegression(features, labels)
    far = problem.fit(1e3, **_OPTIONS)
    warm, cold = problem.fit(0.1, start=far, **_OPTIONS), problem.fit(0.1, **_OPTIONS)
    torch.testing.assert_close(warm.predict_proba(features), cold.predict_proba(features), atol=1e-6, rtol=0)


@pytest.mark.parametrize("solver", [LogisticRegression, SklearnLogisticRegression])
def test_classes_that_the_train_set_lacks_get_columns_of_zeros(solver: Any) -> None:
    features, labels = _data()
    model = solver(features, labels * 2 + 1, num_classes=9).fit(1.0, **_OPTIONS)
    probabilities = model.predict_proba(features)
    assert probabilities.shape == (150, 9)
    assert probabilities.dtype == torch.float64
    assert (probabilities[:, [0, 2, 4, 6, 8]] == 0).all()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(150, dtype=torch.float64))


def test_two_classes_share_one_weight_vector() -> None:
    features, labels = _data(classes=2)
    ours = LogisticRegression(features, labels).fit(2.0, **_OPTIONS)
    theirs = SklearnLogisticRegression(features, labels).fit(2.0, **_OPTIONS)
    assert ours.weight.shape == (1, 7)
    torch.testing.assert_close(ours.predict_proba(features), theirs.predict_proba(features), atol=1e-4, rtol=0)


def test_labels_that_never_change_are_constants() -> None:
    features, classes = _data()
    hot = torch.stack([classes == 0, classes >= 0, classes < 0, classes > 1], dim=1).long()
    ours = LogisticRegression(features, hot).fit(1.0, **_OPTIONS).predict_proba(features)
    theirs = SklearnLogisticRegression(features, hot).fit(1.0, **_OPTIONS).predict_proba(features)
    assert (ours[:, 1] == 1).all()
    assert (ours[:, 2] == 0).all()
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_more_features_than_samples_and_constant_features() -> None:
    features, labels = _data(count=30, width=80)
    features[:, 3] = 2.0
    ours = LogisticRegression(features, labels).fit(1.0, **_OPTIONS)
    theirs = SklearnLogisticRegression(features, labels).fit(1.0, **(_OPTIONS | {"max_iterations": 20000}))
    torch.testing.assert_close(ours.predict_proba(features), theirs.predict_proba(features), atol=1e-4, rtol=0)


def test_float32_is_close_to_float64() -> None:
    features, labels = _data()
    single = LogisticRegression(features, labels, dtype=torch.float32).fit(1.0, **_OPTIONS)
    double = LogisticRegression(features, labels).fit(1.0, **_OPTIONS)
    torch.testing.assert_close(single.predict_proba(features), double.predict_proba(features), atol=2e-3, rtol=0)


def test_too_few_iterations_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    features, labels = _data()
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        LogisticRegression(features, labels).fit(10.0, tolerance=1e-12, max_iterations=2)
        SklearnLogisticRegression(features, labels).fit(10.0, tolerance=1e-12, max_iterations=2)
    assert "after 2 iterations" in caplog.text
    assert "2 iterations were not enough" in caplog.text


@pytest.mark.parametrize(
    ("features", "labels", "options", "message"),
    [
        (torch.randn(4, 2), torch.zeros(4).long(), {}, r"at least two classes, got \[0\]"),
        (torch.full((4, 2), torch.nan), torch.arange(4), {}, "not finite"),
        (torch.randn(4, 2), torch.arange(4), {"dtype": torch.float16}, "float32 or float64, got torch.float16"),
    ],
)
def test_impossible_problems_are_named(features: Tensor, labels: Tensor, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogisticRegression(features, labels, **options)


@pytest.mark.gpu
def test_the_accelerator_finds_the_same_also_with_features_elsewhere() -> None:
    features, labels = _data()
    device = torch.accelerator.current_accelerator()
    cpu = LogisticRegression(features, labels).fit(1.0, **_OPTIONS).predict_proba(features)
    for place in ("cpu", device):
        model = LogisticRegression(features.to(place), labels, device=device).fit(1.0, **_OPTIONS)
        torch.testing.assert_close(model.predict_proba(features).cpu(), cpu, atol=1e-6, rtol=0)
