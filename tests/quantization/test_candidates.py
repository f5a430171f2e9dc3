"""Candidates ranked in a stack: the errors of `split_layer`, whatever the stack."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from loragraft.quantization import candidates
from loragraft.quantization.calibrate import ActivationStats
from loragraft.quantization.candidates import candidate_errors
from loragraft.quantization.low_rank import POWER_ITERATIONS
from loragraft.quantization.settings import Numerics, QuantSettings
from loragraft.quantization.split import Layer, Transform, split_layer

GRID = [Transform(a, b, False) for a, b in ((0.0, 0.0), (0.5, 0.0), (0.5, 0.5), (0.9, 0.1), (0.0, 0.7))]


def _layer(outlier_layer: tuple[nn.Linear, ActivationStats], settings: QuantSettings) -> Layer:
    linear, stats = outlier_layer
    weight, rows = linear.weight.detach(), stats.samples_SK
    return Layer(weight, stats.absmax_K, weight.abs().amax(0), rows, rows @ weight.T, settings, measured=True)


@pytest.mark.parametrize(("numerics", "rank"), [("w4a8", 16), ("w4a8", 0), ("w4a4", 16)])
def test_errors_are_those_of_one_round(
    outlier_layer: tuple[nn.Linear, ActivationStats], numerics: Numerics, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "COLD_ITERATIONS", POWER_ITERATIONS)
    layer = _layer(outlier_layer, QuantSettings(numerics, rank=rank, search="subsampled"))
    turned = [replace(transform, hadamard=True) for transform in GRID] if numerics == "w4a8" else []
    grid = [*GRID, *turned][::-1]  # rotated ones first: the order of the answer is that of the question
    found = candidate_errors(layer, grid)
    assert found == pytest.approx([split_layer(layer, transform, 1).error for transform in grid], rel=1e-4)
    assert len(set(found)) == len(grid)


def test_the_size_of_a_stack_does_not_matter(
    outlier_layer: tuple[nn.Linear, ActivationStats], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = _layer(outlier_layer, QuantSettings(search="subsampled"))
    together = candidate_errors(layer, GRID)
    for count in (1, 2, 3):
        monkeypatch.setattr(candidates, "STACK_ELEMENTS", count * layer.weight_NK.numel())
        assert candidate_errors(layer, GRID) == pytest.approx(together, rel=1e-5)


def test_a_layer_of_zeros_has_no_error(outlier_layer: tuple[nn.Linear, ActivationStats]) -> None:
    layer = _layer(outlier_layer, QuantSettings(search="subsampled"))
    nothing = replace(layer, weight_NK=0 * layer.weight_NK, target_SN=0 * layer.target_SN)
    assert candidate_errors(nothing, GRID) == [0.0] * len(GRID)
    assert candidate_errors(replace(layer, target_SN=0 * layer.target_SN), GRID[:1]) == [torch.inf]


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [0, 32])
def test_a_gpu_ranks_as_a_cpu_does(rank: int) -> None:
    """[1024, 3072] in stacks of ten and a single one left over; the fused rounding may take another of two equal scales."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 3072, generator=generator) / 3072**0.5
    weight[:, ::128] *= 10
    rows = torch.randn(128, 3072, generator=generator)
    rows[:, 5::64] *= 8
    settings = QuantSettings(rank=rank, search="subsampled")
    layer = Layer(weight, rows.abs().amax(0), weight.abs().amax(0), rows, rows @ weight.T, settings, measured=True)
    tensors = {name: value.cuda() for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
    grid = [Transform(a / 5, b / 2, turned) for a in range(5) for b in range(2) for turned in (False, True)] + GRID[1:2]
    assert candidate_errors(replace(layer, **tensors), grid) == pytest.approx(candidate_errors(layer, grid), rel=5e-3)
