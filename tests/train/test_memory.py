"""The answer to a lack of memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3.train.ssl_meta_arch import SSLMetaArch
from dinov3.train.train import main
from tests.helpers import tiny_training
from tests.helpers.tiny_training import with_output


def test_out_of_memory_is_answered_with_what_holds_it_and_what_needs_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = SSLMetaArch.backprop_loss
    calls = []

    def fail_in_the_second_iteration(self: Any, loss: torch.Tensor) -> None:
        calls.append(loss)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("tried to allocate 7 GiB")
        backward(self, loss)

    monkeypatch.setattr(SSLMetaArch, "backprop_loss", fail_in_the_second_iteration)
    with pytest.raises(RuntimeError) as caught:
        main(with_output(tiny_training.prepare(tmp_path), tmp_path / "out"))
    message = str(caught.value)
    assert "tried to allocate 7 GiB" in message
    for part in ("student 0", "gradients 0", "optimizer 0", "teachers 0"):
        assert part in message
    for setting in ("train.checkpointing=true", "train.gradient_accumulation=2", "train.batch_size_per_gpu=2"):
        assert setting in message
