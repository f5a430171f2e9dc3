"""Several adapters resident on one INT4 transformer, each with its weight: a switch copies factors and allocates nothing.

    down [P, K] = [D; A_1; A_2; ...; 0],   up [N, P] = [U, w_1 B_1, w_2 B_2, ..., 0]        1, 2, ...: the active ones

`graft` makes every branch anew for each change. Here each layer has one that is wide enough: P is a multiple of 16, the rank
that the kernels multiply at a time. w B is rounded once, when an adapter comes in or gets another weight. No code or scale is
touched. A layer that no active adapter is for has its own branch, the very tensors that it came with; the wide one waits beside it.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.formats.contract import check_together
from loragraft.adapters.graft import RESIDENT, as_matrices, check_graftable, check_weight, grafted
from loragraft.quantization.checkpoint import quantized_layers, recorded_base_id
from loragraft.quantization.linear import SVDQuantLinear

RANK_STEP = 16


@dataclass(frozen=True)
class Change:
    """What one operation took."""

    seconds: float
    """On a GPU until it has finished."""
    copied_bytes: int
    """Factors copied into branches."""
    allocated_bytes: int
    """Of new branches; 0 for a switch among adapters for which there is room, and for one to none."""


@dataclass
class Resident:
    """One adapter as it is kept: A and w B in the branches' dtype, where the branches are."""

    adapter: Adapter
    weight: float
    factors: dict[str, tuple[Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        """Of the kept factors."""
        return sum(down.nbytes + up.nbytes for down, up in self.factors.values())


class ResidentAdapters:
    """The adapters of one transformer. While there are any, `graft` refuses it; `clear` gives it back as it was."""

    def __init__(self, transformer: nn.Module, *, room: int = 0) -> None:
        """room: adapter ranks for which every layer's branch has place from the start; it grows when more are active at once.

        Raises ValueError for a transformer without INT4 layers, or one with grafts or resident adapters.
        """
        self._transformer, self._layers = transformer, quantized_layers(transformer)
        self._check_alone()
        if not self._layers:
            raise ValueError("the transformer has no INT4 layer, hence no branch; graft() merges into 16-bit weights")
        if room < 0:
            raise ValueError(f"room {room}: expected the number of adapter ranks, 0 or more")
        self.base_id = recorded_base_id(transformer)
        """Of the bare transformer."""
        self._room = room
        self._residents: dict[str, Resident] = {}
        self._active: tuple[str, ...] = ()
        self._own: dict[str, tuple[Tensor, Tensor]] = {}
        """Path -> the branch that a layer came with, of those that have a wide one."""
        self._waiting: dict[str, tuple[Tensor, Tensor]] = {}
        """Path -> the wide branch of a layer that has its own just now."""

    @property
    def residents(self) -> dict[str, Resident]:
        """By name, oldest first."""
        return dict(self._residents)

    @property
    def active(self) -> dict[str, float]:
        """Name -> weight of those that the model computes with, in the branches' order."""
        return {name: self._residents[name].weight for name in self._active}

    @property
    def resident_bytes(self) -> int:
        """Of all kept factors."""
        return sum(resident.nbytes for resident in self._residents.values())

    @property
    def branch_bytes(self) -> int:
        """Of the wide branches, in use or waiting: they stand beside the base's own."""
        total = 0
        for path, layer in self._layers.items():
            down, up = self._waiting.get(path, (layer.lora_down, layer.lora_up))
            total += down.nbytes + up.nbytes if len(down) > layer.base_rank else 0
        return total

    def add(
        self, adapter: Adapter, weight: float = 1.0, name: str | None = None, *, active: bool = True, any_base: bool = False
    ) -> Change:  # fmt: skip
        """Keep `adapter` under `name` (default: its own), and switch it on beside the others unless not `active`.

        Nothing changes unless everything fits. Raises ValueError as `graft` does.
        """
        name = adapter.name if name is None else name
        check_weight(name, weight)
        self._check_alone()
        if name in self._residents:
            raise ValueError(
                f"an adapter named {name!r} is resident already; set_weight changes it, remove takes it out"
            )
        check_graftable(self._transformer, adapter, self.base_id, any_base=any_base)
        begun = self._now()
        factors = {path: self._rounded(self._layers[path], pair, weight) for path, pair in adapter.pairs.items()}
        self._residents[name] = Resident(adapter, float(weight), factors)
        setattr(self._transformer, RESIDENT, self)
        try:
            return self._compose(begun, (*self._active, name) if active else self._active)
        except Exception:  # no memory for wider branches: what was active still is
            self._forget(name)
            raise

    def activate(self, *names: str) -> Change:
        """Compute with exactly these, in this order; none: with the base alone. Raises ValueError for an unknown or doubled name, and for
        two compensating adapters."""
        begun = self._now()
        for name in names:
            self._find(name)
        if len(set(names)) < len(names):
            raise ValueError(f"an adapter is named twice: {', '.join(names)}; set_weight makes it stronger")
        return self._compose(begun, names)

    def set_weight(self, name: str, weight: float) -> Change:
        """Another strength for one adapter, from its own unrounded B. Raises ValueError for an unknown name or a weight that is not finite."""
        begun, resident = self._now(), self._find(name)
        check_weight(name, weight)
        for path, (_, up) in resident.factors.items():
            layer = self._layers[path]
            up.copy_(_scaled(as_matrices(layer, resident.adapter.pairs[path])[1], weight, up))
        resident.weight = float(weight)
        return self._compose(begun, self._active)

    def remove(self, name: str) -> Change:
        """Forget one adapter. Layers that no other is for get their own branch back. Raises ValueError for an unknown name."""
        begun = self._now()
        self._find(name)
        self._forget(name)
        return self._compose(begun, tuple(other for other in self._active if other != name))

    def clear(self) -> None:
        """Forget all: every byte of the transformer is as it was before the first came."""
        for name in list(self._residents):
            self.remove(name)

    def fit(self) -> Change:
        """Make every branch as narrow as what is active allows; for a checkpoint, or after many were active at once."""
        begun = self._now()
        self._room = 0
        self._narrow({path for resident in self._residents.values() for path in resident.factors})
        return self._compose(begun, self._active)

    def table(self) -> str:
        """Markdown: what is there, and what it takes."""
        lines = ["| adapter | weight | rank | active | layers | MB |", "|---|---|---|---|---|---|"]
        for name, kept in self._residents.items():
            on = "yes" if name in self._active else ""
            cells = (name, f"{kept.weight:g}", kept.adapter.rank, on, len(kept.factors), f"{kept.nbytes / 1e6:.1f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
        return "\n".join([*lines, f"| branches, beside the base's | | | | | {self.branch_bytes / 1e6:.1f} |"])

    def _check_alone(self) -> None:
        found = grafted(self._transformer)
        if found:
            raise ValueError(f"the transformer carries grafts ({', '.join(found)}); ungraft them first")
        if getattr(self._transformer, RESIDENT, None) not in (None, self):
            raise ValueError("the transformer has resident adapters already; add to those, or clear() them")

    def _forget(self, name: str) -> None:
        """Layers that no other is for get their own branch back; without residents the transformer is anyone's."""
        gone = self._residents.pop(name)
        left = {path for resident in self._residents.values() for path in resident.factors}
        self._narrow(path for path in gone.factors if path not in left)
        if not self._residents:
            delattr(self._transformer, RESIDENT)

    def _find(self, name: str) -> Resident:
        if name not in self._residents:
            known = ", ".join(self._residents) or "none"
            raise ValueError(f"no resident adapter named {name!r}; resident: {known}")
        return self._residents[name]

    def _rounded(self, layer: SVDQuantLinear, pair: tuple[Tensor, Tensor], weight: float) -> tuple[Tensor, Tensor]:
        down, up = as_matrices(layer, pair)
        return down.to(layer.lora_down.device, layer.lora_down.dtype, copy=True), _scaled(up, weight, layer.lora_up)

    @torch.no_grad()
    def _compose(self, begun: float, active: Iterable[str]) -> Change:
        """Write what is active behind the base's own ranks of every layer that any resident adapter is for."""
        active = tuple(active)
        check_together((name, self._residents[name].adapter.metadata) for name in active)
        touched = {path: None for resident in self._residents.values() for path in resident.factors}
        factors = [self._residents[name].factors for name in active]
        found = {path: [each[path] for each in factors if path in each] for path in touched}
        allocated = 0
        try:  # all of it first: what cannot be allocated changes nothing
            for path, pairs in found.items():
                self._take_wide(path)
                allocated += _widen(self._layers[path], max(self._room, sum(len(down) for down, _ in pairs)))
        except Exception:
            self._give_own(touched)
            raise
        self._active = active
        to: list[Tensor] = []
        written: list[Tensor] = []
        unused: list[Tensor] = []
        for path, pairs in found.items():
            layer = self._layers[path]
            first = layer.base_rank
            for down, up in pairs:
                to += [layer.lora_down[first : first + len(down)], layer.lora_up[:, first : first + len(down)]]
                written += [down, up]
                first += len(down)
            if first < layer.rank:  # A of an unused rank may stay: 0 A x = 0
                unused.append(layer.lora_up[:, first:])
        if to:
            torch._foreach_copy_(to, written)
        if unused:
            torch._foreach_zero_(unused)
        self._give_own(touched)
        return Change(self._now() - begun, sum(tensor.nbytes for tensor in written), allocated)

    def _take_wide(self, path: str) -> None:
        """The wide branch, if it waits; the layer's own is noted before there is one."""
        layer = self._layers[path]
        self._own.setdefault(path, (layer.lora_down, layer.lora_up))
        if path in self._waiting:
            layer.set_branch(*_moved(self._waiting.pop(path), layer))

    def _give_own(self, paths: Iterable[str]) -> None:
        """To those of `paths` that no active adapter is for."""
        active = {path for name in self._active for path in self._residents[name].factors}
        for path in paths:
            layer = self._layers[path]
            if path not in active and layer.rank > layer.base_rank:
                self._waiting[path] = layer.lora_down, layer.lora_up
                self._restore(path)

    def _narrow(self, paths: Iterable[str]) -> None:
        for path in paths:
            self._waiting.pop(path, None)
            if path in self._own:
                self._restore(path)
                del self._own[path]

    def _restore(self, path: str) -> None:
        layer = self._layers[path]
        self._own[path] = _moved(self._own[path], layer)
        layer.set_branch(*self._own[path])

    def _now(self) -> float:
        device = next(iter(self._layers.values())).lora_up.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()


def _moved(branch: tuple[Tensor, Tensor], layer: SVDQuantLinear) -> tuple[Tensor, Tensor]:
    """`branch` where the layer is: the model may have moved since it was put aside."""
    device = layer.qweight.device
    return branch[0].to(device), branch[1].to(device)


def _scaled(up: Tensor, weight: float, like: Tensor) -> Tensor:
    """w B in like's dtype, rounded once from float32."""
    return (up.to(like.device, torch.float32) * weight).to(like.dtype)


def _widen(layer: SVDQuantLinear, ranks: int) -> int:
    """Makes room for `ranks` behind the base's own, what is there kept; returns the bytes that it took, 0 where there is enough."""
    width = -(-(layer.base_rank + ranks) // RANK_STEP) * RANK_STEP
    if ranks == 0 or layer.rank >= layer.base_rank + ranks:
        return 0
    down = layer.lora_down.new_zeros((width, layer.in_features))
    up = layer.lora_up.new_zeros((layer.out_features, width))
    down[: layer.rank], up[:, : layer.rank] = layer.lora_down, layer.lora_up
    layer.set_branch(down, up)
    return down.nbytes + up.nbytes
