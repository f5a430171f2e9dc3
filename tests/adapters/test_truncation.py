"""Joining and re-truncating: nothing lost while the rank suffices, and the stated error is the measured one."""

from typing import Any

import pytest
import torch

from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.truncation import truncate

LAYER, OTHER = "blocks.0.to_q", "blocks.0.to_k"


def _adapter(name: str, seed: int, rank: int, paths: tuple[str, ...] = (LAYER,), **about: Any) -> Adapter:
    random = torch.Generator().manual_seed(seed)
    pairs = {p: (torch.randn(rank, 24, generator=random), torch.randn(40, rank, generator=random)) for p in paths}
    return Adapter(name, {"base": "tiny", "base_id": "one", **about}, pairs)


def _update(adapter: Adapter, path: str) -> torch.Tensor:
    down, up = adapter.pairs[path]
    return up.flatten(1).double() @ down.flatten(1).double()


def test_a_sufficient_rank_loses_nothing() -> None:
    a, b = _adapter("a", 0, 3, (LAYER, OTHER)), _adapter("b", 1, 2)
    done = truncate([(a, 0.5), (b, -2.0)], 8, "both")
    assert done.adapter.name == done.adapter.metadata["name"] == "both"
    assert done.adapter.metadata["joined_from"] == [{"name": "a", "weight": 0.5}, {"name": "b", "weight": -2.0}]
    assert done.adapter.pairs[LAYER][0].shape == (5, 24)
    assert done.error < 1e-7
    wanted = 0.5 * _update(a, LAYER) - 2 * _update(b, LAYER)
    assert torch.allclose(_update(done.adapter, LAYER), wanted, atol=1e-5)
    assert torch.allclose(_update(done.adapter, OTHER), 0.5 * _update(a, OTHER), atol=1e-5)


def test_the_stated_error_is_the_best_and_the_measured_one() -> None:
    a, b = _adapter("a", 0, 6, (LAYER, OTHER)), _adapter("b", 1, 4)
    done = truncate([(a, 1.0), (b, 1.0)], 3, "small")
    whole = _update(a, LAYER) + _update(b, LAYER)
    gone = whole - _update(done.adapter, LAYER)
    singular = torch.linalg.svdvals(whole)
    assert done.errors[LAYER] == pytest.approx(float(gone.norm() / whole.norm()), rel=1e-5)
    assert done.errors[LAYER] == pytest.approx(float(singular[3:].norm() / singular.norm()), rel=1e-5)
    both = (float(gone.norm()) ** 2 + float((_update(a, OTHER) - _update(done.adapter, OTHER)).norm()) ** 2) ** 0.5
    assert done.error == pytest.approx(
        both / (float(whole.norm()) ** 2 + float(_update(a, OTHER).norm()) ** 2) ** 0.5, rel=1e-5
    )
    assert done.worst == max(done.errors.items(), key=lambda item: item[1])


def test_convolutions_keep_their_shapes() -> None:
    down, up = torch.randn(4, 8, 3, 3), torch.randn(16, 4, 1, 1)
    done = truncate([(Adapter("conv", {"base_id": "one"}, {LAYER: (down, up)}), 1.0)], 2, "conv2")
    new_down, new_up = done.adapter.pairs[LAYER]
    assert (new_down.shape, new_up.shape) == ((2, 8, 3, 3), (16, 2, 1, 1))
    assert 0 < done.error < 1


def test_an_adapter_that_does_nothing_has_no_error() -> None:
    zero = Adapter("zero", {"base_id": "one"}, {LAYER: (torch.randn(2, 24), torch.zeros(40, 2))})
    done = truncate([(zero, 1.0)], 1, "still zero")
    assert (done.error, done.errors) == (0.0, {LAYER: 0.0})


def test_refusals() -> None:
    a = _adapter("a", 0, 3)
    with pytest.raises(ValueError, match="different bases"):
        truncate([(a, 1.0), (_adapter("b", 1, 3, base_id="two"), 1.0)], 2, "both")
    with pytest.raises(ValueError, match="another shape"):
        truncate([(a, 1.0), (Adapter("b", a.metadata, {LAYER: (torch.ones(1, 8), torch.ones(40, 1))}), 1.0)], 2, "both")
    with pytest.raises(ValueError, match="expected at least one"):
        truncate([], 2, "none")
    with pytest.raises(ValueError, match="expected at least one"):
        truncate([(a, 1.0)], 0, "none")
