"""Golden cases of the area `depth`: one function per kind of case; "kinds" in the manifest describes what they do."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov3.eval.depth import loss as losses
from dinov3.eval.depth import utils, visualization_utils
from dinov3.eval.depth.datasets.datasets_utils import make_valid_mask
from dinov3.eval.depth.eval import evaluate_depther_with_dataloader
from dinov3.eval.depth.metrics import calculate_depth_metrics
from dinov3.eval.depth.models import Depther, FeaturesToDepth, build_depther
from dinov3.eval.depth.models.dpt_head import DPTHead
from dinov3.eval.depth.models.embed import CenterPadding, StretchToMultiple
from dinov3.eval.depth.models.encoder import DinoVisionTransformerWrapper
from dinov3.eval.depth.models.linear_head import LinearHead
from dinov3.eval.depth.schedulers import build_scheduler
from dinov3.eval.depth.train import IterBasedTrainer
from dinov3.eval.depth.transforms import (
    ColorAug,
    ColourDraw,
    LeftRightFlipAug,
    NYUCrop,
    TrainDraw,
    make_depth_eval_transforms,
    make_depth_train_transforms,
)
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer
from tests.golden import fill
from tests.golden.cases import Case, Expected

Params = Mapping[str, Any]
Inputs = Mapping[str, Tensor]

N_FIRST = 64
N_STRIDED = 256


def cases(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> list[Case]:
    """All cases of the manifest."""
    return [_case(entry, manifest["kinds"][entry["kind"]], tensors) for entry in manifest["cases"]]


def _case(entry: Mapping[str, Any], kind: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Case:
    name = entry["name"]
    expected: dict[str, Expected] = {}
    stored_keys = set()
    for output, rule in entry["outputs"].items():
        prefix = f"{name}/{output}"
        keys = [prefix] if rule["stored"] == "full" else [f"{prefix}.{part}" for part in ("head", "strided", "stats")]
        stored_keys |= set(keys)
        for key in keys:
            expected[key.removeprefix(f"{name}/")] = Expected(tensors[key], rule["atol"], rule["rtol"])
        expected[f"{output}.shape"] = Expected(rule["shape"])
    return Case(
        "depth",
        name,
        partial(_run, entry),
        expected,
        advisory=kind["level"] == "advisory",
        stored_keys=frozenset(stored_keys),
    )


def _run(entry: Mapping[str, Any], _: Path) -> dict[str, Any]:
    inputs = {name: _input(described) for name, described in entry["inputs"].items()}
    outputs = _KINDS[entry["kind"]](entry["params"], inputs)
    results: dict[str, Any] = {}
    for name, rule in entry["outputs"].items():
        value = torch.as_tensor(outputs[name]).detach()
        results[f"{name}.shape"] = list(value.shape)
        results |= {name: value} if rule["stored"] == "full" else _summary(name, value)
    return results


def _summary(name: str, value: Tensor) -> dict[str, Tensor]:
    flat = value.flatten()
    exact = flat.double()
    statistics = [exact.mean(), exact.std(), exact.norm(), exact.min(), exact.max()]
    strided = flat[:: max(1, flat.numel() // N_STRIDED)][:N_STRIDED]
    return {f"{name}.head": flat[:N_FIRST], f"{name}.strided": strided, f"{name}.stats": torch.stack(statistics)}


def _input(described: Mapping[str, Any]) -> Tensor:
    x = fill.tensor(described["fill"], tuple(described["shape"]), described["scale"], described["offset"])
    for op, *arguments in described["ops"]:
        if op == "abs":
            x = x.abs()
        elif op == "clamp":
            x = x.clamp(*arguments)
        elif op == "gt":
            x = x > arguments[0]
        elif op == "zero_where_lt":
            x = torch.where(x < arguments[0], 0.0, x)
        elif op == "round":
            x = x.round()
        else:
            raise ValueError(f"unknown operation {op!r}")
    return x


# --- Models ----------------------------------------------------------------------------------------------------------


def _backbone(described: Mapping[str, Any]) -> nn.Module:
    kinds: dict[str, Callable[..., Any]] = {"vit": DinoVisionTransformer, "convnext": ConvNeXt}
    backbone = kinds[described["arch"]](**described["kwargs"])
    backbone.init_weights()
    return backbone.eval()


def _depther(params: Params) -> Depther:
    depther = build_depther(_backbone(params["backbone"]), **params["depther"])
    fill.fill(depther)
    return depther.eval()


def _levels(inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    numbers = sorted(int(name.removeprefix("feat")) for name in inputs if name.startswith("feat"))
    return [(inputs[f"feat{i}"], inputs[f"cls{i}"]) for i in numbers]


def _center_padding(params: Params, inputs: Inputs) -> dict[str, Any]:
    return {"y": CenterPadding(params["multiple"])(inputs["x"])}


def _stretch(params: Params, inputs: Inputs) -> dict[str, Any]:
    return {"y": StretchToMultiple(params["multiple"])(inputs["x"])}


class _Blocks(nn.Module):
    patch_size = 16
    embed_dim = 8

    def __init__(self, n_blocks: int) -> None:
        super().__init__()
        self.n_blocks = n_blocks


def _out_indices(params: Params, _: Inputs) -> dict[str, Any]:
    encoder = DinoVisionTransformerWrapper(_Blocks(params["n_blocks"]), params["layers"])
    return {"indices": encoder.backbone_out_indices}


def _linear_head(params: Params, inputs: Inputs) -> dict[str, Any]:
    head = LinearHead(**params["kwargs"])
    fill.fill(head)
    head.train(params.get("train", False))
    levels = _levels(inputs)
    if "rescale_to" in params:
        return {"predict": head.predict(levels, rescale_to=params["rescale_to"]), "y": head(levels)}
    outputs: dict[str, Any] = {"y": head(levels)}
    if params.get("train"):
        outputs |= {name: getattr(head.batchnorm_layer, name) for name in ("running_mean", "running_var")}
    return outputs


def _dpt_head(params: Params, inputs: Inputs) -> dict[str, Any]:
    head = DPTHead(**params["kwargs"])
    fill.fill(head)
    head.train(params.get("train", False))
    fused = head.forward_features(_levels(inputs))
    return {"fused": fused, "y": head.conv_depth(fused)}


def _features_to_depth(params: Params, inputs: Inputs) -> dict[str, Any]:
    return {"y": FeaturesToDepth(**params["kwargs"])(inputs["x"])}


def _mixlog_bins(params: Params, _: Inputs) -> dict[str, Any]:
    return {"bins": utils.create_chmv2_mixlog_bins(params["min_depth"], params["max_depth"], params["n_bins"])}


@torch.no_grad()
def _run_depther(params: Params, inputs: Inputs) -> dict[str, Any]:
    depther = _depther(params)
    return {"logits": depther.decoder(depther.encoder(inputs["x"])), "depth": depther(inputs["x"])}


@torch.no_grad()
def _encoder(params: Params, inputs: Inputs) -> dict[str, Any]:
    features = _depther(params).encoder(inputs["x"])
    outputs: dict[str, Any] = {}
    for i, (patches, class_token) in enumerate(features):
        outputs |= {f"feat{i}": patches, f"cls{i}": class_token}
    return outputs


# --- Losses, metrics -------------------------------------------------------------------------------------------------


def _call_loss(module: nn.Module, params: Params, inputs: Inputs) -> dict[str, Any]:
    pred = inputs["pred"].clone().requires_grad_()
    values = [module(pred, inputs["target"], inputs.get("mask")) for _ in range(params.get("n_calls", 1))]
    (grad,) = torch.autograd.grad(values[-1], pred)
    return {"values": torch.stack(values), "grad": grad}


def _loss(params: Params, inputs: Inputs) -> dict[str, Any]:
    kind, kwargs = params["type"], params.get("kwargs", {})
    named = kind in losses.LossType.__members__ and not kwargs
    module = losses.LossType[kind].module() if named else getattr(losses, kind)(**kwargs)
    return _call_loss(module, params, inputs)


def _multi_loss(params: Params, inputs: Inputs) -> dict[str, Any]:
    weights = {losses.LossType[name]: weight for name, weight in params["losses"].items()}
    return _call_loss(losses.MultiLoss(weights), params, inputs)


def _metrics(params: Params, inputs: Inputs) -> dict[str, Any]:
    metrics = calculate_depth_metrics(inputs["gt"], inputs["pred"], inputs["mask"])
    return {"values": torch.stack([metrics[name] for name in params["order"]])}


def _valid_mask(params: Params, inputs: Inputs) -> dict[str, Any]:
    mask = make_valid_mask(inputs["gt"], params["eval_crop"], params["ignored_value"])
    return {"rows": mask[0, 0].sum(dim=1), "cols": mask[0, 0].sum(dim=0), "count": mask.sum()}


def _align(_: Params, inputs: Inputs) -> dict[str, Any]:
    aligned, scale, shift = utils.align_depth_least_square(inputs["gt"], inputs["pred"], inputs["mask"])
    return {"aligned": aligned, "scale_shift": torch.stack([scale, shift])}


# --- Schedules -------------------------------------------------------------------------------------------------------


def _scheduler(params: Params, _: Inputs) -> dict[str, Any]:
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    group = {"params": [parameter], "lr": params["lr"], "betas": tuple(params["betas"]), "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([group])
    scheduler = build_scheduler(
        params["type"], optimizer, params["lr"], params["total_iter"], params["constructor_kwargs"]
    )
    lrs, betas = [], []
    for step in range(params["n_steps"] + 1):
        if step:
            optimizer.step()
            scheduler.step()
        lrs.append(optimizer.param_groups[0]["lr"])
        betas.append(optimizer.param_groups[0]["betas"][0])
    stored = params.get("store", range(len(lrs)))
    return {
        name: torch.tensor([float(values[i]) for i in stored], dtype=torch.float64)
        for name, values in (("lr", lrs), ("beta1", betas))
    }


# --- Transforms ------------------------------------------------------------------------------------------------------


def _nyu_crop(_: Params, inputs: Inputs) -> dict[str, Any]:
    cropped = NYUCrop()(inputs["x"])
    return {"shape": torch.tensor(cropped.shape), "row": cropped[:, 0, :], "col": cropped[:, :, 0]}


def _pictures(inputs: Inputs) -> tuple[Image.Image, Image.Image]:
    image = inputs["img"].clamp(0, 255).round().to(torch.uint8).numpy()
    depth = inputs["depth"].clamp(0, 65535).round().numpy().astype(np.uint16)
    return Image.fromarray(image), Image.fromarray(depth)


def _eval_transform(params: Params, inputs: Inputs) -> dict[str, Any]:
    images, labels = make_depth_eval_transforms(**params["kwargs"])(*_pictures(inputs))
    return {f"image{i}": image for i, image in enumerate(images)} | {f"label{i}": x for i, x in enumerate(labels)}


def _train_transform(params: Params, inputs: Inputs) -> dict[str, Any]:
    """Ours with draws from NumPy's and torch's generators, in the order of the stored case."""
    transform = make_depth_train_transforms(**params["kwargs"])
    random = np.random.RandomState(params["seed"])
    torch.manual_seed(params["seed"])
    pair = transform.prepare(*_pictures(inputs))
    angle = None
    if random.random_sample() < 0.5:
        angle = float(torch.empty(1).uniform_(-transform.rotation_angle, transform.rotation_angle))
    flip = bool(torch.rand(1) < 0.5)
    rest = [size - crop for size, crop in zip(pair[0].shape[-2:], transform.crop_size or (0, 0), strict=True)]
    crop = (int(torch.randint(rest[0] + 1, (1,))), int(torch.randint(rest[1] + 1, (1,))))
    colour = None
    if random.random_sample() < 0.5:
        gamma, brightness = random.uniform(0.9, 1.1), random.uniform(*transform.colours.brightness_range)
        colour = ColourDraw(gamma, brightness, tuple(random.uniform(0.9, 1.1, size=3)))
    image, label = transform.apply(pair, TrainDraw(angle, flip, crop, colour))
    return {"image": image, "label": label}


def _color_aug(params: Params, inputs: Inputs) -> dict[str, Any]:
    random = np.random.RandomState(params["seed"])
    gate, gamma = random.random_sample(), random.uniform(0.9, 1.1)
    brightness, channels = random.uniform(*params["brightness_range"]), random.uniform(0.9, 1.1, size=3)
    draw = ColourDraw(gamma, brightness, tuple(channels))  # stored as applied, whatever the gate says
    return {
        "y": ColorAug.apply_draw(inputs["x"], draw),
        "draws": torch.tensor([gate, gamma, brightness, *channels], dtype=torch.float64),
    }


def _tta_inverse(params: Params, inputs: Inputs) -> dict[str, Any]:
    return {"y": LeftRightFlipAug(params["flip"]).inverse(inputs["x"])}


def _colorize(params: Params, inputs: Inputs) -> dict[str, Any]:
    depth = visualization_utils.depth_tensor_to_colorized_pil(inputs["x"])
    image = visualization_utils.normalized_tensor_to_pil(inputs["img"])
    blended = visualization_utils.alpha_blend(image, depth, params["alpha"])
    pictures = {"depth": depth, "unnormalized": image, "blended": blended}
    return {name: torch.from_numpy(np.array(picture)) for name, picture in pictures.items()}


# --- Evaluation, training --------------------------------------------------------------------------------------------


class _Stored(nn.Module):
    """Returns the stored predictions one after the other, whatever the images.

    The manifest doesn't say so, but mirrored views are predicted half as deep again, so that averaging shows.
    """

    def __init__(self, predictions: list[Tensor]) -> None:
        super().__init__()
        self.predictions = predictions
        self.calls = count()

    def forward(self, images: Tensor) -> Tensor:
        prediction = self.predictions[next(self.calls)]
        return torch.cat([prediction, 1.5 * prediction.flip(-1)]) if len(images) == 2 else prediction


def _evaluate(params: Params, inputs: Inputs) -> dict[str, Any]:
    n_views = 2 if params["use_tta"] else 1
    predictions = [inputs[f"pred{k}"] for k in range(params["n_samples"])]
    loader = []
    for k, prediction in enumerate(predictions):
        image = torch.zeros(1, 3, *prediction.shape[-2:])
        loader.append(([image] * n_views, (torch.tensor([k]), [inputs[f"gt{k}"]] * n_views)))
    options: dict[str, Any] = {
        "device": "cpu",
        "metrics": params["order"],
        "eval_range": tuple(params["eval_range"]),
        "eval_mask_type": params["eval_mask_type"],
        "align_least_squares": params["align_least_squares"],
        "use_tta": params["use_tta"],
    }
    reduced = evaluate_depther_with_dataloader(_Stored(predictions), loader, **options)
    per_image = evaluate_depther_with_dataloader(_Stored(predictions), loader, **options, reduce_results=False)
    return {
        "reduced": torch.tensor([reduced[name] for name in params["order"]]),
        "per_image": torch.tensor([per_image[name] for name in params["order"]]),
    }


def _train_steps(params: Params, inputs: Inputs) -> dict[str, Any]:
    depther = _depther(params)
    optimizer = torch.optim.AdamW(
        depther.decoder.parameters(),
        lr=params["lr"],
        betas=tuple(params["betas"]),
        weight_decay=params["weight_decay"],
    )
    scheduler = build_scheduler(
        "WarmupOneCycleLR", optimizer, params["lr"], params["total_iter"], params["scheduler_kwargs"]
    )
    trainer = IterBasedTrainer(depther, optimizer, scheduler, losses.MultiLoss(params["losses"]))
    logs = [trainer.train_on_batch(inputs[f"x{k}"], inputs[f"gt{k}"]) for k in range(params["n_steps"])]
    weight = depther.decoder.state_dict()[params["weight"]]
    return {
        "losses": torch.stack([log["loss"] for log in logs]),
        "grad_norms": torch.stack([log["grad_norm"] for log in logs]),
        "lrs": torch.stack([log["lr"] for log in logs]),
        "weight_head": weight.flatten()[:32],
        "weight_norm": weight.double().norm(),
    }


_KINDS: dict[str, Callable[[Params, Inputs], dict[str, Any]]] = {
    "center_padding": _center_padding,
    "stretch": _stretch,
    "out_indices": _out_indices,
    "linear_head": _linear_head,
    "dpt_head": _dpt_head,
    "features_to_depth": _features_to_depth,
    "mixlog_bins": _mixlog_bins,
    "loss": _loss,
    "multi_loss": _multi_loss,
    "metrics": _metrics,
    "valid_mask": _valid_mask,
    "align_least_squares": _align,
    "scheduler": _scheduler,
    "nyu_crop": _nyu_crop,
    "eval_transform": _eval_transform,
    "train_transform": _train_transform,
    "color_aug": _color_aug,
    "colorize": _colorize,
    "tta_inverse": _tta_inverse,
    "depther": _run_depther,
    "encoder": _encoder,
    "evaluate": _evaluate,
    "train_steps": _train_steps,
}
