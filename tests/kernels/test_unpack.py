"""Transient weights against their formulas in float64: ragged edges, every branch of the kernel, both kinds of codes."""

import pytest
import torch

from loragraft.kernels.layout import (
    apply_hadamard,
    pack_int4,
    pack_tiles,
    pack_words,
    padded,
    relative_rms,
    unpack_int4,
    uses_triton,
)
from loragraft.kernels.unpack import effective_weight, joined_weight, transposed_int8
from loragraft.kernels.w4a8_linear import weight_int8

SHAPES = [(70, 192), (300, 320)]  # N beyond a step of 64, and beyond a program of 256 rows; K ends inside a tile


@pytest.fixture(autouse=True)
def runs_triton(device):
    if not uses_triton(torch.empty(0, device=device)):
        pytest.skip("written by Triton alone")


def native_codes(N, K, seed):
    """Packed codes, words and I [N, Kp] float64: every code from 0 to 15, I from -64 to 120, in the first row from -128 to 112."""
    generator = torch.Generator().manual_seed(seed)
    groups = padded(K) // 64
    codes = torch.randint(0, 16, (N, padded(K)), generator=generator, dtype=torch.uint8)
    scale = torch.randint(1, 9, (groups, N), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 9, (groups, N), generator=generator, dtype=torch.uint8)
    scale[:, 0], zero[:, 0] = 16, 8
    integers = (codes.view(N, -1, 64).double() - zero.T[..., None].double()) * scale.T[..., None].double()
    return pack_tiles(codes), pack_words(scale, zero, 64), integers.flatten(1)


def branch(N, K, R, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, R, generator=generator).to(dtype), torch.randn(R, K, generator=generator).to(dtype) / 8


def expected(dense_NP, smooth, hadamard, up_NR, down_RK):
    """(W H) / smooth + U D in float64, without the padding of K."""
    K = down_RK.shape[1]
    dense_NK = (apply_hadamard(dense_NP) if hadamard else dense_NP)[:, :K]
    return (dense_NK if smooth is None else dense_NK / smooth.double()) + up_NR.double() @ down_RK.double()


def inverse_scale(K, smooth):
    return torch.rand(K, generator=torch.Generator().manual_seed(1)) + 0.5 if smooth else None


def on(device, *tensors):
    return tuple(None if t is None else t.to(device) for t in tensors)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("R", [0, 5, 48, 100])
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.usefixtures("poison")
def test_effective_weight_of_native_codes(N, K, R, hadamard, smooth, device, dtype, tolerance):
    qweight, words, integers = native_codes(N, K, seed=R)
    scale = torch.rand(N, generator=torch.Generator().manual_seed(2)) / 100
    (up, down), smooth_K = branch(N, K, R, dtype, 3), inverse_scale(K, smooth)
    wanted = expected(integers * scale.double()[:, None], smooth_K, hadamard, up, down)
    weights, factors = on(device, qweight, words, scale, smooth_K), on(device, up, down)
    out = effective_weight(*weights, hadamard, *factors)
    assert out.shape == (N, K)
    assert relative_rms(out.cpu(), wanted) < tolerance
    assert torch.equal(out, effective_weight(*weights, hadamard, *factors))


@pytest.mark.parametrize(("N", "K"), [(65, 72), (1, 200)])
def test_columns_that_end_inside_a_half(N, K, device, dtype, tolerance):
    qweight, words, integers = native_codes(N, K, seed=K)
    scale, (up, down) = torch.ones(N), branch(N, K, 20, dtype, 4)
    out = effective_weight(*on(device, qweight, words, scale, None), False, *on(device, up, down))
    assert relative_rms(out.cpu(), expected(integers, None, False, up, down)) < tolerance


def test_codes_and_their_rotation_are_exact(device):
    """Row scale 8, no branch: every entry of 8 I H is an integer below 2^14, and must come out as it is."""
    qweight, words, integers = native_codes(70, 256, seed=5)
    factors = on(device, torch.zeros(70, 0), torch.zeros(0, 256))
    out = effective_weight(*on(device, qweight, words, torch.full((70,), 8.0), None), True, *factors)
    assert torch.equal(out.cpu().double(), apply_hadamard(8 * integers))


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("R", [0, 100])
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.usefixtures("poison")
def test_effective_weight_of_integer_codes(N, K, R, hadamard, smooth, device, dtype, tolerance):
    generator = torch.Generator().manual_seed(6)
    packed = pack_int4(torch.randint(-8, 8, (N, padded(K)), generator=generator, dtype=torch.int8))
    scale = (torch.rand(padded(K) // 64, N, generator=generator) + 0.1).to(dtype)
    dense = unpack_int4(packed).double() * scale.double().T.repeat_interleave(64, dim=1)
    (up, down), smooth_K = branch(N, K, R, dtype, 7), inverse_scale(K, smooth)
    wanted = expected(dense, smooth_K, hadamard, up, down)
    out = effective_weight(*on(device, packed, None, scale, smooth_K), hadamard, *on(device, up, down))
    assert relative_rms(out.cpu(), wanted) < tolerance


@pytest.mark.parametrize("R", [0, 5, 48])
@pytest.mark.usefixtures("poison")
def test_joined_weight(R, device, dtype, tolerance):
    N, K = 300, 320
    generator = torch.Generator().manual_seed(8)
    packed = pack_int4(torch.randint(-8, 8, (N, padded(K)), generator=generator, dtype=torch.int8))
    scale = (torch.rand(padded(K) // 64, N, generator=generator) + 0.1).to(dtype)
    up, _ = branch(N, K, R, dtype, 9)
    out = joined_weight(*on(device, packed, scale, up)).cpu()
    dense = unpack_int4(packed).double() * scale.double().T.repeat_interleave(64, dim=1)
    assert relative_rms(out[:, : padded(K)], dense) < tolerance
    assert torch.equal(out[:, padded(K) : padded(K) + R], up)
    assert not out[:, padded(K) + R :].any()
    assert out.shape[1] % 8 == 0


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.usefixtures("poison")
def test_transposed_int8(N, K, device):
    qweight, words, integers = native_codes(N, K, seed=10)
    out = transposed_int8(*on(device, qweight, words)).cpu()
    assert out.shape == (padded(K), padded(N))
    assert torch.equal(out[:, :N].T.double(), integers)
    assert torch.equal(out[:, :N].T, weight_int8(qweight, words))
    assert not out[:, N:].any()
