"""Fixtures: `pocket` with two adapters that change every picture, one of them of another base."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from loragraft.backbones.load import load_backbone
from loragraft.demo.catalogue import Catalogue
from loragraft.demo.engine import Engine

OTHER_BASE = "0123456789abcdef" * 4


@pytest.fixture(scope="package")
def driver(module_of: Callable[[Path, str], ModuleType]) -> ModuleType:
    """driver.py, which screenshots.py imports as a script does."""
    return module_of(Path(__file__).with_name("driver.py"), "demo_driver")


@dataclass(frozen=True)
class Runs:
    """A folder of runs with the adapters `ours`, `second` and `foreign`, whose base is `OTHER_BASE`."""

    folder: Path
    base_id: str
    other_base: str = OTHER_BASE


@pytest.fixture(scope="package")
def runs(driver: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    backbone = load_backbone("pocket", "native", "cpu", folder / "cache")
    for seed, (name, base_id) in enumerate(
        (("ours", backbone.base_id), ("second", backbone.base_id), ("foreign", OTHER_BASE))
    ):
        driver.write_random_adapter(
            backbone.transformer, folder / name / "adapter", base_id, name=name, seed=seed, strength=0.5
        )
    return Runs(folder, backbone.base_id)


@pytest.fixture(scope="package")
def engine(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """On one thread, as the tests of a busy machine should."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Engine(Catalogue([runs.folder]), "cpu", tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(threads)
