"""The adapters that one loaded model computes with, exchanged between pictures.

On INT4 layers they are resident (`resident.ResidentAdapters`): a switch or another weight copies factors into branches that stay
where they are, so that neither compiled code nor a CUDA graph is made anew. An adapter that also changes 16-bit layers, or one on
a 16-bit model, is grafted. Either way the base is itself, byte for byte, whenever no adapter is used.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.graft import graft, grafted, ungraft
from loragraft.adapters.resident import ResidentAdapters
from loragraft.quantization.checkpoint import quantized_layers

KEPT = 5
"""Adapters that stay resident, those in use included; the one that came first goes first."""


class AdapterSwitch:
    """One per transformer; `clear` before anything else grafts it."""

    def __init__(self, transformer: nn.Module, kept: int = KEPT) -> None:
        self._transformer, self._kept = transformer, kept
        self._layers = quantized_layers(transformer).keys()
        self._residents: ResidentAdapters | None = None
        self._grafted: list[str] = []

    @property
    def resident(self) -> dict[str, float]:
        """Name -> weight of all that are kept, in use or not."""
        return {} if self._residents is None else {n: kept.weight for n, kept in self._residents.residents.items()}

    def use(self, adapters: Sequence[tuple[Adapter, float]], *, any_base: bool = False) -> None:
        """From here on the model computes with exactly these, each with its weight; none: with the base.

        Raises ValueError as `graft` does, and for two of one name; the model then computes with the base.
        """
        self._rest()
        names = [adapter.name for adapter, _ in adapters]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"two adapters are named {', '.join(twice)}: give each once, with the weight that it is to have"
            )
        if self._can_reside(adapters):
            self._use_residents(adapters, any_base)
        else:
            self.clear()
            self._use_grafts(adapters, any_base)

    def clear(self) -> None:
        """Forgets all; the transformer is anyone's."""
        self._rest()
        if self._residents is not None:
            self._residents.clear()
            self._residents = None

    def _can_reside(self, adapters: Sequence[tuple[Adapter, float]]) -> bool:
        return not grafted(self._transformer) and all(adapter.pairs.keys() <= self._layers for adapter, _ in adapters)

    def _rest(self) -> None:
        """Back to the base."""
        for name in self._grafted:
            ungraft(self._transformer, name)
        self._grafted = []
        if self._residents is not None:
            self._residents.activate()

    def _use_residents(self, adapters: Sequence[tuple[Adapter, float]], any_base: bool) -> None:
        if not adapters:
            return
        residents = self._residents = self._residents or ResidentAdapters(self._transformer)
        for adapter, weight in adapters:
            if not any_base:
                adapter.check_base(residents.base_id)
            there = residents.residents.get(adapter.name)
            if there is not None and there.adapter.pairs is not adapter.pairs:  # trained again under its old name
                residents.remove(adapter.name)
                there = None
            if there is None:
                residents.add(adapter, weight, active=False, any_base=any_base)
            elif there.weight != weight:
                residents.set_weight(adapter.name, weight)
        names = [adapter.name for adapter, _ in adapters]
        others = [name for name in residents.residents if name not in names]
        for name in others[: max(0, len(residents.residents) - self._kept)]:
            residents.remove(name)
        residents.activate(*names)

    def _use_grafts(self, adapters: Sequence[tuple[Adapter, float]], any_base: bool) -> None:
        try:
            for adapter, weight in adapters:
                graft(self._transformer, adapter, weight, any_base=any_base)
                self._grafted.append(adapter.name)
        except ValueError:
            self._rest()
            raise


@contextmanager
def using(
    transformer: nn.Module, adapters: Sequence[tuple[Adapter, float]], *, any_base: bool = False
) -> Iterator[None]:
    """`adapters`, each with its weight, inside the block, beside what is grafted there; every byte as before after it.

    Raises ValueError as `AdapterSwitch.use` does.
    """
    if not adapters:
        yield
        return
    switch = AdapterSwitch(transformer)
    try:
        switch.use(adapters, any_base=any_base)
        yield
    finally:
        switch.clear()
