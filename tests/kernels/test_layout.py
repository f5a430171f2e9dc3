import pytest
import torch

from loragraft.kernels.layout import (
    apply_hadamard,
    check_card,
    hadamard64,
    pack_int4,
    padded,
    relative_rms,
    unpack_int4,
    unpack_uint4,
)


def test_low_nibble_is_the_even_column():
    assert pack_int4(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]
    assert pack_int4(torch.tensor([[-1, -8]], dtype=torch.int8)).tolist() == [[0x8F]]


def test_every_byte_unpacks_and_packs_again():
    packed = torch.arange(256, dtype=torch.uint8).view(2, 128)
    unsigned, signed = unpack_uint4(packed), unpack_int4(packed)
    assert unsigned.dtype == torch.uint8
    assert signed.dtype == torch.int8
    assert unsigned.max() == 15
    assert signed.min() == -8
    assert signed.max() == 7
    assert torch.equal(pack_int4(unsigned), packed)
    assert torch.equal(pack_int4(signed), packed)
    assert torch.equal(signed.to(torch.uint8) & 15, unsigned)


def test_pack_refuses_other_dtypes_and_odd_widths():
    with pytest.raises(ValueError, match="uint8"):
        pack_int4(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="odd"):
        pack_int4(torch.zeros(2, 5, dtype=torch.uint8))


def test_hadamard_is_symmetric_orthonormal_and_regular():
    h = hadamard64(torch.float64)
    assert torch.equal(h, h.T)
    assert torch.equal(h @ h, torch.eye(64, dtype=torch.float64))
    assert torch.equal(h.abs(), torch.full_like(h, 1 / 8))
    assert (h.sum(dim=0) == 1).all()


def test_apply_hadamard_acts_on_blocks_of_64():
    x = torch.randn(2, 3, 128, dtype=torch.float64)
    expected = torch.cat([x[..., :64] @ hadamard64(torch.float64), x[..., 64:] @ hadamard64(torch.float64)], dim=-1)
    assert relative_rms(apply_hadamard(x), expected) < 1e-15
    assert relative_rms(apply_hadamard(apply_hadamard(x)), x) < 1e-15


def test_padded():
    assert [padded(k) for k in (1, 64, 128, 129, 1280)] == [128, 128, 128, 256, 1280]


def test_relative_rms():
    assert relative_rms(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == pytest.approx(1 / 34**0.5)
    assert relative_rms(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_rms(torch.ones(2), torch.zeros(2)) == float("inf")
    assert not relative_rms(torch.tensor([float("nan")]), torch.ones(1)) < 1


def test_a_card_without_int8_products_is_named_with_what_runs_on_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    card = torch.device("cuda", 0)
    with pytest.raises(
        ValueError, match=r"Tesla T4 has compute capability 7\.5, and w4a4, w4a8 .* numerics=weight-only"
    ):
        check_card(["w4a8", "bf16", "w4a16", "w4a4"], card)
    check_card(["w4a16", "bf16"], card)
    check_card(["w4a8"], torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_card(["w4a8"], card)
