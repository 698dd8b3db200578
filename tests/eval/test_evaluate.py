"""Feature extraction, wrappers, the evaluation loop and the accumulator; on one process and on several."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dinov3.eval.accumulators import ResultsAccumulator
from dinov3.eval.evaluate import evaluate, make_eval_data_loader
from dinov3.eval.feature_files import load_features_dict, save_features_dict
from dinov3.eval.features import (
    ModelWithIntermediateLayers,
    ModelWithMultiScale,
    extract_features,
    wrap_model,
)
from dinov3.eval.metrics import ClassificationMetricType, build_classification_metric
from dinov3.eval.setup import autocast_context
from dinov3.eval.utils import average_metrics
from tests.eval.toys import MeanColour, VectorDataset
from tests.helpers.distributed import run_distributed

ACCURACY = ClassificationMetricType.MEAN_ACCURACY


def _linear(out: int = 3) -> nn.Module:
    torch.manual_seed(3)
    return nn.Linear(6, out)


def test_features_are_in_the_order_of_the_data_set() -> None:
    dataset, model = VectorDataset(23), _linear()
    features, labels = extract_features(model, dataset, batch_size=4, num_workers=0)
    torch.testing.assert_close(features, model(dataset.vectors).detach())
    assert torch.equal(labels, dataset.targets)
    assert features.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert not features.requires_grad


def test_an_empty_data_set_has_no_features() -> None:
    with pytest.raises(ValueError, match="data set is empty"):
        extract_features(_linear(), VectorDataset(0), batch_size=4, num_workers=0)


def _evaluate(count: int, batch_size: int) -> tuple[Any, ...]:
    dataset, model = VectorDataset(count), _linear()
    loader = make_eval_data_loader(dataset=dataset, batch_size=batch_size, num_workers=0, metric_type=ACCURACY)
    return evaluate(
        model,
        loader,
        {"all": lambda outputs, targets: {"preds": outputs, "target": targets}},
        {"all": build_classification_metric(ACCURACY, num_classes=3)},
        "cpu",
        criterion=cross_entropy,
        accumulate_results=True,
    )


def test_loss_metric_and_samples() -> None:
    stats, metrics, samples = _evaluate(20, batch_size=5)
    dataset = VectorDataset(20)
    scores = _linear()(dataset.vectors).detach()
    assert stats["loss"] == pytest.approx(cross_entropy(scores, dataset.targets).item(), abs=1e-5)
    assert metrics["all"]["top-1"].item() == pytest.approx((scores.argmax(1) == dataset.targets).float().mean().item())
    torch.testing.assert_close(samples["all"]["preds"], scores)
    assert torch.equal(samples["all"]["target"], dataset.targets)


def test_without_accumulation_there_are_no_samples() -> None:
    loader = make_eval_data_loader(dataset=VectorDataset(5), batch_size=2, num_workers=0, metric_type=ACCURACY)
    stats, metrics, samples = evaluate(_linear(), loader, {}, {}, "cpu")
    assert (stats, metrics, samples) == ({}, {}, {})


def _on_a_process(count: int) -> dict[str, Any]:
    """Everything that must not depend on the number of processes."""
    features, labels = extract_features(_linear(), VectorDataset(count), batch_size=2, num_workers=0)
    _, metrics, samples = _evaluate(count, batch_size=2)
    curve = build_classification_metric(ClassificationMetricType.AUROC, num_classes=3)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if rank == 0:  # the other processes have seen no sample
        curve.update(features, labels)
    return {
        "features": features,
        "labels": labels,
        "top-1": metrics["all"]["top-1"],
        "preds": samples["all"]["preds"],
        "target": samples["all"]["target"],
        "auroc": curve.compute()["top-1"],
    }


@pytest.mark.parametrize(("count", "world_size"), [(7, 2), (10, 3)])  # the last batches hold only padding on some ranks
def test_several_processes_find_what_one_finds(count: int, world_size: int, tmp_path: Path) -> None:
    alone = _on_a_process(count)
    for result in run_distributed(_on_a_process, world_size, tmp_path, count):
        for name, value in alone.items():
            torch.testing.assert_close(result[name], value, msg=name)


def test_padding_is_not_scored() -> None:
    class Loader(list[Any]):
        pass

    batches = Loader([(torch.eye(3), (torch.tensor([0, -1, 1]), torch.tensor([0, 1, 0])))])
    metric = build_classification_metric(ACCURACY, num_classes=3)
    _, metrics, samples = evaluate(
        nn.Identity(),
        batches,
        {"x": lambda outputs, targets: {"preds": outputs, "target": targets}},
        {"x": metric},
        "cpu",
        accumulate_results=True,
    )
    assert metrics["x"]["top-1"].item() == 0.5
    assert samples["x"]["target"].tolist() == [0, 0]


def test_accumulator_pads_lists_of_labels_and_counts_a_sample_once() -> None:
    accumulator = ResultsAccumulator()
    accumulator.update(
        preds=torch.tensor([[3.0], [1.0]]), target=torch.tensor([[3, 4], [1, -1]]), index=torch.tensor([3, 1])
    )
    accumulator.update(preds=torch.tensor([[2.0], [3.0]]), target=torch.tensor([[2], [3]]), index=torch.tensor([2, 3]))
    result = accumulator.accumulate()
    assert result["preds"].flatten().tolist() == [1.0, 2.0, 3.0]
    assert result["target"].tolist() == [[1, -1], [2, -1], [3, 4]]
    with pytest.raises(ValueError, match="nothing to accumulate"):
        ResultsAccumulator().accumulate()


def test_wrappers_normalise_outside_and_average_sizes_inside() -> None:
    model, images = MeanColour(), torch.rand(2, 3, 16, 16)
    plain = wrap_model(model, normalize=False)
    assert plain is model
    unit = wrap_model(model, multi_scale=True)(images)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(2))
    sizes: list[int] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(x.shape[-1])
            return torch.full((len(x), 1), float(len(sizes)))

    assert ModelWithMultiScale(Spy())(images).flatten().tolist() == [2.0, 2.0]
    assert sizes == [16, 11, 8]
    assert wrap_model(nn.Flatten())(torch.zeros(1, 4)).tolist() == [[0.0] * 4]  # no division by zero


def test_intermediate_layers_run_without_gradient_in_the_given_context() -> None:
    model = MeanColour()
    wrapped = ModelWithIntermediateLayers(
        model, 2, lambda: autocast_context(torch.device("cpu"), torch.float32), return_class_token=True
    )
    layers = wrapped(torch.rand(2, 3, 8, 8))
    assert [(p.shape, c.shape) for p, c in layers] == [((2, 4, 3), (2, 3))] * 2
    assert not layers[0][1].requires_grad


def test_features_as_files(tmp_path: Path) -> None:
    features = {"a": torch.randn(3, 2), "b": torch.arange(3)}
    save_features_dict(features, tmp_path / "f.pt")
    save_features_dict(features, tmp_path / "f.npy")
    for loaded in (load_features_dict(tmp_path / "f.pt"), load_features_dict(tmp_path / "f.npy", allow_pickle=True)):
        assert {k: v.tolist() for k, v in loaded.items()} == {k: v.tolist() for k, v in features.items()}
    with pytest.raises(ValueError, match="allow_pickle=True"):
        load_features_dict(tmp_path / "f.npy")
    with pytest.raises(ValueError, match=".pt or .npy"):
        save_features_dict(features, tmp_path / "f.bin")


def test_deviation_of_one_try_is_unknown() -> None:
    averages = average_metrics({0: {"a": 2.0}})
    assert averages["a_mean"] == 2.0
    assert np.isnan(averages["a_std"])
