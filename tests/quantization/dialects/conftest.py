"""Fixtures of the dialect tests: the packing formulas as index arithmetic, and a maker of Nunchaku files built on them."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from loragraft.quantization.checkpoint import quantized_layers
from loragraft.quantization.convert import plan_layers, quantize_model
from loragraft.quantization.settings import QuantSettings


@pytest.fixture(scope="session")
def formulas(module_of: Callable[[Path, str], ModuleType]) -> ModuleType:
    return module_of(Path(__file__).with_name("formulas.py"), "dialect_formulas")


@pytest.fixture(scope="session")
def nunchaku_maker(module_of: Callable[[Path, str], ModuleType]) -> ModuleType:
    return module_of(Path(__file__).with_name("nunchaku_maker.py"), "dialect_nunchaku_maker")


@pytest.fixture
def interchange_flux(
    tiny_flux: FluxTransformer2DModel, flux_rules: Callable[..., dict[str, QuantSettings]], flux_keep: tuple[str, ...]
) -> FluxTransformer2DModel:
    """W4A4 of rank 16 with W4A16 adaLN, data-free, all in bfloat16."""
    model = tiny_flux.to(torch.bfloat16)
    plan = plan_layers(model, flux_rules("w4a4", smoothing="weight", rank=16, iterations=1, grid=1), flux_keep)
    quantize_model(model, plan, {}, keep=flux_keep)
    return model


def _same_model(first: nn.Module, second: nn.Module) -> None:
    """The same tensors, bit for bit, and the same meaning of every quantized layer."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    again = quantized_layers(second)
    for path, layer in quantized_layers(first).items():
        assert repr(layer) == repr(again[path]), path


@pytest.fixture(scope="session")
def same_model() -> Callable[[nn.Module, nn.Module], None]:
    return _same_model
