"""The page that the quick start leaves behind: one HTML file with its pictures inside, in plain words."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from dinov3.data.photos import available_photos
from dinov3.run.quickstart_data import is_digit

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>A DINOv3 backbone, pretrained in $training_time</title>
<style>
:root { --ink: #1f2328; --muted: #57606a; --line: #d8dee4; --blue: #1f6feb; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #f6f8fa; font: 16px/1.6 system-ui, "Segoe UI", sans-serif; }
main { max-width: 920px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 30px; line-height: 1.25; margin: 0 0 8px; }
h2 { font-size: 20px; line-height: 1.3; margin: 0 0 8px; }
p { margin: 8px 0; max-width: 76ch; }
.lead { color: var(--muted); font-size: 18px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 24px 0; }
.tile, section { background: white; border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 16px 20px; color: var(--muted); font-size: 14px; }
.tile b { display: block; font-size: 32px; line-height: 1.25; color: var(--ink); }
.tile.main b { color: var(--blue); }
section { padding: 22px 24px; margin: 16px 0; }
figure { margin: 16px 0 0; }
img { width: 100%; height: auto; display: block; }
figcaption { color: var(--muted); font-size: 14px; margin-top: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
td, th { text-align: left; padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--muted); font-weight: 600; }
code { background: #eff1f3; border-radius: 4px; padding: 1px 5px; font-size: 14px; overflow-wrap: anywhere; }
</style>
</head>
<body>
<main>
<h1>A DINOv3 backbone, pretrained in $training_time</h1>
<p class="lead">A small vision transformer looked at $n_train little pictures, $images_seen times in all, <em>without
ever being told what they show</em>. With the features that it learned, $trained&nbsp;% of pictures that it never saw
find their way into the right one of $n_classes folders. With those of the untrained network it is
$random&nbsp;%.</p>
<div class="tiles">
<div class="tile"><b>$pixels %</b>with nothing but the pixels</div>
<div class="tile"><b>$random %</b>with the network before training</div>
<div class="tile main"><b>$trained %</b>with the network after training</div>
</div>

<section>
<h2>What it was trained on</h2>
<p>$n_train little pictures in $n_classes folders: $contents. They come with ordinary Python packages; nothing was
downloaded. The training sees the pictures, never the names of the folders.</p>
<p>$n_val other pictures are held out for the test. They come from the right part of each photograph, the training
pictures from the left $train_share&nbsp;%, with a gap between: no pixel is in both. To know where a crop of the
right side belongs, one has to recognise the textures and things of the left side.</p>
<figure><img src="$samples" alt="Four training pictures of every folder">
<figcaption>Four training pictures of every folder.</figcaption></figure>
</section>

<section>
<h2>How it learned</h2>
<p>This repository's own training script ran, with the objective of DINOv3. Two large and several small crops are
cut out of each picture, and distorted. A <em>student</em> network must describe every crop as the <em>teacher</em>,
a slow moving average of the student, describes the large ones (DINO), and describe patches that are hidden from it
as the teacher does, who sees them (iBOT). Descriptions of different pictures are pushed apart (KoLeo). The teacher
is what is kept.</p>
<p>The total loss fell from $loss_first to $loss_last in $iterations iterations of $batch_size pictures.</p>
<figure><img src="$losses" alt="Loss curves">
<figcaption>The losses, as medians over 20 iterations.</figcaption></figure>
</section>

<section>
<h2>What the features are good for</h2>
<p>The backbone is frozen now. A picture is described by the mean of its patch features. To guess the folder of a
held-out picture, the $knn_k training pictures with the most similar descriptions vote (k-nearest neighbours). Nothing
is learned in this step, so the accuracy tells how well the features themselves are ordered. Blind guessing would give
$chance&nbsp;%.</p>
<p>For the test all pictures are turned grey. Colours alone give many folders away, to a random network too; without
them shapes and textures must do. The training adds <strong>$gain points</strong>. With colours it goes from
$colour_random&nbsp;% to $colour_trained&nbsp;% (raw pixels: $colour_pixels&nbsp;%); in grey, with the class token
instead of the patches, from $class_token_random&nbsp;% to $class_token_trained&nbsp;%.</p>
<figure><img src="$accuracy" alt="Accuracy before and after, and during the training">
<figcaption>Left: the held-out pictures in grey, before and after. Right: the same on the way.</figcaption></figure>
</section>

<section>
<h2>What it finds alike</h2>
<p>For some held-out pictures, the training pictures whose features are nearest. Green frames: from the right
folder. Red frames: from another one.</p>
<figure><img src="$neighbours" alt="Nearest neighbours of held-out pictures">
<figcaption>The first held-out picture of every second folder; nobody picked them.</figcaption></figure>
</section>

<section>
<h2>What it sees in a whole photograph</h2>
<p>The network describes every patch of $patch_size &times; $patch_size pixels. It was trained on pictures of
$image_size &times; $image_size pixels; here it goes over whole photographs, many times larger. The three directions
in which the patches of a photograph differ most are shown as red, green and blue: where colours are equal, the
network finds the patches alike. Colours and edges are in the pictures already, so the random network shows them
too; compare the columns to see what the training changed.</p>
<figure><img src="$pca" alt="Principal components of patch features">
<figcaption>Principal components of the patch features, for each photograph and backbone anew.
$seen</figcaption></figure>
</section>

<section>
<h2>Patches like this one</h2>
<p>How similar is each patch to the marked one? Brighter is more similar. To ask for any other patch, open
<a href="explore.html">explore.html</a> beside this page and point at it.</p>
<figure><img src="$similarity" alt="Similarity of all patches with a marked one">
<figcaption>Cosine similarity of patch features, stretched from the least similar patch of each map (black) to 1
(bright).</figcaption></figure>
</section>

<section>
<h2>What this is, and what it is not</h2>
<p>It is a demonstration that the whole path works on this machine: $parameters_m million parameters, trained for
$training_time. The published DINOv3 models have 21 million to 6.7 billion parameters and saw more than a billion
photographs. The test is no benchmark either: its pictures are cut from the same photographs as those of the
training.</p>
<p>The same script trains on your pictures: give it a folder with
<code>train.dataset_path=ImageFolder:root=&lt;DIR&gt;</code> and, for larger networks, another file of
<code>dinov3/configs/train</code>.</p>
$facts
</section>

<section>
<h2>Whose pictures these are</h2>
<p>With the licences as the packages state them. All are cropped, scaled, and in part turned grey here.</p>
$credits
</section>
</main>
</body>
</html>
""")


def render(report: Mapping[str, Any], pictures: Mapping[str, Path]) -> str:
    """The whole page.

    Args:
        report: what `report.json` holds.
        pictures: PNG files by name.
    """
    values = {name: _data_address(path) for name, path in pictures.items()}
    values |= {name: html.escape(text) for name, text in _texts(report).items()}
    return _PAGE.substitute(values, facts=_table(_facts(report)), credits=_table(_credits(report["classes"])))


def _texts(report: Mapping[str, Any]) -> dict[str, str]:
    return {
        "pixels": f"{report['knn_pixels']:.1f}",
        "random": f"{report['knn_random']:.1f}",
        "trained": f"{report['knn_trained']:.1f}",
        "gain": f"{report['knn_trained'] - report['knn_random']:.1f}",
        "class_token_random": f"{report['knn_class_token_random']:.1f}",
        "class_token_trained": f"{report['knn_class_token_trained']:.1f}",
        **{f"colour_{which}": f"{report[f'knn_colour_{which}']:.1f}" for which in ("pixels", "random", "trained")},
        "chance": f"{report['chance']:.0f}",
        "knn_k": str(report["knn_k"]),
        "training_time": _in_words(report["seconds_training"]),
        "train_share": f"{100 * report['train_share']:.0f}",
        "n_train": f"{report['n_train']:,}",
        "n_val": f"{report['n_val']:,}",
        "n_classes": str(len(report["classes"])),
        "seen": _seen(report["train_share"]),
        "contents": _contents(report["classes"]),
        "images_seen": f"{report['images_seen']:,}",
        "loss_first": f"{report['loss_first']:.2f}",
        "loss_last": f"{report['loss_last']:.2f}",
        "iterations": str(report["iterations"]),
        "batch_size": str(report["batch_size"]),
        "patch_size": str(report["patch_size"]),
        "image_size": str(report["image_size"]),
        "parameters_m": f"{report['parameters'] / 1e6:.1f}",
    }


def _contents(classes: Sequence[str]) -> str:
    n_digits = sum(map(is_digit, classes))
    if not n_digits:
        return "crops of one photograph in each"
    n_photos = len(classes) - n_digits
    return f"crops of one photograph in {n_photos}, one digit each, in many hands, places and sizes, in {n_digits}"


def _seen(train_share: float) -> str:
    new = [photo.title for photo in available_photos() if not photo.is_class]
    text = f"Of these photographs the training saw crops of the left {100 * train_share:.0f} %"
    return f"{text}, and nothing of: {', '.join(new)}." if new else f"{text}."


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    batches = f"{report['iterations']} iterations of {report['batch_size']} pictures"
    return [
        (
            "Backbone",
            f"{report['arch']}: {report['parameters']:,} parameters, patches of {report['patch_size']} pixels",
        ),
        ("Training", f"{batches}, {report['images_seen']:,} in all, {report['seconds_training']:.0f} seconds"),
        (
            "Test",
            f"k-NN with k = {report['knn_k']} on mean patch features, in grey, {report['n_val']:,} held-out pictures",
        ),
        ("Machine", f"{report['device']}, threads: {report['threads']}, PyTorch {report['torch']}"),
        ("Seed", str(report["seed"])),
    ]


def _credits(classes: Sequence[str]) -> list[tuple[str, str, str]]:
    """What is shown, by whom, and its licence as the package that brings it states it."""
    photos = [(photo.title, photo.credit, photo.licence) for photo in available_photos()]
    if not any(map(is_digit, classes)):
        return photos
    return [*photos, ("Handwritten digits", "E. Alpaydin and C. Kaynak (UCI, 1998), through scikit-learn", "CC BY 4.0")]


def _in_words(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"


def _data_address(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _table(rows: Iterable[Sequence[str]]) -> str:
    lines = ("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return "<table>\n" + "\n".join(lines) + "\n</table>"
