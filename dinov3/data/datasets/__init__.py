"""Datasets on disk. To add one: a file here, and a row in `dinov3.data.registry`."""

from dinov3.data.datasets.ade20k import ADE20K
from dinov3.data.datasets.captions import CaptionList, WebDatasetCaptions
from dinov3.data.datasets.coco_captions import CocoCaptions
from dinov3.data.datasets.coco_detection import CocoDetection
from dinov3.data.datasets.depth_folder import DepthFolder
from dinov3.data.datasets.hugging_face import HuggingFaceDataset
from dinov3.data.datasets.image_folder import ImageFolder
from dinov3.data.datasets.image_list import ImageList
from dinov3.data.datasets.image_net import ImageNet
from dinov3.data.datasets.image_net_22k import ImageNet22k
from dinov3.data.datasets.image_net_variants import (
    ImageNetC,
    ImageNetReaL,
    ImageNetSketch,
    ImageNetSubset,
    ImageNetV2,
    ObjectNet,
)
from dinov3.data.datasets.nyu import NYU
from dinov3.data.datasets.segmentation_folder import SegmentationFolder
from dinov3.data.datasets.web_dataset import WebDataset

__all__ = [
    "ADE20K",
    "NYU",
    "CaptionList",
    "CocoCaptions",
    "CocoDetection",
    "DepthFolder",
    "HuggingFaceDataset",
    "ImageFolder",
    "ImageList",
    "ImageNet",
    "ImageNet22k",
    "ImageNetC",
    "ImageNetReaL",
    "ImageNetSketch",
    "ImageNetSubset",
    "ImageNetV2",
    "ObjectNet",
    "SegmentationFolder",
    "WebDataset",
    "WebDatasetCaptions",
]
