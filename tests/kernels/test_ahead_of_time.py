"""Every kernel becomes machine code for every architecture, without a GPU.

By default each architecture compiles the builds marked quick; LORAGRAFT_COMPILE=all compiles the whole table.
"""

import importlib
import os
from pathlib import Path

import pytest
from triton.runtime.jit import JITFunction

from loragraft.kernels import compile_table
from loragraft.kernels.compile_table import ARCHITECTURES, PORTABLE_SHARED, TABLE, Build, compile_build

KERNELS = Path(compile_table.__file__).parent
EVERYTHING = os.environ.get("LORAGRAFT_COMPILE") == "all"
BUILDS = [
    pytest.param(build, capability, id=f"sm_{capability}-{build}")
    for capability in ARCHITECTURES
    for build in TABLE
    if build.least <= capability <= build.most and (build.quick or EVERYTHING)
]
pytestmark = pytest.mark.not_interpreted


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(("build", "capability"), BUILDS)
def test_compiles(build, capability):
    metadata = compile_build(build, capability)
    assert metadata.target.arch == capability
    if build.portable:
        assert metadata.shared <= PORTABLE_SHARED, f"{metadata.shared} bytes of shared memory"


def test_every_launched_kernel_is_in_the_table():
    """A kernel is what a module of kernels/ names *_kernel."""
    modules = (importlib.import_module(f"loragraft.kernels.{file.stem}") for file in KERNELS.glob("*.py"))
    missing = {
        name
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, JITFunction)
    } - {build.kernel.__name__ for build in TABLE}
    assert missing == set()


def test_every_run_compiles_every_kernel_for_every_architecture_that_has_it():
    for capability in ARCHITECTURES:
        here = [build for build in TABLE if build.least <= capability <= build.most]
        kernels, quick = ({b.kernel.__name__ for b in here if b.quick or all_} for all_ in (True, False))
        assert quick, capability
        assert kernels - quick == set(), capability
    assert {build.most for build in TABLE if build.least <= 75} == {79}


def test_a_build_that_does_not_fit_its_kernel_is_named():
    kernel = TABLE[0].kernel
    with pytest.raises(ValueError, match="no argument"):
        compile_build(Build(kernel, {**TABLE[0].constants, "NO": 1}), 80)
    with pytest.raises(ValueError, match="constexpr UNSIGNED"):
        compile_build(Build(kernel, {"HAS_SMOOTH": True, "HADAMARD": False}), 80)
