"""Continued pretraining: from which files, with fresh heads, and which part learns when."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dinov3.checkpointer.export import export_backbone
from dinov3.checkpointer.weights import read_weights
from dinov3.models.vision_transformer import DinoVisionTransformer
from dinov3.train.optimizer import hold_still
from dinov3.train.warm_start import compare, describe, freeze_first_blocks, resolve
from tests.helpers import tiny_training
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_training import main, with_output

GRAM = ["gram.use_loss=true", "gram.rep_update=false", "crops.gram_teacher_crops_size=16"]
SHORT = ["optim.epochs=1", "optim.warmup_epochs=0", "optim.clip_grad=0"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*tiny_training.prepare(tmp_path_factory.mktemp("tiny")), "student.mask_k_bias=true"]


@pytest.fixture(scope="module")
def sources(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One backbone in every layout."""
    folder = tmp_path_factory.mktemp("sources")
    main(["--seed", "5", *with_output(arguments, folder / "run", "optim.epochs=1")])
    backbone = tiny_training.vit_tiny_test(4, n_storage_tokens=1, mask_k_bias=True, layerscale_init=1e-5)
    backbone.load_state_dict(read_weights(folder / "run" / "teacher_checkpoint.pth"))
    return {
        "teacher": folder / "run" / "teacher_checkpoint.pth",
        "training": folder / "run" / "ckpt" / "4",
        "backbone": export_backbone(backbone, folder / "backbone.pth"),
        "safetensors": export_backbone(backbone, folder / "backbone.safetensors"),
        "hf": export_backbone(backbone, folder / "hf", "hf"),
        "timm": export_backbone(backbone, folder / "timm.pth", "timm"),
    }


@pytest.mark.parametrize("kind", ["teacher", "training", "backbone", "safetensors", "hf", "timm"])
def test_every_layout_starts_student_ema_and_gram_teacher_with_fresh_heads(
    arguments: list[str], sources: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    start = [f"student.pretrained_weights={sources[kind]}", "gram.ckpt=${student.pretrained_weights}", *GRAM]
    main(with_output(arguments, tmp_path, *start, *SHORT, "optim.freeze_backbone_epochs=1"))
    expected = read_weights(sources["backbone"])
    if kind == "timm":  # a layout without mask token
        expected["mask_token"].zero_()
    for network in ("student", "model_ema", "gram_teacher"):
        found = read_weights(tmp_path / "ckpt" / "4", network=network)
        assert all(torch.allclose(found[key], expected[key], rtol=1e-6, atol=1e-8) for key in expected), network
    head = read_weights(tmp_path / "ckpt" / "4", part="dino_head", network="model_ema")
    assert not torch.allclose(
        head["last_layer.weight"], read_weights(sources["teacher"], part="dino_head")["last_layer.weight"], atol=1e-2
    )


def test_the_backbone_learns_after_the_heads_alone(
    arguments: list[str], sources: dict[str, Path], tmp_path: Path
) -> None:
    start = f"student.pretrained_weights={sources['backbone']}"
    main(with_output(arguments, tmp_path, start, *SHORT, "optim.freeze_backbone_epochs=0.8", "checkpointing.period=1"))
    before = read_weights(sources["backbone"])["blocks.1.attn.qkv.weight"]
    after = {name: read_weights(tmp_path / "ckpt" / name, network="student") for name in ("3", "4")}
    assert torch.equal(after["3"]["blocks.1.attn.qkv.weight"], before)
    assert not torch.equal(after["4"]["blocks.1.attn.qkv.weight"], before)
    heads = [read_weights(tmp_path / "ckpt" / name, part="dino_head", network="student") for name in ("3", "4")]
    assert not torch.equal(heads[0]["mlp.0.weight"], heads[1]["mlp.0.weight"])


def test_frozen_blocks_stay_and_the_training_resumes(
    arguments: list[str], sources: dict[str, Path], tmp_path: Path
) -> None:
    settings = [f"student.pretrained_weights={sources['backbone']}", *SHORT[1:], "student.frozen_blocks=1"]
    main(with_output(arguments, tmp_path, "optim.epochs=1", *settings))
    main(with_output(arguments, tmp_path, "optim.epochs=2", *settings))
    before, after = read_weights(sources["backbone"]), read_weights(tmp_path / "ckpt" / "9", network="student")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert not any(key.startswith(("blocks.0.", "patch_embed.")) or "token" in key for key in changed)
    assert {"blocks.1.attn.qkv.weight", "norm.weight"} <= changed


def train(arguments: list[str]) -> None:
    main(arguments)


def test_two_processes_start_from_a_file_freeze_blocks_and_resume(
    arguments: list[str], sources: dict[str, Path], tmp_path: Path
) -> None:
    settings = [f"student.pretrained_weights={sources['hf']}", *SHORT[1:], "student.frozen_blocks=1"]
    settings += ["optim.freeze_backbone_epochs=1", "train.batch_size_per_gpu=2"]
    for epochs in (1, 2):
        command = with_output(arguments, tmp_path / "out", *settings, f"optim.epochs={epochs}")
        run_distributed(train, 2, tmp_path, command, init_group=False)
        found = read_weights(tmp_path / "out" / "ckpt" / str(5 * epochs - 1), network="student")
        expected = read_weights(sources["backbone"])
        changed = {
            key.split(".")[0] + "." + key.split(".")[1] for key in expected if not found[key].equal(expected[key])
        }
        assert changed == (set() if epochs == 1 else {"blocks.1", "norm.weight", "norm.bias"})


def test_one_student_is_distilled_from_a_teacher_with_heads(
    arguments: list[str], sources: dict[str, Path], tmp_path: Path
) -> None:
    settings = ["distillation.enabled=true", f"distillation.full_cfg_path={sources['teacher'].parent / 'config.yaml'}"]
    settings += ["student.arch=vit_tiny_wide_test", *SHORT]
    source = f"distillation.checkpoint_path={sources['training']}"
    main(with_output(arguments, tmp_path, *settings, source))
    assert read_weights(tmp_path / "teacher_checkpoint.pth")["cls_token"].shape[-1] == 24
    assert read_weights(tmp_path / "ckpt" / "4", network="teacher")["cls_token"].shape[-1] == 16
    with pytest.raises(ValueError, match=r"missing: dino_head.*without heads; MODEL.META_ARCHITECTURE=FeatureDistill"):
        main(with_output(arguments, tmp_path / "2", *settings, f"distillation.checkpoint_path={sources['hf']}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["student.pretrained_weights={backbone}", "student.arch=vit_tiny_wide_test"],
            r"student.pretrained_weights=.*: \d+ tensors match; \d+ missing: .*of another shape.*width=16, blocks=2",
        ),
        (
            ["student.pretrained_weights={backbone}", "student.n_storage_tokens=4", "student.mask_k_bias=false"],
            r"tensors match; 2 unexpected: .*its backbone has student.n_storage_tokens=1, student.mask_k_bias=true",
        ),
        (
            ["student.pretrained_weights={training}", "student.n_storage_tokens=0"],
            r"tensors match; 1 unexpected: backbone.storage_tokens; its backbone has student.n_storage_tokens=1",
        ),
        (
            ["student.resume_from_teacher_chkpt={hf}"],
            r"student.resume_from_teacher_chkpt=.*missing: dino_head.*without heads; student.pretrained_weights starts",
        ),
        (["gram.ckpt={backbone}", "student.patch_size=8", *GRAM], r"gram.ckpt=.*student.patch_size=4"),
    ],
)
def test_other_networks_are_refused_with_counts_and_the_settings_that_fit(
    arguments: list[str], sources: dict[str, Path], tmp_path: Path, overrides: list[str], message: str
) -> None:
    paths = {name: str(path) for name, path in sources.items()}
    with pytest.raises(ValueError, match=message):
        main(with_output(arguments, tmp_path, *(override.format(**paths) for override in overrides)))


def test_names_of_the_hub_stand_for_metas_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(resolve("dinov3_vits16")).endswith("/dinov3_vits16_pretrain_lvd1689m-08c60483.pth")
    assert resolve("weights.pth") == "weights.pth"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dinov3_vits16").mkdir()  # a folder of that name comes first
    assert resolve("dinov3_vits16") == "dinov3_vits16"


def test_only_blocks_that_exist_can_be_frozen() -> None:
    backbone = tiny_training.vit_tiny_test()
    freeze_first_blocks(backbone, 0)
    assert all(param.requires_grad for param in backbone.parameters())
    freeze_first_blocks(backbone, 2)
    assert {name for name, param in backbone.named_parameters() if param.requires_grad} == {"norm.weight", "norm.bias"}
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=f"frozen_blocks is {wrong}, the backbone has 2"):
            freeze_first_blocks(backbone, wrong)
    with pytest.raises(ValueError, match="has 0 blocks"):
        freeze_first_blocks(nn.Linear(2, 2), 1)


def test_groups_held_still_are_those_of_the_parameters() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([{"params": first.parameters()}, {"params": second.parameters()}], lr=0.1)
    hold_still(optimizer, second.parameters())
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_a_state_dict_tells_the_settings_of_its_backbone() -> None:
    backbone = DinoVisionTransformer(
        embed_dim=64,
        depth=3,
        num_heads=1,
        patch_size=8,
        n_storage_tokens=2,
        ffn_layer="swiglu",
        mask_k_bias=True,
        untie_global_and_local_cls_norm=True,
        device="meta",
    )
    found = describe(backbone.state_dict())
    assert (found["width"], found["blocks"], found["student.patch_size"]) == (64, 3, 8)
    assert (found["student.n_storage_tokens"], found["student.ffn_layer"]) == (2, "swiglu")
    assert found["student.mask_k_bias"] == found["student.untie_global_and_local_cls_norm"] == "true"
    assert found["student.untie_cls_and_patch_norms"] == "false"
    assert describe({"conv1.weight": torch.zeros(1)}) == {}


def test_comparing_counts_without_loading() -> None:
    report = compare(nn.Linear(2, 3), {"weight": torch.zeros(3, 5), "scale": torch.zeros(1)})
    assert (report.matched, report.missing, report.unexpected) == (0, ("bias",), ("scale",))
    assert report.misshapen == {"weight": ((3, 5), (3, 2))}
