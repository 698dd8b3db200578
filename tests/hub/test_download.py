"""Weights from the web: what is kept, what is checked, and what a failure says."""

import hashlib
import io
import logging
from pathlib import Path

import pytest
import torch

from dinov3.checkpointer.sources import DownloadError, local_path
from dinov3.checkpointer.weights import read_weights
from tests.helpers.server import Answer, Server

LEGAL = ("ai.meta.com", "huggingface.co", "local file", "weights=")


def weights_file(value: float) -> bytes:
    stream = io.BytesIO()
    torch.save({"w": torch.full((50,), value)}, stream)
    return stream.getvalue()


def named_by_hash(content: bytes) -> str:
    return f"model-{hashlib.sha256(content).hexdigest()[:8]}.pth"


def kept(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file())


# --- What works ------------------------------------------------------------------------------------------------------


def test_a_file_is_fetched_once_and_kept_under_its_name(server: Server, cache: Path) -> None:
    content = weights_file(1)
    name = named_by_hash(content)
    server.answers[f"/{name}"] = Answer(content)
    for _ in range(2):
        assert read_weights(f"{server.address}/{name}")["w"].eq(1).all()
    assert server.requests == [f"/{name}"]
    assert (cache / name).read_bytes() == content  # where torch.hub keeps it too


def test_a_file_that_torch_hub_fetched_is_used(server: Server, cache: Path) -> None:
    name = named_by_hash(weights_file(1))
    cache.mkdir(parents=True)
    (cache / name).write_bytes(weights_file(1))
    assert read_weights(f"{server.address}/{name}", check_hash=True)["w"].eq(1).all()
    assert server.requests == []


def test_a_signed_address_is_fetched_once_whatever_its_signature(server: Server, cache: Path) -> None:
    server.answers["/a/model.pth"] = Answer(weights_file(1))
    read_weights(f"{server.address}/a/model.pth?Policy=x&Signature=1/2~3")
    assert read_weights(f"{server.address}/a/model.pth?Policy=y&Signature=4")["w"].eq(1).all()
    assert server.requests == ["/a/model.pth?Policy=x&Signature=1/2~3"]
    assert kept(cache) == ["model.pth"]


def test_two_addresses_with_one_file_name_stay_apart(server: Server, cache: Path) -> None:
    for folder, value in (("a", 1.0), ("b", 2.0)):
        server.answers[f"/{folder}/model.pth"] = Answer(weights_file(value))
        assert read_weights(f"{server.address}/{folder}/model.pth")["w"].eq(value).all()
    assert read_weights(f"{server.address}/a/model.pth")["w"].eq(1).all()


def test_addresses_that_name_the_file_in_the_query_stay_apart(server: Server, cache: Path) -> None:
    server.answers["/get"] = Answer(weights_file(1))
    read_weights(f"{server.address}/get?id=1")
    server.answers["/get"] = Answer(weights_file(2))
    assert read_weights(f"{server.address}/get?id=2")["w"].eq(2).all()


def test_redirects_are_followed(server: Server, cache: Path) -> None:
    server.answers["/old.pth"] = Answer(status=302, headers={"Location": "/new.pth"})
    server.answers["/new.pth"] = Answer(weights_file(3))
    assert read_weights(f"{server.address}/old.pth")["w"].eq(3).all()


# --- Hashes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check_hash", [None, True])
def test_a_download_that_is_not_what_its_name_says_is_refused(server: Server, cache: Path, check_hash: bool) -> None:
    server.answers["/model-00000000.pth"] = Answer(weights_file(1))
    with pytest.raises(ValueError, match="its name says 00000000; nothing was kept") as error:
        read_weights(f"{server.address}/model-00000000.pth", check_hash=check_hash)
    assert all(source in str(error.value) for source in LEGAL)
    assert kept(cache) == []


def test_unchecked_it_is_used_with_a_warning_and_never_passed_off_as_the_right_one(
    server: Server, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{server.address}/model-00000000.pth"
    server.answers["/model-00000000.pth"] = Answer(weights_file(1))
    with caplog.at_level(logging.WARNING, "dinov3"):
        assert read_weights(url, check_hash=False)["w"].eq(1).all()
    assert "its name says 00000000" in caplog.text
    assert not (cache / "model-00000000.pth").exists()
    with pytest.raises(ValueError, match="is not the file its name says"):
        read_weights(url, check_hash=True)


def test_cached_and_local_files_are_checked_too(server: Server, cache: Path, tmp_path: Path) -> None:
    for path in (cache / "model-00000000.pth", tmp_path / "model-00000000.pth"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(weights_file(1))
    for source in (f"{server.address}/model-00000000.pth", tmp_path / "model-00000000.pth"):
        assert read_weights(source)["w"].eq(1).all()
        with pytest.raises(ValueError, match="is not the file its name says"):
            read_weights(source, check_hash=True)
    good = tmp_path / named_by_hash(weights_file(1))
    good.write_bytes(weights_file(1))
    assert read_weights(good, check_hash=True)["w"].eq(1).all()


def test_nothing_passes_a_check_for_want_of_a_hash(server: Server, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(weights_file(1))
    for source in (f"{server.address}/model.pth", tmp_path / "model.pth", tmp_path):
        with pytest.raises(ValueError, match="has no hash in its name"):
            read_weights(source, check_hash=True)
    assert server.requests == []


# --- Failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (Answer(b"<Error>AccessDenied</Error>", 403), r"answered 403 \(access refused"),
        (Answer(b"", 401), "answered 401"),
        (Answer(b"gone", 404), r"answered 404 \(no such file"),
        (Answer(b"oh", 500), "answered 500"),
        (Answer(b"<html>Log in</html>", headers={"Content-Type": "text/html; charset=utf-8"}), "with a web page"),
        (Answer(weights_file(1)[:700], length=2000), "nothing was kept, try again"),
    ],
)
def test_a_refused_or_broken_download_says_why_and_leaves_nothing(
    server: Server, cache: Path, answer: Answer, what: str
) -> None:
    server.answers["/secret/model.pth"] = answer
    with pytest.raises(DownloadError, match=what) as error:
        read_weights(f"{server.address}/secret/model.pth?Signature=abc")
    assert kept(cache) == []
    assert "Signature" not in str(error.value)
    if "try again" not in what:
        assert all(source in str(error.value) for source in LEGAL)


def test_a_redirect_to_a_login_page_is_recognised(server: Server, cache: Path) -> None:
    server.answers["/model.pth"] = Answer(status=302, headers={"Location": "/login?next=model.pth"})
    server.answers["/login"] = Answer(b"<html></html>", headers={"Content-Type": "text/html"})
    with pytest.raises(DownloadError, match=r"with a web page in place of weights, after leading to http\S+/login"):
        read_weights(f"{server.address}/model.pth")
    assert kept(cache) == []


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"<!doctype html><title>Sign in</title>", "web page"),
        (b'{"error": "expired"}', "is not a weight file"),
        (b"", "it is empty"),
        (weights_file(1)[:-100], "is cut off"),
    ],
)
@pytest.mark.parametrize("length", [None, -1])
def test_what_only_pretends_to_be_a_file_is_refused(
    server: Server, cache: Path, body: bytes, what: str, length: int | None
) -> None:
    server.answers["/model.pth"] = Answer(body, length=length)
    with pytest.raises(ValueError, match=what) as error:
        read_weights(f"{server.address}/model.pth")
    assert f"what {server.address}/model.pth sent" in str(error.value)
    assert all(source in str(error.value) for source in LEGAL)
    assert kept(cache) == []


def test_a_server_that_is_not_there(cache: Path) -> None:
    with pytest.raises(DownloadError, match="could not be reached"):
        read_weights("http://127.0.0.1:9/model.pth")
    assert kept(cache) == []


# --- Local files and names -------------------------------------------------------------------------------------------


def test_local_files_are_used_where_they_lie(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for folder, value in (("a b", 1.0), ("c", 2.0)):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "model.pth"
        path.write_bytes(weights_file(value))
        for source in (
            path,
            str(path),
            path.as_uri(),
            f"~/{folder}/model.pth",
            f"{folder}/model.pth",
            Path("~") / folder / "model.pth",
        ):
            assert read_weights(source)["w"].eq(value).all(), source
    assert not cache.exists()


@pytest.mark.parametrize(
    "source", ["/no/such/file.pth", "file:///no/such/file.pth", "~/no/such.pth", "runs/typo.pth", Path("a/b")]
)
def test_a_missing_file_says_where_weights_can_be_had(source: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights at") as error:
        read_weights(source)
    assert all(where in str(error.value) for where in LEGAL)


def test_other_kinds_of_sources_are_refused() -> None:
    with pytest.raises(ValueError, match="http://, https:// or file://"):
        read_weights("s3://bucket/model.pth")
    with pytest.raises(TypeError, match="got int"):
        read_weights(3)  # type: ignore[arg-type]


def test_hugging_face_names_are_found_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"hf download facebook/dinov3-x") as error:
        local_path("facebook/dinov3-x")
    assert all(source in str(error.value) for source in LEGAL)

    repository = tmp_path / "models--facebook--dinov3-x"
    (repository / "snapshots" / "old").mkdir(parents=True)
    assert local_path("facebook/dinov3-x") == repository / "snapshots" / "old"
    (repository / "snapshots" / "new").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("new")
    assert local_path("facebook/dinov3-x") == repository / "snapshots" / "new"


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HOME": "/d", "USERPROFILE": "/d"}, "/d/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_looked_for_where_hugging_face_keeps_it(
    variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dinov3.checkpointer.sources import huggingface_cache

    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert huggingface_cache() == Path(folder)
