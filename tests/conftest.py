"""What several folders of tests need: benchmark scripts as modules, and a guard on the network for other processes."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
GUARD = """
import os, socket
_connect, _getaddrinfo = socket.socket.connect, socket.getaddrinfo
def _refuse(what):
    with open(os.environ["NETWORK_LOG"], "a") as log:
        log.write(f"{what}\\n")
    raise OSError(f"network use: {what}")
def connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(("127.", "::1", "localhost")):
        _refuse(address)
    return _connect(self, address)
def getaddrinfo(host, *args, **kwargs):
    if host not in (None, "", "localhost", "127.0.0.1", "::1", socket.gethostname(), *ALSO):
        _refuse(host)
    return _getaddrinfo(host, *args, **kwargs)
socket.socket.connect, socket.getaddrinfo = connect, getaddrinfo
with open(os.environ["NETWORK_LOG"] + ".armed", "w"):
    pass
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped where there is none. Files with slow tests come first, so that no process waits for one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _module_of(file: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def module_of() -> Callable[[Path, str], ModuleType]:
    """(file, name) -> the file as a module of that name: the folders of tests are no packages."""
    return _module_of


@pytest.fixture(scope="session")
def benchmark_module() -> Callable[..., ModuleType]:
    """(name of a script of benchmarks/, the scripts `beside` it that it imports) -> the first as a module; `benchmarks/` itself
    is no package."""

    def load(name: str, beside: str | tuple[str, ...] = ()) -> ModuleType:
        others = (beside,) if isinstance(beside, str) else beside
        with pytest.MonkeyPatch.context() as patch:
            if others:
                patch.syspath_prepend(str(ROOT / "benchmarks"))
            module = _module_of(ROOT / "benchmarks" / f"{name}.py", f"benchmark_{name}")
        for other in others:
            sys.modules.pop(other)
        return module

    return load


@pytest.fixture(scope="session")
def write_network_guard() -> Callable[..., None]:
    """(folder, *also): writes a `sitecustomize.py` that lets processes with `folder` on their path touch loopback only.

    `also`: further spellings of loopback that names may be looked up by. What is refused is a line of $NETWORK_LOG.
    """

    def write(folder: Path, *also: object) -> None:
        (folder / "sitecustomize.py").write_text(f"ALSO = {also!r}\n{GUARD}")

    return write
