"""Skeletons: the true shapes without a value, and random values that a forward and a backward pass survive."""

from functools import partial
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from loragraft.adapters.inject import inject_adapter
from loragraft.backbones.architectures import FLUX
from loragraft.backbones.flow import flow_loss, predict_velocity
from loragraft.backbones.skeleton import meta_transformer, plan_architecture, randomize
from loragraft.kernels.layout import word_bytes
from loragraft.quantization.checkpoint import load_quantized, recorded_base_id, save_quantized
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.settings import QuantSettings
from loragraft.recipes.schema import AdapterConfig

TINY: dict[str, Any] = {
    "patch_size": 1, "in_channels": 64, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 64,
    "num_attention_heads": 2, "joint_attention_dim": 96, "pooled_projection_dim": 32, "guidance_embeds": False,
    "axes_dims_rope": (16, 24, 24),
}  # fmt: skip
DEV: dict[str, Any] = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip


def _skeleton(main: QuantSettings, config: dict[str, Any] = TINY) -> nn.Module:
    return meta_transformer(FluxTransformer2DModel, config, partial(plan_architecture, FLUX, main))


def _text() -> dict[str, torch.Tensor]:
    return {"prompt_embeds": torch.randn(1, 5, 96), "pooled_prompt_embeds": torch.randn(1, 32)}


def test_flux_dev_has_its_true_size_and_no_bytes() -> None:
    model = _skeleton(QuantSettings(rank=32), DEV)
    tensors = [*model.parameters(), *model.buffers()]
    assert all(tensor.is_meta for tensor in tensors)
    layers = [m for m in model.modules() if isinstance(m, SVDQuantLinear)]
    assert len(layers) == 19 * 12 + 38 * 5 + 19 * 2 + 38
    total = sum(t.numel() for t in model.parameters()) + sum(m.in_features * m.out_features for m in layers)
    assert total == pytest.approx(11.9e9, rel=0.005)
    # half a byte a weight, 4 bytes a row and 128 columns, the branch of rank 32 in 16 bits; 16-bit layers counted as such
    nbytes = sum(m.nbytes for m in layers) + 2 * sum(p.numel() for p in model.parameters())
    assert 6.0 < nbytes / 2**30 < 7.0


@pytest.mark.parametrize(
    "main",
    [
        QuantSettings(rank=8),
        QuantSettings(rank=8, smoothing="hadamard", group_size=128),
        QuantSettings("w4a4", rank=8),
        QuantSettings(rank=0, smoothing="none"),
    ],
    ids=["w4a8", "hadamard-g128", "w4a4", "rank-0"],
)
def test_random_values_are_tame(main: QuantSettings) -> None:
    model = randomize(_skeleton(main), "cpu", torch.float32, seed=1)
    for layer in model.modules():
        if isinstance(layer, SVDQuantLinear):
            weight = layer.dequantized_weight()
            assert weight.std().item() * layer.in_features**0.5 == pytest.approx(1, abs=0.15)
            assert weight.mean().abs().item() < 0.1 * weight.std().item()
            if layer.numerics == "w4a8":
                scale, offset = word_bytes(layer.group_words)
                zero = (128 - offset) // scale
                assert ((15 - zero) * scale).max() <= 119
                assert (zero * scale).max() <= 119
    torch.manual_seed(0)
    with torch.no_grad():
        velocity = predict_velocity(model, torch.randn(1, 16, 8, 8), torch.tensor([0.5]), _text())
    assert 0.1 < velocity.std().item() < 10


def test_random_weights_train_and_travel(tmp_path: Any) -> None:
    model = randomize(_skeleton(QuantSettings(rank=8)), "cpu", torch.float32)
    folder = save_quantized(model, tmp_path / "int4")  # what is stored is legal for the reader
    again = load_quantized(folder, FluxTransformer2DModel)
    ours, theirs = model.transformer_blocks[0].attn.to_q, again.transformer_blocks[0].attn.to_q  # type: ignore[union-attr, index]
    assert torch.equal(ours.group_words, theirs.group_words)  # type: ignore[union-attr]
    parameters = inject_adapter(model, AdapterConfig(rank=4, alpha=4), FLUX.quantize)
    torch.manual_seed(0)
    latents = torch.randn(1, 16, 8, 8)
    flow_loss(model, latents, torch.randn_like(latents), torch.tensor([0.5]), _text()).backward()
    gradients = [p.grad for p in parameters]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert sum(float(g.norm()) for g in gradients if g is not None) > 0


@pytest.mark.parametrize(("smoothing", "smoothed"), [("auto", True), ("hadamard", False), ("none", False)])
def test_smoothing_is_known_before_the_values(smoothing: Any, smoothed: bool) -> None:
    """Layers without smoothing share the codes of their input, which memory predictions must see."""
    model = _skeleton(QuantSettings(rank=8, smoothing=smoothing))
    layer: Any = model.get_submodule("transformer_blocks.0.attn.to_q")
    assert layer.smoothed is smoothed
    randomize(model, "cpu", torch.float32)
    assert layer.smoothed is smoothed


def test_seeds_decide() -> None:
    def ids_and_codes(seed: int) -> tuple[str, torch.Tensor]:
        model = randomize(_skeleton(QuantSettings(rank=8)), "cpu", torch.bfloat16, seed)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        return recorded_base_id(model), model.transformer_blocks[0].attn.to_q.qweight  # type: ignore[union-attr, index, return-value]

    first, again, other = ids_and_codes(3), ids_and_codes(3), ids_and_codes(4)
    assert first[0] == again[0] != other[0]
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_a_wrong_path_is_named() -> None:
    with pytest.raises(ValueError, match=r"no linear layer of the model; nearest: .*to_q"):
        meta_transformer(FluxTransformer2DModel, TINY, {"transformer_blocks.0.attn.to_qq": QuantSettings()})
