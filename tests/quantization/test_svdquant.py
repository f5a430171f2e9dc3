"""SVDQuant of one layer: better than rounding, deterministic, honest about its error."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loragraft.kernels.layout import apply_hadamard, relative_rms
from loragraft.quantization import split, svdquant
from loragraft.quantization.calibrate import ActivationStats
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.low_rank import low_rank
from loragraft.quantization.settings import Numerics, QuantSettings
from loragraft.quantization.split import smoothing_vector
from loragraft.quantization.svdquant import quantize_linear

OutlierLayer = tuple[nn.Linear, ActivationStats]


@pytest.mark.parametrize(
    "settings", [QuantSettings("w4a8"), QuantSettings("w4a8", group_size=128), QuantSettings("w4a4")]
)
def test_beats_plain_rounding_on_outliers(outlier_layer: OutlierLayer, settings: QuantSettings) -> None:
    linear, stats = outlier_layer
    layer, report = SVDQuantLinear.from_linear(linear, stats, settings, path="here")
    assert report.output_error < 0.5 * report.rtn_error
    assert report.path == "here"
    assert report.rank == 16
    y, y16 = layer(stats.samples_SK), linear(stats.samples_SK)
    measured = relative_rms(y - linear.bias, y16 - linear.bias)
    assert measured == pytest.approx(report.output_error, rel=0.01)  # the report is about what the kernels compute
    assert relative_rms(layer.dequantized_weight(), linear.weight) == pytest.approx(report.weight_error, rel=1e-4)


@pytest.mark.parametrize("numerics", ["w4a8", "w4a4"])
def test_calibrated_smoothing_beats_none(outlier_layer: OutlierLayer, numerics: Numerics) -> None:
    linear, stats = outlier_layer
    errors = {}
    for smoothing in ("calibrated", "none"):
        settings = QuantSettings(numerics, smoothing=smoothing, rotation="never")
        _, report = quantize_linear(linear.weight, None, stats, settings)
        errors[smoothing] = report.output_error
        assert (report.alpha > 0) == (smoothing == "calibrated")
    assert errors["calibrated"] < 0.7 * errors["none"]


def test_rotation_is_tried_and_kept_only_if_better(outlier_layer: OutlierLayer) -> None:
    linear, stats = outlier_layer
    free = quantize_linear(linear.weight, None, stats, QuantSettings(iterations=1))[1]
    fixed = quantize_linear(linear.weight, None, stats, QuantSettings(iterations=1, rotation="never"))[1]
    assert free.output_error <= fixed.output_error
    assert not fixed.hadamard


@pytest.mark.parametrize("smoothing", ["weight", "hadamard"])
def test_data_free_needs_no_statistics(outlier_layer: OutlierLayer, smoothing: str) -> None:
    linear, _ = outlier_layer
    _, report = quantize_linear(linear.weight, linear.bias, None, QuantSettings(smoothing=smoothing))  # type: ignore[arg-type]
    assert report.output_error < report.rtn_error
    assert report.hadamard == (smoothing == "hadamard")


def test_transforms_are_exact_before_rounding(outlier_layer: OutlierLayer) -> None:
    linear, stats = outlier_layer
    smooth = smoothing_vector(stats.absmax_K, linear.weight.abs().amax(0), 0.5, 0.5)
    assert smooth.dtype == torch.bfloat16
    x = apply_hadamard(stats.samples_SK / smooth.float())
    weight = apply_hadamard(linear.weight * smooth.float())
    assert relative_rms(x @ weight.T, stats.samples_SK @ linear.weight.T) < 1e-5


def test_a_full_rank_branch_leaves_next_to_nothing(outlier_layer: OutlierLayer) -> None:
    """Un-rotation and un-smoothing of the stored branch: with all ranks in it, the effective weight is W."""
    linear, stats = outlier_layer
    for settings in (QuantSettings(rank=192, smoothing="hadamard"), QuantSettings("w4a4", rank=192)):
        _, report = quantize_linear(linear.weight, None, stats, settings)
        assert report.weight_error < 2e-3


@pytest.mark.parametrize("numerics", ["w4a8", "w4a4"])
def test_alternation_is_never_worse(outlier_layer: OutlierLayer, numerics: Numerics) -> None:
    linear, stats = outlier_layer
    errors = [
        quantize_linear(linear.weight, None, stats, QuantSettings(numerics, iterations=rounds))[1].output_error
        for rounds in (1, 2, 4, 12)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_deterministic_and_leaves_the_global_generator_alone(outlier_layer: OutlierLayer) -> None:
    linear, stats = outlier_layer
    torch.manual_seed(1)
    first, report = quantize_linear(linear.weight, linear.bias, stats, QuantSettings())
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    torch.manual_seed(2)
    second, again = quantize_linear(linear.weight, linear.bias, stats, QuantSettings())
    assert report == again
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_low_rank_matches_the_full_svd() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(96, 20, generator=generator) @ torch.diag(0.7 ** torch.arange(20.0)) @ torch.randn(20, 128, generator=generator)  # fmt: skip
    left, right = low_rank(matrix, 6, seed=0)
    U, S, Vh = torch.linalg.svd(matrix)
    best = (U[:, :6] * S[:6]) @ Vh[:6]
    assert relative_rms(left @ right, matrix) <= 1.001 * relative_rms(best, matrix)
    assert [tuple(t.shape) for t in low_rank(matrix, 0, seed=0)] == [(96, 0), (0, 128)]


def test_weight_only_layers(outlier_layer: OutlierLayer) -> None:
    linear, stats = outlier_layer
    tensors, report = quantize_linear(linear.weight, linear.bias, stats, QuantSettings("w4a16"))
    assert "smooth" not in tensors
    assert report.rank == 0
    assert report.output_error == pytest.approx(report.rtn_error)
    better = quantize_linear(linear.weight, None, stats, QuantSettings("w4a16", rank=16))[1]
    assert better.output_error < report.output_error


@pytest.mark.parametrize("K", [100, 64, 320])
@pytest.mark.parametrize("numerics", ["w4a8", "w4a4", "w4a16"])
def test_awkward_widths(K: int, numerics: Numerics) -> None:
    generator = torch.Generator().manual_seed(K)
    linear = nn.Linear(K, 24).requires_grad_(False)
    linear.weight.data = torch.randn(24, K, generator=generator) * 0.1
    x = torch.randn(2, 5, K, generator=generator)
    stats = ActivationStats(x.abs().amax((0, 1)), x.view(-1, K))
    layer, report = SVDQuantLinear.from_linear(linear, stats, QuantSettings(numerics, iterations=2))
    assert relative_rms(layer(x), linear(x)) < 0.15
    assert not (K == 100 and report.hadamard)


def test_refusals_name_the_layer(outlier_layer: OutlierLayer) -> None:
    linear, stats = outlier_layer
    with pytest.raises(ValueError, match=r"blocks\.3\.fc.*needs activation statistics"):
        quantize_linear(linear.weight, None, None, QuantSettings(), path="blocks.3.fc")
    weight = linear.weight.clone()
    weight[2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"blocks\.3\.fc.*NaN"):
        quantize_linear(weight, None, stats, QuantSettings(), path="blocks.3.fc")
    with pytest.raises(ValueError, match=r"256 in features for a weight of 100"):
        quantize_linear(weight[:2, :100].nan_to_num(), None, stats, QuantSettings())
    with pytest.raises(ValueError, match="divisible by 64"):
        quantize_linear(torch.ones(4, 100), None, None, QuantSettings(smoothing="hadamard"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"numerics": "w3a3"},
        {"smoothing": "magic"},
        {"numerics": "w4a4", "group_size": 128},
        {"numerics": "w4a4", "smoothing": "hadamard"},
        {"numerics": "w4a16", "smoothing": "calibrated"},
        {"rank": -1},
        {"iterations": 0},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong)) if len(wrong) == 1 else list(wrong)[1])):
        QuantSettings(**wrong)  # type: ignore[arg-type]


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that ops make inside the block, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known and size:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.mark.parametrize(("numerics", "most"), [("w4a8", 5.9), ("w4a16", 3.9)])
def test_few_copies_of_a_wide_layer_live_at_once(
    numerics: Numerics, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 copies of the weight: w4a8 itself, the rotated one, what is rounded, and values and codes of two rounds."""
    for module, name in ((svdquant, "SYNTHETIC_ROWS"), (svdquant, "SUBSAMPLED_ROWS"), (svdquant, "SUBSAMPLED_OUTPUTS")):
        monkeypatch.setattr(module, name, 12)
    monkeypatch.setattr(split, "ROUNDING_CHUNK", 1 << 14)
    auto = {"rank": 2, "smoothing": "auto", "iterations": 4}
    settings = QuantSettings(numerics, search="subsampled", grid=1, **(auto if numerics == "w4a8" else {}))  # type: ignore[arg-type]
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    with _LiveBytes() as live:
        quantize_linear(weight.clone(), None, None, settings)
    assert live.peak < most * 4 * weight.numel()
    assert live.now < 0.1 * live.peak  # the counter sees what is let go
