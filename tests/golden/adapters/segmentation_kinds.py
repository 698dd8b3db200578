"""How each kind of segmentation case is run: a function of the case's description and its inputs, by target."""

import random
from collections.abc import Callable, Mapping
from functools import partial
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dinov3.eval.segmentation import inference, loss, metrics
from dinov3.eval.segmentation import models as segmentation_models
from dinov3.eval.segmentation.models import BackboneLayersSet, FeatureDecoder, build_segmentation_decoder
from dinov3.eval.segmentation.models.backbone.dinov3_adapter import DINOv3_Adapter
from dinov3.eval.segmentation.schedulers import build_scheduler
from dinov3.models.vision_transformer import DinoVisionTransformer
from tests.golden import fill

Entry = Mapping[str, Any]
Inputs = Mapping[str, Tensor]
Results = dict[str, Any]


def deform_core(entry: Entry, inputs: Inputs) -> Results:
    weights = inputs["attn"].flatten(-2).softmax(-1).view_as(inputs["attn"])
    value, loc, attn = (x.clone().requires_grad_() for x in (inputs["value"], inputs["loc"], weights))
    out = resolve_name(entry["target"])(value, torch.tensor(entry["kwargs"]["shapes"]), loc, attn)
    grads = torch.autograd.grad((out * inputs["cotangent"]).sum(), (value, loc, attn))
    return {"out": out, **dict(zip(("grad_value", "grad_loc", "grad_attn"), grads, strict=True))}


def deform_module(entry: Entry, inputs: Inputs) -> Results:
    module = _module(entry, filled=False)
    results: Results = {"initial.sampling_offsets.bias": module.sampling_offsets.bias.detach().clone()}
    fill.fill(module)
    shapes = torch.tensor(entry["shapes"])
    areas = shapes.prod(1)
    mask = None
    if "padding_mask" in entry.get("values", {}):
        mask = (torch.arange(inputs["feat"].shape[1]) % 3 == 0).expand(inputs["feat"].shape[:2])
    arguments = (inputs["query"], inputs["ref"].sigmoid(), inputs["feat"], shapes, areas.cumsum(0) - areas, mask)
    return results | {"out": module(*arguments)}


def adapter(entry: Entry, inputs: Inputs) -> Results:
    module = DINOv3_Adapter(_backbone(entry), **entry["kwargs"])
    fill.fill(module).eval()
    results: Results = dict(module(inputs["x"]))
    for name, value in zip(("c1", "c2", "c3", "c4"), module.spm(inputs["x"]), strict=True):
        results[f"spm.{name}"] = value
    return results | {"values.state_dict_keys": _keys(module)}


def pixel_decoder(entry: Entry, inputs: Inputs) -> Results:
    module = _module(entry)
    mask_features, first, maps = module.forward_features({name[1:]: value for name, value in inputs.items()})
    assert first is maps[0] or torch.equal(first, maps[0])
    levels = {f"level{i}": level for i, level in enumerate(maps)}
    return {"mask_features": mask_features, **levels, "values.state_dict_keys": _keys(module)}


def predictor(entry: Entry, inputs: Inputs) -> Results:
    module = _module(entry)
    maps = [inputs[name] for name in sorted(inputs) if name != "mask_features"]
    out = module(maps, inputs["mask_features"])
    results: Results = {"values.state_dict_keys": _keys(module), "values.n_aux_outputs": len(out["aux_outputs"])}
    for i, aux in enumerate(out["aux_outputs"]):
        results |= {f"aux{i}.{name}": value for name, value in aux.items()}
    return results | {name: out[name] for name in ("pred_logits", "pred_masks")}


def m2f_head(entry: Entry, inputs: Inputs) -> Results:
    features = {name[1:]: value for name, value in inputs.items()}
    out: Results = _module(entry).predict(features, rescale_to=entry["rescale_to"])
    return out


def decoder(entry: Entry, inputs: Inputs) -> Results:
    module = _decoder(entry)
    keys = list(module.state_dict())
    head = sorted(key for key in keys if "backbone" not in key and "feature_model" not in key)
    results: Results = {
        "values.head_keys": head,
        "values.n_head_keys": len(head),
        "values.n_state_dict_keys": len(keys),
    }
    x, rescale_to = inputs["x"], entry["rescale_to"]
    if entry["decoder_type"] == "linear":
        return results | {"forward": module(x), "predict": module.predict(x, rescale_to)}
    predicted = module.predict(x, rescale_to)
    semantic = inference.semantic_map(predicted, "m2f")
    return results | module(x) | {"predict.pred_masks": predicted["pred_masks"], "semantic": semantic}


def position_sine(entry: Entry, inputs: Inputs) -> Results:
    module = resolve_name(entry["target"])(**entry["kwargs"])
    return {"out": module(torch.zeros(entry["x_shape"]), inputs.get("mask"))}


def linear_head(entry: Entry, inputs: Inputs) -> Results:
    module = _module(entry)
    names = sorted(name for name in inputs if name.startswith("f"))
    leaves = {name: inputs[name].clone().requires_grad_(entry["train"]) for name in names}
    features: list[Any] = list(leaves.values())
    if entry["kwargs"].get("use_cls_token"):
        features = [(leaves[name], inputs[f"cls{name[1:]}"]) for name in names]
    results: Results = {"forward": module(features), "values.state_dict_keys": _keys(module)}
    if not entry["train"]:
        return results | {"predict": module.predict(features, entry["rescale_to"])}
    (results["forward"] * inputs["cotangent"]).sum().backward()
    tensors = dict(module.named_parameters()) | leaves
    results |= {f"grad.{name}": tensor.grad for name, tensor in tensors.items()}
    return results | {f"after.{name}": value for name, value in module.state_dict().items()}


def backbone_out_indices(entry: Entry, inputs: Inputs) -> Results:
    class Blocks(nn.Module):
        def __init__(self, n_blocks: int) -> None:
            super().__init__()
            self.n_blocks = n_blocks

    def indices(n_blocks: str, name: str) -> list[int]:
        return segmentation_models._get_backbone_out_indices(Blocks(int(n_blocks)), BackboneLayersSet[name])

    table = entry["values"]["table"]
    return {"values.table": {n: {name: indices(n, name) for name in row} for n, row in table.items()}}


def make_inference(entry: Entry, inputs: Inputs) -> Results:
    kwargs, stub = dict(entry["kwargs"]), _stub(entry, inputs)
    activation = partial(torch.softmax, dim=1) if entry["output_activation"] else None
    results: Results = {
        "out": inference.make_inference(inputs["x"], stub, **kwargs, output_activation=activation)  # type: ignore[arg-type]
    }
    if kwargs["inference_mode"] == "slide":
        names = ("decoder_head_type", "n_output_channels", "crop_size", "stride")
        results["slide"] = inference.slide_inference(inputs["x"], stub, *(kwargs[name] for name in names), 1)
    return results


def evaluate(entry: Entry, inputs: Inputs) -> Results:
    from dinov3.eval.segmentation.eval import evaluate_segmentation_model

    batches = []
    for i, sample in enumerate(entry["values"]["samples"]):
        base = _resize(inputs[f"s{i}.base"], sample["gt"])
        views = [_resize(base, size) for size in sample["views"]]
        if sample.get("flip"):
            views += [view.flip([-1]) for view in views]
        batches.append((views, (torch.tensor([i]), inputs[f"s{i}.gt"][None, None])))
    options = entry["kwargs"]
    got = evaluate_segmentation_model(
        _stub(entry, inputs),
        batches,
        torch.device("cpu"),
        options["crop"],
        options["stride"],
        options["decoder_head_type"],
        options["num_classes"],
        torch.float32,
    )
    return {"values.metrics": dict(got)}


def intersect_and_union(entry: Entry, inputs: Inputs) -> Results:
    n = len(inputs) // 2
    areas = [
        metrics.calculate_intersect_and_union(inputs[f"pred{i}"], inputs[f"label{i}"], **entry["kwargs"])
        for i in range(n)
    ]
    got = metrics.calculate_segmentation_metrics(
        torch.stack(areas), metrics=["mIoU", "dice", "fscore"], beta=entry["beta"]
    )
    return {f"areas{i}": area for i, area in enumerate(areas)} | {"values.metrics": got}


def nonzero_labels(entry: Entry, inputs: Inputs) -> Results:
    label = inputs["label"]
    reduce = metrics.preprocess_nonzero_labels
    return {"uint8": reduce(label.to(torch.uint8)), "int64": reduce(label.to(torch.int64))}


def pixel_loss(entry: Entry, inputs: Inputs) -> Results:
    criterion = getattr(loss, entry["target"].rsplit(".", 1)[-1])(**entry["kwargs"])
    pred = inputs["pred"].clone().requires_grad_()
    value = criterion(pred, inputs["label"])
    value.backward()
    return {"loss": value, "grad": pred.grad}


def scheduler(entry: Entry, inputs: Inputs) -> Results:
    kwargs = entry["kwargs"]
    parameter = nn.Parameter(torch.zeros(1))
    optimizer: torch.optim.Optimizer
    if entry["optimizer"] == "SGD":
        optimizer = torch.optim.SGD([parameter], lr=kwargs["lr"], momentum=0.9)
    else:
        optimizer = torch.optim.AdamW([parameter], lr=kwargs["lr"])
    made = build_scheduler(optimizer=optimizer, **kwargs)
    group = optimizer.param_groups[0]
    rows = []
    for step in range(kwargs["total_iter"]):
        if step:
            optimizer.step()
            made.step()
        rows.append([group["lr"], group["betas"][0] if "betas" in group else group["momentum"]])
    lr, momentum = torch.tensor(rows, dtype=torch.float64).T
    return {"lr": lr, "momentum": momentum}


def transform(entry: Entry, inputs: Inputs) -> Results:
    make = resolve_name(entry["target"])
    kwargs = {key: tuple(value) if key == "crop_size" else value for key, value in entry["kwargs"].items()}
    if entry["numpy_seed"] is not None:
        np.random.seed(entry["numpy_seed"])
        random.seed(entry["numpy_seed"])
        torch.manual_seed(entry["numpy_seed"])
    image = Image.fromarray(inputs["image"].permute(1, 2, 0).numpy())
    views, label = make(**kwargs)(image, Image.fromarray(inputs["label"].numpy()))
    results: Results = {"label": label, "values.label_dtype": str(label.dtype)}
    if isinstance(views, Tensor):
        return results | {"image": views}
    results |= {f"image{i}": view for i, view in enumerate(views)}
    return results | {"values.n_images": len(views)}


def train(entry: Entry, inputs: Inputs) -> Results:
    from dinov3.eval.segmentation.train import train_step

    module = _decoder(entry)
    module.segmentation_model[1].train()
    options, schedule = entry["optimizer"], entry["scheduler"]
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), **options | {"betas": tuple(options["betas"])})
    made = build_scheduler(
        schedule["type"], optimizer, options["lr"], schedule["total_iter"], schedule["constructor_kwargs"]
    )
    losses, rates = [], []
    criterion = loss.MultiSegmentationLoss(diceloss_weight=0.0, celoss_weight=1.0)
    for step in range(len(inputs) // 2):
        batch = (inputs[f"x{step}"], (torch.arange(len(inputs[f"x{step}"])), inputs[f"gt{step}"]))
        clip = entry["gradient_clip"]
        rates.append(optimizer.param_groups[0]["lr"])  # that this step uses
        value = train_step(module, batch, torch.device("cpu"), None, optimizer, clip, made, criterion, None, step)
        losses.append(torch.as_tensor(value).detach())
    results: Results = {"loss": torch.stack(losses), "lr": torch.tensor(rates, dtype=torch.float64)}
    results |= {f"after.{name}": value for name, value in module.segmentation_model[1].state_dict().items()}
    return results | {"values.trainable": list(trainable)}


def norm(entry: Entry, inputs: Inputs) -> Results:
    return {"out": _module(entry)(inputs["x"])}


class LinearStub:
    """Resized y, with y[b, c] = sum over k of weight[c, k] x[b, k], times 1 + mean(x)."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def predict(self, x: Tensor, rescale_to: Any) -> Any:
        return _resize(torch.einsum("ck,bkhw->bchw", self.weight, x) * (1 + x.mean()), rescale_to)


class MaskStub(LinearStub):
    """The same as masks, with fixed class logits."""

    def __init__(self, weight: Tensor, logits: Tensor) -> None:
        super().__init__(weight)
        self.logits = logits

    def predict(self, x: Tensor, rescale_to: Any) -> Any:
        return {"pred_masks": super().predict(x, rescale_to), "pred_logits": self.logits}


def _stub(entry: Entry, inputs: Inputs) -> LinearStub:
    if entry["stub"] == "MaskStub":
        return MaskStub(inputs["weight"], inputs["logits"])
    return LinearStub(inputs["weight"])


def _resize(x: Tensor, size: Any) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _module(entry: Entry, filled: bool = True) -> Any:
    module = resolve_name(entry["target"])(**entry["kwargs"])
    if filled:
        fill.fill(module)
    return module.train(entry.get("train", False))


def _backbone(entry: Entry) -> DinoVisionTransformer:
    backbone = DinoVisionTransformer(**entry["backbone"])
    backbone.init_weights()
    return backbone


def _decoder(entry: Entry) -> FeatureDecoder:
    module = build_segmentation_decoder(
        _backbone(entry), BackboneLayersSet[entry["backbone_out_layers"]], entry["decoder_type"], **entry["kwargs"]
    )
    fill.fill(module).eval()
    return module


def _keys(module: nn.Module) -> list[str]:
    return sorted(key for key in module.state_dict() if not key.startswith("backbone."))


KINDS: dict[str, Callable[[Entry, Inputs], Results]] = {
    "ms_deform_attn_core_pytorch": deform_core,
    "MSDeformAttn": deform_module,
    "DINOv3_Adapter": adapter,
    "MSDeformAttnPixelDecoder": pixel_decoder,
    "MultiScaleMaskedTransformerDecoder": predictor,
    "Mask2FormerHead": m2f_head,
    "build_segmentation_decoder": decoder,
    "PositionEmbeddingSine": position_sine,
    "LinearHead": linear_head,
    "_get_backbone_out_indices": backbone_out_indices,
    "make_inference": make_inference,
    "evaluate_segmentation_model": evaluate,
    "calculate_intersect_and_union": intersect_and_union,
    "preprocess_nonzero_labels": nonzero_labels,
    "CrossEntropyLoss": pixel_loss,
    "DiceLoss": pixel_loss,
    "MultilabelDiceLoss": pixel_loss,
    "MultiSegmentationLoss": pixel_loss,
    "build_scheduler": scheduler,
    "make_segmentation_eval_transforms": transform,
    "make_segmentation_train_transforms": transform,
    "train_step": train,
    "get_norm": norm,
}
