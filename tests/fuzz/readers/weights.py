"""Files of weights of every format and layout: all tensors come back as they were written, or an error says why not."""

import io
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.checkpointer.export import export_backbone, hf_config, hf_preprocessor_config
from dinov3.checkpointer.heads import HeadFile, read_head, save_head
from dinov3.checkpointer.weights import load_weights, read_weights
from dinov3.hub.hf import load_hf_model
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer
from tests.fuzz.core import Reader, require
from tests.fuzz.mutations import Damaged, damage, damage_json_text

# A flipped bit in the pickle of a file of the old format can move a tensor within its storage; nothing in such a file
# would tell.
_UNCHECKED = ("legacy",)


def tiny_vit() -> nn.Module:
    """A ViT of a few thousand weights, none of them zero."""
    torch.manual_seed(0)
    model = DinoVisionTransformer(
        patch_size=2,
        embed_dim=16,
        depth=1,
        num_heads=2,
        ffn_ratio=1,
        layerscale_init=0.1,
        n_storage_tokens=1,
        mask_k_bias=True,
    )
    model.init_weights()
    return model


def tiny_convnext() -> nn.Module:
    """A ConvNeXt of a few thousand weights."""
    torch.manual_seed(1)
    model = ConvNeXt(depths=[1, 1, 1, 1], dims=[4, 4, 8, 8])
    model.init_weights()
    return model


def count_changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> int:
    """Elements whose bits differ."""
    require(before.keys() == after.keys(), f"other tensors: {sorted(before.keys() ^ after.keys())}")
    changed = 0
    for key, value in before.items():
        found = after[key]
        require(value.shape == found.shape and value.dtype == found.dtype, f"{key} is {found.dtype} {found.shape}")
        size = value.element_size()
        as_bytes = [
            t.detach().contiguous().view(torch.uint8).view(-1, size) for t in (value.reshape(-1), found.reshape(-1))
        ]
        changed += int((as_bytes[0] != as_bytes[1]).any(1).sum())
    return changed


def check_tensors(before: dict[str, Tensor], after: dict[str, Tensor], how: Damaged, times: int = 1) -> None:
    """A byte that was overwritten may have been part of a weight; nothing else may be different.

    Args:
        before, after: tensors as written and as read.
        how: the damage.
        times: in how many tensors a stored weight occurs.
    """
    changed = count_changed(before, after)
    require(changed <= how.n_changed * times, f"{changed} weights differ after {how.n_changed} bytes were {how.kind}")


@dataclass(frozen=True)
class WeightFile:
    """Weights as they lie on the disk.

    Attributes:
        kind: layout, model and format.
        model: name of the model that they are of.
        path: what is read.
        how: what has happened to the tensors' file.
        config_is_damaged: whether `config.json` beside it is.
        with_model: whether `read_weights` is told what model they are for.
    """

    kind: str
    model: str
    path: Path
    how: Damaged
    config_is_damaged: bool
    with_model: bool


class Weights(Reader):
    """`read_weights` and `load_weights`, over files and folders of each kind."""

    name, share = "weights", 10.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.models = {"vit": tiny_vit(), "convnext": tiny_convnext()}
        self.wanted = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in self.models.items()}
        self.configs = {name: hf_config(model) for name, model in self.models.items()}
        self.files: dict[str, tuple[str, bytes]] = {}  # kind -> (model, content)
        for name, model in self.models.items():
            for form, ending in itertools.product(("meta", "timm"), ("pth", "safetensors")):
                path = export_backbone(model, folder / f"made.{ending}", form)
                self.files[f"{form} {name} {ending}"] = name, path.read_bytes()
            made = export_backbone(model, folder / "made_hf", "hf")
            self.files[f"hf {name}"] = name, (made / "model.safetensors").read_bytes()
        vit = self.wanted["vit"]
        self.files["legacy vit"] = "vit", saved(vit, new=False)
        teacher = {f"backbone.{key}": value for key, value in vit.items()} | {"dino_head.last": torch.ones(3)}
        self.files["teacher vit"] = "vit", saved({"teacher": teacher, "iteration": 7})

    def make(self, rng: random.Random) -> WeightFile:
        kind = rng.choice(sorted(self.files))
        model, content = self.files[kind]
        how, with_model = damage(rng, content), rng.random() < 0.7
        if not kind.startswith("hf"):
            return WeightFile(kind, model, self.file("by_a_stranger", how.data), how, False, with_model)
        config_is_damaged = rng.random() < 0.2
        config = json.dumps(self.configs[model]).encode()
        if config_is_damaged:
            how, config = Damaged(content, "none"), damage_json_text(rng, self.configs[model])
        path = self.file("hf_by_a_stranger/model.safetensors", how.data).parent
        self.file("hf_by_a_stranger/config.json", config)
        return WeightFile(kind, model, path, how, config_is_damaged, with_model)

    def read(self, given: WeightFile) -> dict[str, Tensor]:
        module = self.models[given.model]
        state = read_weights(given.path, like=module if given.with_model else None)
        module.load_state_dict({key: torch.full_like(value, 7) for key, value in self.wanted[given.model].items()})
        load_weights(module, state)
        return module.state_dict()

    def check(self, given: WeightFile, result: dict[str, Tensor]) -> None:
        wanted, found = self.wanted[given.model], dict(result)
        if given.config_is_damaged and "rope_embed.periods" in wanted:  # they are computed from it
            found["rope_embed.periods"] = wanted["rope_embed.periods"]
        if not given.kind.startswith(_UNCHECKED):
            check_tensors(wanted, found, given.how, times=2)  # ConvNeXt has its last norm twice


def saved(content: Any, *, new: bool = True) -> bytes:
    """The bytes that torch.save writes, in its new or its old format."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


class HuggingFaceModels(Reader):
    """`load_hf_model`, which builds what `config.json` describes."""

    name, share = "hugging face models", 1.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.models = {"vit": tiny_vit(), "convnext": tiny_convnext()}
        self.contents = {}
        for name, model in self.models.items():
            made = export_backbone(model, folder / "made", "hf")
            config = json.loads((made / "config.json").read_text())
            self.contents[name] = (made / "model.safetensors").read_bytes(), config

    def make(self, rng: random.Random) -> tuple[str, Path]:
        name = rng.choice(sorted(self.contents))
        content, config = self.contents[name]
        folder = self.file("by_a_stranger/model.safetensors", content).parent
        self.file("by_a_stranger/config.json", damage_json_text(rng, config))
        preprocessor = hf_preprocessor_config((0.1, 0.2, 0.3), (0.2, 0.3, 0.4))
        damaged = damage_json_text(rng, preprocessor) if rng.random() < 0.3 else json.dumps(preprocessor).encode()
        self.file("by_a_stranger/preprocessor_config.json", damaged)
        return name, folder

    def read(self, given: tuple[str, Path]) -> nn.Module:
        return load_hf_model(given[1])

    def check(self, given: tuple[str, Path], result: nn.Module) -> None:
        wanted, found = self.models[given[0]].state_dict(), result.state_dict()
        for key in set(wanted) - {"rope_embed.periods"}:
            require(torch.equal(wanted[key], found[key]), f"{key} differs")


class Heads(Reader):
    """`read_head`."""

    name, share = "heads", 3.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        torch.manual_seed(2)
        tensors = {"weight": torch.randn(4, 6), "bias": torch.randn(4)}
        self.head = HeadFile("depth", tensors, {"width": 4, "layers": [1, 2]}, "dinov3_vits16", ["a"])
        self.content = save_head(folder / "made.pth", self.head).read_bytes()

    def make(self, rng: random.Random) -> tuple[Path, Damaged]:
        how = damage(rng, self.content)
        return self.file("head_of_a_stranger.pth", how.data), how

    def read(self, given: tuple[Path, Damaged]) -> HeadFile:
        return read_head(given[0])

    def check(self, given: tuple[Path, Damaged], result: HeadFile) -> None:
        check_tensors(self.head.head, result.head, given[1])
        for name in ("task", "config", "backbone", "class_names", "mean", "std"):
            require(getattr(result, name) == getattr(self.head, name), f"{name} is {getattr(result, name)}")

    def must_name(self, given: tuple[Path, Damaged]) -> str:
        return given[0].name
