"""The certificate: true for grafts of either kind, and false for a branch that is not what the kernel multiplies."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from loragraft.adapters.certificate import certify
from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.graft import graft, ungraft
from loragraft.adapters.resident import ResidentAdapters
from loragraft.quantization.checkpoint import quantized_layers

TO_Q, ADALN = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.norm1.linear"


@pytest.fixture
def probe(flux: FluxTransformer2DModel) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(5)
    return {path: torch.randn(2, 9, m.in_features, generator=random) for path, m in quantized_layers(flux).items()}


@pytest.mark.parametrize("resident", [False, True])
def test_grafts_are_certified_and_left_as_they_are(
    flux: FluxTransformer2DModel, make_adapter: Callable[..., Adapter], probe: dict[str, Tensor], resident: bool
) -> None:
    a, b = make_adapter("a", 0), make_adapter("b", 1, rank=7)
    if resident:
        adapters = ResidentAdapters(flux)
        adapters.add(a)
        adapters.add(b, 0.4)
    else:
        graft(flux, a)
        graft(flux, b, 0.4)
    branches = {path: (layer.lora_down, layer.lora_up) for path, layer in quantized_layers(flux).items()}
    found = certify(flux, probe)
    assert found.passed, str(found)
    assert 0 <= found.rel_dev_fp32 <= 1e-5
    assert 0 <= found.rel_dev_bf16 <= 5e-3
    assert (found.rows, len(found.float32)) == (18, len(probe))
    assert min(row.effect for row in found.float32) > 0.05
    assert str(found).startswith("passed")
    for path, layer in quantized_layers(flux).items():
        assert layer.lora_down is branches[path][0]
        assert layer.lora_up is branches[path][1]


def test_a_layer_that_computes_something_else_fails(
    flux: FluxTransformer2DModel, make_adapter: Callable[..., Adapter], probe: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    graft(flux, make_adapter("a", 0))
    layer = quantized_layers(flux)[TO_Q]
    forward = layer.forward
    wide = layer.rank

    def lossy(x: Tensor, *args: Any) -> Tensor:
        y = forward(x, *args)
        return y * 1.001 if layer.rank == wide else y

    monkeypatch.setattr(layer, "forward", lossy)
    found = certify(flux, {TO_Q: probe[TO_Q]})
    assert not found.passed
    assert found.rel_dev_fp32 == pytest.approx(1e-3, rel=1e-2)
    assert str(found).startswith("FAILED")


def test_what_cannot_be_certified(
    flux: FluxTransformer2DModel, make_adapter: Callable[..., Adapter], probe: dict[str, Tensor]
) -> None:
    graft(flux, make_adapter("a", 0, paths=[TO_Q]))
    with pytest.raises(ValueError, match="carries no graft"):
        certify(flux, {ADALN: probe[ADALN]})
    with pytest.raises(ValueError, match="is no INT4 layer"):
        certify(flux, {"x_embedder": probe[TO_Q]})
    with pytest.raises(ValueError, match="empty"):
        certify(flux, {})
    ungraft(flux, "a")
    with pytest.raises(ValueError, match="carries no graft"):
        certify(flux, {TO_Q: probe[TO_Q]})


@pytest.mark.gpu
def test_on_a_gpu(flux: FluxTransformer2DModel, make_adapter: Callable[..., Adapter], probe: dict[str, Tensor]) -> None:
    """The Triton kernels on branches of padded rank, switched in place, in both dtypes."""
    flux.to("cuda")
    adapters = ResidentAdapters(flux, room=8)
    adapters.add(make_adapter("a", 0))
    adapters.add(make_adapter("b", 1, rank=7), active=False)
    for names in (("a",), ("b",), ("b", "a")):
        assert adapters.activate(*names).seconds > 0
        found = certify(flux, probe)
        assert found.passed, str(found)
