"""Reading weights in every container, and loading them strictly."""

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from dinov3.checkpointer.export import export_backbone
from dinov3.checkpointer.weights import load_weights, read_state_dict, read_weights
from tests.helpers.backbones import assert_states_equal, tiny_convnext, tiny_vit


def training_state(backbone: nn.Module, head: float = 0.0, network: str = "") -> dict[str, Tensor]:
    """Backbone and heads as a training holds them."""
    prefix = f"{network}." if network else ""
    state = {f"{prefix}backbone.{key}": value for key, value in backbone.state_dict().items()}
    return state | {f"{prefix}dino_head.mlp.0.weight": torch.full((2, 3), head)}


def save_dcp(content: dict[str, Any], folder: Path) -> Path:
    with warnings.catch_warnings():
        # torch warns that one process suffices, and (torch 2.7) of its own use of typed storages.
        warnings.filterwarnings("ignore", message=".*save in a single process|TypedStorage is deprecated")
        dcp.save(content, checkpoint_id=folder)
    return folder


# --- Containers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_vit, tiny_convnext])
@pytest.mark.parametrize("legacy", [False, True])
def test_released_backbone_file(tmp_path: Path, make: Any, legacy: bool) -> None:
    model = make()
    torch.save(model.state_dict(), tmp_path / "any name", _use_new_zipfile_serialization=not legacy)
    assert_states_equal(read_weights(tmp_path / "any name"), model.state_dict())


def test_teacher_checkpoint(tmp_path: Path) -> None:
    model = tiny_vit()
    torch.save({"teacher": training_state(model, 7.0)}, tmp_path / "teacher_checkpoint.pth")
    path = str(tmp_path / "teacher_checkpoint.pth")
    assert_states_equal(read_weights(path), model.state_dict())
    assert_states_equal(read_weights(path, part="dino_head"), {"mlp.0.weight": torch.full((2, 3), 7.0)})
    assert_states_equal(read_weights(path, part="all"), training_state(model, 7.0))
    assert_states_equal(read_weights(path, network="teacher"), model.state_dict())


def test_all_parts_of_a_bare_backbone_are_named_as_in_training(tmp_path: Path) -> None:
    model = tiny_vit()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    state = read_weights(tmp_path / "a.pth", part="all")
    assert_states_equal(state, {f"backbone.{key}": value for key, value in model.state_dict().items()})


def test_names_of_wrappers_are_removed(tmp_path: Path) -> None:
    model = tiny_vit()
    state = {
        f"module.backbone.{key.replace('blocks.0.', 'blocks.0._checkpoint_wrapped_module._orig_mod.')}": value
        for key, value in model.state_dict().items()
    }
    torch.save({"model": state}, tmp_path / "a.pth")
    assert_states_equal(read_weights(tmp_path / "a.pth"), model.state_dict())


@pytest.mark.parametrize("format", ["hf", "timm", "meta"])
@pytest.mark.parametrize("make", [tiny_vit, tiny_convnext])
def test_other_layouts_fit_without_further_help(tmp_path: Path, format: str, make: Any) -> None:
    model, fresh = make(), make()
    fresh.init_weights()
    path = export_backbone(model, tmp_path / ("folder" if format == "hf" else "file.safetensors"), format)
    load_weights(fresh, read_weights(path))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(fresh.eval()(x), model(x))


def test_hugging_face_folder_of_an_unusual_model(tmp_path: Path) -> None:
    model = tiny_vit(num_heads=4, pos_embed_rope_base=10.0)
    export_backbone(model, tmp_path / "hf", "hf")
    for source in (tmp_path / "hf", tmp_path / "hf" / "model.safetensors"):
        assert_states_equal(
            {"periods": read_weights(source)["rope_embed.periods"]}, {"periods": model.rope_embed.periods}
        )


def test_sharded_hugging_face_folder(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny_vit()
    folder = export_backbone(model, tmp_path / "hf", "hf")
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    index = {}
    for shard, keys in enumerate((names[::2], names[1::2])):
        save_file({key: state[key] for key in keys}, folder / f"model-{shard}.safetensors")
        index |= dict.fromkeys(keys, f"model-{shard}.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {index}}}'.replace("'", '"'))
    load_weights(tiny_vit(), read_weights(folder))
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-1\.safetensors"):
        read_weights(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {"a": "../elsewhere.safetensors"}}', "{}"])
def test_a_bad_index_of_shards_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="not a valid index of shards"):
        read_weights(tmp_path)


# --- Folders of torch.distributed.checkpoint -------------------------------------------------------------------------


def test_exported_teacher_folder(tmp_path: Path) -> None:
    model = tiny_vit()
    folder = save_dcp({"model": training_state(model, 2.0), "iteration": "training_9"}, tmp_path / "export")
    assert_states_equal(read_weights(folder), model.state_dict())
    assert_states_equal(read_weights(folder, part="all"), training_state(model, 2.0))


def test_training_checkpoint_gives_the_moving_average(tmp_path: Path) -> None:
    student, teacher = tiny_vit(), tiny_vit()
    teacher.cls_token.data.add_(1)
    content = {
        "model": training_state(student, 1.0, "student") | training_state(teacher, 2.0, "model_ema"),
        "optimizer": {"state": {"x": torch.zeros(3)}},
        "iteration": 9,
    }
    content["model"]["dino_loss.center"] = torch.zeros(1, 4)
    folder = save_dcp(content, tmp_path / "9")
    assert_states_equal(read_weights(folder), teacher.state_dict())
    assert_states_equal(read_weights(folder, network="student"), student.state_dict())
    assert read_weights(folder, part="dino_head")["mlp.0.weight"].eq(2).all()
    with pytest.raises(ValueError, match=r"no network 'gram_teacher'; it has model_ema, student"):
        read_weights(folder, network="gram_teacher")


def test_moving_average_stored_once_under_the_name_teacher(tmp_path: Path) -> None:
    model = tiny_vit()
    folder = save_dcp({"model": training_state(model, network="teacher")}, tmp_path / "9")
    assert_states_equal(read_weights(folder), model.state_dict())


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize(
    "index",
    [
        None,  # Evil
        b"cpathlib\nos.mkdir\n.",
        b"ctorch.distributed.checkpoint.filesystem\nos\n.",
        b"ctorch.distributed.checkpoint.filesystem\n_generate_uuid\n.",
        b"ctorch\nload\n.",
        b"cbuiltins\neval\n.",
    ],
)
def test_code_in_the_index_of_a_checkpoint_is_not_run(tmp_path: Path, index: bytes | None) -> None:
    folder = save_dcp({"model": training_state(tiny_vit())}, tmp_path / "9")
    (folder / ".metadata").write_bytes(index or pickle.dumps(Evil(tmp_path / "proof")))
    with pytest.raises(ValueError, match="has no place in the index of a checkpoint"):
        read_weights(folder)
    assert not (tmp_path / "proof").exists()


def test_an_index_that_is_none_is_named(tmp_path: Path) -> None:
    folder = save_dcp({"model": training_state(tiny_vit())}, tmp_path / "9")
    whole = (folder / ".metadata").read_bytes()
    for index in (b"", whole[:200], pickle.dumps({"a": 1})):
        (folder / ".metadata").write_bytes(index)
        with pytest.raises(ValueError, match="not the index of a checkpoint"):
            read_weights(folder)


# --- Bad files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_not_run(tmp_path: Path, legacy: bool) -> None:
    content = {"teacher": {"backbone.a": torch.zeros(1)}, "extra": Evil(tmp_path / "proof")}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="could run code"):
        read_weights(tmp_path / "a.pth")
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("form", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("rest", [0.001, 0.5, 0.999])
def test_a_truncated_file_is_named_so(tmp_path: Path, form: str, rest: float) -> None:
    path = export_backbone(tiny_vit(), tmp_path / form)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * rest)])
    with pytest.raises(ValueError, match="is cut off"):
        read_weights(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "it is empty"),
        (b"\n<!DOCTYPE html><html>Log in</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"hello weights", "begins with b'hello weights'"),
        (b"\x80\x02 nothing", "damaged"),
        (b"PK\x03\x04" + bytes(100), "cut off"),
        ((2**62).to_bytes(8, "little") + b"{", "begins with"),
        ((4).to_bytes(8, "little") + b"{;;}", "no valid safetensors header"),
        ((40).to_bytes(8, "little") + b'{"a":{"dtype":"F99","shape":[1]}}       ', "not valid in a safetensors"),
    ],
)
def test_what_is_no_weight_file_is_told(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match=what):
        read_weights(tmp_path / "weights.pth")


def test_safetensors_whose_shapes_and_sizes_disagree_are_refused(tmp_path: Path) -> None:
    path = export_backbone({"a": torch.zeros(4), "b": torch.zeros(4)}, tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes().replace(b'"shape":[4]', b'"shape":[3]'))
    with pytest.raises(ValueError, match="does not fit its shape"):
        read_weights(path)


def test_safetensors_reader_equals_the_library(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    dtypes += [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int16, torch.int32]
    state = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes}
    state |= {"empty": torch.zeros(1, 0, 3), "scalar": torch.tensor(3.0)}
    save_file(state, tmp_path / "a.safetensors")
    got = read_weights(tmp_path / "a.safetensors")
    assert {key: value.dtype for key, value in got.items()} == {key: value.dtype for key, value in state.items()}
    assert_states_equal(*({key: value.double() for key, value in each.items()} for each in (got, state)))


def test_changing_what_was_read_leaves_the_file_alone(tmp_path: Path) -> None:
    for name in ("a.pth", "a.safetensors"):
        path = export_backbone({"a": torch.zeros(4)}, tmp_path / name)
        read_weights(path)["a"].add_(1)
        assert read_weights(path)["a"].eq(0).all()


def test_checkpoints_without_weights_tell_what_they_hold(tmp_path: Path) -> None:
    torch.save({"optimizer": {"lr": 1.0}, "epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="'optimizer', 'epoch' are not tensors"):
        read_weights(tmp_path / "a.pth")
    torch.save([torch.zeros(1)], tmp_path / "a.pth")
    with pytest.raises(ValueError, match="holds list, expected tensors by name"):
        read_weights(tmp_path / "a.pth")
    torch.save({"teacher": training_state(tiny_vit())}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="no 'ibot_head'; its parts are: backbone, dino_head"):
        read_weights(tmp_path / "a.pth", part="ibot_head")
    with pytest.raises(ValueError, match="no network 'student'; it has teacher"):
        read_weights(tmp_path / "a.pth", network="student")
    with pytest.raises(ValueError, match="unknown network 'ema'; expected one of model_ema"):
        read_weights(tmp_path / "a.pth", network="ema")


def test_folders_without_weights_tell_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    with pytest.raises(ValueError, match=r"it holds ckpt\. Expected a weight file"):
        read_weights(tmp_path)


def test_heads_are_read_by_their_own_names(tmp_path: Path) -> None:
    head = nn.Linear(3, 2)
    torch.save({"model": head.state_dict()}, tmp_path / "head.pth")
    load_weights(nn.Linear(3, 2), read_state_dict(tmp_path / "head.pth"))


# --- Strict loading --------------------------------------------------------------------------------------------------


def two_layers() -> nn.Module:
    return nn.ModuleDict({"first": nn.Linear(3, 2), "second": nn.Linear(2, 2)})


def test_loading_copies_everything_and_counts_it() -> None:
    source, target = two_layers(), two_layers()
    report = load_weights(target, source.state_dict())
    assert (report.matched, report.missing, report.unexpected, report.misshapen) == (4, (), (), {})
    assert_states_equal(target.state_dict(), source.state_dict())
    source["first"].weight.data.add_(1)
    assert not target["first"].weight.equal(source["first"].weight)


def test_what_does_not_fit_is_named_and_nothing_is_loaded() -> None:
    source, target = two_layers(), two_layers()
    state = source.state_dict()
    del state["second.bias"]
    state |= {"third.bias": torch.zeros(2), "first.weight": torch.zeros(2, 4)}
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load_weights(target, state)
    for fact in (
        "2 tensors match",
        "1 missing: second.bias",
        "1 unexpected: third.bias",
        "first.weight [2, 4] (the model has [2, 3])",
    ):
        assert fact in str(error.value)
    assert_states_equal(target.state_dict(), before)


@pytest.mark.parametrize("allowed", ["second", "second.", "second.*", "*.bias", "second.bias"])
def test_named_keys_may_be_missing_or_left_over(allowed: str) -> None:
    source, target = two_layers(), two_layers()
    state = source.state_dict()
    kept = target["second"].bias.clone()
    del state["second.bias"]
    report = load_weights(target, state, allow_missing=[allowed])
    assert report.missing == ("second.bias",)
    assert target["second"].bias.equal(kept)
    assert target["first"].weight.equal(source["first"].weight)

    partial = nn.ModuleDict({"first": nn.Linear(3, 2)})
    assert load_weights(partial, source.state_dict(), allow_unexpected=["second"]).unexpected == (
        "second.weight",
        "second.bias",
    )


def test_names_are_matched_at_dots_only() -> None:
    state = two_layers().state_dict()
    del state["second.bias"]
    with pytest.raises(ValueError, match=r"missing: second\.bias"):
        load_weights(two_layers(), state, allow_missing=["sec", "second.b"])


def test_no_match_at_all_is_an_error_whatever_is_allowed() -> None:
    with pytest.raises(ValueError, match="0 tensors match"):
        load_weights(two_layers(), {"a": torch.zeros(1)}, allow_missing=["*"], allow_unexpected=["*"])


def test_shapes_are_never_negotiable() -> None:
    state = two_layers().state_dict() | {"first.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="another shape"):
        load_weights(two_layers(), state, allow_missing=["*"], allow_unexpected=["*"])


def test_misuse_is_explained() -> None:
    with pytest.raises(TypeError, match="expected a list"):
        load_weights(two_layers(), two_layers().state_dict(), allow_missing="second")
    with pytest.raises(ValueError, match="to_empty"):
        load_weights(two_layers().to("meta"), two_layers().state_dict())


def test_long_reports_are_cut() -> None:
    with pytest.raises(ValueError, match=r"… and \d+ more"):
        load_weights(two_layers(), tiny_vit().state_dict())
