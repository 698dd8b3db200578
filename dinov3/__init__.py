"""DINOv3: self-supervised vision backbones, their training and their evaluation.

The rooms, from the ground up: `utils`; `distributed`, `logging`; `layers`, `loss`, `optim`, `data`; `models`,
`checkpointer`, `fsdp`, `configs`; `hub`; `train`, `eval`; `run`. A module imports lower rooms only.
"""

__version__ = "0.0.1"
