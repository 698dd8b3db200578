"""Head training, feature extraction and export that are killed, and started again."""

import random
import time
from pathlib import Path

import pytest
import torch

from dinov3.checkpointer.weights import read_weights
from dinov3.eval import knn, linear
from dinov3.models.vision_transformer import vit_small
from dinov3.run import export
from tests.eval.toys import write_colour_folders
from tests.faults.figures import fault
from tests.faults.jobs import Training, pause, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of an evaluation on a backbone that has been trained for a moment."""
    folder = tmp_path_factory.mktemp("backbone")
    training = Training(folder, "out", "optim.epochs=1")
    training.run_to_the_end()
    train, val = (write_colour_folders(folder / name, 40, seed=i) for i, name in enumerate(("train", "val")))
    return [
        f"model.config_file={training.output_dir / 'config.yaml'}",
        f"model.pretrained_weights={training.output_dir / 'teacher_checkpoint.pth'}",
        "transform.resize_size=16",
        "transform.crop_size=16",
        f"train.dataset=ImageFolder:root={train}",
        f"{{val}}ImageFolder:root={val}",
    ]


def of(arguments: list[str], output_dir: Path, val: str, *more: str) -> list[str]:
    return [f"output_dir={output_dir}", *(word.replace("{val}", val) for word in arguments), *more]


def run(main: object, argv: list[str], output: Path) -> None:
    process = start(main, argv, output)  # type: ignore[arg-type]
    process.join(180)
    assert process.exitcode == 0, output.read_text()[-3000:]


def test_head_training_killed_at_random_moments_gives_the_same_results(arguments: list[str], tmp_path: Path) -> None:
    more = ("train.epochs=4", "train.epoch_length=25", "train.save_checkpoint_iterations=3", "train.batch_size=4")
    more += ("train.num_workers=0", "train.eval_period_iterations=20", "train.learning_rates=[0.01,0.1]")
    undisturbed, killed = (of(arguments, tmp_path / name, "train.val_dataset=", *more) for name in ("one", "other"))
    run(linear.main, undisturbed, tmp_path / "undisturbed.txt")
    rng, log = random.Random(10), tmp_path / "killed.txt"
    for _ in range(30):
        before = log.stat().st_size if log.exists() else 0
        process = start(linear.main, killed, log)
        while process.is_alive() and (not log.exists() or log.read_text()[before:].count("ImageFolder: ") < 2):
            time.sleep(0.005)
        pause(rng, 0.3)
        process.kill()
        process.join()
        fault("head training killed")
    run(linear.main, killed, log)
    for name in linear.RESULTS_FILENAME, linear.RESULTS_FILENAME.replace(".csv", ".jsonl"):
        if (tmp_path / "one" / name).exists():
            assert (tmp_path / "other" / name).read_text() == (tmp_path / "one" / name).read_text()
    assert "resumed" in log.read_text()


def test_feature_extraction_killed_at_random_moments_gives_the_same_results(
    arguments: list[str], tmp_path: Path
) -> None:
    more = ("train.batch_size=8", "train.num_workers=0", "eval.num_workers=0", "eval.batch_size=8")
    undisturbed, killed = (of(arguments, tmp_path / name, "eval.test_dataset=", *more) for name in ("one", "other"))
    run(knn.main, undisturbed, tmp_path / "undisturbed.txt")
    wanted, results = (tmp_path / "one" / knn.RESULTS_FILENAME).read_text(), tmp_path / "other" / knn.RESULTS_FILENAME
    rng = random.Random(11)
    for _ in range(15):
        process = start(knn.main, killed, tmp_path / "killed.txt")
        pause(rng, 1.5)
        process.kill()
        process.join()
        fault("feature extraction killed")
        if results.exists():  # just done
            assert results.read_text() == wanted
            results.unlink()
    run(knn.main, killed, tmp_path / "killed.txt")
    assert results.read_text() == wanted


@pytest.mark.parametrize("name", ["backbone.pth", "backbone.safetensors"])
def test_an_export_killed_at_random_moments_leaves_the_old_file_or_the_new_one(name: str, tmp_path: Path) -> None:
    for i in range(2):
        torch.manual_seed(i)
        model = vit_small(device="cpu")
        model.init_weights()
        torch.save(model.state_dict(), tmp_path / f"{i}.pth")
    states = [read_weights(tmp_path / f"{i}.pth")["cls_token"] for i in range(2)]
    target, rng, seen = tmp_path / "out" / name, random.Random(12), set()
    for i in range(30):
        process = start(export.main, [str(tmp_path / f"{i % 2}.pth"), str(target)], tmp_path / "log.txt")
        pause(rng, 1.0)
        process.kill()
        process.join()
        fault("export killed")
        if target.exists():
            found = read_weights(target)["cls_token"]
            seen |= {j for j in range(2) if torch.equal(found, states[j])}
            assert any(torch.equal(found, state) for state in states)
    assert seen
    run(export.main, [str(tmp_path / "0.pth"), str(target)], tmp_path / "log.txt")
    assert torch.equal(read_weights(target)["cls_token"], states[0])
    assert [path.name for path in target.parent.iterdir()] == [name], "something was left behind"
