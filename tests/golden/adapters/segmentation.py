"""Golden cases of the area `segmentation`: not built yet."""

from functools import partial

from tests.golden.adapters.pending import pending_cases

cases = partial(pending_cases, "segmentation", reason="not built yet: comes with issue '7. Semantic segmentation'")
