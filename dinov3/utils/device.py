"""Where to compute when nobody says."""

import torch


def default_device() -> torch.device:
    """The current accelerator (CUDA, MPS, XPU, ...) if there is one, else the CPU."""
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            return torch.device(accelerator.type, torch.accelerator.current_device_index())
    return torch.device("cpu")
