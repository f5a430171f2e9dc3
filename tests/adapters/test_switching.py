"""One model, adapters exchanged between pictures: resident where they can be, and the base untouched in between."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.graft import graft, grafted, ungraft
from loragraft.adapters.resident import ResidentAdapters
from loragraft.adapters.switching import AdapterSwitch, using
from loragraft.kernels.layout import relative_rms
from loragraft.quantization.checkpoint import quantized_layers

MakeAdapter = Callable[..., Adapter]
Inputs = Callable[[int], dict[str, Tensor]]
TO_Q = "transformer_blocks.0.attn.to_q"


def _addresses(model: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]


def _bytes(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == before.keys() and all(torch.equal(state[name], tensor) for name, tensor in before.items())


@pytest.fixture
def answer(flux: FluxTransformer2DModel, flux_inputs: Inputs) -> Callable[[], Tensor]:
    @torch.no_grad()
    def answer() -> Tensor:
        return flux(**flux_inputs(0), return_dict=False)[0]

    return answer


def test_what_is_used_is_what_grafts_compute(
    flux: FluxTransformer2DModel, make_adapter: MakeAdapter, answer: Callable[[], Tensor]
) -> None:
    a, b = make_adapter("a", 0), make_adapter("b", 1, rank=5, paths=[TO_Q])
    before, bare = _bytes(flux), answer()
    wanted = []
    for adapters in ([(a, 1.0)], [(b, -0.5), (a, 0.3)], [(b, 2.0)]):
        for adapter, weight in adapters:
            graft(flux, adapter, weight)
        wanted.append(answer())
        for adapter, _ in adapters:
            ungraft(flux, adapter.name)
    switch = AdapterSwitch(flux)
    for adapters, expected in zip(([(a, 1.0)], [(b, -0.5), (a, 0.3)], [(b, 2.0)]), wanted, strict=True):
        switch.use(adapters)
        assert relative_rms(answer(), expected) < 1e-5
        assert relative_rms(expected, bare) > 0.01
        switch.use([])
        assert torch.equal(answer(), bare)
        assert _same(flux, before)
    assert switch.resident == {"a": 0.3, "b": 2.0}
    switch.clear()
    assert switch.resident == {}
    graft(flux, a)
    assert grafted(flux) == {"a": 1.0}


def test_switching_keeps_every_tensor_in_its_place(flux: FluxTransformer2DModel, make_adapter: MakeAdapter) -> None:
    """So graphs that were captured with and without adapters stay valid."""
    a, b = make_adapter("a", 0), make_adapter("b", 1)
    bare, switch = _addresses(flux), AdapterSwitch(flux)
    switch.use([(a, 1.0)])
    wide = _addresses(flux)
    assert wide != bare
    for adapters, place in (
        ([], bare),
        ([(b, 1.0)], wide),
        ([(a, 0.2), (b, 0.4)], wide),
        ([], bare),
        ([(a, 1.0)], wide),
    ):
        switch.use(adapters)
        assert _addresses(flux) == place
    switch.clear()
    assert _addresses(flux) == bare


def test_an_adapter_that_was_trained_again_is_the_new_one(
    flux: FluxTransformer2DModel, make_adapter: MakeAdapter, answer: Callable[[], Tensor]
) -> None:
    switch, old, new = AdapterSwitch(flux), make_adapter("a", 0), make_adapter("a", 1)
    switch.use([(old, 1.0)])
    first = answer()
    switch.use([(dataclasses.replace(old), 1.0)])
    assert torch.equal(answer(), first)
    switch.use([(new, 1.0)])
    assert relative_rms(answer(), first) > 0.01


def test_the_oldest_make_way(flux: FluxTransformer2DModel, make_adapter: MakeAdapter) -> None:
    switch = AdapterSwitch(flux, kept=2)
    adapters = [make_adapter(name, seed, paths=[TO_Q]) for seed, name in enumerate("abc")]
    for adapter in adapters:
        switch.use([(adapter, 1.0)])
    assert list(switch.resident) == ["b", "c"]
    switch.use([(adapter, 1.0) for adapter in adapters])
    assert set(switch.resident) == {"a", "b", "c"}, "those in use stay, however many"


def test_16_bit_layers_are_grafted(
    flux: FluxTransformer2DModel, make_adapter: MakeAdapter, answer: Callable[[], Tensor]
) -> None:
    a, before, bare = make_adapter("a", 0), _bytes(flux), answer()
    mixed = Adapter("mixed", a.metadata, {**a.pairs, "proj_out": (torch.randn(2, 128), torch.randn(16, 2))})
    switch = AdapterSwitch(flux)
    switch.use([(a, 1.0)])
    switch.use([(a, 1.0), (mixed, 0.5)])
    assert grafted(flux) == {"a": 1.0, "mixed": 0.5}
    assert switch.resident == {}
    switch.use([])
    assert _same(flux, before)
    switch.use([(a, 1.0)])
    assert grafted(flux) == {}
    switch.clear()
    assert torch.equal(answer(), bare)


def test_a_16_bit_model_is_grafted(plain_flux: FluxTransformer2DModel) -> None:
    before = _bytes(plain_flux)
    adapter = Adapter("a", {}, {TO_Q: (torch.randn(2, 128), torch.randn(128, 2))})
    with using(plain_flux, [(adapter, 1.0)], any_base=True):
        assert grafted(plain_flux) == {"a": 1.0}
        assert not _same(plain_flux, before)
    assert _same(plain_flux, before)


def test_refusals_leave_the_base(flux: FluxTransformer2DModel, make_adapter: MakeAdapter) -> None:
    a, foreign, before = make_adapter("a", 0), make_adapter("foreign", 1), _bytes(flux)
    foreign.metadata["base_id"] = "another"
    misfit = Adapter("misfit", a.metadata, {TO_Q: (torch.randn(2, 7), torch.randn(128, 2))})
    switch = AdapterSwitch(flux)
    switch.use([(foreign, 1.0)], any_base=True)
    for adapters, message in (
        ([(a, 1.0), (foreign, 1.0)], "trained on base another"),
        ([(a, 1.0), (misfit, 1.0)], "misfit"),
        ([(a, 1.0), (a, 0.5)], "two adapters are named a"),
    ):
        with pytest.raises(ValueError, match=message):
            switch.use(adapters)
        assert _same(flux, before)
    switch.clear()
    with pytest.raises(ValueError, match="misfit"), using(flux, [(a, 1.0), (misfit, 1.0)]):
        pytest.fail("entered")
    assert _same(flux, before)
    ResidentAdapters(flux).add(a)
    with pytest.raises(ValueError, match="has resident adapters already"), using(flux, [(a, 1.0)]):
        pytest.fail("entered")


def test_beside_a_graft_that_was_there(flux: FluxTransformer2DModel, make_adapter: MakeAdapter) -> None:
    a, b = make_adapter("a", 0), make_adapter("b", 1)
    graft(flux, a)
    with using(flux, [(b, 1.0)]):
        assert grafted(flux) == {"a": 1.0, "b": 1.0}
    assert grafted(flux) == {"a": 1.0}


def test_a_model_that_moves_meanwhile(flux: FluxTransformer2DModel, make_adapter: MakeAdapter) -> None:
    """`meta` stands for a GPU: what was put aside follows the layer."""
    with using(flux, [(make_adapter("a", 0), 1.0)]):
        nn.Module.to(flux, device="meta")
    assert {tensor.device.type for layer in quantized_layers(flux).values() for tensor in layer.buffers()} == {"meta"}
