"""Tile sizes kept per card: added to what is known, found at once."""

import pytest
import torch

from loragraft.kernels import hopper_gemm

pytestmark = pytest.mark.not_interpreted
DEVICE = torch.device("cuda", 0)


def row(M, BM, K=2944):
    return {"M": M, "N": 320, "K": K, "packed": True, "BM": BM, "WN": 64, "GROUP_M": 2}


def test_rows_replace_those_of_their_shape_and_hold_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(hopper_gemm, "card_name", lambda _device: "card")
    monkeypatch.setattr(hopper_gemm, "TUNED", tmp_path)
    hopper_gemm._tuned.cache_clear()
    assert hopper_gemm.hopper_config(DEVICE, 16384, 320, 2944, True)["BM"] == 256
    hopper_gemm.keep_tuned(DEVICE, [row(16384, 128), row(4096, 256)], tmp_path)
    assert hopper_gemm.hopper_config(DEVICE, 16384, 320, 2944, True)["BM"] == 128
    assert hopper_gemm.hopper_config(DEVICE, 6000, 320, 2944, True)["BM"] == 256, "the nearest number of tokens"
    file = hopper_gemm.keep_tuned(DEVICE, [row(16384, 256), row(16384, 128, K=5760)], tmp_path)
    assert hopper_gemm.hopper_config(DEVICE, 16384, 320, 2944, True)["BM"] == 256
    assert file.read_text().count('"BM"') == 3
    hopper_gemm._tuned.cache_clear()
