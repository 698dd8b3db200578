"""What holds for every test: one thread, fixed seeds, no network, its own cache, which tests a plain run leaves out."""

import ipaddress
import os
import random
import socket
import tempfile
from pathlib import Path
from typing import Any

# Before torch starts its thread pool. Processes that tests start inherit these.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Lists of images are kept here instead of in the user's cache.
_cache = tempfile.TemporaryDirectory(prefix="dinov3-tests-")
os.environ.setdefault("DINOV3_CACHE", _cache.name)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from tests.helpers.wheel import build_wheel  # noqa: E402

_real_connect = socket.socket.connect
_real_connect_ex = socket.socket.connect_ex


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow as well")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what was not asked for, and skip what this machine cannot run."""
    expression = config.option.markexpr or ""
    left_out = {
        "slow": not (config.getoption("--run-slow") or "slow" in expression),
        "network": "network" not in expression,
    }
    kept, deselected = [], []
    for item in items:
        out = any(absent and item.get_closest_marker(name) for name, absent in left_out.items())
        (deselected if out else kept).append(item)
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = kept

    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    for item in items:
        for name, needed in {"gpu": 1, "multi_gpu": 2}.items():
            if item.get_closest_marker(name) and devices < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} accelerator(s), this machine has {devices}"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection that leaves this machine (tests may talk to servers of their own on it)."""
    if request.node.get_closest_marker("network"):
        return

    def connect(self: socket.socket, address: Any) -> None:
        _refuse_foreign(self, address)
        _real_connect(self, address)

    def connect_ex(self: socket.socket, address: Any) -> int:
        _refuse_foreign(self, address)
        return _real_connect_ex(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", connect_ex)


def _refuse_foreign(sock: socket.socket, address: Any) -> None:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    host = str(address[0])
    if host in ("", "localhost", "0.0.0.0", "::", socket.gethostname()):
        return
    try:
        foreign = not ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:  # a name
        foreign = True
    if foreign:
        raise ConnectionRefusedError(
            f"a test tried to reach {address[:2]}: serve the data on 127.0.0.1, or mark it `network`"
        )
