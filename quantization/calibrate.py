"""Activation statistics of linear layers and convolutions, gathered by hooks while a caller runs the model.

Per layer: max|x_k| over everything seen, and a bounded uniform sample of input rows. The sample is a reservoir: each row
draws a uniform key and the `rows` largest keys stay, which is a uniform sample without replacement of the whole stream
(Efraimidis and Spirakis 2006, with equal weights), however many denoising steps the caller runs.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loragraft.quantization.names import named_module
from loragraft.quantization.patches import rows_of
from loragraft.quantization.tensor_file import CheckpointError, write_tensors
from loragraft.quantization.weight_source import FileSource

DEFAULT_ROWS = 512


@dataclass(frozen=True)
class ActivationStats:
    """What one linear layer receives; a convolution receives patches (`patches`)."""

    absmax_K: Tensor
    """[K] float32: largest magnitude seen per in feature."""
    samples_SK: Tensor
    """[S, K] a uniform sample of input rows, in the dtype that the layer received."""


class _Collector:
    """Running statistics of one layer; `hook` is its forward pre-hook."""

    def __init__(self, path: str, rows: int, seed: int) -> None:
        self.path, self.rows = path, rows
        self.absmax: Tensor | None = None
        self.samples: Tensor | None = None
        self.keys = torch.empty(0)
        # A generator of its own: what one layer sees cannot shift another layer's sample.
        self.generator = torch.Generator().manual_seed(seed ^ zlib.crc32(path.encode()))

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        rows = rows_of(module, x)
        absmax = rows.absmax()
        if not torch.isfinite(absmax).all():
            raise ValueError(f"layer {self.path!r} received NaN or infinity during calibration")
        self.absmax = absmax if self.absmax is None else torch.maximum(self.absmax, absmax)
        keys = torch.rand(rows.count, generator=self.generator)
        full = self.keys.numel() == self.rows
        index = torch.nonzero(keys > self.keys.min()).flatten() if full else torch.arange(keys.numel())
        if index.numel() == 0:
            return
        drawn = rows.draw(index)
        samples = drawn if self.samples is None else torch.cat([self.samples, drawn])
        all_keys = torch.cat([self.keys, keys[index]])
        keep = all_keys.topk(min(self.rows, all_keys.numel())).indices
        self.keys, self.samples = all_keys[keep], samples[keep.to(samples.device)]


def collect(
    model: nn.Module, paths: Iterable[str], run: Callable[[], None], *, rows: int = DEFAULT_ROWS, seed: int = 0
) -> dict[str, ActivationStats]:
    """Statistics of the layers at `paths` while `run()` drives the model, without gradients.

    The same model, `run` and seed give the same statistics. Raises KeyError for an unknown path (with the nearest one)
    and ValueError naming the layer for non-finite inputs or a layer that `run` never reached.
    """
    collectors = {path: _Collector(path, rows, seed) for path in paths}
    handles = []
    try:
        for path, collector in collectors.items():
            module = named_module(model, path)
            handles.append(module.register_forward_pre_hook(collector.hook, with_kwargs=True))
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    unreached = [path for path, collector in collectors.items() if collector.absmax is None]
    if unreached:
        raise ValueError(f"calibration never reached {len(unreached)} layer(s): {', '.join(sorted(unreached)[:8])}")
    stats = {}
    for path, collector in collectors.items():
        assert collector.absmax is not None
        assert collector.samples is not None
        stats[path] = ActivationStats(collector.absmax, collector.samples)
    return stats


def save_stats(path: Path, stats: Mapping[str, ActivationStats]) -> None:
    """One safetensors file: `<layer>.absmax` float32 [K] and `<layer>.samples` bfloat16 [S, K], whole or not at all."""
    tensors = {}
    for layer, found in stats.items():
        tensors[f"{layer}.absmax"] = found.absmax_K.float().cpu()
        tensors[f"{layer}.samples"] = found.samples_SK.to(torch.bfloat16).cpu()
    write_tensors(path, tensors, {"format": "pt"})


class StatsFile:
    """What `save_stats` wrote, one layer in memory at a time."""

    def __init__(self, path: Path) -> None:
        """Reads the header. Raises CheckpointError for a damaged file and for one that holds something else."""
        self._source = FileSource(path)
        self.layers = {name.removesuffix(".absmax") for name in self._source.tensors if name.endswith(".absmax")}
        """Paths of the layers."""
        if self._source.tensors.keys() != {f"{p}.{kind}" for p in self.layers for kind in ("absmax", "samples")}:
            raise CheckpointError(f"{path} holds no activation statistics; expected a file of save_stats")

    @property
    def identity(self) -> str:
        """Changes with the file."""
        return self._source.identity

    def read(self, layer: str) -> ActivationStats:
        """The statistics of one layer, samples in bfloat16."""
        return ActivationStats(self._source.read(f"{layer}.absmax"), self._source.read(f"{layer}.samples"))
