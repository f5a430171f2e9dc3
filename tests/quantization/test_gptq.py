"""GPTQ: less error than plain rounding where inputs are correlated, in all three code systems, and never codes that cannot be."""

import pytest
import torch
from torch import Tensor, nn

from loragraft.kernels.layout import relative_rms
from loragraft.quantization.calibrate import ActivationStats
from loragraft.quantization.gptq import gptq_codes
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.settings import Numerics, QuantSettings
from loragraft.quantization.split import round_weight
from loragraft.quantization.svdquant import quantize_linear


def _correlated(S: int, K: int, seed: int) -> Tensor:
    """Inputs that live near a subspace of an eighth of their width."""
    mixing = torch.randn(K // 8, K, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(S, K // 8, generator=generator) @ mixing + 0.3 * torch.randn(S, K, generator=generator)


def _weight(N: int, K: int) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(4)) * 0.1


@pytest.mark.parametrize("K", [256, 200])
@pytest.mark.parametrize("numerics", ["w4a8", "w4a4", "w4a16"])
def test_lower_output_error_than_rounding_on_unseen_rows(numerics: Numerics, K: int) -> None:
    settings, weight = QuantSettings(numerics), _weight(96, K)
    rounded = round_weight(weight, settings)
    better = gptq_codes(weight, _correlated(512, K, 1), rounded, settings)
    judge = _correlated(512, K, 2)
    errors = [relative_rms(judge @ r.dense_NK.T, judge @ weight.T) for r in (rounded, better)]
    assert errors[1] < 0.75 * errors[0]
    assert better.scales is rounded.scales
    assert torch.equal(better.codes_NK[:, K:], rounded.codes_NK[:, K:])  # padding


@pytest.mark.parametrize("group_size", [64, 128])
def test_progressive_codes_stay_inside_int8(group_size: int) -> None:
    """Error compensation pushes values out of their group's range: (u - z) s must stay an INT8 all the same."""
    settings, weight = QuantSettings("w4a8", group_size=group_size), _weight(64, 256) ** 5
    rounded = gptq_codes(weight, _correlated(300, 256, 1), round_weight(weight, settings), settings)
    assert rounded.codes_NK.min() >= 0 and rounded.codes_NK.max() <= 15
    zero, scale = (
        rounded.scales[name].int().T.repeat_interleave(group_size, 1) for name in ("group_zero", "group_scale")
    )
    integers = (rounded.codes_NK.int() - zero) * scale
    assert integers.min() >= -128 and integers.max() <= 127
    dense = integers * rounded.scales["row_scale"][:, None]
    torch.testing.assert_close(rounded.dense_NK, dense)


@pytest.mark.parametrize("rows", [8, 600])
def test_fewer_rows_than_features_and_dead_channels(rows: int) -> None:
    x = _correlated(rows, 256, 1)
    x[:, 7] = 0
    settings, weight = QuantSettings("w4a4"), _weight(32, 256)
    better = gptq_codes(weight, x, round_weight(weight, settings), settings)
    assert torch.isfinite(better.dense_NK).all()


@pytest.mark.parametrize("numerics", ["w4a8", "w4a4", "w4a16"])
def test_layer_with_gptq_runs_on_the_kernels_and_reports_unseen_rows(numerics: Numerics) -> None:
    x = _correlated(512, 256, 1)
    linear = nn.Linear(256, 96, bias=False).requires_grad_(False)
    linear.weight.data = _weight(96, 256)
    stats = ActivationStats(x.abs().amax(0), x)
    settings = {"iterations": 2, "grid": 2, "rank": 4}
    plain = SVDQuantLinear.from_linear(linear, stats, QuantSettings(numerics, **settings))[0]  # type: ignore[arg-type]
    layer, report = SVDQuantLinear.from_linear(linear, stats, QuantSettings(numerics, gptq=True, **settings))  # type: ignore[arg-type]
    judge = _correlated(512, 256, 2)
    errors = [relative_rms(each(judge), linear(judge)) for each in (plain, layer)]
    assert errors[1] < 0.9 * errors[0]
    assert report.output_error == pytest.approx(errors[1], rel=0.15)  # no flattery


def test_refusals() -> None:
    weight, x = _weight(8, 64), _correlated(6, 64, 1)
    with pytest.raises(ValueError, match=r"here.*GPTQ needs activation statistics"):
        quantize_linear(weight, None, None, QuantSettings(smoothing="auto", gptq=True), path="here")
    with pytest.raises(ValueError, match=r"here.*at least 8 activation rows.*there are 6"):
        quantize_linear(weight, None, ActivationStats(x.abs().amax(0), x), QuantSettings(gptq=True), path="here")
    x[0, 0] = torch.nan
    with pytest.raises(ValueError, match="cannot be factored"):
        gptq_codes(weight, x, round_weight(weight, QuantSettings()), QuantSettings())
