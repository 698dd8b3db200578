"""Golden cases of dino.txt: towers, model, tokenizer, losses and training."""

import gzip
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.eval.text.clip_loss import memory_efficient_clip_loss
from dinov3.eval.text.gram_loss import gram_loss_fn
from dinov3.eval.text.text_tower import build_text_model
from dinov3.eval.text.text_transformer import TextTransformer
from dinov3.eval.text.tokenizer import Tokenizer, get_tokenizer, installed_vocabulary
from dinov3.eval.text.train_dinotxt import Step, build_optimizer, exclude, learning_rates
from dinov3.eval.text.vision_tower import build_vision_model
from tests.golden import fill
from tests.golden.adapters.text_cases import dinotxt, make_case, text_backbone, vision_backbone
from tests.golden.cases import Case
from tests.helpers.distributed import run_distributed

Entry = Mapping[str, Any]
Inputs = Mapping[str, Tensor]
Results = dict[str, Any]


def cases(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> list[Case]:
    """All cases of the manifest."""
    return [_case(name, entry, tensors) for name, entry in manifest["cases"].items()]


def _case(name: str, entry: Entry, tensors: dict[str, Tensor]) -> Case:
    run = next(function for prefix, function in _RUNNERS.items() if name.rstrip("0123456789") in (prefix, f"{prefix}_"))
    skip = None
    if name == "tokenizer" and installed_vocabulary() is None:
        skip = "the vocabulary bpe_simple_vocab_16e6.txt.gz is not here: pip install open_clip_torch"
    return make_case("text", name, entry, tensors, run, ignored_values=("texts",), skip=skip)


def text_transformer(entry: Entry, inputs: Inputs, _: Path) -> Results:
    model = fill.fill(TextTransformer(**entry["kwargs"])).eval()
    return {"out": model(inputs["tokens"]), "state_dict_keys": sorted(model.state_dict())}


def text_tower(entry: Entry, inputs: Inputs, _: Path) -> Results:
    model = fill.fill(build_text_model(backbone=text_backbone(entry["backbone"]), **entry["kwargs"])).eval()
    return {"features": model(inputs["tokens"]), "head_keys": _keys(model.state_dict(), "head.")}


def vision_tower(entry: Entry, inputs: Inputs, _: Path) -> Results:
    model = build_vision_model(backbone=vision_backbone(entry["backbone"]), **entry["kwargs"])
    fill.fill(model).eval()
    features, patch_tokens, backbone_patch_tokens = model(inputs["images"])
    found = model.get_backbone_features(inputs["images"])
    class_token, head_patches, same_patches = model.get_class_and_patch_tokens(inputs["images"])
    assert torch.equal(head_patches, patch_tokens)
    assert torch.equal(same_patches, found.patch_tokens)
    return {
        "features": features,
        "patch_tokens": patch_tokens,
        "backbone_patch_tokens": backbone_patch_tokens,
        "backbone.class": found.class_token,
        "backbone.patch": found.patch_tokens,
        "backbone.register": found.register_tokens,
        "head.class_token": class_token,
        "head_keys": _keys(model.state_dict(), "head."),
    }


def dinotxt_model(entry: Entry, inputs: Inputs, _: Path) -> Results:
    model = dinotxt(entry)
    images, tokens = inputs["images"], inputs["tokens"]
    image_features, text_features, scale, patch_tokens, backbone_patch_tokens = model(images, tokens)
    image_logits, text_logits = model.get_logits(images, tokens)
    state = model.state_dict()
    results = {
        "image_features": image_features,
        "text_features": text_features,
        "logit_scale_exp": scale,
        "patch_tokens": patch_tokens,
        "backbone_patch_tokens": backbone_patch_tokens,
        "image_logits": image_logits,
        "text_logits": text_logits,
        "encode_image": model.encode_image(images),
        "encode_text": model.encode_text(tokens),
        "state_dict_keys_without_backbones": [key for key in sorted(state) if ".backbone." not in key],
    }
    model.init_weights()
    return results | {"logit_scale_after_init": model.logit_scale.item()}


def clip_loss(entry: Entry, inputs: Inputs, folder: Path) -> Results:
    image, text = (F.normalize(inputs[name], dim=-1) for name in ("image", "text"))
    n, world = entry["n"], entry["world_size"]
    parts = list(zip(image.split(n), text.split(n), strict=True))
    if world == 1:
        ranks = [_clip_loss_of_rank(parts, entry["logit_scale"], 0)]
    else:
        ranks = run_distributed(_clip_loss_of_rank, world, folder, parts, entry["logit_scale"], None)
    return {key: torch.cat([rank[key] for rank in ranks]) for key in ranks[0]}


def _clip_loss_of_rank(parts: list[tuple[Tensor, Tensor]], scale: float, rank: int | None) -> dict[str, Tensor]:
    image, text = parts[torch.distributed.get_rank() if rank is None else rank]
    image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
    logit_scale = torch.tensor(scale, requires_grad=True)
    loss = memory_efficient_clip_loss(image, text, logit_scale, group=None)
    loss.backward()
    assert image.grad is not None
    assert text.grad is not None
    assert logit_scale.grad is not None
    return {
        "loss": loss.detach().reshape(1),
        "grad_logit_scale": logit_scale.grad.reshape(1),
        "grad_image": image.grad,
        "grad_text": text.grad,
    }


def gram_loss(entry: Entry, inputs: Inputs, _: Path) -> Results:
    if entry["torch_seed"] is not None:
        torch.manual_seed(entry["torch_seed"])
    patch_tokens = inputs["patch_tokens"].clone().requires_grad_()
    loss = gram_loss_fn(inputs["backbone_patch_tokens"], patch_tokens, **entry["kwargs"])
    loss.backward()
    return {"loss": loss, "grad": patch_tokens.grad}


def tokenizer(entry: Entry, _: Inputs, __: Path) -> Results:
    found = get_tokenizer(installed_vocabulary())
    texts = entry["values"]["texts"]
    return _tokenized(found, texts) | {
        "tokenize": found.tokenize(texts),
        "tokenize_short": found.tokenize(texts, context_length=8),
    }


def tokenizer_tiny(entry: Entry, _: Inputs, folder: Path) -> Results:
    path = folder / "tiny.txt.gz"
    path.write_bytes(gzip.compress("\n".join(["#version: tiny", *entry["merges"]]).encode()))
    found, texts = get_tokenizer(str(path)), entry["values"]["texts"]
    context_length = entry["outputs"]["tokenize"]["shape"][1]
    return _tokenized(found, texts) | {"tokenize": found.tokenize(texts, context_length)}


def _tokenized(tokenizer: Tokenizer, texts: list[str]) -> Results:
    encoded = [tokenizer.encode(text) for text in texts]
    return {
        "encoded": encoded,
        "decoded": [tokenizer.decode(tokens) for tokens in encoded],
        "vocab_size": tokenizer.vocab_size,
        "start_end": [tokenizer.start_token, tokenizer.end_token],
    }


def train_dinotxt(entry: Entry, inputs: Inputs, _: Path) -> Results:
    model = dinotxt(entry)
    with torch.no_grad():
        model.logit_scale.fill_(entry["logit_scale_start"])
    options = entry["optimizer"]
    rates = learning_rates(options["lr"], options["warmup"], options["total"])
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    step = Step(
        model,
        build_optimizer(
            model, weight_decay=options["weight_decay"], betas=(options["beta1"], options["beta2"]), eps=options["eps"]
        ),
        gram_loss_weight=entry["gram_loss_weight"],
    )
    logged: dict[str, list[Tensor]] = {"contrastive_loss": [], "gram_loss": [], "logit_scale": []}
    for number in count():
        if f"images{number}" not in inputs:
            break
        metrics = step(inputs[f"images{number}"], inputs[f"tokens{number}"], float(rates[number]))
        for name, values in logged.items():
            values.append(metrics[name].reshape(()))
    after = {f"after.{name}": value for name, value in model.state_dict().items()}
    return after | {
        "contrastive_loss": torch.stack(logged["contrastive_loss"]),
        "gram_loss": torch.stack(logged["gram_loss"]),
        "logit_scale_after": torch.stack(logged["logit_scale"]).log(),
        "lr_schedule": torch.from_numpy(rates),
        "no_weight_decay": [name for name, p in trained if exclude(name, p)],
        "weight_decay": [name for name, p in trained if not exclude(name, p)],
    }


def _keys(state: Mapping[str, Tensor], prefix: str) -> list[str]:
    return sorted(key for key in state if key.startswith(prefix))


_RUNNERS = {
    "text_transformer": text_transformer,
    "text_tower": text_tower,
    "vision_tower": vision_tower,
    "dinotxt": dinotxt_model,
    "clip_loss": clip_loss,
    "gram_loss": gram_loss,
    "tokenizer": tokenizer,
    "tokenizer_tiny": tokenizer_tiny,
    "train_dinotxt": train_dinotxt,
}
