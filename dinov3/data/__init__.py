"""Datasets, transforms, augmentation, masking, collation, samplers and loaders.

`loaders` turns dataset strings into datasets (`registry`, `datasets`) and those into loaders (`samplers`, `seeded`);
`augmentations`, `masking` and `collate` make the batches of self-supervised training; `transforms` serves evaluation.
"""

from dinov3.data.adapters import DatasetWithEnumeratedTargets
from dinov3.data.augmentations import DataAugmentationDINO
from dinov3.data.collate import collate_data_and_cast
from dinov3.data.loaders import SamplerType, make_data_loader, make_dataset
from dinov3.data.masking import MaskingGenerator
from dinov3.data.meta_loaders import CombinedDataLoader
from dinov3.data.registry import register_dataset
from dinov3.data.transforms import make_classification_eval_transform, make_classification_train_transform

__all__ = [
    "CombinedDataLoader",
    "DataAugmentationDINO",
    "DatasetWithEnumeratedTargets",
    "MaskingGenerator",
    "SamplerType",
    "collate_data_and_cast",
    "make_classification_eval_transform",
    "make_classification_train_transform",
    "make_data_loader",
    "make_dataset",
    "register_dataset",
]
