"""LoRA through PEFT on quantized layers: targets, gradients, a frozen base, and what is refused."""

from collections.abc import Callable

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from loragraft.adapters.inject import (
    SVDQuantLoraLinear,
    adapter_factors,
    expand_targets,
    inject_adapter,
    load_factors,
    remove_adapter,
)
from loragraft.kernels.act_quant import dequantize_activation, quantize_activation, smooth_and_rotate
from loragraft.kernels.layout import relative_rms
from loragraft.quantization.calibrate import ActivationStats
from loragraft.quantization.checkpoint import base_id
from loragraft.quantization.ledger import build_ledger
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.settings import Numerics, QuantSettings
from loragraft.recipes.schema import AdapterConfig

Inputs = Callable[[int], dict[str, Tensor]]
ATTENTION = r"(single_)?transformer_blocks\.\d+\.attn\.to_[qkv]"
CONFIG = AdapterConfig(rank=4, alpha=8.0)


def _model(layer: SVDQuantLinear) -> nn.ModuleDict:
    """PEFT asks the model's first parameter for its device, so there must be one."""
    return nn.ModuleDict({"fc": layer, "head": nn.Linear(2, 2)})


def test_a_few_steps_train_the_adapter_and_nothing_else(flux: FluxTransformer2DModel, flux_inputs: Inputs) -> None:
    before, identity = flux(**flux_inputs(0)).sample, base_id(flux)
    targets = [ATTENTION, r"transformer_blocks\.\d+\.norm1\.linear", r"single_transformer_blocks\.\d+\.proj_out"]
    parameters = inject_adapter(flux, CONFIG, targets)
    assert len(parameters) == 2 * 8
    assert {id(p) for p in flux.parameters() if p.requires_grad} == {id(p) for p in parameters}
    assert all(p.dtype == torch.float32 for p in parameters)
    assert torch.equal(flux(**flux_inputs(0)).sample, before)  # B = 0
    optimizer = torch.optim.AdamW(parameters, lr=3e-2)
    losses = []
    for _ in range(4):
        loss = (flux(**flux_inputs(0)).sample - 1).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    assert base_id(flux) == identity
    assert all(up.abs().max() > 0 for _, up in adapter_factors(flux).values())
    remove_adapter(flux)
    assert torch.equal(flux(**flux_inputs(0)).sample, before)
    assert not any(isinstance(module, SVDQuantLoraLinear) for module in flux.modules())
    inject_adapter(flux, CONFIG, targets)  # nothing of the first is left in the way


@pytest.mark.parametrize(("numerics", "hadamard"), [("w4a8", False), ("w4a8", True), ("w4a4", False), ("w4a16", False)])
def test_gradients_equal_autograd_over_the_dequantized_layer(numerics: Numerics, hadamard: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(192, 96).requires_grad_(False)
    linear.weight.data = torch.randn(96, 192, generator=generator) * 0.1
    x = torch.randn(2, 17, 192, generator=generator)
    stats = ActivationStats(x.abs().amax((0, 1)), x.view(-1, 192))
    smoothing = "hadamard" if hadamard else None
    base, _ = SVDQuantLinear.from_linear(
        linear, stats, QuantSettings(numerics, rank=8, smoothing=smoothing, iterations=2)
    )
    base.save_x = "raw"  # the exact reference for dA
    model = _model(base)
    parameters = inject_adapter(model, CONFIG, ["fc"])
    parameters[1].data = torch.randn(96, 4, generator=generator) * 0.2
    dy = torch.randn(2, 17, 96, generator=generator)
    x.requires_grad_(True)
    y = model["fc"](x)
    gradients = torch.autograd.grad(y, [x, *parameters], dy)

    x64, A, B = (t.detach().double().requires_grad_(True) for t in (x, *parameters))
    x_seen = x64
    if numerics != "w4a16":  # straight through: rounded forward, identity backward
        flat = x.detach().view(-1, 192)
        codes, scale = quantize_activation(flat, base.smooth, hadamard, 8 if numerics == "w4a8" else 4)
        rounded = smooth_and_rotate(dequantize_activation(codes, scale, torch.float64)[:, :192], None, hadamard)
        x_seen = x64 + ((rounded * base.smooth.double()).view_as(x64) - x64).detach()
    branch = base.lora_up.double() @ base.lora_down.double()
    residual = base.dequantized_weight(torch.float64) - branch
    expected = x_seen @ residual.T + x64 @ branch.T + base.bias.double() + 2.0 * (x64 @ A.T) @ B.T
    reference = torch.autograd.grad(expected, [x64, A, B], dy.double())
    assert relative_rms(y, expected) < 1e-5
    for got, wanted in zip(gradients, reference, strict=True):
        assert relative_rms(got, wanted) < 1e-3

    base.save_x = "quantized"
    dA = torch.autograd.grad(model["fc"](x), parameters[0], dy)[0]
    assert relative_rms(dA, reference[1]) < {"w4a8": 0.02, "w4a4": 0.2, "w4a16": 1e-3}[numerics]


def test_factors_are_seeded_and_drawn_as_peft_draws_them(flux: FluxTransformer2DModel) -> None:
    torch.manual_seed(5)
    first = [p.clone() for p in inject_adapter(flux, CONFIG, [ATTENTION])]
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    remove_adapter(flux)
    torch.manual_seed(6)
    second = inject_adapter(flux, CONFIG, [ATTENTION])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    remove_adapter(flux)
    other = inject_adapter(flux, AdapterConfig(rank=4, alpha=8.0, seed=1), [ATTENTION])
    assert not torch.equal(first[0], other[0])
    bound = 1 / 128**0.5  # Kaiming uniform with a = sqrt 5
    assert 0.9 * bound < first[0].abs().max() <= bound
    assert all(p.abs().max() == 0 for p in first[1::2])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_several_active_adapters_add_up() -> None:
    base, _ = SVDQuantLinear.from_linear(
        nn.Linear(64, 32), None, QuantSettings(smoothing="weight", rank=2, iterations=1)
    )
    model = _model(base)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["fc"], init_lora_weights=False)
    config._register_custom_module({SVDQuantLinear: SVDQuantLoraLinear})
    for name in ("one", "two"):
        inject_adapter_in_model(config, model, adapter_name=name)
    layer, x = model["fc"], torch.randn(5, 64)
    layer.set_adapter(["one", "two"])
    expected = base(x) + x @ (layer.get_delta_weight("one") + layer.get_delta_weight("two")).T
    assert relative_rms(layer(x), expected) < 1e-5
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base(x))


def test_targets_match_whole_paths(flux: FluxTransformer2DModel) -> None:
    assert expand_targets(flux, [r"single_transformer_blocks\.0\.proj_out"]) == ["single_transformer_blocks.0.proj_out"]
    with pytest.raises(ValueError, match=r"'proj_out' matches 'proj_out', a Linear, not a quantized layer"):
        expand_targets(flux, ["proj_out"])
    with pytest.raises(ValueError, match=r"matches no module path.*nearest: .*attn\.to_q"):
        expand_targets(flux, [r"transformer_blocks\.0\.attn\.to_queue"])
    with pytest.raises(ValueError, match=r"'transformer_blocks\.0\.attn\.to_out', a ModuleList"):
        expand_targets(flux, [r"transformer_blocks\.0\.attn\.to_out"])
    with pytest.raises(ValueError, match="no adapter targets"):
        inject_adapter(flux, CONFIG, [])


def test_recipe_targets_win_over_the_defaults(flux: FluxTransformer2DModel) -> None:
    config = AdapterConfig(rank=2, alpha=2.0, targets=(r"transformer_blocks\.0\.attn\.to_q",))
    inject_adapter(flux, config, [ATTENTION])
    assert list(adapter_factors(flux)) == ["transformer_blocks.0.attn.to_q"]
    with pytest.raises(ValueError, match="injected already"):
        inject_adapter(flux, config, [])
    with pytest.raises(ValueError, match="no adapter named 'other'"):
        adapter_factors(flux, "other")
    rows = build_ledger(flux).rows
    assert len(rows) == 28
    assert [row.path for row in rows if row.path.endswith("attn.to_q")] == [
        "transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.0.attn.to_q",
    ]


def test_a_16_bit_base_takes_plain_linears(plain_flux: FluxTransformer2DModel, flux_inputs: Inputs) -> None:
    parameters = inject_adapter(plain_flux, CONFIG, [ATTENTION])
    plain_flux(**flux_inputs(0)).sample.square().mean().backward()
    assert parameters[1].grad is not None
    assert parameters[1].grad.abs().max() > 0
    remove_adapter(plain_flux)
    assert type(plain_flux.get_submodule("transformer_blocks.0.attn.to_q")) is nn.Linear


def test_factors_can_be_put_back(flux: FluxTransformer2DModel, flux_inputs: Inputs) -> None:
    parameters = inject_adapter(flux, CONFIG, [ATTENTION])
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.1)
    trained, factors = (
        flux(**flux_inputs(0)).sample.detach(),
        {p: (a.clone(), b) for p, (a, b) in adapter_factors(flux).items()},
    )
    remove_adapter(flux)
    inject_adapter(flux, CONFIG, [ATTENTION])
    load_factors(flux, factors)
    assert relative_rms(flux(**flux_inputs(0)).sample, trained) < 1e-6
    factors.popitem()
    with pytest.raises(ValueError, match="inject with the adapter's own targets"):
        load_factors(flux, factors)


@pytest.mark.parametrize(
    "option", [{"lora_dropout": 0.1}, {"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}]
)  # fmt: skip
def test_what_the_op_does_not_compute_is_refused(option: dict[str, object]) -> None:
    base, _ = SVDQuantLinear.from_linear(
        nn.Linear(64, 32), None, QuantSettings(smoothing="weight", rank=2, iterations=1)
    )
    config = LoraConfig(r=2, target_modules=["fc"], **option)
    config._register_custom_module({SVDQuantLinear: SVDQuantLoraLinear})
    with pytest.raises(ValueError, match=f"{next(iter(option))} cannot be used on a SVDQuant layer"):
        inject_adapter_in_model(config, _model(base))


def test_merging_is_refused(flux: FluxTransformer2DModel) -> None:
    inject_adapter(flux, CONFIG, [ATTENTION])
    layer = flux.get_submodule("transformer_blocks.0.attn.to_q")
    for call in (layer.merge, layer.unmerge):
        with pytest.raises(NotImplementedError, match="graft"):
            call()
