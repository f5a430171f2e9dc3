"""Sizes are what the checkpoints hold; memory is this process's."""

import mmap
from pathlib import Path

import pytest
import torch

from loragraft.backbones.load import find_spec
from loragraft.demo.catalogue import Catalogue
from loragraft.demo.engine import Engine
from loragraft.demo.figures import MIB, adapter_size, memory
from loragraft.quantization.tensor_file import read_tensors


def stored(folder: Path) -> float:
    """MiB of the tensors in a checkpoint."""
    files = list(folder.glob("*.safetensors"))
    assert files
    return sum(tensor.nbytes for file in files for tensor in read_tensors(file)[0].values()) / MIB


def test_model_sizes_are_those_of_the_shipped_tensors(engine: Engine) -> None:
    engine.backbone("pocket", "native")
    assert engine.loaded is not None
    spec = find_spec("pocket")
    assert engine.loaded.size.int4 == pytest.approx(stored(spec.transformer_int4["native"]), rel=1e-3)
    assert engine.loaded.size.full == pytest.approx(stored(spec.transformer_16bit), rel=1e-3)


def test_adapter_size_is_two_bytes_a_value(engine: Engine) -> None:
    adapter = engine.catalogue.load("ours")
    values = sum(down.numel() + up.numel() for down, up in adapter.pairs.values())
    assert adapter_size([adapter, adapter]) == pytest.approx(4 * values / MIB)
    assert adapter_size([]) == 0


def test_memory_sees_what_is_allocated() -> None:
    before = memory(torch.device("cpu"))
    with mmap.mmap(-1, 200 * MIB) as block:  # pages of its own: an array might get what earlier tests have freed
        block[:: mmap.PAGESIZE] = b"x" * (200 * MIB // mmap.PAGESIZE)
        after = memory(torch.device("cpu"))
    assert after.resident - before.resident > 150
    assert after.peak_resident >= after.resident
    assert after.peak_cuda is None


def test_a_fresh_engine_has_loaded_nothing(tmp_path: Path) -> None:
    assert Engine(Catalogue([]), "cpu", tmp_path).loaded is None
