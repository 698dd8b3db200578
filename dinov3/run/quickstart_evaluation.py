"""What the quick start measures: k-NN accuracy of raw pixels, of the backbone before and after its training.

The main test is in grey: colours alone tell many photographs apart, for a random network too.
"""

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
    def load(cls, folder: Path, size: int, *, grey: bool) -> "Split":
        """All images below `folder`, `size` pixels high and wide, without their colours if `grey`."""
        from torchvision.transforms import v2

        transform = make_classification_eval_transform(resize_size=size, crop_size=size)
        if grey:
            transform = v2.Compose([v2.Grayscale(num_output_channels=3), transform])
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


class Accuracies(NamedTuple):
    """Of the features in `ImageFeatures` [%]."""

    mean_patch: float
    class_token: float


class Pictures(NamedTuple):
    """Images to search in, and held-out ones to find neighbours for."""

    train: Split
    val: Split

    @classmethod
    def load(cls, folder: Path, size: int, *, grey: bool) -> "Pictures":
        """Both splits of the image folder."""
        return cls(*(Split.load(folder / split, size, grey=grey) for split in SPLITS))

    def accuracy(self, train: Tensor, val: Tensor) -> float:
        """Share of held-out images that k-NN on these features `[n, D]` classifies correctly [%]."""
        return round(100 * knn_accuracy(val, self.val.labels, train, self.train.labels, ks=(K,))[K], 2)

    def accuracies(self, backbone: nn.Module) -> "Accuracies":
        """The same for both kinds of features of a backbone."""
        train, val = (features_of(backbone, split) for split in self)
        return Accuracies(
            self.accuracy(train.mean_patch, val.mean_patch), self.accuracy(train.class_token, val.class_token)
        )


class FinishedRun(NamedTuple):
    """A training of the quick start, ready to be looked at.

    Attributes:
        cfg: its configuration.
        grey, colour: the images.
        metrics: rows of `training_metrics.json`.
        backbones: by number of iterations trained: 0 is the initialisation, the last one the result.
    """

    cfg: Any
    grey: Pictures
    colour: Pictures
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
        grey, colour = (Pictures.load(images, size, grey=grey) for grey in (True, False))
        return cls(cfg, grey, colour, metrics, dict(sorted(backbones.items())))

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
        return sorted({file.parent.name for file in self.colour.train.files})

    def measure(self) -> dict[str, Any]:
        """Accuracies [%] and what the training amounted to."""
        course = {iterations: self.grey.accuracies(backbone) for iterations, backbone in self.backbones.items()}
        before, after = (self.colour.accuracies(backbone) for backbone in (self.random, self.trained))
        batch_size, iterations = int(self.cfg.train.batch_size_per_gpu), max(course)
        return {
            "knn_pixels": self.grey.accuracy(*(split.images.flatten(1) for split in self.grey)),
            "knn_random": course[0].mean_patch,
            "knn_trained": course[iterations].mean_patch,
            "knn_course": {str(i): accuracies.mean_patch for i, accuracies in course.items()},
            "knn_class_token_random": course[0].class_token,
            "knn_class_token_trained": course[iterations].class_token,
            "knn_colour_pixels": self.colour.accuracy(*(split.images.flatten(1) for split in self.colour)),
            "knn_colour_random": before.mean_patch,
            "knn_colour_trained": after.mean_patch,
            "knn_k": K,
            "chance": 100 / len(self.class_names),
            "loss_first": self.metrics[0]["total_loss"],
            "loss_last": self.metrics[-1]["total_loss"],
            "iterations": iterations,
            "batch_size": batch_size,
            "images_seen": iterations * batch_size,
            "n_train": len(self.colour.train.files),
            "n_val": len(self.colour.val.files),
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


def initial_backbone(cfg: Any, seed: int) -> nn.Module:
    """The backbone as the training with this seed starts: the training draws its weights first of all."""
    backbone, _ = build_model_from_cfg(cfg, only_teacher=True)
    backbone.to_empty(device=default_device())
    fix_random_seeds(seed)
    backbone.init_weights()
    return backbone.eval()


class ImageFeatures(NamedTuple):
    """What a backbone says of each image, on the CPU: the mean of its patch tokens, and its class token, `[n, D]`."""

    mean_patch: Tensor
    class_token: Tensor


def features_of(backbone: nn.Module, split: Split) -> ImageFeatures:
    """Features of the last layer, normed by the backbone."""
    frozen, device = FrozenFeatures(backbone), default_device()
    layers = [frozen(batch.to(device)).layers[-1] for batch in split.images.split(BATCH_SIZE)]
    return ImageFeatures(
        mean_patch=torch.cat([layer.tokens.mean(dim=1).cpu() for layer in layers]),
        class_token=torch.cat([layer.class_token.cpu() for layer in layers]),
    )


def neighbours_of(backbone: nn.Module, queries: Split, among: Split, n: int) -> list[list[Path]]:
    """Per query the files of the `n` most similar images, most similar first."""
    features = (features_of(backbone, split).mean_patch for split in (queries, among))
    query_features, others = (torch.nn.functional.normalize(one, dim=1) for one in features)
    return [[among.files[i] for i in row] for row in nearest_neighbours(query_features, others, n).indices.tolist()]


def patch_features(backbone: nn.Module, photo: "Image") -> Tensor:
    """Normed features of the patches of a whole photograph, `[D, h, w]` on the CPU."""
    side = min(photo.size)
    image = make_classification_eval_transform(resize_size=side, crop_size=None)(photo)
    return FrozenFeatures(backbone, fit="resize")(image[None].to(default_device())).layers[-1].map[0].cpu()
