"""The whole detector: what is trained, small images, padding, unusual settings, and settings that are refused."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3.eval.detection.config import DetectionHeadConfig, PositionEncoding, config_values, log2_ratio
from dinov3.eval.detection.models.detr import PostProcess, build_model
from dinov3.eval.detection.models.position_encoding import PositionEmbeddingLearned
from dinov3.eval.detection.util.misc import NestedTensor
from tests.eval.detection.tiny import tiny_backbone, tiny_config, tiny_detector
from tests.golden.fill import fill
from tests.helpers.backbones import tiny_convnext


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    items = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for item in items for tensor in _tensors(item)]


def test_the_head_is_trained_and_the_backbone_is_not() -> None:
    detector = tiny_detector(backbone_use_layernorm=True).train()
    assert not detector.backbone.extractor.backbone.training
    outputs = detector([torch.randn(3, 64, 80)])
    sum(value.float().square().sum() for value in _tensors(outputs)).backward()
    for name, parameter in detector.named_parameters():
        frozen = name.startswith("backbone.0.backbone.")
        assert parameter.requires_grad is not frozen
        assert (parameter.grad is None) is frozen, name


def test_state_dict_names_the_heads_once() -> None:
    names = list(tiny_detector().state_dict())
    assert not [name for name in names if name.startswith(("transformer.decoder.class", "transformer.decoder.bbox"))]
    assert sum(name.startswith("class_embed.") for name in names) == 2 * 3


def test_heads_start_equal_with_a_small_probability_and_without_moving_boxes() -> None:
    detector = tiny_detector()
    images = [torch.randn(3, 64, 64)]
    outputs = detector.eval()(images)
    assert all(torch.equal(head.weight, detector.class_embed[0].weight) for head in detector.class_embed)
    assert detector.class_embed[0].bias.tolist() == pytest.approx([-math.log(99)] * 5)
    torch.testing.assert_close(outputs["pred_boxes"], outputs["pred_boxes_old"])
    assert set(detector.transformer.level_embed.shape) == {1, 32}
    linear = detector.transformer.decoder.layers[0].linear1
    assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.15)
    assert float(linear.bias.detach().abs().max()) == 0


def test_images_with_fewer_proposals_than_queries_get_fewer_queries() -> None:
    detector = tiny_detector(num_queries_one2one=60, num_queries_one2many=40).train()
    outputs = detector([torch.randn(3, 32, 48)])  # 24 + 6 + 1 proposals
    assert outputs["pred_logits"].shape == (1, 31, 5)
    assert outputs["pred_logits_one2many"].shape == (1, 0, 5)
    (found,) = PostProcess(topk=1000, reparam=True)(outputs, torch.tensor([[32, 48]]))
    assert found["scores"].shape == (31 * 5,)


@pytest.mark.parametrize(
    "options", [{}, {"reparam": False}, {"decoder_type": "global_ape"}, {"norm_type": "post_norm"}]
)
def test_one_image_is_detected_alike_with_room_around_it(options: dict[str, Any]) -> None:
    detector = fill(tiny_detector(**options)).eval()
    image = torch.randn(3, 64, 64)
    canvas = torch.zeros(1, 3, 64, 96)
    mask = torch.ones(1, 64, 96, dtype=torch.bool)
    canvas[0, :, :, :64], mask[:, :, :64] = image, False
    with torch.no_grad():
        alone, padded = (
            detector.backbone(NestedTensor(image[None], mask[:, :, :64])),
            detector.backbone(NestedTensor(canvas, mask)),
        )
    # Positions and masks of the image's part are equal; features aren't, since the backbone sees the canvas.
    assert torch.equal(alone.mask, padded.mask[:, :, :4])
    torch.testing.assert_close(alone.pos, padded.pos[..., :4])
    with torch.no_grad():
        outputs = detector(NestedTensor(canvas, mask))
    valid = outputs["pred_boxes"]
    assert bool(valid.isfinite().all())


def test_numbers_do_not_depend_on_what_is_in_the_padding_of_the_feature_map() -> None:
    detector = fill(tiny_detector()).eval()
    mask = torch.zeros(1, 4, 8, dtype=torch.bool)
    mask[:, :, 4:] = True  # half of the coarsest level's cells
    features, pos = torch.randn(1, 32, 4, 8), torch.randn(1, 32, 4, 8)
    from dinov3.eval.detection.models.transformer import Heads

    heads = Heads(detector.class_embed, detector.bbox_embed)
    results = []
    with torch.no_grad():
        for noise in (0.0, 3.0):
            changed = features + noise * mask[:, None] * torch.randn(1, 32, 4, 8)
            output = detector.transformer(changed, mask, pos, detector.query_embed.weight, heads)  # type: ignore[union-attr]
            results.append(output.decoder.states)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_a_size_that_is_no_multiple_of_the_patch_is_padded_not_cut() -> None:
    detector = fill(tiny_detector()).eval()
    image = torch.randn(3, 60, 70)
    mask = torch.zeros(1, 60, 70, dtype=torch.bool)
    with torch.no_grad():
        a, b = detector([image]), detector(NestedTensor(image[None], mask))
        seen = detector.backbone(NestedTensor(image[None], mask))
    assert seen.mask.shape == (1, 4, 5)
    assert not seen.mask.any()  # the last row and column hold pixels of the image
    torch.testing.assert_close(a["pred_boxes"], b["pred_boxes"])


def test_learned_positions_reach_beyond_their_table() -> None:
    encode = PositionEmbeddingLearned(4)
    for n in (50, 51, 120):
        mask = torch.zeros(1, 2, n, dtype=torch.bool)
        encoded = encode(NestedTensor(torch.zeros(1, 1, 2, n), mask))
        assert encoded.shape == (1, 8, 2, n)
        torch.testing.assert_close(encoded[0, :4, 0, 0], encode.col_embed.weight[0])
        torch.testing.assert_close(encoded[0, :4, 0, -1], encode.col_embed.weight[49])


def test_without_two_stages_queries_are_learned_points() -> None:
    detector = tiny_detector(two_stage=False, reparam=False, decoder_type="global_ape").train()
    outputs = detector([torch.randn(3, 64, 64)])
    assert "enc_outputs" not in outputs
    assert outputs["pred_boxes"].shape == (1, 10, 4)
    assert len(detector.class_embed) == 2
    assert detector.query_embed is not None
    assert detector.query_embed.weight.shape == (16, 64)
    first = outputs["aux_outputs"][0]["pred_boxes"]
    torch.testing.assert_close(first[..., 2:], torch.full_like(first[..., 2:], 1 / (1 + math.exp(2))))
    outputs["pred_boxes"].sum().backward()
    assert detector.transformer.reference_points.weight.grad is not None


def test_one_refinement_is_enough_without_auxiliary_outputs() -> None:
    outputs = tiny_detector(aux_loss=False, dec_layers=1).eval()([torch.randn(3, 48, 48)])
    assert "aux_outputs" not in outputs


@pytest.mark.parametrize("windows", [0, 2])
def test_a_convolutional_backbone_is_seen_at_its_last_stride(windows: int) -> None:
    detector = build_model(tiny_convnext(), tiny_config(n_windows_sqrt=windows)).eval()
    assert detector.backbone.stride == 32
    assert detector.transformer.strides == [16, 32, 64, 128]
    with torch.no_grad():
        outputs = detector([torch.randn(3, 128, 150)])
    assert bool(outputs["pred_boxes"].isfinite().all())


def test_recomputing_layers_changes_no_gradient() -> None:
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        detector = tiny_detector(decoder_use_checkpoint=checkpointed, encoder_dropout=0.0).train()
        detector([torch.ones(3, 64, 64)])["pred_logits"].sum().backward()
        gradients.append(detector.transformer.decoder.layers[0].linear1.weight.grad)
    torch.testing.assert_close(*gradients)


def test_inference_runs_the_one_to_one_queries_only() -> None:
    detector = fill(tiny_detector()).eval()
    images = [torch.randn(3, 64, 64)]
    with torch.no_grad():
        both = detector(images)
        detector.num_queries = detector.transformer.two_stage_num_proposals = detector.num_queries_one2one
        alone = detector(images)
    assert alone["pred_logits_one2many"].shape[1] == 0
    torch.testing.assert_close(alone["pred_boxes"], both["pred_boxes"], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"two_stage": False}, "two_stage=False starts from points"),
        ({"two_stage": False, "reparam": False}, "decoder_type='global_ape'; got"),
        ({"with_box_refine": False}, "two_stage=True needs with_box_refine=True"),
        ({"num_feature_levels": 2}, "num_feature_levels must be 1"),
        ({"blocks_to_train": ["3"]}, "blocks_to_train must be None"),
        ({"norm_type": "norm"}, "norm_type must be one of pre_norm, post_norm; got 'norm'"),
        ({"decoder_type": "deformable"}, "decoder_type must be one of"),
        ({"decoder_rpe_type": "log"}, "decoder_rpe_type must be one of"),
        ({"hidden_dim": 48}, "hidden_dim must be a multiple of 32 and of nheads=4"),
        ({"dec_layers": 0}, "dec_layers must be at least 1"),
        ({"num_queries_one2many": -1}, "num_queries_one2many must not be negative"),
        ({"position_embedding": "cosine"}, "'cosine' is not a valid PositionEncoding"),
        ({"proposal_tgt_strides": [16]}, "proposal_tgt_strides needs a stride for each of 4 levels"),
        ({"proposal_tgt_strides": [8, 16, 32, 48], "proposal_in_stride": 16}, "times powers of two, got 48"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)


def test_settings_that_do_not_fit_the_backbone_are_refused() -> None:
    with pytest.raises(ValueError, match="cells of this backbone's map are 16 pixels wide"):
        build_model(tiny_backbone(), tiny_config(proposal_in_stride=14))
    with pytest.raises(ValueError, match=r"no blocks \[7\]"):
        build_model(tiny_backbone(), tiny_config(layers_to_use=[7]))
    coarse = build_model(tiny_backbone(), tiny_config(proposal_tgt_strides=[64, 128, 256, 512]))
    with pytest.raises(ValueError, match="proposals have a stride of 64 pixels, but the image only 48: enlarge it"):
        coarse([torch.zeros(3, 48, 48)])


def test_configurations_survive_a_file() -> None:
    config = tiny_config(position_embedding="learned", layers_to_use=(1, 3), proposal_tgt_strides=(8, 16, 32, 64))
    values = config_values(config)
    assert values["position_embedding"] == "learned"
    again = DetectionHeadConfig(**values)
    assert again.position_embedding is PositionEncoding.LEARNED
    assert config_values(again) == values
    assert [log2_ratio(t, 16) for t in (4, 8, 16, 32, 64)] == [-2, -1, 0, 1, 2]


def test_postprocessing_checks_sizes() -> None:
    outputs = {"pred_logits": torch.zeros(2, 3, 4), "pred_boxes": torch.zeros(2, 3, 4)}
    with pytest.raises(ValueError, match=r"expected target_sizes \[2, 2\], got \(1, 2\)"):
        PostProcess(5, reparam=True)(outputs, torch.tensor([[4, 4]]))
