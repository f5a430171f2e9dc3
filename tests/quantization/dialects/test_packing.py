"""Byte orders: against the formulas as index arithmetic, and against DeepCompressor's own packer where its output is there."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from loragraft.kernels.layout import pack_int4
from loragraft.quantization.dialects import packing
from loragraft.quantization.tensor_file import read_tensors

GOLDEN = Path(__file__).parents[4] / "shared" / "data" / "golden" / "nunchaku_pack_golden.safetensors"


def _codes(N: int, K: int, low: int, high: int, seed: int = 0) -> Tensor:
    codes = torch.randint(low, high + 1, (N, K), generator=torch.Generator().manual_seed(seed))
    return codes.to(torch.uint8 if low >= 0 else torch.int8)


def _same(packed: Tensor, expected: Tensor) -> None:
    assert packed.dtype == expected.dtype
    assert packed.shape == expected.shape
    assert torch.equal(packed, expected)


@pytest.mark.parametrize(("N", "K"), [(128, 128), (256, 128), (128, 384), (384, 256)])
def test_codes(formulas: ModuleType, N: int, K: int) -> None:
    signed, unsigned = pack_int4(_codes(N, K, -8, 7)), pack_int4(_codes(N, K, 0, 15))
    for rows, pack, unpack, expected in (
        (signed, packing.pack_qweight, packing.unpack_qweight, formulas.packed_qweight(_codes(N, K, -8, 7))),
        (unsigned, packing.pack_awq, packing.unpack_awq, formulas.packed_awq(_codes(N, K, 0, 15))),
        (signed, packing.pack_tiles, packing.unpack_tiles, formulas.tile_packed(_codes(N, K, -8, 7))),
    ):
        _same(pack(rows), expected)
        _same(unpack(expected), rows)


@pytest.mark.parametrize(("C", "R"), [(128, 16), (128, 48), (384, 32)])
def test_vectors_scales_and_factors(formulas: ModuleType, C: int, R: int) -> None:
    numbers = torch.arange(C * R, dtype=torch.float32)
    up, down, scales, vector = numbers.view(C, R), numbers.view(R, C), numbers.view(R, C), numbers[:C]
    for logical, pack, unpack, expected in (
        (up, packing.pack_up, packing.unpack_up, formulas.packed_up(up)),
        (down, packing.pack_down, packing.unpack_down, formulas.packed_down(down)),
        (scales, packing.pack_scales, packing.unpack_scales, formulas.packed_scales(scales)),
        (vector, packing.pack_vector, packing.unpack_vector, formulas.packed_vector(vector)),
    ):
        _same(pack(logical), expected)
        _same(unpack(expected), logical)
    tiles = packing.pack_tile_columns(scales)
    assert tiles.shape == (C // 128, R, 128)
    assert all(tiles[n // 128, g, n % 128] == scales[g, n] for g in range(R) for n in range(0, C, 37))
    _same(packing.unpack_tile_columns(tiles), scales)


@pytest.mark.parametrize("splits", [1, 3, 6])
def test_split_rows(formulas: ModuleType, splits: int) -> None:
    for rows in (torch.arange(24), torch.arange(48).view(24, 2)):
        _same(packing.separate_splits(formulas.interleaved(rows, splits), splits), rows)


def test_padding() -> None:
    assert (packing.round_up(200, 128), packing.round_up(256, 128)) == (256, 256)
    padded = packing.pad_to(torch.ones(2, 3), (3, 4), 7)
    assert padded.tolist() == [[1, 1, 1, 7], [1, 1, 1, 7], [7, 7, 7, 7]]
    assert packing.pad_to(padded, (3, 4)) is padded


DIGESTS: dict[Callable[[Tensor], Tensor], tuple[Tensor, str]] = {
    packing.pack_qweight: (
        pack_int4((torch.arange(256 * 256) % 16 - 8).to(torch.int8).view(256, 256)),
        "4e0602a9453482cb2ea4f82d1f232202",
    ),
    packing.pack_scales: (
        torch.arange(1024, dtype=torch.float16).view(256, 4).T.contiguous(),
        "96deb4b68723ecacc4d71ee0347f657b",
    ),
    packing.pack_down: (
        torch.arange(2048, dtype=torch.float16).view(32, 64),
        "2262011a6a805f9ed84c884feaab5bcd",
    ),
    packing.pack_up: (
        torch.arange(2048, dtype=torch.float16).view(64, 32),
        "5f6165dcb449a59c80f410d28db2fa50",
    ),
}
"""Packer -> (numbers in order, sha256 of what DeepCompressor's packer makes of them)."""


@pytest.mark.parametrize("pack", DIGESTS)
def test_golden_digests(pack: Callable[[Tensor], Tensor]) -> None:
    """Everywhere, without DeepCompressor's tensors."""
    given, digest = DIGESTS[pack]
    packed = pack(given).contiguous().view(torch.uint8)
    assert hashlib.sha256(packed.numpy().tobytes()).hexdigest()[: len(digest)] == digest


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    if not GOLDEN.is_file():
        pytest.skip(f"DeepCompressor's packed tensors are third-party data and not part of the repository: {GOLDEN}")
    return read_tensors(GOLDEN)[0]


def test_golden_probes(golden: dict[str, Tensor]) -> None:
    probe = {name.removeprefix("probe."): tensor for name, tensor in golden.items() if name.startswith("probe.")}
    _same(packing.pack_qweight(pack_int4(probe["pack_weight.in"])), probe["pack_weight.out"])
    scales = probe["pack_scale.in"].view(256, 4).T.contiguous()
    _same(packing.pack_scales(scales), probe["pack_scale.out"])
    _same(packing.pack_down(probe["lowrank_down.in"]), probe["lowrank_down.out"])
    _same(packing.pack_up(probe["lowrank_up.in"]), probe["lowrank_up.out"])


@pytest.mark.parametrize("case", ["int4_256x256_r32_bf16", "int4_128x384_r16_f16", "int4_200x128_r16_bf16_padded"])
def test_golden_w4a4(golden: dict[str, Tensor], case: str) -> None:
    given = {n.removeprefix(f"{case}.in."): t for n, t in golden.items() if n.startswith(f"{case}.in.")}
    packed = {n.removeprefix(f"{case}.out."): t for n, t in golden.items() if n.startswith(f"{case}.out.")}
    (N, K), rank = given["weight"].shape, given["lora_down"].shape[0]
    Np, scale = packing.round_up(N, 128), given["scale"].view(N, -1)
    codes = (given["weight"].float().view(N, -1, 64) / scale.float()[..., None]).round().to(torch.int8).view(N, K)
    _same(packing.pack_qweight(packing.pad_to(pack_int4(codes), (Np, K // 2))), packed["qweight"])
    _same(packing.pack_scales(packing.pad_to(scale.T.contiguous(), (K // 64, Np), 1)), packed["wscales"])
    _same(packing.pack_vector(packing.pad_to(given["bias"], (Np,), 1)), packed["bias"])
    _same(packing.pack_vector(given["smooth"]), packed["smooth"])
    _same(packing.pack_down(given["lora_down"]), packed["proj_down"])
    _same(packing.pack_up(packing.pad_to(given["lora_up"], (Np, rank))), packed["proj_up"])
    _same(packing.unpack_qweight(packed["qweight"])[:N], pack_int4(codes))
    _same(packing.unpack_up(packed["proj_up"])[:N], given["lora_up"])


@pytest.mark.parametrize("splits", [1, 3, 6])
def test_golden_awq(golden: dict[str, Tensor], formulas: ModuleType, splits: int) -> None:
    case = f"awq_192x128_split{splits}"
    weight, scale, bias = (golden[f"{case}.in.{name}"] for name in ("weight", "scale", "bias"))
    scale_NG = scale.view(192, 2)
    codes = (weight.float().view(192, 2, 64) / scale_NG.float()[..., None] + 7).round().clamp(0, 15)
    rows = formulas.interleaved(pack_int4(codes.view(192, 128).to(torch.uint8)), splits)
    _same(packing.pack_awq(rows), golden[f"{case}.out.qweight"])
    wscales, wzeros = golden[f"{case}.out.wscales"], golden[f"{case}.out.wzeros"]
    assert (wscales[2:] == 0).all()
    assert (wzeros[2:] == 0).all()
    _same(packing.separate_splits(wscales[:2].T, splits), scale_NG)
    _same(packing.separate_splits(wzeros[:2].T, splits), -7 * scale_NG)
    ones = torch.zeros(splits, 192 // splits)
    if splits > 1:
        ones[[1, -2]] = 1  # of 3 splits both are the same one
    _same(packing.separate_splits(golden[f"{case}.out.bias"], splits), bias + ones.flatten().to(bias.dtype))
