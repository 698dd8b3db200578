"""What tells early that a training goes wrong: signs of collapse, and online k-NN on the EMA teacher."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

from dinov3 import distributed
from dinov3.configs.schema import OnlineKnnOptions
from dinov3.data import make_classification_eval_transform, make_data_loader, make_dataset
from dinov3.models.neighbours import knn_accuracy

logger = logging.getLogger("dinov3")


@torch.no_grad()
def collapse_monitors(teacher_global: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Two numbers that fall when the teacher collapses.

    Args:
        teacher_global: output of `SSLMetaArch.get_teacher_output`.

    Returns:
        `teacher_entropy`: mean entropy in nats of the targets, between 0 (one prototype per image) and ln(prototypes)
        (all images alike). `feature_rank`: effective rank of the batch's centred CLS tokens, from 1 to the smaller of
        batch and width: the exponential of the entropy of their normalised singular values.

    Source: RankMe, Garrido et al. (arXiv 2210.02885), equation 2.
    """
    targets = teacher_global["cls_centered"]
    monitors = {"teacher_entropy": -torch.xlogy(targets, targets).sum(dim=-1).mean()}
    if "cls_pre_head" in teacher_global:
        features = teacher_global["cls_pre_head"].flatten(0, -2).float()
        monitors["feature_rank"] = effective_rank(features - features.mean(dim=0))
    return monitors


def effective_rank(matrix: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised singular values; NaN if the matrix isn't finite."""
    if not matrix.isfinite().all():
        return matrix.new_tensor(torch.nan)
    values = torch.linalg.svdvals(matrix)
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return torch.xlogy(shares, shares).sum().neg().exp()


class OnlineKnn:
    """k-NN accuracy of the EMA teacher on two labelled data sets, every so many iterations.

    Args:
        options: the section `evaluation.online_knn` of the configuration.
        num_workers: of the loaders.

    Raises:
        ValueError: a data set is not named.
    """

    def __init__(self, options: Mapping[str, Any], num_workers: int) -> None:
        wanted = OnlineKnnOptions(**options)
        names = {"train_dataset": wanted.train_dataset, "val_dataset": wanted.val_dataset}
        if missing := [key for key, name in names.items() if not isinstance(name, str)]:
            raise ValueError(f"evaluation.online_knn needs {' and '.join(missing)} (dataset strings)")
        self.period, self.k = wanted.period, wanted.k
        self.batch_size, self.num_workers = wanted.batch_size, num_workers
        transform = make_classification_eval_transform(resize_size=wanted.resize_size, crop_size=wanted.crop_size)
        self.train_set, self.val_set = (make_dataset(dataset_str=name, transform=transform) for name in names.values())
        self.k = min(self.k, len(self.train_set))

    def is_due(self, iteration: int) -> bool:
        """Whether to evaluate after this iteration."""
        return (iteration + 1) % self.period == 0

    def evaluate(self, backbone: nn.Module, dtype: torch.dtype, on_batch: Callable[[], None] = lambda: None) -> float:
        """Top-1 accuracy of validation images by their neighbours among training images, in percent.

        Collective over the process subgroup: each process computes the features of its share of the images.

        Args:
            backbone: of CLS tokens [B, D].
            dtype: of the images it takes.
            on_batch: called after each batch.
        """
        train_features, train_labels = self._features(backbone, self.train_set, dtype, on_batch)
        queries, labels = self._features(backbone, self.val_set, dtype, on_batch)
        accuracy = knn_accuracy(queries, labels, train_features, train_labels, [self.k])
        return 100 * float(accuracy[self.k])

    @torch.no_grad()
    def _features(
        self, backbone: nn.Module, dataset: Any, dtype: torch.dtype, on_batch: Callable[[], None]
    ) -> tuple[Tensor, Tensor]:
        """Normalised CLS tokens [n, D] and labels [n] of a data set, in its order, on every process."""
        group, device = distributed.get_process_subgroup(), next(backbone.parameters()).device
        rank, world = distributed.get_subgroup_rank(), distributed.get_subgroup_size()
        share = -(-len(dataset) // world)  # equal for all: a sharded backbone needs everyone in each forward pass
        loader = make_data_loader(
            dataset=Subset(dataset, [i % len(dataset) for i in range(rank * share, (rank + 1) * share)]),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            shuffle=False,
            sampler_type=None,
            drop_last=False,
        )
        batches = []
        for images, labels in loader:
            batches.append((backbone(images.to(device, dtype)).float(), labels))
            on_batch()
        features = F.normalize(torch.cat([features for features, _ in batches]), dim=1)
        labels = torch.cat([labels for _, labels in batches]).to(device)
        gathered = [
            torch.cat(distributed.gather_all_tensors(x, group=group))[: len(dataset)] for x in (features, labels)
        ]
        return gathered[0], gathered[1]
