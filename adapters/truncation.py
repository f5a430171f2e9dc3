"""Adapters with their weights -> one adapter of a fixed rank, nearest in the Frobenius norm, and how far it is.

    sum_i w_i B_i A_i = [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...] = Q_B (R_B R_A^T) Q_A^T,    the inner matrix r x r:  S diag(s) T^T
    kept: the largest s,  error = sqrt(sum of the dropped s^2 / sum of all s^2)              (Eckart and Young 1936)

Two thin QR and one small SVD per layer, in float64: the N x K update is never formed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.formats.contract import COMPENSATING, START_HASH, check_together, contract_of


@dataclass(frozen=True)
class Truncated:
    """One adapter for several, and what that cost."""

    adapter: Adapter
    errors: dict[str, float]
    """Path -> |dropped| / |whole| of the layer's update; 0 where the rank sufficed."""
    error: float
    """The same over all layers together."""

    @property
    def worst(self) -> tuple[str, float]:
        """The layer that lost most."""
        return max(self.errors.items(), key=lambda item: item[1])


def truncate(adapters: Sequence[tuple[Adapter, float]], rank: int, name: str) -> Truncated:
    """Join (adapter, weight) pairs into one adapter `name` of at most `rank`, with weight 1.

    Raises ValueError for no adapter, a rank below 1, adapters of several bases or parts of a pipeline, two compensating ones, and layers on which
    their shapes differ.
    """
    if not adapters or rank < 1:
        raise ValueError(f"{len(adapters)} adapters to rank {rank}: expected at least one of each")
    first = adapters[0][0]
    check_together((adapter.name, adapter.metadata) for adapter, _ in adapters)
    for adapter, _ in adapters[1:]:
        if (adapter.base_id, adapter.component) != (first.base_id, first.component):
            raise ValueError(
                f"adapters {first.name!r} and {adapter.name!r} are for different bases ({first.component} {first.base_id}, "
                f"{adapter.component} {adapter.base_id}): joined they would fit neither"
            )
    pairs, errors, dropped, total = {}, {}, 0.0, 0.0
    for path in dict.fromkeys(path for adapter, _ in adapters for path in adapter.pairs):
        found = [(*adapter.pairs[path], weight) for adapter, weight in adapters if path in adapter.pairs]
        shapes = {(tuple(down.shape[1:]), tuple(up.shape[:1])) for down, up, _ in found}
        if len(shapes) > 1:
            raise ValueError(f"{path!r} has another shape in each adapter: {', '.join(map(str, sorted(shapes)))}")
        pairs[path], singular = _nearest(found, rank)
        lost, whole = float(singular[rank:].square().sum()), float(singular.square().sum())
        errors[path] = (lost / whole) ** 0.5 if whole else 0.0
        dropped, total = dropped + lost, total + whole
    about: dict[str, Any] = {**first.metadata, "name": name, "rank": rank, "alpha": float(rank)}
    if COMPENSATING in {contract_of(adapter.metadata) for adapter, _ in adapters}:
        about["contract"] = COMPENSATING
    about.pop(START_HASH, None)  # one adapter's, not theirs together
    about["joined_from"] = [{"name": adapter.name, "weight": weight} for adapter, weight in adapters]
    joined = replace(first, name=name, metadata=about, pairs=pairs)
    return Truncated(joined, errors, (dropped / total) ** 0.5 if total else 0.0)


def _nearest(found: Sequence[tuple[Tensor, Tensor, float]], rank: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """((A, B) in float32, all singular values). sqrt(s) goes to either side, which keeps both in the range of 16 bits."""
    downs, ups, _ = zip(*found, strict=True)
    down = torch.cat([down.double().flatten(1) for down in downs])
    up = torch.cat([weight * up.double().flatten(1) for _, up, weight in found], dim=1)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    left, singular, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    kept = singular[:rank].sqrt()
    new_down, new_up = kept[:, None] * (right[:rank] @ q_down.T), (q_up @ left[:, :rank]) * kept
    shape_down, shape_up = (len(kept), *downs[0].shape[1:]), (len(new_up), len(kept), *ups[0].shape[2:])
    return (new_down.view(shape_down).float(), new_up.view(shape_up).float()), singular
