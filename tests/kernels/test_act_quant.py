import pytest
import torch

from loragraft.kernels.act_quant import (
    CASES,
    GELU_SHIFT,
    dequantize_activation,
    quantize_activation,
    quantize_reference,
    smooth_and_rotate,
)
from loragraft.kernels.layout import apply_hadamard, padded, relative_rms
from loragraft.kernels.token_quant import quantize_down


def random_x(M, K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(M, K, generator=generator), torch.rand(K, generator=generator) + 0.5


@pytest.mark.parametrize(("M", "K"), CASES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.usefixtures("poison")
def test_codes_and_scales_match_float64(M, K, bits, hadamard, device, dtype):
    hadamard = hadamard and K % 64 == 0
    x, smooth = (t.to(device, dtype) for t in random_x(M, K))
    codes, scale = quantize_activation(x, smooth, hadamard, bits)
    ref_codes, ref_scale = quantize_reference(smooth_and_rotate(x.double(), smooth.double(), hadamard), bits)
    assert codes.dtype == torch.int8
    assert codes.shape == (M, padded(K))
    assert (codes[:, K:] == 0).all()
    assert scale.dtype == torch.float32
    assert scale.shape == ref_scale.shape
    # A tie of the bf16 rounding may fall the other way, by one bf16 step; codes are compared where the scales agree.
    agree = torch.isclose(scale.double(), ref_scale, rtol=1e-6, atol=0)
    assert torch.allclose(scale.double(), ref_scale, rtol=1e-6 if bits == 8 else 2**-7, atol=0)
    assert agree.float().mean() > 0.95
    difference = (codes.int() - ref_codes.int()).abs().view(*scale.shape, -1)[agree]
    assert difference.max() <= 1
    assert (difference != 0).float().mean() < 1e-3


@pytest.mark.parametrize(("M", "K"), CASES)
@pytest.mark.usefixtures("poison")
def test_unsigned_codes_of_gelu_outputs_match_float64(M, K, device, dtype):
    x, smooth = random_x(M, K)
    x, smooth = (t.to(device, dtype) for t in (torch.nn.functional.gelu(2 * x, approximate="tanh"), smooth))
    codes, scale = quantize_activation(x, smooth, False, bits=4, unsigned=True)
    shifted = smooth_and_rotate(x.double() + 11 / 64, smooth.double(), False)
    ref_codes, ref_scale = quantize_reference(shifted, bits=4, unsigned=True)
    assert (codes[:, K:] == 0).all()  # the shift does not reach the padding
    assert codes.min() >= 0
    assert codes.max() == 15
    assert torch.allclose(scale.double(), ref_scale, rtol=2**-7, atol=0)
    agree = torch.isclose(scale.double(), ref_scale, rtol=1e-6, atol=0)
    assert agree.float().mean() > 0.95
    difference = (codes.int() - ref_codes.int()).abs().view(*scale.shape, -1)[agree]
    assert difference.max() <= 1
    assert (difference != 0).float().mean() < 1e-3
    rebuilt = dequantize_activation(codes, scale, torch.float32)[:, :K] * smooth.float() - GELU_SHIFT
    assert relative_rms(rebuilt, x) < 0.11  # 4.5-8 % seen; signed codes of the same x: 9-15 %


def test_unsigned_codes_by_hand(device):
    """Largest x' = 15, so the scale is 1 and code = x + 0.171875 rounded half to even, 0 below the shift."""
    x = torch.tensor([15.0, 0.5, 1.5, 2.5, 0.171875, 0.0, -1.0, 7.4, 7.6] + [0.171875] * 55) - 0.171875
    codes, scale = quantize_activation(x[None].to(device), None, False, bits=4, unsigned=True)
    assert scale[0, 0] == 1
    assert codes[0, :9].tolist() == [15, 0, 2, 2, 0, 0, 0, 7, 8]


@pytest.mark.parametrize("bits", [8, 4])
def test_rounds_half_to_even(bits, device):
    levels = 127 if bits == 8 else 7
    steps = torch.tensor([levels, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.49, 3.51] + [0.0] * 55)
    codes, scale = quantize_activation(steps[None].to(device), None, False, bits)
    assert scale[0, 0] == 1
    assert codes[0, :9].tolist() == [levels, 0, 2, 2, 0, -2, -2, 3, 4]


def test_four_bit_scales_are_bf16_values_and_codes_stay_within_seven(device):
    x, _ = random_x(33, 256)
    codes, scale = quantize_activation(x.to(device), None, False, bits=4)
    assert torch.equal(scale, scale.to(torch.bfloat16).float())
    assert codes.min() == -7
    assert codes.max() == 7


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_zeros_have_scale_one(bits, device):
    x = torch.zeros(3, 128, device=device)
    x[1] = 2.0
    codes, scale = quantize_activation(x, None, False, bits)
    assert (scale[[0, 2]] == 1).all()
    assert (codes[[0, 2]] == 0).all()
    assert (codes[1] != 0).all()


@pytest.mark.parametrize(("bits", "unsigned"), [(8, False), (4, False), (4, True)])
@pytest.mark.parametrize(
    "bad", [0x7FC00000, 0x7FFFFFFF, 0x7F800000, -0x800000], ids=["nan", "nan of a GPU", "inf", "-inf"]
)
def test_non_finite_x_reaches_the_scale(bits, unsigned, bad, device):
    """The NaN that GPUs produce has all bits set: rounding it to bf16 by adding to its bits once made it -0."""
    x = torch.ones(3, 128)
    x.view(torch.int32)[1, 70] = bad
    x = x.to(device)
    codes, scale = quantize_activation(x, None, False, bits, unsigned=unsigned)
    rebuilt = dequantize_activation(codes, scale, torch.float32)
    assert rebuilt.isfinite().all(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.01), (4, 0.15)])
def test_dequantizing_gives_x_again(bits, bound, device):
    x, smooth = (t.to(device) for t in random_x(77, 320))
    codes, scale = quantize_activation(x, smooth, True, bits)
    rebuilt = apply_hadamard(dequantize_activation(codes, scale, torch.float32)[:, :320]) * smooth
    assert bound / 10 < relative_rms(rebuilt, x) < bound


def test_rotation_spreads_an_outlier(device):
    x, _ = random_x(33, 256)
    x[:, 9] = 100.0
    x = x.to(device)

    def error(hadamard):
        codes, scale = quantize_activation(x, None, hadamard, bits=8)
        rebuilt = dequantize_activation(codes, scale, torch.float32)
        return relative_rms(apply_hadamard(rebuilt) if hadamard else rebuilt, x)

    assert error(True) < 0.5 * error(False)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("bits", [8, 4])
def test_opcheck(bits, device):
    x, smooth = (t.to(device) for t in random_x(7, 192))
    torch.library.opcheck(torch.ops.loragraft.quantize_activation.default, (x, smooth, True, bits))
    if bits == 4:
        torch.library.opcheck(torch.ops.loragraft.quantize_activation.default, (x, smooth, False, bits, True))


@pytest.mark.not_interpreted
@pytest.mark.parametrize(("bits", "hadamard"), [(8, True), (4, True), (4, False)])
def test_compiles_without_a_graph_break(bits, hadamard, device):
    x, smooth = (t.to(device) for t in random_x(7, 192))
    compiled = torch.compile(quantize_activation, fullgraph=True, backend="aot_eager")
    arguments, flags = (x, smooth, hadamard, bits), {"unsigned": not hadamard, "unsigned_from": 0 if hadamard else 64}
    eager, actual = quantize_activation(*arguments, **flags), compiled(*arguments, **flags)
    assert all(torch.equal(one, other) for one, other in zip(eager, actual, strict=True))


def test_refuses_what_it_cannot_do():
    x = torch.zeros(2, 96)
    with pytest.raises(ValueError, match="bits = 5"):
        quantize_activation(x, None, False, bits=5)
    with pytest.raises(ValueError, match="hadamard needs K % 64"):
        quantize_activation(x, None, True, bits=8)
    with pytest.raises(ValueError, match="flatten"):
        quantize_activation(x[None], None, False, bits=8)
    with pytest.raises(ValueError, match="unsigned needs bits = 4"):
        quantize_activation(x, None, False, bits=8, unsigned=True)
    with pytest.raises(ValueError, match="hadamard = True"):
        quantize_activation(x[:, :64], None, True, bits=4, unsigned=True)


@pytest.mark.gpu
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("rank", [0, 48])
def test_thousands_of_programs_meet_and_none_is_lost(hadamard, rank):
    """K = 15360 takes 30 programs a block of rows; one that draws a wrong ticket keeps the others waiting for ever."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(4608, 15360, device="cuda", generator=generator).bfloat16()
    down = torch.randn(rank, 15360, device="cuda", generator=generator).bfloat16()
    smooth = None if hadamard else torch.rand(15360, device="cuda", generator=generator).bfloat16() + 0.5
    ref_codes, ref_scale = quantize_reference(smooth_and_rotate(x.double(), smooth, hadamard), bits=8)
    for _ in range(20):
        codes, scale, h = quantize_down(x, smooth, hadamard, down)
        assert torch.allclose(scale.double(), ref_scale, rtol=1e-4, atol=0)
        assert (codes.int() - ref_codes.int()).abs().max() <= 1
        assert rank == 0 or relative_rms(h[:, :rank].double(), x.double() @ down.double().T) < 5e-3
