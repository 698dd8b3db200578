"""Released models by name. `registry` is the table, `loading` turns a row and a user's wishes into a module,
`backbones` holds the entry points, `released_heads` what those of heads share, `hf` goes to and from Hugging Face,
`heads` loads heads that you trained.
"""

from dinov3.hub.heads import load_head

__all__ = ["load_head"]
