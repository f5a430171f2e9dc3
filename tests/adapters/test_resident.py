"""Resident adapters: the same bytes as grafts, switched in place, and every byte back at the end."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from loragraft.adapters import resident
from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.graft import graft, grafted, ungraft
from loragraft.adapters.resident import ResidentAdapters
from loragraft.kernels.layout import relative_rms
from loragraft.quantization.checkpoint import base_id, load_quantized, quantized_layers, save_quantized
from loragraft.quantization.linear import SVDQuantLinear

MakeAdapter = Callable[..., Adapter]
TO_Q, TO_K = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"
ADALN = "transformer_blocks.0.norm1.linear"


def _bytes(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == before.keys() and all(torch.equal(state[name], tensor) for name, tensor in before.items())


def _branches(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Without ranks that do nothing."""
    found = {}
    for path, layer in quantized_layers(model).items():
        used = layer.lora_up.count_nonzero(dim=0) > 0
        found[path] = layer.lora_down[used], layer.lora_up[:, used]
    return found


def _equal(model: nn.Module, wanted: dict[str, tuple[Tensor, Tensor]]) -> bool:
    found = _branches(model)
    return all(torch.equal(found[path][i], wanted[path][i]) for path in wanted for i in (0, 1))


def _grafted_branches(model: nn.Module, *adapters: tuple[Adapter, float]) -> dict[str, tuple[Tensor, Tensor]]:
    for adapter, weight in adapters:
        graft(model, adapter, weight)
    found = _branches(model)
    for adapter, _ in adapters:
        ungraft(model, adapter.name)
    return found


def test_branches_are_those_of_grafts(flux: FluxTransformer2DModel, make_adapter: MakeAdapter) -> None:
    """Added, switched, weighted, ordered and removed: bit for bit what `graft` composes."""
    a, b, c = make_adapter("a", 0), make_adapter("b", 1, rank=5, paths=[TO_Q, ADALN]), make_adapter("c", 2, rank=1)
    wanted = {
        "a": _grafted_branches(flux, (a, 1.0)),
        "cb": _grafted_branches(flux, (c, 0.3), (b, -0.7)),
        "ab": _grafted_branches(flux, (a, 1.0), (b, -0.7)),
    }
    before, identity = _bytes(flux), base_id(flux)
    adapters = ResidentAdapters(flux)
    adapters.add(a)
    adapters.add(b, 2.0, active=False)
    adapters.add(c, 0.3, active=False)
    assert _equal(flux, wanted["a"])
    adapters.set_weight("b", -0.7)
    assert _equal(flux, wanted["a"])
    adapters.activate("c", "b")
    assert adapters.active == {"c": 0.3, "b": -0.7}
    assert _equal(flux, wanted["cb"])
    adapters.activate("a", "b", "c")
    adapters.remove("c")
    assert _equal(flux, wanted["ab"])
    assert base_id(flux) == identity  # residents are no part of the base
    adapters.clear()
    assert _same(flux, before)
    graft(flux, a)
    assert grafted(flux) == {"a": 1.0}


def test_a_switch_allocates_nothing_and_leaves_codes_alone(
    flux: FluxTransformer2DModel, make_adapter: MakeAdapter
) -> None:
    adapters = ResidentAdapters(flux, room=3)
    for i in range(5):
        change = adapters.add(make_adapter(f"a{i}", i), active=i == 0)
        assert (change.allocated_bytes > 0) == (i == 0)
    layers = quantized_layers(flux)
    where = {path: (layer.lora_down.data_ptr(), layer.lora_up.data_ptr()) for path, layer in layers.items()}
    codes = {path: layer.qweight for path, layer in layers.items()}
    x = torch.randn(9, 128)
    plain = layers[TO_Q](x)
    for name in ("a3", "a1", "a4"):
        change = adapters.activate(name)
        assert change.allocated_bytes == 0
        assert change.copied_bytes == adapters.residents[name].nbytes
        assert change.seconds > 0
        assert relative_rms(layers[TO_Q](x), plain) > 0.01
    assert {path: (y.lora_down.data_ptr(), y.lora_up.data_ptr()) for path, y in layers.items()} == where
    assert all(layer.qweight is codes[path] for path, layer in layers.items())
    assert all(layer.rank % 16 == 0 for layer in layers.values())
    adapters.activate("a0")
    assert torch.equal(layers[TO_Q](x), plain)


def test_without_active_ones_the_base_answers(flux: FluxTransformer2DModel, make_adapter: MakeAdapter) -> None:
    layer, x = quantized_layers(flux)[TO_Q], torch.randn(9, 128)
    plain = layer(x)
    adapters = ResidentAdapters(flux)
    adapters.add(make_adapter("a", 0))
    assert relative_rms(layer(x), plain) > 0.01
    adapters.activate()
    assert relative_rms(layer(x), plain) < 1e-6
    assert adapters.active == {}


def test_memory_is_what_the_tensors_take(flux: FluxTransformer2DModel, make_adapter: MakeAdapter) -> None:
    layers = quantized_layers(flux)
    adapters = ResidentAdapters(flux)
    assert adapters.branch_bytes == 0
    adapters.add(make_adapter("a", 0, rank=4))
    adapters.add(make_adapter("b", 1, rank=20, paths=[TO_Q]))
    wide = sum(layer.lora_down.nbytes + layer.lora_up.nbytes for layer in layers.values())
    assert adapters.branch_bytes == wide
    adapters.activate()
    assert adapters.branch_bytes == wide
    adapters.activate("a", "b")
    pairs = [pair for kept in adapters.residents.values() for pair in kept.adapter.pairs.values()]
    assert adapters.resident_bytes == sum(2 * (down.numel() + up.numel()) for down, up in pairs)
    assert [line.split("|")[1].strip() for line in adapters.table().splitlines()[2:4]] == ["a", "b"]
    assert quantized_layers(flux)[TO_Q].rank == 32  # 4 + 4 + 20 ranks
    adapters.activate("a")
    assert quantized_layers(flux)[TO_Q].rank == 32
    adapters.fit()
    assert quantized_layers(flux)[TO_Q].rank == 16
    assert adapters.active == {"a": 1.0}


def test_layers_that_no_resident_is_for_are_their_own_again(
    flux: FluxTransformer2DModel, make_adapter: MakeAdapter
) -> None:
    layers, before = quantized_layers(flux), _bytes(flux)
    adapters = ResidentAdapters(flux)
    adapters.add(make_adapter("q", 0, paths=[TO_Q]))
    adapters.add(make_adapter("k", 1, paths=[TO_K]))
    adapters.remove("q")
    assert (layers[TO_Q].rank, layers[TO_K].rank) == (4, 16)
    adapters.remove("k")
    assert _same(flux, before)


def test_no_memory_for_wider_branches_changes_nothing(
    flux: FluxTransformer2DModel, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fifth branch cannot be widened: the model answers as before, and all goes on."""
    layers = quantized_layers(flux)
    inputs = {path: torch.randn(9, layer.in_features) for path, layer in layers.items()}
    a, b = make_adapter("a", 0), make_adapter("b", 1, rank=20)
    before, adapters = _bytes(flux), ResidentAdapters(flux)
    widen, calls = resident._widen, 0

    def scarce(layer: SVDQuantLinear, ranks: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise torch.OutOfMemoryError("no memory")
        return widen(layer, ranks)

    with monkeypatch.context() as patch:
        patch.setattr(resident, "_widen", scarce)
        with pytest.raises(torch.OutOfMemoryError):
            adapters.add(a)
    assert _same(flux, before)
    graft(flux, a)
    ungraft(flux, "a")
    adapters.add(a)
    answers = {path: layer(inputs[path]) for path, layer in layers.items()}
    calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(resident, "_widen", scarce)
        with pytest.raises(torch.OutOfMemoryError):
            adapters.add(b)
    assert (list(adapters.residents), adapters.active) == (["a"], {"a": 1.0})
    for path, layer in layers.items():
        assert relative_rms(layer(inputs[path]), answers[path]) < 1e-6
    adapters.add(b)
    assert adapters.active == {"a": 1.0, "b": 1.0}
    adapters.clear()
    assert _same(flux, before)


def test_a_model_with_residents_is_saved_as_a_grafted_one(
    flux: FluxTransformer2DModel, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapters = ResidentAdapters(flux)
    adapters.add(make_adapter("a", 0))
    with pytest.raises(ValueError, match="carry grafts"):
        save_quantized(flux, tmp_path / "no")
    read = load_quantized(save_quantized(flux, tmp_path / "baked", bake_grafts=True), FluxTransformer2DModel)
    assert _same(read, _bytes(flux))
    assert base_id(read) != base_id(flux)


def test_refusals(flux: FluxTransformer2DModel, make_adapter: MakeAdapter) -> None:
    a, foreign = make_adapter("a", 0), make_adapter("foreign", 1)
    foreign.metadata["base_id"] = "another"
    before = _bytes(flux)
    graft(flux, a)
    with pytest.raises(ValueError, match=r"carries grafts \(a\)"):
        ResidentAdapters(flux)
    ungraft(flux, "a")
    adapters = ResidentAdapters(flux)
    with pytest.raises(ValueError, match="trained on base another"):
        adapters.add(foreign)
    misfit = Adapter("misfit", a.metadata, {"nowhere": a.pairs[TO_Q]})
    with pytest.raises(ValueError, match="nowhere"):
        adapters.add(misfit)
    assert _same(flux, before)
    adapters.add(a)
    for change in (lambda: adapters.activate("b"), lambda: adapters.remove("b"), lambda: adapters.set_weight("b", 1.0)):
        with pytest.raises(ValueError, match="no resident adapter named 'b'; resident: a"):
            change()
    with pytest.raises(ValueError, match="resident already"):
        adapters.add(a)
    with pytest.raises(ValueError, match="named twice"):
        adapters.activate("a", "a")
    with pytest.raises(ValueError, match="weight nan of adapter 'a': expected a finite number"):
        adapters.set_weight("a", float("nan"))
    with pytest.raises(ValueError, match="weight inf of adapter 'c'"):
        adapters.add(foreign, float("inf"), "c", any_base=True)
    with pytest.raises(ValueError, match="has resident adapters"):
        graft(flux, make_adapter("b", 1))
    with pytest.raises(ValueError, match="resident adapters already"):
        ResidentAdapters(flux)
    adapters.add(foreign, any_base=True)
    adapters.clear()
    assert _same(flux, before)
    with pytest.raises(ValueError, match="no INT4 layer"):
        ResidentAdapters(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="room -1"):
        ResidentAdapters(flux, room=-1)
