"""What the quick start measures: k-NN accuracy of raw pixels, of the backbone before and after its training."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov3.configs import DinoV3SetupArgs, get_cfg_from_args
from dinov3.data import make_classification_eval_transform, make_dataset
from dinov3.models.build import build_model_for_eval, build_model_from_cfg
from dinov3.models.features import FrozenFeatures
from dinov3.models.neighbours import knn_accuracy, nearest_neighbours
from dinov3.run.quickstart_data import SPLITS, TRAIN_SHARE
from dinov3.utils import count_parameters, fix_random_seeds
from dinov3.utils.device import default_device

if TYPE_CHECKING:
    from PIL.Image import Image

K = 20  # neighbours that vote
BATCH_SIZE = 256


class Split(NamedTuple):
    """A split of the image folder: files, class numbers `[n]`, images as a backbone sees them `[n, 3, s, s]`."""

    files: list[Path]
    labels: Tensor
    images: Tensor

    @classmethod
    def load(cls, folder: Path, size: int) -> "Split":
        """All images below `folder`, `size` pixels high and wide."""
        transform = make_classification_eval_transform(resize_size=size, crop_size=size)
        dataset = make_dataset(dataset_str=f"ImageFolder:root={folder}", transform=transform)
        images, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
        paths = [folder / dataset.get_image_relpath(i) for i in range(len(dataset))]
        return cls(paths, torch.tensor(labels), torch.stack(images))

    def of_class(self, label: int) -> list[Path]:
        """Files of a class."""
        return [file for file, own in zip(self.files, self.labels.tolist(), strict=True) if own == label]

    def first_of_each_class(self) -> list[int]:
        """Row number of the first image of each class."""
        labels = self.labels.tolist()
        return [labels.index(label) for label in sorted(set(labels))]

    def select(self, rows: list[int]) -> "Split":
        """These rows alone."""
        return Split([self.files[i] for i in rows], self.labels[rows], self.images[rows])


class FinishedRun(NamedTuple):
    """A training of the quick start, ready to be looked at.

    Attributes:
        cfg: its configuration.
        train, val: the images.
        metrics: rows of `training_metrics.json`.
        backbones: by number of iterations trained: 0 is the initialisation, the last one the result.
    """

    cfg: Any
    train: Split
    val: Split
    metrics: list[dict[str, float]]
    backbones: dict[int, nn.Module]

    @classmethod
    def load(cls, images: Path, training: Path, seed: int) -> "FinishedRun":
        """Read what the training left in its folder."""
        cfg = get_cfg_from_args(DinoV3SetupArgs(config_file=str(training / "config.yaml"), output_dir=str(training)))
        size = cfg.crops.global_crops_size
        metrics = [json.loads(line) for line in (training / "training_metrics.json").read_text().splitlines()]
        backbones = {0: initial_backbone(cfg, seed)}
        for file in training.glob("eval/training_*/teacher_checkpoint.pth"):
            backbones[int(file.parent.name.removeprefix("training_")) + 1] = build_model_for_eval(cfg, file)
        train, val = (Split.load(images / name, size) for name in SPLITS)
        return cls(cfg, train, val, metrics, dict(sorted(backbones.items())))

    @property
    def random(self) -> nn.Module:
        """The backbone before the training."""
        return self.backbones[0]

    @property
    def trained(self) -> nn.Module:
        """The backbone after it."""
        return self.backbones[max(self.backbones)]

    @property
    def class_names(self) -> list[str]:
        """Folder names, in the order of the labels."""
        return sorted({file.parent.name for file in self.train.files})

    def measure(self) -> dict[str, Any]:
        """Accuracies [%] and what the training amounted to."""
        course = {iterations: self.accuracy(backbone) for iterations, backbone in self.backbones.items()}
        batch_size, iterations = int(self.cfg.train.batch_size_per_gpu), max(course)
        return {
            "knn_pixels": self.accuracy(None),
            "knn_random": course[0],
            "knn_trained": course[iterations],
            "knn_course": {str(i): accuracy for i, accuracy in course.items()},
            "knn_k": K,
            "chance": 100 / len(self.class_names),
            "loss_first": self.metrics[0]["total_loss"],
            "loss_last": self.metrics[-1]["total_loss"],
            "iterations": iterations,
            "batch_size": batch_size,
            "images_seen": iterations * batch_size,
            "n_train": len(self.train.files),
            "n_val": len(self.val.files),
            "train_share": TRAIN_SHARE,
            "classes": self.class_names,
            "arch": self.cfg.student.arch,
            "parameters": count_parameters(self.trained),
            "image_size": int(self.cfg.crops.global_crops_size),
            "patch_size": int(self.cfg.student.patch_size),
            "torch": torch.__version__,
            "device": str(default_device()),
            "threads": torch.get_num_threads(),
        }

    def accuracy(self, backbone: nn.Module | None) -> float:
        """Share of held-out images that k-NN classifies correctly [%]; None: from raw pixels."""
        train, val = (features_of(backbone, split) for split in (self.train, self.val))
        return round(100 * knn_accuracy(val, self.val.labels, train, self.train.labels, ks=(K,))[K], 2)


def initial_backbone(cfg: Any, seed: int) -> nn.Module:
    """The backbone as the training with this seed starts: the training draws its weights first of all."""
    backbone, _ = build_model_from_cfg(cfg, only_teacher=True)
    backbone.to_empty(device=default_device())
    fix_random_seeds(seed)
    backbone.init_weights()
    return backbone.eval()


def features_of(backbone: nn.Module | None, split: Split) -> Tensor:
    """Class tokens `[n, D]` on the CPU; without a backbone the pixels themselves."""
    if backbone is None:
        return split.images.flatten(1)
    frozen, device = FrozenFeatures(backbone), default_device()
    batches = split.images.split(BATCH_SIZE)
    return torch.cat([frozen(batch.to(device)).layers[-1].class_token.cpu() for batch in batches])


def neighbours_of(backbone: nn.Module, queries: Split, among: Split, n: int) -> list[list[Path]]:
    """Per query the files of the `n` most similar images, most similar first."""
    query_features, features = (
        torch.nn.functional.normalize(features_of(backbone, x), dim=1) for x in (queries, among)
    )
    found = nearest_neighbours(query_features, features, n).indices
    return [[among.files[i] for i in row] for row in found.tolist()]


def patch_features(backbone: nn.Module, photo: "Image") -> Tensor:
    """Normed features of the patches of a whole photograph, `[D, h, w]` on the CPU."""
    side = min(photo.size)
    image = make_classification_eval_transform(resize_size=side, crop_size=None)(photo)
    return FrozenFeatures(backbone)(image[None].to(default_device())).layers[-1].map[0].cpu()
