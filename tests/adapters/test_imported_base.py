"""Training and grafting on a base as Nunchaku's files make it: W4A4, with unsigned columns behind the GELU."""

from collections.abc import Callable

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.graft import graft, ungraft
from loragraft.adapters.inject import adapter_factors, inject_adapter, remove_adapter
from loragraft.kernels.layout import relative_rms
from loragraft.quantization.checkpoint import base_id, record_base_id
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.names import replace_module
from loragraft.quantization.numerics import convert_numerics
from loragraft.recipes.schema import AdapterConfig

UNSIGNED = {"transformer_blocks.0.ff.net.2": 0, "single_transformer_blocks.0.proj_out": 128}


@pytest.fixture
def imported(flux: FluxTransformer2DModel) -> FluxTransformer2DModel:
    convert_numerics(flux, "w4a4")
    for path, first in UNSIGNED.items():
        layer = flux.get_submodule(path)
        assert isinstance(layer, SVDQuantLinear)
        share = (layer.dequantized_codes(torch.float32) / layer.smooth.float())[:, first:].sum(dim=1)
        tensors = dict(layer.named_buffers()) | {"bias": layer.bias - 0.171875 * share}
        K, N = layer.in_features, layer.out_features
        replace_module(flux, path, SVDQuantLinear(K, N, "w4a4", tensors, act_unsigned=True, unsigned_from=first))
    record_base_id(flux)
    return flux


def test_an_adapter_trains_and_its_graft_is_what_was_trained(
    imported: FluxTransformer2DModel, flux_inputs: Callable[[int], dict[str, Tensor]]
) -> None:
    inputs, identity = flux_inputs(0), base_id(imported)
    before = imported(**inputs).sample
    target = before + 0.3 * torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    patterns = [path.replace(".", r"\.") for path in UNSIGNED]
    parameters = inject_adapter(imported, AdapterConfig(rank=4, alpha=4.0), patterns)
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    losses = []
    for _ in range(12):
        loss = (imported(**inputs).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    trained = imported(**inputs).sample.detach()
    pairs = {
        path: tuple(t.detach().bfloat16().float() for t in pair) for path, pair in adapter_factors(imported).items()
    }
    remove_adapter(imported)
    assert base_id(imported) == identity
    assert torch.equal(imported(**inputs).sample, before)
    graft(imported, Adapter("ours", {"base_id": identity}, pairs))  # type: ignore[arg-type]
    assert relative_rms(imported(**inputs).sample, trained) < 0.2 * relative_rms(trained, before)  # factors in bfloat16
    ungraft(imported, "ours")
    assert torch.equal(imported(**inputs).sample, before)
