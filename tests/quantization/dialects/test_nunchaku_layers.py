"""One packed layer: padding comes off, rows and columns can be split and joined exactly, adaLN loses its 1."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from loragraft.kernels.layout import pack_int4, relative_rms, unpack_int4, unpack_uint4
from loragraft.quantization.dialects import packing
from loragraft.quantization.dialects.files import TensorFiles
from loragraft.quantization.dialects.nunchaku_layers import Part, beside, read_awq, read_part, w4a4_layer
from loragraft.quantization.tensor_file import CheckpointError, write_tensors


def _part(N: int, K: int, seed: int, bias: bool = True) -> Part:
    random = torch.Generator().manual_seed(seed)
    return Part(
        codes=pack_int4(torch.randint(-7, 8, (N, K), generator=random).to(torch.int8)),
        wscale=(torch.rand(K // 64, N, generator=random) / K**0.5).bfloat16(),
        smooth=(torch.rand(K, generator=random) + 0.5).bfloat16(),
        lora_down=torch.randn(16, K, generator=random).bfloat16(),
        lora_up=torch.randn(N, 16, generator=random).bfloat16(),
        bias=torch.randn(N, generator=random).bfloat16() if bias else torch.zeros(N).bfloat16(),
    )


def test_padding_of_rows_and_columns_comes_off(formulas: ModuleType, tmp_path: Path) -> None:
    """N = 200 and K = 192 lie in 256 x 256 of the file, garbage in the padding."""
    whole, linear = _part(256, 256, seed=1), nn.Linear(192, 200, device="meta")
    packed = {
        "fc.qweight": formulas.packed_qweight(unpack_int4(whole.codes)),
        "fc.wscales": formulas.packed_scales(whole.wscale),
        "fc.smooth": formulas.packed_vector(whole.smooth),
        "fc.lora_down": formulas.packed_down(whole.lora_down),
        "fc.lora_up": formulas.packed_up(whole.lora_up),
        "fc.bias": formulas.packed_vector(whole.bias),
    }
    write_tensors(tmp_path / "layer.safetensors", packed, {})
    files = TensorFiles([tmp_path / "layer.safetensors"])
    layer = w4a4_layer(read_part(files, "fc", 192, 200), linear, "fc.bias")
    assert files.unread == set()
    assert torch.equal(unpack_int4(layer.qweight)[:, :192], unpack_int4(whole.codes)[:200, :192])
    assert not unpack_int4(layer.qweight)[:, 192:].any()
    assert torch.equal(layer.wscale[:3], whole.wscale[:3, :200])
    assert (layer.wscale[3] == 1).all()
    for name, wanted in (
        ("smooth", whole.smooth[:192]), ("lora_down", whole.lora_down[:, :192]), ("lora_up", whole.lora_up[:200]),
        ("bias", whole.bias[:200]),
    ):  # fmt: skip
        assert torch.equal(getattr(layer, name), wanted), name


def test_rows_and_halves_answer_like_the_whole() -> None:
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(2))
    whole = _part(192, 256, seed=3)
    y = w4a4_layer(whole, nn.Linear(256, 192, device="meta"), "")(x)
    for first in (0, 64, 128):
        rows = w4a4_layer(whole.rows(first, first + 64), nn.Linear(256, 64, device="meta"), "")(x)
        assert relative_rms(rows, y[:, first : first + 64]) < 1e-6
    for biases in ((True, True), (False, True), (True, False), (False, False)):
        left, right = (_part(96, K, seed=K, bias=bias) for K, bias in zip((64, 192), biases, strict=True))
        joined = beside(left, right)
        assert joined.lora_down.shape == (32, 256)
        assert joined.bias is not None
        assert joined.bias.dtype == (torch.float32 if all(biases) else torch.bfloat16)
        apart = sum(
            w4a4_layer(part, nn.Linear(K, 96, device="meta"), "")(columns)
            for part, K, columns in ((left, 64, x[:, :64]), (right, 192, x[:, 64:]))
        )
        assert relative_rms(w4a4_layer(joined, nn.Linear(256, 96, device="meta"), "")(x), apart) < 1e-6


def _awq(formulas: ModuleType, path: Path, **changes: Tensor) -> TensorFiles:
    codes = torch.randint(0, 16, (12, 128), generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    tensors = {
        "n.qweight": formulas.packed_awq(formulas.interleaved(codes, 3)),
        "n.wscales": formulas.interleaved(torch.arange(1.0, 25).view(12, 2), 3).T.bfloat16(),
        "n.wzeros": formulas.interleaved(-torch.arange(1.0, 25).view(12, 2), 3).T.bfloat16(),
        "n.bias": formulas.interleaved(torch.tensor([0.25] * 4 + [1.25] * 4 + [0.25] * 4), 3).bfloat16(),
    }
    write_tensors(path, tensors | {f"n.{name}": tensor for name, tensor in changes.items()}, {})
    return TensorFiles([path])


def test_adaln(formulas: ModuleType, tmp_path: Path) -> None:
    """Of three splits the middle one is the scale, whose bias has the 1 of `1 + scale` in it."""
    layer = read_awq(_awq(formulas, tmp_path / "n.safetensors"), "n", nn.Linear(128, 12, device="meta"), splits=3)
    codes = torch.randint(0, 16, (12, 128), generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    assert torch.equal(unpack_uint4(layer.qweight), codes)
    assert torch.equal(layer.wscale.T, torch.arange(1.0, 25).view(12, 2).bfloat16())
    assert torch.equal(layer.wzero, -layer.wscale)
    assert layer.bias.tolist() == [0.25] * 12
    assert (layer.numerics, layer.rank) == ("w4a16", 0)


def test_impossible_adaln_is_refused(formulas: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "n.safetensors"
    with pytest.raises(CheckpointError, match=r"n\.qweight': AWQ needs K % 64 == 0"):
        read_awq(_awq(formulas, path), "n", nn.Linear(100, 12, device="meta"), splits=3)
    with pytest.raises(CheckpointError, match=r"n\.wscales' has 1 groups, expected 2 or more"):
        read_awq(_awq(formulas, path, wscales=torch.ones(1, 12).bfloat16()), "n", nn.Linear(128, 12), splits=3)
    with pytest.raises(CheckpointError, match=r"n\.bias' is not zero, and the layer has no bias"):
        read_awq(_awq(formulas, path), "n", nn.Linear(128, 12, bias=False), splits=3)
    assert packing.separate_splits(torch.arange(6), 3).tolist() == [0, 3, 1, 4, 2, 5]
