"""Golden cases of `data_evals` that are about `dinov3.data`.

`data_case(name, spec, stored)` gives the case, or None if it is about something else. `spec` is the entry of the
manifest, `stored` holds the tensors of the whole area.
"""

import ast
import importlib
import itertools
import json
import math
import random
import re
import tarfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor

from tests.golden import fill
from tests.golden.cases import Case, Expected, load_area
from tests.golden.inputs import ToyDataset, image, pil_image, png_bytes, write_png

Spec = Mapping[str, Any]
Runner = Callable[[Path], dict[str, Any]]
_AREA = "data_evals"
_BLUR_TRIES = 400
# Pillow 13, with which the cases were made, resizes some shapes (21 x 17 to 16 x 16, say) unlike Pillow 10.3 to 12.2:
# up to 10 grey levels apart, 7 % of the largest value in these cases.
_OLD_PILLOW_SLACK = 0.1 if int(PIL.__version__.split(".")[0]) < 13 else 0.0


def data_case(name: str, spec: Spec, stored: Mapping[str, Tensor]) -> Case | None:
    """The case of that name, None if its target isn't in `dinov3.data`."""
    if not spec["target"].startswith("dinov3.data."):
        return None
    values = {key: value for key, value in spec["values"].items() if not key.startswith("structure")}
    run: Runner = lambda folder: _run(spec, folder)  # noqa: E731
    if spec["target"] == "dinov3.data.transforms.GaussianBlur":
        expected = _blur_expectations(values["rates"])
    else:
        expected = {key: _expect(value, spec["tolerance"]) for key, value in values.items()}
        slack = _OLD_PILLOW_SLACK if spec["target"] == "dinov3.data.DataAugmentationDINO" else 0.0
        expected |= {key: _expect(stored[f"{name}/{key}"], spec["tolerance"], slack) for key in spec["tensors"]}
    return Case(_AREA, name, run, expected, stored_keys=frozenset(f"{name}/{key}" for key in spec["tensors"]))


def _expect(value: Any, tolerance: Any, slack: float = 0.0) -> Expected:
    # Draws that follow a computation are compared exactly; tolerances are for resampled pixels.
    if tolerance == "exact" or not isinstance(value, Tensor):
        return Expected(value)
    return Expected(value, atol=tolerance["atol"], rtol=tolerance["rtol"], rtol_of_max=slack)


def _run(spec: Spec, folder: Path) -> dict[str, Any]:
    target = spec["target"]
    if target.startswith("dinov3.data.datasets."):
        return _DATASETS[target.rsplit(".", 1)[-1]](spec["how"], spec, folder)
    kind = next(kind for prefix, kind in _KINDS.items() if target.startswith(prefix))
    return kind(spec, _resolve(target))


def _resolve(target: str) -> Any:
    """The object that the manifest names by its dotted path."""
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError:
        module, _, attribute = target.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _next_draws() -> dict[str, float]:
    return {"next_random": random.random(), "next_numpy": float(np.random.rand())}


def _masking(spec: Spec, generator_class: Any) -> dict[str, Any]:
    how = spec["how"]
    generator = generator_class(**{key: _as_tuple(value) for key, value in how["kwargs"].items()})
    _seed_all(how["seed"])
    masks = np.stack([generator(count) for count in how["calls"]])
    assert masks.dtype == bool
    return {
        "masks": masks,
        "log_aspect_ratio": generator.log_aspect_ratio,
        "shape": generator.get_shape(),
        **_next_draws(),
    }


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _collate(spec: Spec, collate: Any) -> dict[str, Any]:
    how = spec["how"]
    kwargs = dict(how["kwargs"], dtype=getattr(torch, how["kwargs"]["dtype"]))
    samples = _crop_samples(how["samples"])
    _seed_all(how["seed"])
    batch = collate(samples, mask_generator=_mask_generator(how["mask_generator"]), **kwargs)
    draws = _next_draws()
    dtypes = {
        key: str(value.dtype) if isinstance(value, Tensor) else type(value).__name__ for key, value in batch.items()
    }
    return {**batch, "dtypes": dtypes, **draws}


def _crop_samples(spec: Spec) -> list[tuple[dict[str, Any], None]]:
    """Samples as augmentation gives them, of random crops named after sample, kind and number."""
    prefix = re.search(r"f'(.*?)/\{sample\}", spec["crop"]).group(1)
    sides = {kind: int(side) for side, kind in re.findall(r"(\d+) (global|local|gram)", spec["crop"])}
    counts = {"global": spec["n_global"], "local": spec["n_local"]}
    if spec["gram"]:
        counts["gram"] = spec["n_global"]
    keys = {"global": "global_crops", "local": "local_crops", "gram": "gram_teacher_crops"}
    return [
        (
            {
                keys[kind]: [
                    fill.tensor(f"{prefix}/{sample}/{kind}{crop}", (3, sides[kind], sides[kind]))
                    for crop in range(count)
                ]
                for kind, count in counts.items()
            },
            None,
        )
        for sample in range(spec["batch"])
    ]


def _mask_generator(expression: str) -> Any:
    """`MaskingGenerator((4, 4), max_num_patches=8.0)` as an object."""
    call = ast.parse(expression, mode="eval").body
    generator_class = _resolve(f"dinov3.data.{call.func.id}")
    arguments = [ast.literal_eval(argument) for argument in call.args]
    return generator_class(*arguments, **{keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords})


def _batch_subset(spec: Spec, get_batch_subset: Any) -> dict[str, Any]:
    how = spec["how"]
    source, global_batch_size = re.search(r"case (\w+), plus global_batch_size = (\d+)", how["batch"]).groups()
    collate_spec = load_area(_AREA)[0]["cases"][source]
    batch = _collate(collate_spec, _resolve(collate_spec["target"]))
    batch = {key: batch[key] for key in [*collate_spec["tensors"], "upperbound"]}
    _seed_all(how["seed"])
    return get_batch_subset({**batch, "global_batch_size": int(global_batch_size)}, how["divide_by"])


def _sampler(spec: Spec, sampler_class: Any) -> dict[str, Any]:
    how = spec["how"]
    sampler = sampler_class(**how["kwargs"])
    if "take" in how:
        return {"indices": list(itertools.islice(sampler, how["take"]))}
    indices = []
    for epoch in re.findall(r"\((\d+)\)", how["epochs"]):
        sampler.set_epoch(int(epoch))
        indices.append(list(sampler))
    return {"indices": indices, "length": len(sampler)}


def _sampler_choice(spec: Spec, make_data_loader: Any) -> dict[str, Any]:
    how = spec["how"]
    sampler_type = _resolve("dinov3.data.SamplerType")
    table = []
    for kind, size, advance, _ in spec["values"]["table"]:
        try:
            loader = make_data_loader(
                dataset=list(range(how["dataset_length"])),
                batch_size=2,
                num_workers=0,
                sampler_type=kind and sampler_type[kind],
                sampler_size=size,
                sampler_advance=advance,
            )
            # Without a sampler, torch's loader puts in the sequential one.
            result: Any = type(loader.sampler).__name__.replace("SequentialSampler", "NoneType")
        except (ValueError, NotImplementedError) as error:
            result = {"error": type(error).__name__}
        table.append([kind, size, advance, result])
    return {"table": table}


def _sampler_type(spec: Spec, enum: Any) -> dict[str, Any]:
    return {"members": {member.name: member.value for member in enum}}


class _CountingLoader:
    """Yields [number, 0], [number, 1], ..."""

    def __init__(self, number: int, length: int, batch_size: int) -> None:
        self.number, self.length, self.batch_size = number, length, batch_size

    def __iter__(self) -> Any:
        return ([self.number, i] for i in range(self.length))


def _combined(spec: Spec, combined_class: Any) -> dict[str, Any]:
    how = spec["how"]
    lengths = ast.literal_eval(re.search(r"lengths (\([\d, ]+\))", how["loaders"]).group(1))
    batch_size = int(re.search(r"batch_size (\d+)", how["loaders"]).group(1))
    loaders = [_CountingLoader(i, length, batch_size) for i, length in enumerate(lengths)]
    combined = combined_class(
        zip(loaders, how["ratios"], strict=True), batch_size, combining_mode=how["combining_mode"], seed=how["seed"]
    )
    return {"batches": list(itertools.islice(combined, how["take"]))}


def _image_of(description: str) -> Any:
    """`PIL image(name, 40, 56)`, with or without brackets around the size."""
    name, height, width = re.search(r"image\(([^,]+), \(?(\d+), (\d+)\)", description).groups()
    return name, int(height), int(width)


def _transform(spec: Spec, make: Any) -> dict[str, Any]:
    how = spec["how"]
    kwargs = {key: _as_tuple(value) for key, value in how["kwargs"].items()}
    if "interpolation" in kwargs:
        kwargs["interpolation"] = _resolve("dinov3.data.transforms.make_interpolation_mode")(kwargs["interpolation"])
    transform = make(**kwargs)
    if "seed" not in how:
        return {f"out{i}": transform(pil_image(*_image_of(text))) for i, text in enumerate(how["inputs"])}
    image_name, height, width = _image_of(how["inputs"])
    last = int(re.search(r"i = 0\.\.(\d+)", how["inputs"]).group(1))
    torch.manual_seed(int(re.search(r"\d+", how["seed"]).group()))
    prefix = image_name.removesuffix("i")
    return {"out": torch.stack([transform(pil_image(f"{prefix}{i}", height, width)) for i in range(last + 1)])}


def _blur(spec: Spec, blur_class: Any) -> dict[str, Any]:
    how = spec["how"]
    picture = pil_image("blur", 16, 16)
    found: dict[str, Any] = {}
    torch.manual_seed(0)
    for p in how["p"]:
        blur = blur_class(p=p)
        changed = sum(blur(picture).tobytes() != picture.tobytes() for _ in range(_BLUR_TRIES))
        found |= {f"p={p}: stored_p": blur.p, f"p={p}: changed_of_400": changed}
    return found


def _blur_expectations(rates: Spec) -> dict[str, Expected]:
    """The stored counts are of unknown draws: five standard deviations of two counts, and none where none may be."""
    expected = {}
    for p, rate in rates.items():
        share = rate["changed_of_400"] / _BLUR_TRIES
        deviation = math.sqrt(2 * _BLUR_TRIES * share * (1 - share))
        expected[f"p={p}: stored_p"] = Expected(rate["stored_p"])
        expected[f"p={p}: changed_of_400"] = Expected(rate["changed_of_400"], atol=5 * deviation)
    return expected


def _constants(spec: Spec, module: Any) -> dict[str, Any]:
    return {key: getattr(module, key) for key in dir(module) if key.isupper()}


def _augment(spec: Spec, augmentation_class: Any) -> dict[str, Any]:
    how = spec["how"]
    augment = augmentation_class(**{key: _as_tuple(value) for key, value in how["kwargs"].items()})
    _seed_all(int(re.search(r"\d+", how["seed"]).group()))
    output = augment(pil_image(*_image_of(how["input"])))
    draws = _next_draws()
    stacks = {key: value for key, value in output.items() if key.endswith(("_crops", "_teacher"))}
    same = [a is b for a, b in zip(output["global_crops"], output["global_crops_teacher"], strict=True)]
    return {
        **{key: torch.stack(value) for key, value in stacks.items()},
        "keys": list(output),
        "shapes": {key: [list(crop.shape) for crop in value] for key, value in stacks.items()},
        "offsets": [list(offset) for offset in output["offsets"]],
        "teacher_is_global": same,
        **draws,
    }


def _dataset_strings(spec: Spec, parse: Any) -> dict[str, Any]:
    how = spec["how"]
    parsed: dict[str, Any] = {}
    for text in how["strings"]:
        try:
            dataset_class, kwargs = parse(text)
            parsed[text] = [dataset_class.__name__, {key: getattr(v, "name", v) for key, v in kwargs.items()}]
        except (ValueError, AssertionError, KeyError) as error:
            parsed[text] = {"error": type(error).__name__}
    return {"parsed": parsed}


def _enumerated(spec: Spec, adapter_class: Any) -> dict[str, Any]:
    how = spec["how"]
    toy, count, classes = re.search(r"'(.+)', (\d+) items, (\d+) classes", how["dataset"]).groups()
    dataset = ToyDataset(toy, int(count), int(classes))
    adapter = adapter_class(dataset, pad_dataset=how["pad_dataset"], num_replicas=how["num_replicas"])
    return {
        "length": len(adapter),
        "unpadded_length": len(adapter_class(dataset)),
        "targets": [list(adapter[i][1]) for i in range(len(adapter))],
        "get_target": [list(adapter.get_target(i)) for i in range(len(adapter))],
    }


def _read_images(dataset: Any) -> tuple[np.ndarray, list[Any]]:
    items = [dataset[i] for i in range(len(dataset))]
    return np.stack([np.asarray(picture) for picture, _ in items]), [target for _, target in items]


def _image_net(how: Spec, spec: Spec, folder: Path) -> dict[str, Any]:
    dataset_class = _resolve(spec["target"])
    height, width = spec["tensors"]["train_images"]["shape"][1:3]
    for path in how["paths"]:
        write_png(folder / "root" / path, image(path, height, width))
    rows = [",".join(f'"{field}"' if "," in field else field for field in row) for row in how["labels.txt"]]
    (folder / "root" / "labels.txt").write_text("\n".join(rows) + "\n")
    splits = dataset_class.Split
    found: dict[str, Any] = {"split_lengths": {split.name: split.length for split in splits}}
    for split in (splits.TRAIN, splits.VAL):
        extra = folder / "extra"
        dataset = dataset_class(split=split, root=folder / "root", extra=extra)
        dataset.dump_extra()
        key, entries = split.value, np.load(extra / f"entries-{split.name}.npy")
        found[f"{key}_images"], found[f"{key}_targets"] = _read_images(dataset)
        found[f"{key}_entries"], found[f"{key}_dtype"] = [list(row.tolist()) for row in entries], str(entries.dtype)
        found[f"{key}_class_ids"] = np.load(extra / f"class-ids-{split.name}.npy")
        found[f"{key}_class_names"] = np.load(extra / f"class-names-{split.name}.npy")
        found[f"{key}_get_targets"] = dataset.get_targets()
    found["relpaths"] = {}
    for name, path in spec["values"]["relpaths"].items():
        class_id, number = splits[name].parse_image_relpath(path)
        found["relpaths"][name] = splits[name].get_image_relpath(number, class_id)
    return found


def _image_net_22k(how: Spec, spec: Spec, folder: Path) -> dict[str, Any]:
    height, width = spec["tensors"]["images"]["shape"][1:3]
    (folder / "extra").mkdir()
    dtype = ast.literal_eval(how["entries_dtype"])
    np.save(folder / "extra/entries.npy", np.array([tuple(entry) for entry in how["entries"]], dtype=dtype))
    np.save(folder / "extra/class-ids.npy", np.array(how["class_ids"]))
    for class_id in how["class_ids"]:
        with tarfile.open(folder / f"{class_id}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for _, owner, start, end, filename in how["entries"]:
                if owner == class_id:
                    data = png_bytes(image(filename, height, width))
                    member = tarfile.TarInfo(filename)
                    member.size = len(data)
                    assert archive.offset == start
                    archive.addfile(member, BytesIO(data))
                    assert archive.offset == end
    dataset = _resolve(spec["target"])(root=folder, extra=folder / "extra")
    images, targets = _read_images(dataset)
    return {
        "images": images,
        "targets": targets,
        "class_id_of_0": dataset.get_class_id(0),
        "find_class_id": [dataset.find_class_id(i) for i in range(len(how["class_ids"]))],
        "get_targets": dataset.get_targets(),
    }


def _make_dataset(how: Spec, folder: Path) -> Any:
    return _resolve("dinov3.data.make_dataset")(dataset_str=how["dataset_str"].replace("<ROOT>", str(folder)))


def _paired(dataset: Any, dtype: Any) -> dict[str, Any]:
    images, targets = _read_images(dataset)
    return {
        "images": images,
        "targets": np.stack([np.asarray(target) for target in targets]).astype(dtype),
        "modes": [target.mode for target in targets],
        "image_paths": dataset.image_paths,
        "target_paths": dataset.target_paths,
    }


def _split_of(how: Spec) -> str:
    return re.search(r"split=(\w+)", how["dataset_str"]).group(1)


def _ade20k(how: Spec, spec: Spec, folder: Path) -> dict[str, Any]:
    height, width = spec["tensors"]["images"]["shape"][1:3]
    (folder / f"ADE20K_object150_{_split_of(how).lower()}.txt").write_text("\n".join(how["list file"]) + "\n")
    for line in how["list file"]:
        stem = line.rsplit(".", 1)[0]
        write_png(folder / "images" / line, image(stem, height, width))
        write_png(folder / "annotations" / f"{stem}.png", image(f"{stem}/mask", height, width)[..., 0])
    return _paired(_make_dataset(how, folder), np.uint8)


def _nyu(how: Spec, spec: Spec, folder: Path) -> dict[str, Any]:
    height, width = how["size"]
    list_file = "nyu_train.txt" if _split_of(how) == "TRAIN" else "nyu_test.txt"
    (folder / list_file).write_text("\n".join(how["list file"]) + "\n")
    for line in how["list file"]:
        picture, depth, _ = line.split()
        stem = picture.rsplit(".", 1)[0]
        write_png(folder / picture.strip("/"), image(stem, height, width))
        values = fill.tensor(f"{stem}/depth", (height, width)).abs().numpy() * 3000
        write_png(folder / depth.strip("/"), values.astype(np.uint16))
    return _paired(_make_dataset(how, folder), np.int32)


def _coco_captions(how: Spec, spec: Spec, folder: Path) -> dict[str, Any]:
    height, width = spec["tensors"]["images"]["shape"][1:3]
    annotations = folder / "annotations_trainval2014/annotations/captions_train2014.json"
    annotations.parent.mkdir(parents=True)
    annotations.write_text(json.dumps(how["annotations"]))
    for entry in how["annotations"]["images"]:
        write_png(folder / "train2014/train2014" / entry["file_name"], image(f"coco/{entry['id']}", height, width))
    dataset = _make_dataset(how, folder)
    random.seed(int(re.search(r"random\.seed\((\d+)\)", how["seed"]).group(1)))
    images, captions = _read_images(dataset)
    relpaths = [str(Path(dataset.get_image_relpath(i)).relative_to(folder)) for i in range(len(dataset))]
    return {"images": images, "captions": captions, "relpaths": relpaths}


_KINDS: dict[str, Callable[[Spec, Any], dict[str, Any]]] = {
    "dinov3.data.MaskingGenerator": _masking,
    "dinov3.data.collate_data_and_cast": _collate,
    "dinov3.data.collate.get_batch_subset": _batch_subset,
    "dinov3.data.samplers.": _sampler,
    "dinov3.data.make_data_loader": _sampler_choice,
    "dinov3.data.SamplerType": _sampler_type,
    "dinov3.data.CombinedDataLoader": _combined,
    "dinov3.data.transforms.GaussianBlur": _blur,
    "dinov3.data.transforms.make_": _transform,
    "dinov3.data.make_classification": _transform,
    "dinov3.data.transforms": _constants,
    "dinov3.data.DataAugmentationDINO": _augment,
    "dinov3.data.loaders._parse_dataset_str": _dataset_strings,
    "dinov3.data.DatasetWithEnumeratedTargets": _enumerated,
}
_DATASETS: dict[str, Callable[[Spec, Spec, Path], dict[str, Any]]] = {
    "ImageNet": _image_net,
    "ImageNet22k": _image_net_22k,
    "ADE20K": _ade20k,
    "NYU": _nyu,
    "CocoCaptions": _coco_captions,
}
