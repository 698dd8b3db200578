"""Golden cases of the area `detection`: boxes, modules, whole detectors, criterion, COCO figures."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dinov3.eval.detection.config import DetectionHeadConfig, PositionEncoding
from dinov3.eval.detection.loss import LossWeights, SetCriterion
from dinov3.eval.detection.matcher import Costs, cost_matrix, match, regression_distances
from dinov3.eval.detection.metrics import coco_figures, records_of
from dinov3.eval.detection.models.backbone import build_backbone
from dinov3.eval.detection.models.decoder import Frame
from dinov3.eval.detection.models.detr import MLP, PostProcess, build_model
from dinov3.eval.detection.models.global_ape_decoder import GlobalCrossAttention as ApeAttention
from dinov3.eval.detection.models.global_ape_decoder import build_global_ape_decoder
from dinov3.eval.detection.models.global_rpe_decomp_decoder import GlobalCrossAttention as RpeAttention
from dinov3.eval.detection.models.global_rpe_decomp_decoder import build_global_rpe_decomp_decoder
from dinov3.eval.detection.models.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine
from dinov3.eval.detection.models.transformer import build_transformer
from dinov3.eval.detection.models.transformer_encoder import TransformerEncoder, TransformerEncoderLayer
from dinov3.eval.detection.models.utils import LayerNorm2D
from dinov3.eval.detection.util.box_ops import (
    bbox2delta,
    box_cxcywh_to_xyxy,
    box_xyxy_to_cxcywh,
    delta2bbox,
    pairwise_bbox2delta,
)
from dinov3.eval.detection.util.misc import NestedTensor, inverse_sigmoid, nested_tensor_from_tensor_list
from dinov3.hub.detectors import DetectorWithProcessor
from dinov3.models.vision_transformer import DinoVisionTransformer
from tests.golden import fill
from tests.golden.cases import Case, Expected

Params = Mapping[str, Any]
Inputs = dict[str, Any]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def cases(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> list[Case]:
    """All cases of the manifest."""
    return [_case(entry, tensors) for entry in manifest["cases"]]


def _case(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Case:
    expected: dict[str, Expected] = {}
    stored_keys = set()
    for output, rule in entry["outputs"].items():
        key = f"{entry['name']}/{output}"
        bound = {"atol": rule["atol"], "rtol": rule["rtol"]}
        if rule["stored"] == "full":
            expected[output] = Expected(tensors[key], **bound, transform=_plain)
            stored_keys.add(key)
            continue
        for part, summary in SUMMARIES.items():
            expected[f"{output}.{part}"] = Expected(tensors[f"{key}.{part}"], **bound, transform=summary)
            stored_keys.add(f"{key}.{part}")
    return Case("detection", entry["name"], partial(_run, entry), expected, stored_keys=frozenset(stored_keys))


def _run(entry: Mapping[str, Any], _: Path) -> dict[str, Any]:
    inputs = {name: _input(rule) for name, rule in entry["inputs"].items()}
    with torch.no_grad():
        results = RUNNERS[entry["kind"]](entry["params"], inputs)
    for output, rule in entry["outputs"].items():
        if rule["stored"] == "summary" and output in results:
            assert list(results[output].shape) == rule["shape"], f"{output}: {tuple(results[output].shape)}"
            results |= {f"{output}.{part}": results[output] for part in SUMMARIES}
    return results


def _plain(value: Tensor) -> Tensor:
    return torch.as_tensor(value).detach()


def _stats(value: Tensor) -> Tensor:
    values = value.detach().double().flatten()
    return torch.stack([values.mean(), values.std(), values.norm(), values.min(), values.max()])


SUMMARIES: dict[str, Callable[[Tensor], Tensor]] = {
    "head": lambda value: value.detach().flatten()[:64],
    "strided": lambda value: value.detach().flatten()[:: max(1, value.numel() // 256)][:256],
    "stats": _stats,
}


# Inputs, by the manifest's conventions.


def _input(rule: Mapping[str, Any]) -> Tensor:
    shape = tuple(rule["shape"])
    value = fill.tensor(rule["fill"], shape, rule["scale"], rule["offset"])
    for name, *arguments in rule["ops"]:
        value = OPERATIONS[name](value, *arguments)
    return value


def _boxes(x: Tensor, width: float, height: float) -> Tensor:
    s = x.sigmoid()
    sides = [s[..., 0] * width, s[..., 1] * height]
    sides += [4 + s[..., 2] * (width / 2 - 4), 4 + s[..., 3] * (height / 2 - 4)]
    return torch.stack(sides, dim=-1)


def _pad_mask(x: Tensor, *sizes: list[int]) -> Tensor:
    mask = torch.ones(x.shape, dtype=torch.bool)
    for row, (height, width) in zip(mask, sizes, strict=True):
        row[:height, :width] = False
    return mask


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "abs": torch.abs,
    "clamp": torch.clamp,
    "sigmoid": torch.sigmoid,
    "boxes": _boxes,
    "pad_mask": _pad_mask,
}


def _filled(module: ModuleT, scale_entries: Mapping[str, float] | None = None) -> ModuleT:
    fill.fill(module)
    for key, factor in (scale_entries or {}).items():
        for name, parameter in module.named_parameters():
            if key in name:
                parameter.mul_(factor)
    return module.eval()


def _config(values: Mapping[str, Any]) -> DetectionHeadConfig:
    position = PositionEncoding(values.get("position_embedding", "sine"))
    return DetectionHeadConfig(**{**values, "position_embedding": position})


def _vit(values: Mapping[str, Any]) -> DinoVisionTransformer:
    model = DinoVisionTransformer(**values)
    model.init_weights()  # position periods: `fill` keeps them
    return model


def _images(inputs: Inputs) -> list[Tensor]:
    return [inputs[f"x{i}"] for i in range(len(inputs)) if f"x{i}" in inputs]


# One runner for each kind.


def box_convert(_: Params, inputs: Inputs) -> Inputs:
    return {"xyxy": box_cxcywh_to_xyxy(inputs["x"]), "cxcywh": box_xyxy_to_cxcywh(inputs["x"])}


def run_delta2bbox(p: Params, inputs: Inputs) -> Inputs:
    shape = p["max_shape"]
    if shape is not None:  # heights, widths
        height, width = (torch.tensor(sides)[:, None] for sides in shape)
        shape = (height, width)
    return {"y": delta2bbox(inputs["proposals"], inputs["deltas"], shape, **p["kwargs"])}


def run_bbox2delta(p: Params, inputs: Inputs) -> Inputs:
    same = len(inputs["proposals"]) == len(inputs["gt"])
    function = bbox2delta if same else pairwise_bbox2delta
    return {"y": function(inputs["proposals"], inputs["gt"], **p["kwargs"])}


def nested_tensor(_: Params, inputs: Inputs) -> Inputs:
    return nested_tensor_from_tensor_list(_images(inputs))._asdict()


def position_encoding(p: Params, inputs: Inputs) -> Inputs:
    n, mask = p["num_pos_feats"], inputs["mask"]
    learned = p["type"] == "learned"
    module = PositionEmbeddingLearned(n) if learned else PositionEmbeddingSine(n, normalize=p["type"] == "sine")
    return {"y": _filled(module)(NestedTensor(torch.zeros(len(mask), 1, *mask.shape[1:]), mask))}


def layer_norm_2d(p: Params, inputs: Inputs) -> Inputs:
    return {"y": _filled(LayerNorm2D(p["channels"]))(inputs["x"])}


def mlp(p: Params, inputs: Inputs) -> Inputs:
    return {"y": _filled(MLP(**p["kwargs"]))(inputs["x"])}


def transformer_encoder(p: Params, inputs: Inputs) -> Inputs:
    layer = TransformerEncoderLayer(**p["layer"])
    norm = nn.LayerNorm(p["layer"]["d_model"]) if p["layer"]["normalize_before"] else None
    encoder = _filled(TransformerEncoder(layer, p["num_layers"], norm=norm))
    padding = inputs["mask"].flatten(1)
    tokens = encoder(inputs["src"], pos=inputs["pos"], src_key_padding_mask=padding)
    return {"y": tokens.masked_fill(padding[..., None], 0.0)}  # tokens of padding are stored as zero


def cross_attention(kind: Callable[..., nn.Module], p: Params, inputs: Inputs) -> Inputs:
    attention: Any = _filled(kind(**p["kwargs"]), p.get("scale_entries"))
    mask = inputs["mask"]
    boxes = inputs["ref"][:, :, None] if "ref" in inputs else None
    shape = tuple(mask.shape[1:])
    return {"y": attention(inputs["query"], boxes, inputs["key"], inputs["value"], shape, mask.flatten(1))}


def decoder(p: Params, inputs: Inputs) -> Inputs:
    config, mask, n = _config(p["config"]), inputs["mask"], inputs["tgt"].shape[1]
    build = build_global_ape_decoder if p["type"] == "ape" else build_global_rpe_decomp_decoder
    module = build(config)
    width = config.hidden_dim
    # The box heads are the detector's; the case fills them under names of the decoder.
    module.bbox_embed = nn.ModuleList(MLP(width, width, 4, 3) for _ in range(config.dec_layers))
    _filled(module, p["scale_entries"])
    rows, columns = (~mask[:, :, 0]).sum(1), (~mask[:, 0]).sum(1)
    stride = config.proposal_in_stride
    frame = Frame((rows * stride, columns * stride) if config.reparam else None)
    ratios = torch.stack([columns / mask.shape[2], rows / mask.shape[1]], dim=-1)
    first = torch.arange(n) < p["n1"]
    output = module(
        inputs["tgt"],
        inputs["ref"],
        inputs["src"],
        inputs["src_pos"],
        tuple(mask.shape[1:]),
        mask.flatten(1),
        inputs["query_pos"],
        bbox_embed=module.bbox_embed,
        frame=frame,
        valid_ratios=ratios,
        self_attn_mask=first[:, None] != first,
    )
    return {"hs": output.states, "refs": torch.stack(output.references[1:])}


def proposals(p: Params, inputs: Inputs) -> Inputs:
    transformer = _filled(build_transformer(_config(p["config"])))
    mask = inputs["mask"]
    memory, boxes, max_shape = transformer.gen_encoder_output_proposals(
        inputs["memory"], mask.flatten(1), [tuple(mask.shape[1:])]
    )
    results = {
        "memory": memory,
        "proposals": boxes.nan_to_num(posinf=1e30),
        "ratio": transformer.get_valid_ratio(mask),
        "pos": transformer.get_proposal_pos_embed(inputs["boxes"]),
    }
    return results if max_shape is None else results | {"max_shape": torch.stack(max_shape)}


def backbone(p: Params, inputs: Inputs) -> Inputs:
    module = _filled(build_backbone(_vit(p["vit"]), _config(p["config"])))
    output = module(nested_tensor_from_tensor_list(_images(inputs)))
    return output._asdict() | {"num_channels": torch.tensor(module.num_channels)}


def _detector(p: Params) -> nn.Module:
    return _filled(build_model(_vit(p["vit"]), _config(p["config"])), p["scale_entries"])


def detector(p: Params, inputs: Inputs) -> Inputs:
    outputs = _detector(p)(_images(inputs))
    results = {key: value for key, value in outputs.items() if isinstance(value, Tensor)}
    for key, prefix in (("aux_outputs", "aux"), ("aux_outputs_one2many", "aux_o2m")):
        for level, values in enumerate(outputs.get(key, ())):
            results |= {f"{prefix}{level}_{name}": value for name, value in values.items()}
    return results | {f"enc_{name}": value for name, value in outputs["enc_outputs"].items()}


def _per_image(detections: list[dict[str, Tensor]]) -> Inputs:
    return {f"{name}{k}": value for k, one in enumerate(detections) for name, value in one.items()}


def detector_with_processor(p: Params, inputs: Inputs) -> Inputs:
    config = _config(p["config"])
    module: Any = _detector(p)
    module.num_queries = module.transformer.two_stage_num_proposals = config.num_queries_one2one
    whole = DetectorWithProcessor(module, PostProcess(config.topk, config.reparam))
    return _per_image(whole(_images(inputs)))


def postprocess(p: Params, inputs: Inputs) -> Inputs:
    original = p["original_target_sizes"]
    outputs = {"pred_logits": inputs["logits"], "pred_boxes": inputs["boxes"]}
    sizes, original = torch.tensor(p["target_sizes"]), None if original is None else torch.tensor(original)
    return _per_image(PostProcess(p["topk"], p["reparam"])(outputs, sizes, original))


def _targets(p: Params, inputs: Inputs) -> list[dict[str, Tensor]]:
    labels = [torch.tensor(values) for values in p["labels"]]
    return [{"labels": values, "boxes": inputs[f"gt{k}"]} for k, values in enumerate(labels)]


def _costs(p: Params) -> Costs:
    return Costs(p["cost"]["class"], p["cost"]["bbox"], p["cost"]["giou"])


def _level(inputs: Inputs, prefix: str) -> Inputs:
    return {key.removeprefix(prefix): value for key, value in inputs.items() if key.startswith(f"{prefix}pred_")}


def matcher(p: Params, inputs: Inputs) -> Inputs:
    outputs, targets, costs = _level(inputs, ""), _targets(p, inputs), _costs(p)
    labels, boxes = targets[0]["labels"], targets[0]["boxes"]
    l1 = regression_distances(outputs, 0, boxes)
    cost = cost_matrix(outputs["pred_logits"][0], outputs["pred_boxes"][0], l1, labels, boxes, costs)
    rows, columns = match(outputs, targets, costs)[0]
    return {"cost": cost, "rows": rows, "cols": columns}


def criterion(p: Params, inputs: Inputs) -> Inputs:
    outputs: dict[str, Any] = _level(inputs, "")
    outputs |= {f"{key}_one2many": value for key, value in _level(inputs, "o2m_").items()}
    outputs["aux_outputs"] = [_level(inputs, f"aux{level}_") for level in range(p["aux"])]
    outputs["aux_outputs_one2many"] = [_level(inputs, f"auxo2m{level}_") for level in range(p["aux"])]
    if proposals := _level(inputs, "enc_"):
        outputs["enc_outputs"] = proposals
    weights = LossWeights(**p["weights"], cls_loss=p["cls_loss"])
    losses_of = SetCriterion(_costs(p), weights, p["k_one2many"], p["lambda_one2many"])
    losses = losses_of(outputs, _targets(p, inputs))
    assert sorted(losses) == sorted(p["names"])
    return {"values": torch.stack([losses[name] for name in p["names"]]), "total": losses_of.total(losses)}


def coco_eval(p: Params, _: Inputs) -> Inputs:
    ids = {category["id"]: category["id"] for category in p["dataset"]["categories"]}
    records = []
    for image_id, found in p["results"].items():
        detections = {key: torch.tensor(value, dtype=torch.float64) for key, value in found.items()}
        records += records_of(int(image_id), detections, ids)
    return {"stats": torch.tensor(list(coco_figures(p["dataset"], records).values()), dtype=torch.float64)}


RUNNERS: dict[str, Callable[[Params, Inputs], Inputs]] = {
    "box_convert": box_convert,
    "delta2bbox": run_delta2bbox,
    "bbox2delta": run_bbox2delta,
    "inverse_sigmoid": lambda p, inputs: {"y": inverse_sigmoid(inputs["x"])},
    "nested_tensor": nested_tensor,
    "position_encoding": position_encoding,
    "layer_norm_2d": layer_norm_2d,
    "mlp": mlp,
    "transformer_encoder": transformer_encoder,
    "rpe_cross_attention": partial(cross_attention, RpeAttention),
    "ape_cross_attention": partial(cross_attention, ApeAttention),
    "decoder": decoder,
    "proposals": proposals,
    "backbone": backbone,
    "detector": detector,
    "detector_with_processor": detector_with_processor,
    "postprocess": postprocess,
    "matcher": matcher,
    "criterion": criterion,
    "coco_eval": coco_eval,
}
