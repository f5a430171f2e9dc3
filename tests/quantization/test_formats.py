"""Codebooks and scales against published values, and against bitsandbytes and torchao where they are installed."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from loragraft.backbones.architectures import NUMERICS
from loragraft.kernels.layout import relative_rms
from loragraft.quantization import fp4, low_integers, nf4, rowwise
from loragraft.quantization.formats import FORMATS, Format, FormatName
from loragraft.recipes import schema

every_format = pytest.mark.parametrize("found", FORMATS.values(), ids=FORMATS)
PUBLISHED_BITS = {
    "fp8": 8,
    "int8": 8,
    "nf4": 4.5,
    "nf4-double": 4.127,
    "nvfp4": 4.5,
    "mxfp4": 4.25,
    "int3": 3.5,
    "int2": 2.5,
}


def weight(N: int = 48, K: int = 320, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def decoded(found: Format, w: Tensor) -> Tensor:
    return found.decode(found.encode(w) | found.tables, *w.shape)


def test_the_recipe_knows_every_format_by_its_name() -> None:
    assert set(FORMATS) == set(get_args(FormatName))
    assert set(get_args(schema.Numerics)) == {*NUMERICS, "16bit"}


@every_format
def test_what_is_stored_is_what_the_layout_says(found: Format) -> None:
    for N, K in ((48, 320), (10, 72), (7, 101)):
        stored = found.encode(weight(N, K).bfloat16())
        assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == found.layout(N, K)
        assert found.decode(stored | found.tables, N, K).shape == (N, K)
    assert found.bits == pytest.approx(PUBLISHED_BITS[found.name], abs=0.01)
    assert found.source


@every_format
def test_a_second_rounding_changes_nothing(found: Format) -> None:
    once = decoded(found, weight())
    again = decoded(found, once)
    if found.name in ("nf4-double", "int3", "int2"):  # their scales are rounded or searched for: close, not equal
        assert relative_rms(again, once) < 0.25 * relative_rms(once, weight())
    else:
        assert torch.allclose(again, once, rtol=1e-6, atol=0)


def test_fewer_bits_are_a_larger_error() -> None:
    w = weight(256, 512)
    error = {name: relative_rms(decoded(found, w), w) for name, found in FORMATS.items()}
    order = ["int8", "fp8", "nf4", "mxfp4", "int3", "int2"]
    assert [error[name] for name in order] == sorted(error[name] for name in order)
    assert error["fp8"] < error["nvfp4"] < error["mxfp4"]
    assert error["nf4"] <= error["nf4-double"] < 1.01 * error["nf4"]
    # N(0, 1): E4M3 errs by 2.6 %; a uniform quantizer of range r and n levels by r / n / sqrt 12
    assert error["fp8"] == pytest.approx(0.026, abs=0.002)
    assert error["int8"] == pytest.approx(w.abs().amax(1).mean().item() / w.std().item() / 127 / math.sqrt(12), rel=0.1)


@every_format
def test_zeros_and_single_large_values_stay_finite(found: Format) -> None:
    w = torch.zeros(16, 128)
    assert torch.equal(decoded(found, w), w)
    w[3, 5], w[9, 127] = 300.0, -1e-7
    assert torch.isfinite(decoded(found, w)).all()
    assert decoded(found, w)[3, 5] == pytest.approx(300, rel=0.15)
    if found.round_input is not None:
        assert torch.isfinite(found.round_input(w.bfloat16())).all()
        assert torch.equal(found.round_input(torch.zeros(4, 128)), torch.zeros(4, 128))


def test_e2m1_is_the_ocp_table_and_rounds_ties_to_even() -> None:
    """OCP MX 1.0, table 5; ties by section 5.3.3: to the even mantissa."""
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert fp4.e2m1_values(torch.arange(16, dtype=torch.uint8)).tolist() == table + [-value for value in table]
    values = torch.tensor(table + [-value for value in table])
    assert fp4.e2m1_codes(values).tolist() == list(range(16))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 100.0])
    assert fp4.e2m1_values(fp4.e2m1_codes(ties)).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    many = torch.cat([torch.linspace(-8, 8, 4097), ties, -ties])
    assert torch.equal(fp4.e2m1_round(many), fp4.e2m1_values(fp4.e2m1_codes(many)))


def test_mx_scales_are_powers_of_two_with_bias_127() -> None:
    w = torch.zeros(5, 32)
    w[:, 0] = torch.tensor([1.0, 6.0, 7.99, 2.0**-128, 3e38])
    found = fp4.encode_mx(w)
    assert found["block_scale"][:, 0].tolist() == [125, 127, 127, 0, 252]
    assert fp4.decode(found | fp4.tables(), 32)[:3, 0].tolist() == [1.0, 6.0, 6.0]
    assert fp4.decode(found | fp4.tables(), 32)[3, 0] == 2.0**-128  # a scale of 2^-127, itself subnormal


def test_nv_scales_reach_the_ends_of_e4m3() -> None:
    found = fp4.encode_nv(weight())
    largest = weight().abs().max()
    assert found["block_scale"].view(torch.float8_e4m3fn).float().max() == 448
    assert found["tensor_scale"].item() == pytest.approx(largest.item() / 2688, rel=1e-6)
    x = weight(6, 64) * torch.logspace(-3, 3, 6)[:, None]
    alone = torch.cat([fp4.round_nv(row[None]) for row in x])
    assert torch.equal(fp4.round_nv(x), alone)  # a token does not depend on its neighbours


def test_nf4_is_the_published_codebook() -> None:
    """QLoRA, appendix E: quantiles of N(0, 1), asymmetric around an exact zero."""
    assert nf4.NF4[0] == -1
    assert nf4.NF4[7] == 0
    assert nf4.NF4[15] == 1
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    upper = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64))[:-1]
    lower = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    values = torch.cat([upper, torch.zeros(1, dtype=torch.float64), lower]).sort().values
    assert torch.allclose(values / values.max(), torch.tensor(nf4.NF4, dtype=torch.float64), atol=1e-6)
    assert len(nf4.dynamic_map()) == 256
    assert nf4.dynamic_map().max() == 1
    assert nf4.dynamic_map().min() == pytest.approx(-0.99297, abs=1e-5)


@pytest.mark.parametrize("shape", [(64, 320), (7, 101), (33, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_bitsandbytes_own(shape: tuple[int, int], dtype: torch.dtype) -> None:
    reason = "compared where bitsandbytes is installed"
    functional = pytest.importorskip("bitsandbytes.functional", reason=reason)
    w = weight(*shape).to(dtype)
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    ours = nf4.encode(w, double=False)
    assert torch.equal(packed.flatten(), ours["qweight"].flatten())
    assert torch.equal(state.absmax.float(), ours["absmax"].flatten())
    dense = nf4.decode(ours | nf4.tables(False), *shape).to(dtype)
    assert torch.equal(functional.dequantize_4bit(packed, state), dense)
    assert torch.equal(nf4.decode_bitsandbytes(ours, *shape, dtype), dense)
    # Its CPU kernel of double quantization misses the nearest code of about one in 600 absmax; codes differ by one then.
    assert torch.equal(functional.create_dynamic_map(), nf4.dynamic_map())
    _, nested = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    double = nf4.encode(w, double=True)
    assert torch.equal(nested.state2.absmax, double["absmax_scale"])
    assert torch.equal(nested.offset[None], double["absmax_mean"])
    apart = (nested.absmax.int() - double["absmax"].flatten().int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.01


def test_fp4_is_torchaos_own() -> None:
    reason = "compared where torchao is installed"
    tensors = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason=reason)
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", reason=reason)
    w = weight(64, 320)
    mx, ours = tensors.MXTensor.to_mx(w, torch.float4_e2m1fn_x2, 32), fp4.encode_mx(w)
    assert torch.equal(mx.qdata.view(torch.uint8), ours["qweight"])
    assert torch.equal(mx.scale.view(torch.uint8).view(64, -1), ours["block_scale"])
    assert torch.equal(mx.dequantize(torch.float32), fp4.decode(ours | fp4.tables(), 320))
    scale, packed = nv.nvfp4_quantize(w, 16, nv.per_tensor_amax_to_scale(w.abs().amax()))
    ours = fp4.encode_nv(w)
    assert torch.equal(packed, ours["qweight"])
    assert torch.equal(scale.view(torch.uint8).view(64, -1), ours["block_scale"])


def test_row_codes_are_nearest_and_symmetric() -> None:
    w = weight()
    codes, scale = rowwise.row_codes(w, torch.int8)
    assert torch.equal(scale[:, 0], w.abs().amax(1) / 127)
    assert codes.abs().amax(1).tolist() == [127] * len(w)
    assert (codes * scale - w).abs().max() <= scale.max() / 2 * (1 + 1e-5)
    assert rowwise.to_e4m3(torch.tensor([448.0, 464.0, 1e9, 17.0])).float().tolist() == [448, 448, 448, 16]


@pytest.mark.parametrize("rows", [1, 17, 40])
def test_products_of_codes_are_products_of_what_they_stand_for(rows: int) -> None:
    """torch's low-bit products exist on a CPU too; what a GPU rounds differently is the GPU test's matter."""
    x, w = weight(rows, 64, seed=3), weight(48, 64)
    for name, tolerance in (("int8", 1e-6), ("fp8", 3e-3)):  # INT32 sums; a bfloat16 result
        found = FORMATS[name]
        assert found.product is not None
        assert found.round_input is not None
        stored = found.encode(w)
        exact = found.round_input(x).double() @ found.decode(stored, *w.shape).double().T
        assert relative_rms(found.product(x, stored), exact) < tolerance


@pytest.mark.parametrize("bits", [2, 3])
def test_low_bit_codes_are_packed_low_bits_first(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    packed = low_integers.pack(codes, bits)
    assert packed.shape == (5, 64 * bits // 8)
    assert torch.equal(low_integers.unpack(packed, bits), codes)
    word = sum(int(code) << (bits * place) for place, code in enumerate(codes[0, :8].tolist()))
    assert packed[0, :bits].tolist() == list(word.to_bytes(bits, "little"))


def test_clipping_lowers_the_error_of_few_levels() -> None:
    """Against the affine code over the whole range, whose step is (max - min) / 3."""
    w = weight(64, 64)
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    step = (high - low) / 3
    plain = ((w - low) / step).round() * step + low
    assert relative_rms(decoded(FORMATS["int2"], w), w) < 0.85 * relative_rms(plain, w)


def test_engines_are_gpu_matters() -> None:
    for found in FORMATS.values():
        assert found.engine_on(torch.device("cpu"), 64, 64) == "reference"
        assert (found.product is None) == (found.engine not in ("scaled_mm", "int_mm"))
