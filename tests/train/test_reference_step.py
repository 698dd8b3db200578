"""Our training step against the equations written down plainly (`benchmarks.reference_training`)."""

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from benchmarks.reference_training import ReferenceTraining
from dinov3.configs import get_default_config
from dinov3.models.vision_transformer import DinoVisionTransformer
from dinov3.train.ssl_meta_arch import SSLMetaArch
from tests.golden.adapters.training_steps import build_batch, registered

SIZES = (16, 3, 2)  # width, blocks, heads


def build(overrides: dict[str, Any]) -> tuple[SSLMetaArch, ReferenceTraining, Any]:
    """Ours and the reference with equal weights, and their configuration."""
    head = {"head_n_prototypes": 24, "head_bottleneck_dim": 8, "head_hidden_dim": 20}
    sizes = {
        "student": {"arch": "vit_reference_test", "patch_size": 4, "layerscale": 0.5, "n_storage_tokens": 1},
        "crops": {"local_crops_number": 3, "global_crops_size": 16, "local_crops_size": 8},
        "dino": head,
        "ibot": head,
        "compute_precision": {"param_dtype": "fp32"},
        "train": {"compile": False},
    }
    cfg = OmegaConf.merge(get_default_config(), sizes, overrides)

    def arch(patch_size: int = 16, **options: Any) -> DinoVisionTransformer:
        dim, depth, n_heads = SIZES
        return DinoVisionTransformer(patch_size=patch_size, embed_dim=dim, depth=depth, num_heads=n_heads, **options)

    with registered({"vit_reference_test": arch}), torch.device("meta"):
        ours = SSLMetaArch(cfg)
    ours.prepare_for_distributed_training()
    torch.manual_seed(0)
    ours.init_weights()
    with torch.no_grad():  # larger than at the start of a training, so that every part has an effect
        for param in ours.student.parameters():
            param.add_(0.1 * torch.randn_like(param))
    ours.train()
    reference = ReferenceTraining(cfg, SIZES)
    reference.student.load_state_dict(ours.student.state_dict())
    reference.teacher.load_state_dict(ours.teacher.state_dict())
    return ours, reference, cfg


@pytest.mark.parametrize("all_tokens", [False, True])
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.4])
def test_loss_and_every_gradient_are_those_of_the_equations(
    drop_path_rate: float, all_tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, reference, cfg = build({"student": {"drop_path_rate": drop_path_rate}})
    assert not ours._reads_all_tokens(torch.device("cpu"))  # the last block computes only what is read
    monkeypatch.setattr(ours, "_reads_all_tokens", lambda device: all_tokens)
    batch = build_batch(cfg, {"b": 4, "threshold": 0.4, "empty": [1, 6]}, "reference")
    torch.manual_seed(1)
    loss, _ = ours.forward_backward(batch, teacher_temp=0.07)
    torch.manual_seed(1)  # the same samples skip branches
    expected = reference.forward_backward(batch, teacher_temp=0.07)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for (name, param), plain in zip(ours.student.named_parameters(), reference.student.parameters(), strict=True):
        assert param.grad is not None
        assert plain.grad is not None
        error, largest = float((param.grad - plain.grad).abs().max()), float(plain.grad.abs().max())
        assert error <= 2e-4 * largest, name
