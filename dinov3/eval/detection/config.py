"""Configuration of the detector: every choice that decides on its weights or its numbers.

Configuration of trainings and evaluations is in `recipe.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any


class PositionEncoding(Enum):
    """Position encodings of the feature map."""

    LEARNED = "learned"
    SINE = "sine"
    SINE_UNNORM = "sine_unnorm"


_CHOICES = {
    "norm_type": ("pre_norm", "post_norm"),
    "decoder_type": ("global_rpe_decomp", "global_ape"),
    "decoder_rpe_type": ("linear", "abs_log8"),
}


@dataclass(kw_only=True)
class DetectionHeadConfig:
    """The detection head; the names are those of the released configurations.

    Raises:
        ValueError: values, or combinations of them, that no detector can be built from.
    """

    num_classes: int = 91
    """Logits per query. Class 0 is trained as "any object" on the proposals."""
    hidden_dim: int = 256
    """Width d of all tokens of the head; a multiple of 32 (groups of the first norm) and of `nheads`."""
    nheads: int = 8
    dim_feedforward: int = 2048
    dropout: float = 0.0
    """Of the decoder."""
    encoder_dropout: float = 0.1
    norm_type: str = "pre_norm"
    """Of the decoder; the encoder is post-norm."""
    dec_layers: int = 6
    add_transformer_encoder: bool = True
    num_encoder_layers: int = 6

    num_queries_one2one: int = 300
    num_queries_one2many: int = 1500
    k_one2many: int = 6
    """How often each object is a target of the one-to-many branch."""
    lambda_one2many: float = 1.0
    """Weight of that branch's losses."""
    with_box_refine: bool = True
    two_stage: bool = True
    mixed_selection: bool = True
    look_forward_twice: bool = True
    aux_loss: bool = True
    """Outputs of every decoder layer, not only of the last."""
    reparam: bool = True
    """Boxes in pixels of the padded input; otherwise relative to each image's own size."""
    topk: int = 100
    """Detections per image."""

    position_embedding: PositionEncoding = PositionEncoding.SINE
    proposal_feature_levels: int = 4
    proposal_in_stride: int | None = None
    """Pixels per cell of the feature map. None: the backbone's."""
    proposal_tgt_strides: Sequence[int] | None = None
    """Pixels per cell of each level of proposals, `proposal_in_stride` times powers of two. None: from half the
    stride on."""
    proposal_min_size: int = 50
    """Side of the proposals of the finest level [pixels]; doubled from level to level."""
    decoder_type: str = "global_rpe_decomp"
    decoder_rpe_hidden_dim: int = 512
    decoder_rpe_type: str = "linear"
    decoder_use_checkpoint: bool = False
    """Compute decoder layers again in the backward pass instead of keeping their activations."""

    layers_to_use: int | Sequence[int] | None = None
    """Blocks of the backbone, or how many of the last. None: four at even intervals."""
    n_windows_sqrt: int = 0
    """Windows per side; 0: none."""
    backbone_use_layernorm: bool = False

    num_feature_levels: int = 1
    """Only 1: the detector is a plain one. Kept so that released configurations can be read."""
    blocks_to_train: Sequence[str] | None = None
    """Only None: the backbone is frozen. Kept so that released configurations can be read."""

    def __post_init__(self) -> None:
        self.position_embedding = PositionEncoding(self.position_embedding)
        self._check_choices()
        self._check_numbers()
        self._check_combinations()

    @property
    def num_queries(self) -> int:
        """Of both branches."""
        return self.num_queries_one2one + self.num_queries_one2many

    def _check_choices(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")

    def _check_numbers(self) -> None:
        at_least_one = ("num_classes", "nheads", "dim_feedforward", "dec_layers", "num_queries_one2one", "topk")
        for name in (*at_least_one, "proposal_feature_levels", "proposal_min_size", "decoder_rpe_hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_queries_one2many", "n_windows_sqrt", "k_one2many"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.hidden_dim % 32 or self.hidden_dim % self.nheads:
            raise ValueError(
                f"hidden_dim must be a multiple of 32 and of nheads={self.nheads}, got hidden_dim={self.hidden_dim}"
            )
        strides, stride = self.proposal_tgt_strides, self.proposal_in_stride
        if strides is None or self.proposal_feature_levels == 1:
            return
        if len(strides) != self.proposal_feature_levels:
            raise ValueError(
                f"proposal_tgt_strides needs a stride for each of {self.proposal_feature_levels} levels, got {strides}"
            )
        if stride is not None:
            for target in strides:
                log2_ratio(target, stride)

    def _check_combinations(self) -> None:
        if self.two_stage and not self.with_box_refine:
            raise ValueError("two_stage=True needs with_box_refine=True: proposals are boxes to be refined")
        if not self.two_stage and (self.reparam or self.decoder_type != "global_ape"):
            raise ValueError(
                "two_stage=False starts from points, not boxes, and so needs reparam=False and "
                f"decoder_type='global_ape'; got reparam={self.reparam}, decoder_type={self.decoder_type!r}"
            )
        if self.num_feature_levels != 1:
            raise ValueError(f"num_feature_levels must be 1 (a plain detector), got {self.num_feature_levels}")
        if self.blocks_to_train is not None:
            raise ValueError(f"blocks_to_train must be None (the backbone is frozen), got {self.blocks_to_train!r}")


def log2_ratio(target_stride: int, in_stride: int) -> int:
    """r with target_stride = in_stride * 2^r.

    Raises:
        ValueError: there is none.
    """
    larger, smaller = max(target_stride, in_stride), min(target_stride, in_stride)
    ratio, rest = divmod(larger, smaller) if smaller > 0 else (0, 0)
    if rest or ratio < 1 or ratio & (ratio - 1):
        raise ValueError(
            f"proposal_tgt_strides must be proposal_in_stride={in_stride} times powers of two, got {target_stride}"
        )
    steps = ratio.bit_length() - 1
    return steps if target_stride > in_stride else -steps


def strides_of(config: DetectionHeadConfig) -> tuple[int, list[int]]:
    """Pixels per cell of the feature map and of each level of proposals.

    Raises:
        ValueError: `proposal_in_stride` was not set (`build_model` takes it from the backbone).
    """
    stride = config.proposal_in_stride
    if stride is None:
        raise ValueError("proposal_in_stride is not set: give the pixels per cell of the feature map")
    if config.proposal_feature_levels == 1:
        return stride, [stride]
    if config.proposal_tgt_strides is not None:
        return stride, list(config.proposal_tgt_strides)
    return stride, [int(stride * 2.0 ** (level - 1)) for level in range(config.proposal_feature_levels)]


def config_values(config: DetectionHeadConfig) -> dict[str, Any]:
    """The configuration as plain values: `DetectionHeadConfig(**config_values(config)) == config`."""
    values = dict(vars(config))
    values["position_embedding"] = config.position_embedding.value
    for name in ("proposal_tgt_strides", "layers_to_use"):
        if isinstance(values[name], Sequence):
            values[name] = list(values[name])
    return values
