"""The three code systems: ranges, agreement with what the kernels dequantize, degenerate weights."""

import pytest
import torch

from loragraft.kernels.layout import pack_int4, pack_tiles, pack_words, relative_rms
from loragraft.kernels.w4a4_linear import dequantize_w4a4
from loragraft.kernels.w4a8_linear import dequantize_w4a8
from loragraft.kernels.w4a16_linear import dequantize_w4a16
from loragraft.quantization.weight_quant import round_affine, round_progressive, round_symmetric


def _weights(seed: int, kind: str, N: int = 33, K: int = 192) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator)
    if kind == "heavy":
        weight = weight**5
    elif kind == "one-sided":
        weight = weight.abs() + 0.1
    elif kind == "extreme":  # groups that hold both +max and -max: the widest second-level range
        weight = torch.where(torch.rand(N, K, generator=generator) < 0.5, -3.0, 3.0)
    elif kind == "outlier row":
        weight[:, 5] *= 1e4
    return weight


@pytest.mark.parametrize("kind", ["normal", "heavy", "one-sided", "extreme", "outlier row"])
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("seed", range(5))
def test_progressive_codes_stay_inside_int8(kind: str, group: int, seed: int) -> None:
    rounded = round_progressive(_weights(seed, kind), group)
    scale_GN, zero_GN = rounded.scales["group_scale"].int(), rounded.scales["group_zero"].int()
    assert scale_GN.min() >= 1
    assert scale_GN.max() <= 15
    assert zero_GN.max() <= 15
    assert rounded.codes_NK.max() <= 15
    codes = rounded.codes_NK.int().view(33, -1, group)
    integers = (codes - zero_GN.T[..., None]) * scale_GN.T[..., None]
    assert integers.min() >= -128
    assert integers.max() <= 127


@pytest.mark.parametrize("K", [64, 100, 192, 256])
def test_dense_is_what_the_kernels_multiply_with(K: int) -> None:
    weight = _weights(0, "normal", K=K)
    native, symmetric, affine = round_progressive(weight, 64), round_symmetric(weight, 64), round_affine(weight, 64)
    words = pack_words(native.scales["group_scale"], native.scales["group_zero"], 64)
    by_kernel = (
        dequantize_w4a8(pack_tiles(native.codes_NK), native.scales["row_scale"], words),
        dequantize_w4a4(pack_int4(symmetric.codes_NK), **symmetric.scales),
        dequantize_w4a16(pack_int4(affine.codes_NK), **affine.scales),
    )
    for rounded, dense in zip((native, symmetric, affine), by_kernel, strict=True):
        torch.testing.assert_close(dense[:, :K], rounded.dense_NK, rtol=1e-6, atol=1e-7)
        assert relative_rms(rounded.dense_NK, weight) < 0.12


def test_symmetric_codes_use_the_stored_scale() -> None:
    weight = _weights(1, "heavy")
    rounded = round_symmetric(weight, 64)
    assert rounded.codes_NK.abs().max() <= 7
    assert rounded.scales["wscale"].dtype == torch.bfloat16
    scale = rounded.scales["wscale"].float().T.repeat_interleave(64, dim=1)[:, :192]
    assert ((rounded.dense_NK - weight).abs() <= 0.5 * scale + 1e-2 * weight.abs()).all()


@pytest.mark.parametrize("rounding", [round_progressive, round_symmetric, round_affine])
def test_zero_and_constant_weights_survive(rounding: object) -> None:
    weight = torch.zeros(8, 128)
    weight[3] = 0.25
    rounded = rounding(weight, 64)  # type: ignore[operator]
    assert torch.isfinite(rounded.dense_NK).all()
    assert rounded.dense_NK[0].abs().max() == 0
    torch.testing.assert_close(rounded.dense_NK[3], weight[3], rtol=0.01, atol=0)
