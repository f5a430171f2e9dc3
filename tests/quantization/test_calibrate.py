"""Activation statistics: exact maxima, a bounded uniform sample, errors that name the layer."""

from functools import partial

import pytest
import torch
from torch import nn

from loragraft.quantization.calibrate import collect


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def _feed(model: nn.Module, batches: list[torch.Tensor]) -> None:
    for x in batches:
        model(x)


def test_maxima_and_sample() -> None:
    model = _model()
    batches = [torch.randn(3, 5, 8) for _ in range(20)]
    stats = collect(model, ["0", "2"], partial(_feed, model, batches), rows=64)
    seen = torch.cat([x.reshape(-1, 8) for x in batches])
    torch.testing.assert_close(stats["0"].absmax_K, seen.abs().amax(0))
    assert stats["0"].samples_SK.shape == (64, 8)
    assert all((seen == row).all(1).any() for row in stats["0"].samples_SK)
    assert stats["0"].samples_SK.unique(dim=0).shape[0] == 64  # without replacement
    assert stats["2"].samples_SK.min() >= 0  # after the ReLU
    assert not model[0]._forward_pre_hooks


def test_few_rows_are_all_kept() -> None:
    model = _model()
    assert collect(model, ["0"], partial(_feed, model, [torch.randn(7, 8)]))["0"].samples_SK.shape == (7, 8)


def test_sample_is_uniform_over_the_stream() -> None:
    """Rows carry their number; the mean of a uniform sample of 0..1999 is near 1000, early and late rows alike."""
    model = nn.Sequential(nn.Linear(1, 1))

    def run() -> None:
        for start in range(0, 2000, 50):
            model(torch.arange(start, start + 50.0)[:, None])

    samples = collect(model, ["0"], run, rows=400)["0"].samples_SK.flatten()
    assert samples.numel() == 400
    assert abs(samples.mean() - 1000) < 120  # four standard errors
    assert (samples < 500).sum() > 60
    assert (samples >= 1500).sum() > 60


def test_same_seed_same_statistics_whatever_else_is_collected() -> None:
    model = _model()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(50, 8, generator=generator) for _ in range(4)]
    run = partial(_feed, model, batches)
    alone, together = collect(model, ["2"], run, rows=16), collect(model, ["0", "2"], run, rows=16)
    assert torch.equal(alone["2"].samples_SK, together["2"].samples_SK)
    other = collect(model, ["2"], run, rows=16, seed=1)
    assert not torch.equal(alone["2"].samples_SK, other["2"].samples_SK)


def test_refusals_name_the_layer() -> None:
    model = _model()
    with pytest.raises(ValueError, match=r"never reached 1 layer\(s\): 2"):
        collect(model, ["0", "2"], partial(_feed, model[0], [torch.ones(1, 8)]))
    with pytest.raises(ValueError, match="'0' received NaN"):
        collect(model, ["0"], partial(_feed, model, [torch.full((1, 8), torch.nan)]))
    with pytest.raises(KeyError, match="no module 'fc'"):
        collect(model, ["fc"], lambda: None)
    assert not model[0]._forward_pre_hooks
