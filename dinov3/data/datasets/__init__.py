"""Datasets on disk. To add one: a file here, and a row in `dinov3.data.registry`."""

from dinov3.data.datasets.ade20k import ADE20K
from dinov3.data.datasets.coco_captions import CocoCaptions
from dinov3.data.datasets.image_folder import ImageFolder
from dinov3.data.datasets.image_net import ImageNet
from dinov3.data.datasets.image_net_22k import ImageNet22k
from dinov3.data.datasets.nyu import NYU

__all__ = ["ADE20K", "NYU", "CocoCaptions", "ImageFolder", "ImageNet", "ImageNet22k"]
