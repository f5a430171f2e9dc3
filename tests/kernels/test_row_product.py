"""left^T right over many rows, against float64."""

import pytest
import torch

from loragraft.kernels.layout import apply_hadamard, relative_rms
from loragraft.kernels.row_product import CASES, ROWS, adapter_gradients, row_product, split_rows


def operands(M, r, C, dtype, device):
    random = torch.Generator().manual_seed(0)
    left = torch.randn(M, r, generator=random).to(device, dtype)
    return left, torch.randn(M, C, generator=random).to(device, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("poison")
def test_float_operands(case, device, dtype, tolerance):
    left, right = operands(*case, dtype, device)
    expected = left.double().T @ right.double()
    assert relative_rms(row_product(left, right), expected) < tolerance


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("poison")
def test_codes_with_a_scale_per_token(case, device, dtype, tolerance):
    left, right = operands(*case, torch.float32, device)
    codes = (right * 40).round().clamp(-127, 127).to(torch.int8)
    scale = right.abs().amax(1, keepdim=True) / 127
    expected = left.to(dtype).double().T @ (codes.double() * scale.double())
    assert relative_rms(row_product(left.to(dtype), codes, scale), expected) < tolerance


def test_strided_left_and_the_same_bits_twice(device):
    left, right = operands(300, 24, 192, torch.float32, device)
    part = left[:, -16:]
    assert torch.equal(row_product(part, right), row_product(part.contiguous(), right))
    assert torch.equal(row_product(part, right), row_product(part, right))


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="rows contiguous"):
        row_product(torch.zeros(4, 2), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="four at a time"):
        row_product(torch.zeros(4, 2), torch.zeros(4, 6, dtype=torch.int8))


def test_every_code_is_read_exactly(device, dtype):
    """Each of the 256 bytes in each place of a word, times one."""
    codes = (torch.arange(1024) % 256 - 128).view(4, 256).to(device, torch.int8)
    codes = torch.stack([codes[0].roll(i) for i in range(4)])
    one = torch.eye(4, device=device, dtype=dtype)
    assert torch.equal(row_product(one, codes), codes.float())


ADAPTED = ((77, 5, 200, 72), (300, 16, 192, 130), (1, 3, 64, 8), (700, 20, 64, 40))  # (M, r, K, N)


def adapted(M, r, K, N, dtype, device, raw):
    """g, x, scale, h and dy as a backward pass has them: g and h are slices, codes are padded to 128 columns."""
    random = torch.Generator().manual_seed(1)
    wide_g, wide_h = (torch.randn(M, 24 + r, generator=random).to(device, dtype) for _ in range(2))
    dy = torch.randn(M, N, generator=random).to(device, dtype)
    x = torch.randn(M, K, generator=random)
    if raw:
        return wide_g[:, -r:], x.to(device, dtype), None, wide_h[:, -r:], dy
    codes = torch.full((M, (K + 127) // 128 * 128), 99, dtype=torch.int8)
    codes[:, :K] = (x * 40).round().clamp(-127, 127)
    return wide_g[:, -r:], codes.to(device), (x.abs().amax(1, keepdim=True) / 127).to(device), wide_h[:, -r:], dy


@pytest.mark.parametrize("x", ["codes", "rotated", "smooth", "both", "raw"])
@pytest.mark.parametrize("case", ADAPTED, ids=str)
@pytest.mark.usefixtures("poison")
def test_gradients_of_an_adapter(case, x, device, dtype, tolerance):
    _, r, K, N = case
    if x in ("rotated", "both") and K % 64:
        K = case[2] // 64 * 64
    g, right, scale, h, dy = adapted(case[0], r, K, N, dtype, device, x == "raw")
    smooth = (torch.rand(K) + 0.5).to(device, dtype) if x in ("smooth", "both") else None
    hadamard = x in ("rotated", "both")
    down, up = adapter_gradients(g, right, scale, h, dy, smooth, hadamard, K, torch.float32, torch.float32)
    rebuilt = right.double() * (1 if scale is None else scale.double())
    expected = (g.double().T @ rebuilt)[:, :K]
    expected = apply_hadamard(expected) if hadamard else expected
    expected = expected if smooth is None else expected * smooth.double()
    assert (down.shape, up.shape, down.is_contiguous(), up.is_contiguous()) == ((r, K), (N, r), True, True)
    assert relative_rms(down, expected) < tolerance
    assert relative_rms(up, dy.double().T @ h.double()) < tolerance
    again = adapter_gradients(g, right, scale, h, dy, smooth, hadamard, K, torch.float32, torch.float32)
    assert torch.equal(down, again[0]) and torch.equal(up, again[1])


def test_the_rotation_keeps_float32(device):
    """One token times one: codes alone, whose rotation float64 knows to the last bit."""
    random = torch.Generator().manual_seed(2)
    codes = torch.randint(-127, 128, (300, 128), generator=random, dtype=torch.int8).to(device)
    g = torch.randn(300, 16, generator=random).to(device)
    h, dy = g.contiguous(), g[:, :8].contiguous()
    down, _ = adapter_gradients(g, codes, None, h, dy, None, True, 128, torch.float32, torch.float32)
    assert relative_rms(down, apply_hadamard(g.double().T @ codes.double())) < 1e-6


def test_gradients_take_the_adapters_dtypes(device):
    arguments = adapted(33, 4, 64, 16, torch.float32, device, raw=True)
    down, up = adapter_gradients(*arguments, None, False, 64, torch.float16, torch.float16)
    wide = adapter_gradients(*arguments, None, False, 64, torch.float32, torch.float32)
    assert torch.equal(down, wide[0].half()) and torch.equal(up, wide[1].half())


@pytest.mark.parametrize("blocks", [1, 36, 72, 168, 216, 1000])
@pytest.mark.parametrize("M", [1, 512, 4096, 4608, 100_000])
def test_splits_cover_all_tokens_and_none_is_empty(M, blocks):
    rows, splits = split_rows(M, blocks)
    assert rows % ROWS == 0 and rows * (splits - 1) < M <= rows * splits


@pytest.mark.not_interpreted
@pytest.mark.parametrize("raw", [False, True], ids=["codes", "raw"])
def test_opcheck(device, raw):
    arguments = adapted(7, 3, 64, 16, torch.float32, device, raw)
    for kind in (torch.float32, torch.bfloat16):
        rest = (None, False, 64, kind, kind) if raw else (torch.ones(64, device=device), True, 64, kind, kind)
        torch.library.opcheck(torch.ops.loragraft.adapter_gradients.default, (*arguments, *rest))


@pytest.mark.not_interpreted
def test_compiles_without_a_graph_break(device):
    arguments = (*adapted(7, 3, 64, 40, torch.float32, device, False), None, True, 64, torch.float32, torch.float32)
    compiled = torch.compile(adapter_gradients, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(*arguments), adapter_gradients(*arguments), strict=True):
        assert torch.equal(ours, eager)
