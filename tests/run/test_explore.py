"""The explore page: what it holds, and how it behaves in a browser."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dinov3.eval.notebook_utils import picture_features
from dinov3.models.vision_transformer import DinoVisionTransformer
from dinov3.run import explore
from tests.helpers.browser import missing_browser, open_browser


@pytest.fixture(scope="module")
def backbone() -> DinoVisionTransformer:
    torch.manual_seed(0)
    model = DinoVisionTransformer(embed_dim=32, depth=2, num_heads=2, patch_size=16, pos_embed_rope_dtype="fp32")
    model.init_weights()
    return model.eval()


@pytest.fixture(scope="module")
def images() -> dict[str, Image.Image]:
    generator = np.random.default_rng(0)
    blocks = [generator.integers(0, 255, (h, w, 3), dtype=np.uint8) for h, w in ((4, 6), (5, 3))]
    return {
        name: Image.fromarray(pixels.repeat(16, 0).repeat(16, 1))
        for name, pixels in zip(("one", "</script><b>two"), blocks, strict=True)
    }


def test_quantised_features_keep_their_cosines() -> None:
    features = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 200)[:, None]
    exact, rounded = F.normalize(features), F.normalize(explore.quantise(features).float())
    assert (exact @ exact.T - rounded @ rounded.T).abs().max() < 0.01


def test_the_page_stands_alone(backbone: DinoVisionTransformer, images: dict[str, Image.Image]) -> None:
    page = explore.render(backbone, images, 64)
    assert not re.search(r'(src|href)="|https?://|@import', page)
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page)
    content = json.loads(data)
    assert [picture["name"] for picture in content["pictures"]] == list(images)
    assert [(picture["rows"], picture["columns"]) for picture in content["pictures"]] == [(4, 6), (4, 2)]


def test_the_command_writes_it(
    backbone: DinoVisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    monkeypatch.setattr(explore, "load_model_and_context", lambda config, output_dir: (backbone, {}))
    output = tmp_path / "new" / "page.html"
    assert explore.main([str(tmp_path / "red.png"), "--output", str(output), "--image-size", "64"]) == output
    assert "red" in output.read_text()


def test_a_model_must_be_named(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    with pytest.raises(ValueError, match="dino_hub"):
        explore.main([str(tmp_path / "red.png"), "--output", str(tmp_path / "page.html")])


@pytest.mark.skipif(missing_browser() is not None, reason=str(missing_browser()))
def test_clicking_a_patch_shows_what_is_like_it(
    backbone: DinoVisionTransformer, images: dict[str, Image.Image], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text(explore.render(backbone, images, 64), encoding="utf-8")
    features = [picture_features(backbone, image, 64) for image in images.values()]
    tokens = [F.normalize(one.flatten(0, 1), dim=-1) for one in features]

    with open_browser() as browser:
        browser.open(page)
        browser.click("#picture-0", x=8, y=8)  # right of and below the centre of 4 x 6 patches
        chosen = browser.run("return chosen")
        assert chosen == {"index": 0, "patch": 2 * 6 + 3}
        shown = browser.run("return similarities(chosen.index, chosen.patch).map(map => Array.from(map))")
        for got, one in zip(shown, tokens, strict=True):
            torch.testing.assert_close(torch.tensor(got), one @ tokens[0][15], atol=0.01, rtol=0)
        browser.click("#picture-1")  # it stays where it was put until another click
        assert browser.run("return pinned && chosen.index") == 1
        browser.screenshot(tmp_path / "page.png")
        assert browser.run("return document.querySelectorAll('b').length") == 0  # names are text

    with Image.open(tmp_path / "page.png") as seen:
        assert len(seen.convert("RGB").getcolors(1 << 24) or []) > 100
