"""Quantize a model that is never built: one layer at a time from a file, through the device, into a file.

Three threads work on different layers at once: one reads, one (the caller's) computes, one writes. In memory are at most
`AHEAD` layers waiting on either side and the one at work, on the device the one at work. The checkpoint grows in a hidden
folder beside its target, `.<name>.unfinished`, which takes the target's name when it is complete; a killed run leaves it, and
the same command goes on there (`partial_file`). Each layer's result depends on its own weights alone, so an interrupted run
ends with the same bytes.
"""

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from loragraft.disk import flush, sweep, write_atomic
from loragraft.quantization.calibrate import ActivationStats
from loragraft.quantization.checkpoint import CONFIG_NAME, PROFILES, QUANT_METHOD, VERSION, WEIGHTS_NAME
from loragraft.quantization.conv import conv_columns, quantize_conv_weight
from loragraft.quantization.convert import plan_paths
from loragraft.quantization.linear import buffer_layout
from loragraft.quantization.partial_file import JOURNAL, PartialFile
from loragraft.quantization.report import report_to_dict
from loragraft.quantization.settings import LayerReport, QuantSettings
from loragraft.quantization.svdquant import quantize_linear
from loragraft.quantization.tensor_file import CheckpointError
from loragraft.quantization.weight_source import TensorInfo, WeightSource

AHEAD = 2
"""Layers that may wait between two threads."""
ALGORITHM = 3
"""Part of the key of a half-done quantization: raised whenever the same layer would come out with other bits or another report."""
REPORT_NAME = "quantization_report.json"
OnWait = Callable[[str, float], None]
T = TypeVar("T")


def _ignore(what: str, seconds: float) -> None:
    pass


class StatsSource(Protocol):
    """Activation statistics, one layer at a time."""

    @property
    def layers(self) -> set[str]: ...

    @property
    def identity(self) -> str: ...

    def read(self, layer: str) -> ActivationStats: ...


@dataclass(frozen=True)
class _Piece:
    """A layer with its bias, or one tensor that is kept."""

    name: str
    tensors: tuple[str, ...]
    settings: QuantSettings | None
    """None: kept in 16 bits."""


def weight_layers(source: WeightSource) -> list[str]:
    """Paths of what can be quantized, in natural order of their names: all two-dimensional `.weight`s, the linear layers,
    and the four-dimensional ones of square kernels over more than one channel."""
    return _paths(source, lambda shape: len(shape) == 2 or (len(shape) == 4 and not _always_16bit(shape)))


def _always_16bit(shape: tuple[int, ...]) -> bool:
    """Whether a convolution of this weight cannot be quantized: depthwise, or not square."""
    return len(shape) == 4 and (shape[1] == 1 or shape[2] != shape[3])


def _paths(source: WeightSource, wanted: Callable[[tuple[int, ...]], bool]) -> list[str]:
    found = (name for name, info in source.tensors.items() if name.endswith(".weight") and wanted(info.shape))
    return sorted((name.removesuffix(".weight") for name in found), key=_natural)


def plan_source(
    source: WeightSource, rules: Mapping[str, QuantSettings], keep: Sequence[str]
) -> dict[str, QuantSettings]:
    """Which layer is quantized how. Raises ValueError as `plan_paths` does."""
    return plan_paths(weight_layers(source), rules, keep, _paths(source, _always_16bit))


def quantize_stream(
    source: WeightSource,
    plan: Mapping[str, QuantSettings],
    config: Mapping[str, Any],
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    stats: StatsSource | None = None,
    progress: bool = True,
    waited: OnWait = _ignore,
) -> list[LayerReport]:
    """Writes the checkpoint `folder` (as `load_quantized` reads it, with the report beside it); returns the report.

    `config` is the model's configuration. `waited` is told for what the computing thread waited ("reader", "writer") and how long. float32 tensors that stay are stored in bfloat16, 16-bit ones as they are.
    Raises FileExistsError if `folder` exists, ValueError for layers without the statistics that they need, CheckpointError
    for damaged weights or another run's unfinished folder, DiskFullError where there is no room.
    """
    folder, device = Path(folder), torch.device(device)
    if folder.exists() and not (folder / JOURNAL).exists():
        raise FileExistsError(f"{folder} exists; choose another folder or move it away")
    _check_statistics(plan, stats)
    pieces, tensors = _pieces(source, plan)
    unfinished = folder if folder.exists() else folder.with_name(f".{folder.name}.unfinished")
    with PartialFile(unfinished, WEIGHTS_NAME, tensors, _key(source, plan, config, stats, device)) as file:
        _run(source, [piece for piece in pieces if piece.name not in file.done], file, device, stats, progress, waited)
        reports = [LayerReport(**file.done[piece.name]) for piece in pieces if piece.settings is not None]
        block = _quantization_config(plan, reports)
        sweep(unfinished, older_than_hours=0)  # scratch names of a process that was killed in the next two lines
        _write_json(unfinished / CONFIG_NAME, {**_public(config), "quantization_config": block}, indent=2)
        _write_json(unfinished / REPORT_NAME, report_to_dict(reports), indent=1)
        if unfinished != folder:
            os.replace(unfinished, folder)
            flush(folder.parent)
        # Last: until here a killed run goes on, from either name.
        (folder / JOURNAL).unlink()
    return reports


def _check_statistics(plan: Mapping[str, QuantSettings], stats: StatsSource | None) -> None:
    known = set() if stats is None else stats.layers
    lacking = [path for path, settings in plan.items() if settings.needs_statistics and path not in known]
    if lacking:
        raise ValueError(
            f"no activation statistics for {len(lacking)} layer(s), the first is {lacking[0]!r}; "
            "calibrate them, or ask for smoothing 'auto' without gptq"
        )


def _pieces(source: WeightSource, plan: Mapping[str, QuantSettings]) -> tuple[list[_Piece], dict[str, TensorInfo]]:
    """(the work in order, the output's tensors)."""
    pieces: list[_Piece] = []
    tensors: dict[str, TensorInfo] = {}
    taken: set[str] = set()
    for path, settings in plan.items():
        N, K = _matrix_shape(source.tensors[f"{path}.weight"].shape)
        layout = buffer_layout(K, N, settings.numerics, settings.group_size, min(settings.branch_rank, N, K))
        tensors |= {f"{path}.{name}": TensorInfo(dtype, shape) for name, (shape, dtype) in layout.items()}
        names = [f"{path}.weight"]
        if f"{path}.bias" in source.tensors:
            names.append(f"{path}.bias")
            tensors[names[1]] = _stored(source.tensors[names[1]])
        taken.update(names)
        pieces.append(_Piece(path, tuple(names), settings))
    for name in sorted(source.tensors.keys() - taken, key=_natural):
        tensors[name] = _stored(source.tensors[name])
        pieces.append(_Piece(name, (name,), None))
    return pieces, tensors


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """[N, K] of a linear layer, or of a convolution [N, C, k, k] as a matrix."""
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], conv_columns(shape[1], shape[2]))


def _stored(info: TensorInfo) -> TensorInfo:
    wide = info.dtype in (torch.float32, torch.float64)
    return TensorInfo(torch.bfloat16 if wide else info.dtype, info.shape)


def _kept(name: str, tensor: Tensor) -> Tensor:
    """The tensor as it is stored. Raises CheckpointError for NaN and infinity, which would be every picture's."""
    stored = tensor.to(_stored(TensorInfo(tensor.dtype, tuple(tensor.shape))).dtype)
    if stored.is_floating_point() and not torch.isfinite(stored.float()).all():
        raise CheckpointError(f"tensor {name!r} holds NaN or infinity; nothing can be drawn with it")
    return stored


def _run(
    source: WeightSource,
    pieces: Sequence[_Piece],
    file: PartialFile,
    device: torch.device,
    stats: StatsSource | None,
    progress: bool,
    waited: OnWait,
) -> None:
    """Reads, computes and writes the pieces, each in a thread of its own. The first error of any of them is raised."""
    writes: deque[Future[None]] = deque()
    shape: tuple[int, ...] = ()
    layers = sum(piece.settings is not None for piece in pieces)
    with (
        ThreadPoolExecutor(1, "reader") as reader,
        ThreadPoolExecutor(1, "writer") as writer,
        tqdm(total=layers, desc="quantize", unit="layer", disable=not progress) as bar,
    ):
        for piece, inputs, found in _ahead(reader, source, pieces, stats, waited):
            if piece.settings is None:
                outputs = {name: _kept(name, tensor) for name, tensor in inputs.items()}
                result: dict[str, Any] = {}
            else:
                bar.set_postfix_str(piece.name, refresh=False)
                if device.type == "cuda" and shape != source.tensors[piece.tensors[0]].shape:
                    # Memory cached for one shape is cut up for the next: at FLUX.1's size 3.3 GiB are reserved
                    # where at most 1.2 are in use.
                    torch.cuda.empty_cache()
                    shape = source.tensors[piece.tensors[0]].shape
                outputs, result = _quantize(piece, piece.settings, inputs, found, device)
                bar.update()
            while len(writes) >= AHEAD or (writes and writes[0].done()):
                _wait(writes.popleft(), "writer", waited)
            writes.append(writer.submit(file.write, piece.name, outputs, result))
        for write in writes:
            _wait(write, "writer", waited)


def _ahead(
    reader: ThreadPoolExecutor,
    source: WeightSource,
    pieces: Sequence[_Piece],
    stats: StatsSource | None,
    waited: OnWait,
) -> Iterator[tuple[_Piece, dict[str, Tensor], ActivationStats | None]]:
    """The pieces with their tensors, read in the background `AHEAD` of their use."""

    def read(piece: _Piece) -> tuple[_Piece, dict[str, Tensor], ActivationStats | None]:
        known = stats is not None and piece.name in stats.layers
        found = stats.read(piece.name) if stats is not None and known else None
        return piece, {name: source.read(name) for name in piece.tensors}, found

    waiting: deque[Future[tuple[_Piece, dict[str, Tensor], ActivationStats | None]]] = deque()
    for piece in pieces:
        waiting.append(reader.submit(read, piece))
        if len(waiting) > AHEAD:
            yield _wait(waiting.popleft(), "reader", waited)
    while waiting:
        yield _wait(waiting.popleft(), "reader", waited)


def _wait(future: Future[T], what: str, waited: OnWait) -> T:
    started = time.monotonic()
    result = future.result()
    waited(what, time.monotonic() - started)
    return result


def _quantize(
    piece: _Piece,
    settings: QuantSettings,
    inputs: dict[str, Tensor],
    stats: ActivationStats | None,
    device: torch.device,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors under their full names, the report as JSON)."""
    bias = inputs.get(f"{piece.name}.bias")
    if bias is not None:
        bias = _kept(f"{piece.name}.bias", bias)
    stored = inputs[f"{piece.name}.weight"]
    # The copy has no name here: it leaves the device as soon as `quantize_linear` has widened it.
    quantize = quantize_linear if stored.ndim == 2 else quantize_conv_weight
    tensors, report = quantize(stored.to(device, non_blocking=True), bias, stats, settings, path=piece.name)
    return {f"{piece.name}.{name}": tensor for name, tensor in tensors.items()}, asdict(report)


def _quantization_config(plan: Mapping[str, QuantSettings], reports: Sequence[LayerReport]) -> dict[str, Any]:
    """The block that `checkpoint.quantization_config` makes of a model."""
    if not reports:
        raise ValueError("the plan quantizes no layer")
    kinds = {PROFILES[settings.numerics] for settings in plan.values() if settings.numerics in PROFILES}
    profile = kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "weight-only"
    layers = {
        report.path: {
            "numerics": report.numerics,
            "group_size": report.group_size,
            "hadamard": report.hadamard,
            "act_unsigned": False,
            "act_shift": 0.0,
            "rank": report.rank,
            "output_error": report.output_error,
        }
        for report in reports
    }
    return {"quant_method": QUANT_METHOD, "version": VERSION, "profile": profile, "layers": layers}


def _key(
    source: WeightSource,
    plan: Mapping[str, QuantSettings],
    config: Mapping[str, Any],
    stats: StatsSource | None,
    device: torch.device,
) -> str:
    """Everything that decides the bytes: weights, settings, statistics, arithmetic."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    parts = {
        "algorithm": ALGORITHM,
        "source": source.identity,
        "plan": {path: asdict(settings) for path, settings in plan.items()},
        "config": _public(config),
        "stats": None if stats is None else stats.identity,
        "torch": torch.__version__,
        "device": where,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without `_name_or_path`: a local path has no business in a published file."""
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def _write_json(path: Path, content: Mapping[str, Any], indent: int) -> None:
    write_atomic(path, (json.dumps(content, indent=indent) + "\n").encode())


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key: block 10 comes after block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
