"""Grafts: the same output as the adapter kept apart, and every byte back after the last one is gone."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.formats.families import Family
from loragraft.adapters.graft import graft, graft_deviation, grafted, set_weight, ungraft
from loragraft.adapters.inject import inject_adapter, load_factors
from loragraft.kernels.layout import relative_rms
from loragraft.quantization.checkpoint import base_id, quantized_layers
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.settings import Numerics, QuantSettings
from loragraft.recipes.schema import AdapterConfig

Inputs = Callable[[int], dict[str, Tensor]]
MakeAdapter = Callable[..., Adapter]
TO_Q, ADALN = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.norm1.linear"


def _bytes(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == before.keys() and all(
        state[name].dtype == tensor.dtype and torch.equal(state[name], tensor) for name, tensor in before.items()
    )


def test_grafted_output_is_the_trained_output(
    flux: FluxTransformer2DModel, make_adapter: MakeAdapter, flux_inputs: Inputs
) -> None:
    """The whole model: trained forward (factors representable in bfloat16) against the graft, and it matters."""
    adapter = make_adapter("ours", 0)
    rounded = {p: (a.bfloat16().float(), b.bfloat16().float()) for p, (a, b) in adapter.pairs.items()}
    adapter = Adapter(adapter.name, adapter.metadata, rounded)
    before = flux(**flux_inputs(0)).sample
    graft(flux, adapter)
    output = flux(**flux_inputs(0)).sample
    ungraft(flux, "ours")
    assert relative_rms(output, before) > 0.05
    assert torch.equal(flux(**flux_inputs(0)).sample, before)
    inject_adapter(flux, AdapterConfig(rank=3, alpha=3.0), [p.replace(".", r"\.") for p in adapter.pairs])
    load_factors(flux, adapter.pairs)
    assert relative_rms(output, flux(**flux_inputs(0)).sample.detach()) < 1e-5


@pytest.mark.parametrize("numerics", ["w4a8", "w4a4", "w4a16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deviation_of_a_layer(numerics: Numerics, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 192).requires_grad_(False)
    base, _ = SVDQuantLinear.from_linear(
        linear, None, QuantSettings(numerics, rank=8, iterations=1, smoothing=None if numerics == "w4a16" else "weight")
    )
    model = nn.ModuleDict({"fc": base})
    down, up = torch.randn(16, 256, generator=generator) / 16, 0.1 * torch.randn(192, 16, generator=generator)
    adapter = Adapter("a", {"base_id": base_id(model)}, {"fc": (down, up)})
    before = _bytes(model)
    x = torch.randn(3, 40, 256, generator=generator).to(dtype)
    (deviation,) = graft_deviation(model, adapter, {"fc": x}, weight=0.7)
    assert deviation.effect > 0.05
    assert deviation.merged_vs_apart < (1e-5 if dtype == torch.float32 else 5e-3)
    assert deviation.merged_vs_exact < (1e-5 if dtype == torch.float32 else 5e-3)
    assert deviation.merged_vs_exact <= 1.1 * deviation.apart_vs_exact + 1e-7
    assert _same(model, before)


def test_undo_in_any_order_restores_every_byte(flux: FluxTransformer2DModel, make_adapter: MakeAdapter) -> None:
    before, identity = _bytes(flux), base_id(flux)
    adapters = [make_adapter("a", 0), make_adapter("b", 1, rank=5, paths=[TO_Q]), make_adapter("c", 2, rank=1)]
    for order in (("a", "b", "c"), ("c", "b", "a"), ("b", "c", "a")):
        for adapter in adapters:
            graft(flux, adapter, 0.5)
        assert grafted(flux) == {"a": 0.5, "b": 0.5, "c": 0.5}
        assert flux.get_submodule(TO_Q).rank == 4 + 3 + 5 + 1
        assert flux.get_submodule(ADALN).rank == 0 + 3 + 1
        assert base_id(flux) == identity  # a graft is no part of the base
        for name in order:
            ungraft(flux, name)
        assert _same(flux, before)
        assert grafted(flux) == {}


def test_removing_one_leaves_the_others_exactly(flux: FluxTransformer2DModel, make_adapter: MakeAdapter) -> None:
    first, second, third = make_adapter("a", 0), make_adapter("b", 1), make_adapter("c", 2)
    graft(flux, first)
    graft(flux, third, -0.3)
    wanted = _bytes(flux)
    for name in ("a", "c"):
        ungraft(flux, name)
    for adapter, weight in ((first, 1.0), (second, 2.0), (third, 0.9)):
        graft(flux, adapter, weight)
    ungraft(flux, "b")
    set_weight(flux, "c", -0.3)
    assert _same(flux, wanted)


def test_weights_scale_the_adapter(flux: FluxTransformer2DModel, make_adapter: MakeAdapter) -> None:
    adapter, layer = make_adapter("a", 0, paths=[TO_Q]), quantized_layers(flux)[TO_Q]
    x = torch.randn(20, 128)
    plain, (down, up) = layer(x), adapter.pairs[TO_Q]
    graft(flux, adapter, 0.0)
    assert relative_rms(layer(x), plain) < 1e-6
    for weight in (1.0, -2.0, 0.25):
        set_weight(flux, "a", weight)
        added = weight * (x @ down.bfloat16().float().T) @ up.bfloat16().float().T
        assert relative_rms(layer(x), plain + added) < 1e-5  # powers of two times bfloat16 are exact


def test_branches_of_other_kinds(flux: FluxTransformer2DModel, make_adapter: MakeAdapter) -> None:
    """A float32 branch keeps float32 factors; zero-padded ranks stay where they are."""
    layer, adapter = quantized_layers(flux)[TO_Q], make_adapter("a", 0, paths=[TO_Q])
    x = torch.randn(20, 128)
    padded_down = torch.cat([layer.lora_down, layer.lora_down.new_zeros(12, 128)])
    padded_up = torch.cat([layer.lora_up, layer.lora_up.new_zeros(128, 12)], dim=1)
    layer.set_branch(padded_down.float(), padded_up.float())
    plain, (down, up) = layer(x), adapter.pairs[TO_Q]
    graft(flux, adapter, any_base=True)  # the exchange above made it another base
    assert layer.lora_down.dtype == torch.float32
    assert layer.rank == 16 + 3
    assert torch.equal(layer.lora_down[16:], down)
    assert relative_rms(layer(x), plain + (x @ down.T) @ up.T) < 1e-6
    ungraft(flux, "a")
    assert torch.equal(layer.lora_down, padded_down.float())


def test_a_16_bit_model_takes_grafts_too(plain_flux: FluxTransformer2DModel, flux_inputs: Inputs) -> None:
    before, output = _bytes(plain_flux), plain_flux(**flux_inputs(0)).sample
    pair = torch.randn(4, 128) / 11, 0.5 * torch.randn(128, 4)
    adapter = Adapter("a", {"base_id": base_id(plain_flux)}, {TO_Q: pair})
    graft(plain_flux, adapter, 0.5)
    weight = plain_flux.get_submodule(TO_Q).weight
    assert relative_rms(weight, before[f"{TO_Q}.weight"] + 0.5 * pair[1] @ pair[0]) < 1e-6
    ungraft(plain_flux, "a")
    assert _same(plain_flux, before)
    assert torch.equal(plain_flux(**flux_inputs(0)).sample, output)


def test_16_bit_layers_of_a_quantized_model_take_grafts(
    flux: FluxTransformer2DModel, make_adapter: MakeAdapter
) -> None:
    """Other people's adapters train embedders and last layers too, which stay in 16 bits here."""
    before, other = _bytes(flux), make_adapter("other", 0)
    pair = torch.randn(4, 16), torch.randn(128, 4)
    graft(flux, Adapter("a", other.metadata, {**other.pairs, "x_embedder": pair}), 0.5)
    weight = flux.get_submodule("x_embedder").weight
    assert relative_rms(weight, before["x_embedder.weight"] + 0.5 * pair[1] @ pair[0]) < 1e-6
    ungraft(flux, "a")
    assert _same(flux, before)


def test_an_adapter_that_changes_more_than_the_denoiser(
    flux: FluxTransformer2DModel, make_adapter: MakeAdapter
) -> None:
    """Is refused with what it is, until it is left out knowingly."""
    before, good = _bytes(flux), make_adapter("good", 0)
    more = replace(good, extras={"text_encoder": {"x.lora_A.weight": torch.ones(2, 4)}})
    with pytest.raises(ValueError, match=r"also changes text_encoder \(1 tensors\).*--denoiser-only"):
        graft(flux, more)
    assert _same(flux, before)
    graft(flux, more.denoiser_only())
    assert grafted(flux) == {"good": 1.0}


def test_refusals_change_nothing(flux: FluxTransformer2DModel, make_adapter: MakeAdapter) -> None:
    before, good = _bytes(flux), make_adapter("good", 0)
    stranger = Adapter("stranger", {"base": "flux", "base_id": "f" * 64}, good.pairs)
    with pytest.raises(ValueError, match=f"{'f' * 64}.*this base is {base_id(flux)}"):
        graft(flux, stranger)
    lost = Adapter("lost", good.metadata, {**good.pairs, "transformer_blocks.9.attn.to_q": good.pairs[TO_Q]})
    with pytest.raises(ValueError, match=r"1 layer\(s\).*transformer_blocks\.9\.attn\.to_q.*nearest"):
        graft(flux, lost)
    thin = Adapter("thin", good.metadata, {**good.pairs, TO_Q: (torch.ones(2, 64), torch.ones(128, 2))})
    with pytest.raises(ValueError, match=r"to_q' maps 64 to 128 features"):
        graft(flux, thin)
    for call in (lambda: ungraft(flux, "ghost"), lambda: set_weight(flux, "ghost", 1.0)):
        with pytest.raises(ValueError, match="'ghost'; grafted: none"):
            call()
    assert _same(flux, before)
    graft(flux, stranger, any_base=True)
    with pytest.raises(ValueError, match="grafted already"):
        graft(flux, stranger, any_base=True)
    graft(flux, stranger, name="again", any_base=True)
    ungraft(flux, "stranger")
    ungraft(flux, "again")
    assert _same(flux, before)
    inject_adapter(flux, AdapterConfig(), [r"transformer_blocks\.0\.attn\.to_q"])
    with pytest.raises(ValueError, match="remove_adapter before grafting"):
        graft(flux, good)


def test_a_weight_that_is_no_number_is_refused(flux: FluxTransformer2DModel, make_adapter: MakeAdapter) -> None:
    adapter, before = make_adapter("a", 0), _bytes(flux)
    for weight in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"weight (nan|inf) of adapter 'a': expected a finite number"):
            graft(flux, adapter, weight)
    assert _same(flux, before)
    graft(flux, adapter)
    with pytest.raises(ValueError, match="expected a finite number"):
        set_weight(flux, "a", float("nan"))
    assert grafted(flux) == {"a": 1.0}


def test_an_adapter_for_another_base_is_not_sent_to_any_base_in_vain(
    flux: FluxTransformer2DModel, make_adapter: MakeAdapter
) -> None:
    """A file of another trainer's names no base: what does not fit says whose layers it has; what fits, how to graft it."""
    ours = make_adapter("a", 0)
    theirs = Adapter("theirs", {}, ours.pairs)
    with pytest.raises(ValueError, match="trained on an unknown base"):
        graft(flux, theirs)
    sdxl = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    pairs = {sdxl: (torch.ones(4, 640), torch.ones(640, 4))}
    theirs = Adapter("theirs", {}, pairs, family=Family("sdxl", True))
    with pytest.raises(ValueError, match=r"cannot carry it here.*Its file says none; layers: sdxl"):
        graft(flux, theirs)
    interchange = Adapter("b", {"base": "pocket", "base_id": "another", "profile": "interchange"}, ours.pairs)
    with pytest.raises(ValueError, match=r"trained on base another \(pocket in profile interchange\)"):
        graft(flux, interchange)


def test_a_compensating_adapter_is_not_sent_to_any_base(
    flux: FluxTransformer2DModel, make_adapter: MakeAdapter
) -> None:
    """It is refused there too: what helps is the portable file."""
    ours = make_adapter("a", 0)
    theirs = replace(ours, metadata={**ours.metadata, "base_id": "another", "contract": "compensating"})
    for any_base in (False, True):
        with pytest.raises(ValueError, match=r"is compensating: .*--portable") as caught:
            graft(flux, theirs, any_base=any_base)
        assert "--any-base" not in str(caught.value)
