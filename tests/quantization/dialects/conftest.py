"""Fixtures of the dialect tests: the packing formulas as index arithmetic, and a maker of Nunchaku files built on them."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"dialect_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def formulas() -> ModuleType:
    return _load("formulas")


@pytest.fixture(scope="session")
def nunchaku_maker() -> ModuleType:
    return _load("nunchaku_maker")
