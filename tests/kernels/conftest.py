"""Every kernel test runs on each device and dtype that this process can check.

On the CPU the ops take their torch path; in a process started with TRITON_INTERPRET=1 (test_interpreter.py starts one) the
same tests run the Triton source; on a CUDA machine they run the compiled kernels. Interpreted bf16 dots are wrong.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if HAS_CUDA else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
DTYPES = [torch.float32, torch.float16] if INTERPRETED else list(TOLERANCE)


def pytest_configure(config):
    config.addinivalue_line("markers", "not_interpreted: about torch's machinery; skipped under TRITON_INTERPRET=1")


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="torch machinery, not Triton source: nothing to interpret")
    for item in items:
        if INTERPRETED and item.get_closest_marker("not_interpreted"):
            item.add_marker(skip)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture
def tolerance(dtype):
    """Bound of relative_rms against the float64 reference."""
    return TOLERANCE[dtype]


@pytest.fixture
def poison(monkeypatch):
    """torch.empty and its kin return NaN (or the largest integer): memory that a kernel reads or leaves unwritten shows."""

    def poisoned(function):
        def wrapper(*args, **kwargs):
            tensor = function(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

        return wrapper

    for owner, name in (
        (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
        (torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
