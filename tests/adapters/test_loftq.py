"""LoftQ's start: the best low-rank make-up for what quantization took, in the space that an adapter reads."""

from collections.abc import Callable

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from loragraft.adapters.inject import adapter_factors, inject_adapter, remove_adapter
from loragraft.adapters.loftq import compensate, loftq_factors, residual
from loragraft.quantization.branched import BranchedLinear
from loragraft.quantization.conv import SVDQuantConv2d
from loragraft.quantization.convert import plan_layers, quantize_model
from loragraft.quantization.quantized_linear import from_linear
from loragraft.quantization.settings import QuantSettings
from loragraft.recipes.schema import AdapterConfig

RANK = 6
KINDS = [("w4a8", "hadamard"), ("w4a8", "weight"), ("w4a4", "weight"), ("w4a16", "none"), ("int2", "none"), ("nf4", "none")]  # fmt: skip
LAYERS = (r"transformer_blocks\.0\.attn\.to_q", r"single_transformer_blocks\.0\.proj_out")


def quantized(numerics: str, smoothing: str) -> tuple[nn.Linear, BranchedLinear]:
    """A linear layer whose columns differ in size, and the same quantized."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        linear = nn.Linear(192, 96).requires_grad_(False)
        linear.weight *= torch.logspace(-1, 1, 192)
    rank = 4 if numerics.startswith("w4a") else None
    settings = QuantSettings(numerics, smoothing=smoothing, rank=rank, iterations=1, grid=1)  # type: ignore[arg-type]
    return linear, from_linear(linear, None, settings)[0]


@pytest.mark.parametrize(("numerics", "smoothing"), KINDS)
def test_it_is_the_best_approximation_and_reads_raw_inputs(numerics: str, smoothing: str) -> None:
    """No other factors of this rank leave a smaller error, weighed with the smoothing; beside the layer they act on x itself."""
    linear, layer = quantized(numerics, smoothing)
    down, up = loftq_factors(layer, residual(layer, linear.weight), RANK)
    smooth = getattr(layer, "smooth", None)
    size = torch.ones(192) if smooth is None else smooth.float()
    lost = (linear.weight - layer.dequantized_weight()) * size
    best = torch.linalg.svdvals(lost)[RANK:].square().sum().sqrt()
    assert (lost - up @ down * size).norm() <= 1.001 * best
    torch.testing.assert_close((down * size).norm(dim=1), up.norm(dim=0))
    x = torch.randn(32, 192, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x, down, up) - layer(x), (x @ down.T) @ up.T, rtol=1e-3, atol=1e-2)
    whole = layer.dequantized_weight() + up @ down
    assert (linear.weight - whole).norm() < 0.97 * (linear.weight - layer.dequantized_weight()).norm()


def test_a_convolutions_start_has_a_convolutions_shapes() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        conv = nn.Conv2d(48, 32, 3, padding=1).requires_grad_(False)
    settings = QuantSettings("w4a8", smoothing="weight", rank=4, iterations=1, grid=1)
    layer, _ = SVDQuantConv2d.from_conv(conv, None, settings)
    lost = residual(layer, conv.weight)
    down, up = loftq_factors(layer, lost, RANK)
    assert (down.shape, up.shape) == ((RANK, 48, 3, 3), (32, RANK, 1, 1))
    left = lost.flatten(1) - up.flatten(1) @ down.flatten(1)
    assert left.norm() < 0.97 * lost.norm()
    assert residual(layer, layer.kernel_weight()).abs().max() == 0


def test_what_cannot_be_made_up_for_is_refused() -> None:
    linear, layer = quantized("w4a8", "weight")
    lost = residual(layer, linear.weight)
    with pytest.raises(ValueError, match=r"'fc': the 16-bit weight is \(96, 64\), the quantized layer \(96, 192\)"):
        residual(layer, linear.weight[:, :64], "fc")
    with pytest.raises(ValueError, match=r"'fc': .*cannot start rank 97 on a layer of \(96, 192\): lower adapter.rank"):
        loftq_factors(layer, lost, 97, "fc")
    with pytest.raises(ValueError, match="'fc': quantization lost nothing there"):
        loftq_factors(layer, torch.zeros_like(lost), RANK, "fc")


@pytest.mark.parametrize("alpha", [float(RANK), 16.0])
def test_a_model_starts_nearer_to_its_16_bit_self(
    plain_flux: FluxTransformer2DModel, flux_inputs: Callable[[int], dict[str, Tensor]], alpha: float
) -> None:
    """In its output too, whatever alpha; only targets that were injected have a start."""
    weights = {path: m.weight.clone() for path, m in plain_flux.named_modules() if isinstance(m, nn.Linear)}
    inputs = flux_inputs(1)
    with torch.no_grad():
        exact = plain_flux(**inputs).sample
    rules = dict.fromkeys(LAYERS, QuantSettings("int2", smoothing="none", rank=None))
    keep = (rf"(?!{'|'.join(LAYERS)}).*",)
    quantize_model(plain_flux, plan_layers(plain_flux, rules, keep), {}, keep=keep)
    inject_adapter(plain_flux, AdapterConfig(rank=RANK, alpha=alpha), LAYERS)

    def distance() -> float:
        with torch.no_grad():
            return float((plain_flux(**inputs).sample - exact).norm())

    before, read = distance(), list[str]()
    found = compensate(plain_flux, lambda path: read.append(path) or weights[path])  # type: ignore[func-returns-value]
    assert sorted(read) == sorted(adapter_factors(plain_flux))
    assert (found.layers, found.rank) == (2, RANK)
    assert found.error_after < 0.97 * found.error_before
    assert f"{100 * found.error_after:.2f} %" in str(found)
    assert distance() < 0.99 * before
    remove_adapter(plain_flux)
    assert distance() == before


def test_a_16_bit_layer_has_no_error(plain_flux: FluxTransformer2DModel) -> None:
    inject_adapter(plain_flux, AdapterConfig(rank=2), [LAYERS[0]])
    with pytest.raises(ValueError, match=r"'transformer_blocks.0.attn.to_q' is not quantized"):
        compensate(plain_flux, lambda path: torch.zeros(128, 128))
