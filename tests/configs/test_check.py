import pytest

from dinov3.configs import DinoV3SetupArgs, get_cfg_from_args
from dinov3.configs.check import check_config

V2 = [
    f"schedules.{name}.{key}=0"
    for name in ("lr", "weight_decay", "momentum", "teacher_temp")
    for key in ("start", "peak", "end", "warmup_epochs")
] + ["schedules.lr.freeze_last_layer_epochs=0"]
TWO_SIZES = [
    "crops.global_crops_size=[224,256]",
    "crops.local_crops_size=[96,112]",
    "crops.global_local_crop_pairs_ratios=[0.5,0.5]",
]
GRAM = ["gram.use_loss=true", "gram.ckpt=x", "crops.gram_teacher_crops_size=224"]
DISTILLATION = ["distillation.enabled=true", "distillation.full_cfg_path=t.yaml", "distillation.checkpoint_path=ignore"]


def check(*opts: str, file: str = "") -> None:
    check_config(get_cfg_from_args(DinoV3SetupArgs(config_file=file, opts=list(opts)), strict=False))


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["crops.local_crops_number=0"], "crops.local_crops_number must be positive"),
        (["ibot.separate_head=false"], "ibot.separate_head must be true"),
        (["train.centering=centering"], "train.centering must be sinkhorn_knopp, got 'centering'"),
        (["compute_precision.sharding_strategy=NO_SHARD"], "must be SHARD_GRAD_OP"),
        (["compute_precision.param_dtype=float32"], "compute_precision.param_dtype must be one of fp32, fp16, bf16"),
        (["ibot.mask_ratio_min_max=[0.5,0.1]"], "0 <= min < max <= 1"),
        (["ibot.mask_ratio_min_max=[0.1]"], "0 <= min < max <= 1"),
        (["ibot.mask_sample_probability=1.5"], "ibot.mask_sample_probability must be in [0, 1]"),
        (["dino.koleo_topk=2"], "other values than 1 need dino.koleo_loss_distributed"),
        (["dino.koleo_loss_distributed=true", "dino.koleo_distributed_replicas=1"], "must be 0"),
        (
            ["dino.koleo_loss_distributed=true", "dino.koleo_distributed_loss_group_size=100"],
            "must be a multiple of train.batch_size_per_gpu 64",
        ),
        (["MODEL.META_ARCHITECTURE=Other"], "MultiDistillationMetaArch, FeatureDistillation, got 'Other'"),
        (["crops.global_crops_size=230"], "230 is not a multiple of the patch size 16: take 224 or 240"),
        (["crops.global_crops_size=8"], "8 is not a multiple of the patch size 16: take 16"),
        (["crops.global_crops_size=224", "crops.teacher_to_student_resolution_scale=1.3"], "patch size 20"),
        (["crops.gram_teacher_crops_size=100"], "gram_teacher_crops_size 100 is not a multiple"),
        (["crops.global_crops_size=[224,256]"], "must have the same length"),
        (["crops.global_local_crop_pairs_ratios=0.9"], "sum to 1, got [0.9] (sum 0.9)"),
        (["crops.global_crops_scale=[0.5,0.2]"], "0 < min <= max <= 1"),
        (["crops.rgb_std=[1,1]"], "one entry per channel (3)"),
        (["student.pos_embed_rope_base=null"], "give either student.pos_embed_rope_base or both"),
        (["student.pos_embed_rope_min_period=1"], "give either student.pos_embed_rope_base or both"),
        (["student.pos_embed_rope_dtype=float"], "student.pos_embed_rope_dtype must be one of"),
        (["student.drop_path_rate=1"], "student.drop_path_rate must be in [0, 1)"),
        (["optim.lr=null", "teacher.teacher_temp=null"], "optim.lr: null is allowed only with a section `schedules`"),
        (["optim.lr=null", "teacher.teacher_temp=null"], "teacher.teacher_temp: null is allowed only"),
        (["optim.epochs=5"], "optim.warmup_epochs 10 exceeds optim.epochs 5"),
        (["schedules.lr.start=0"], "schedules.lr lacks peak, end, warmup_epochs, freeze_last_layer_epochs"),
        (["schedules.lr.start=0"], "schedules.momentum is missing"),
        ([*V2, "schedules.lr.warmup_epochs=80", "schedules.lr.cosine_epochs=30"], "schedules.lr: warmup_epochs 80"),
        (
            ["dino.reweight_dino_local_loss=true", "dino.local_loss_weight_schedule.warmup_epochs=101"],
            "dino.local_loss_weight_schedule: warmup_epochs 101",
        ),
        ([*GRAM, "gram.loss_weight_schedule.start=0"], "gram.loss_weight_schedule lacks peak, end, warmup_epochs"),
        ([*GRAM, "gram.ckpt=ignore"], "gram.ckpt is `ignore`"),
        ([*GRAM, "gram.ckpt=null"], "gram.use_loss needs gram.ckpt=<file or folder>, or gram.it_load_ema_teacher >= 0"),
        ([*GRAM, "crops.gram_teacher_crops_size=null"], "gram.use_loss needs crops.gram_teacher_crops_size"),
        ([*GRAM, *TWO_SIZES, "crops.gram_teacher_crops_size=[224,null]"], "needs crops.gram_teacher_crops_size"),
        ([*GRAM, "gram.ema_teacher=true"], "gram.ema_teacher and gram.ckpt exclude each other"),
        ([*GRAM, "gram.ema_teacher=true"], "gram.ema_teacher needs gram.rep_update: false"),
        ([*GRAM, "gram.ema_teacher=true"], "gram.ema_teacher needs crops.gram_teacher_crops_size: null"),
        ([*GRAM, "gram.tokens_used=some"], "gram.tokens_used must be one of all, masked, unmasked"),
        ([*GRAM, "gram.tokens_used=masked", "gram.img_level=true"], "masked needs gram.img_level: false"),
        ([*GRAM, "gram.remove_neg=true", "gram.remove_only_teacher_neg=true"], "exclude each other"),
        (["distillation.enabled=true"], "needs distillation.full_cfg_path"),
        (["distillation.enabled=true"], "needs distillation.checkpoint_path"),
        (["multidistillation.enabled=true"], "multidistillation.enabled needs distillation.enabled"),
        ([*DISTILLATION, "multidistillation.enabled=true"], "global_batch_size must be a positive integer"),
        (["train.dataset_path=null"], "train.dataset_path is empty"),
        (["train.dataset_path=<DATA>"], "train.dataset_path is the placeholder <DATA>"),
        (["train.batch_size_per_gpu=0"], "train.batch_size_per_gpu must be positive"),
        (["checkpointing.max_to_keep=-1"], "checkpointing.max_to_keep must not be negative"),
        (["train.batch_size_per_gpu=many"], "train.batch_size_per_gpu must be an integer, got 'many'"),
        (["train.compile=1"], "train.compile must be true or false, got 1"),
        (["crops.global_crops_size=[a]"], "crops.global_crops_size must be an integer or a list"),
        (["dino=1"], "dino must be a section with keys of its own, got 1"),
        (["optim.epochs=null"], "optim.epochs must be an integer, got None"),
    ],
)
def test_contradictions_are_named(opts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match="the configuration can't be used") as error:
        check(*opts)
    assert message in str(error.value)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ValueError, match="can't be used") as error:
        check("crops.local_crops_number=0", "crops.global_crops_size=230", "train.dataset_path=null")
    assert len(str(error.value).splitlines()) == 4


@pytest.mark.parametrize(
    "opts",
    [
        [],
        V2,
        GRAM,
        ["gram.use_loss=true", "gram.it_load_ema_teacher=0", "crops.gram_teacher_crops_size=448"],
        ["gram.use_loss=true", "gram.ema_teacher=true", "gram.rep_update=false"],
        [*TWO_SIZES, "crops.gram_teacher_crops_size=[null,null]"],
        DISTILLATION,
        [
            "student.pos_embed_rope_base=null",
            "student.pos_embed_rope_min_period=1",
            "student.pos_embed_rope_max_period=9",
        ],
        ["optim.epochs=2", "optim.warmup_epochs=0.25"],
        ["evaluation.online_knn.train_dataset=X", "evaluation.online_knn.val_dataset=X"],
    ],
)
def test_what_fits_passes(opts: list[str]) -> None:
    check(*opts)


def test_settings_without_effect_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    check("train.checkpointing_full=true", "crops.local_crops_size=100", "train.cudagraphs=true", "train.compile=false")
    for part in ("train.checkpointing_full has no effect", "train.cudagraphs has no effect", "edge pixels are lost"):
        assert any(part in message for message in caplog.messages)
