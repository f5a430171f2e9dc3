"""What the Hopper kernels turn down: operands whose rows TMA cannot fetch (16 bytes), decided without a GPU."""

import pytest
import torch

from loragraft.kernels import hopper_gemm, hopper_quant

pytestmark = pytest.mark.not_interpreted
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hopper_gemm, hopper_quant):
        monkeypatch.setattr(module, "on_hopper", lambda x, dtype: dtype == BF16)


def factor(*shape: int, stride: int = 0, shift: int = 0) -> torch.Tensor:
    """[rows, columns] in rows of `stride` elements, `shift` elements after an aligned address."""
    rows, columns = shape
    stride = stride or columns
    return torch.zeros(shift + rows * stride, dtype=BF16)[shift:].as_strided((rows, columns), (stride, 1))


@pytest.mark.parametrize(
    ("up_NR", "runs"),
    [
        (factor(64, 16), True),
        (factor(64, 16, shift=8), True),
        (factor(64, 16, shift=1), False),
        (factor(64, 12), False),
        (factor(60, 16), False),
        (factor(12, 64).T, True),
        (factor(12, 64, shift=1).T, False),
    ],
    ids=["whole", "16 bytes on", "2 bytes on", "rows of 24 bytes", "60 outputs", "by rank", "by rank, 2 bytes on"],
)
def test_product(up_NR: torch.Tensor, runs: bool) -> None:
    codes_MK = torch.zeros(8, 128, dtype=torch.int8)
    assert hopper_gemm.hopper_gemm_runs(codes_MK, BF16, up_NR) is runs
    assert not hopper_gemm.hopper_gemm_runs(codes_MK, torch.float32, up_NR)


@pytest.mark.parametrize(
    ("x_MK", "down_RK", "runs"),
    [
        (factor(4, 64), factor(16, 64), True),
        (factor(4, 64), factor(64, 16).T, True),
        (factor(4, 64), factor(0, 64), True),
        (factor(4, 64), factor(65, 64), False),
        (factor(4, 60), factor(16, 60), False),
        (factor(4, 64, shift=1), factor(16, 64), False),
        (factor(4, 64), factor(16, 64, shift=1), False),
        (factor(4, 64), factor(16, 64, stride=68), False),
        (factor(4, 64), factor(16, 128)[:, ::2], False),
    ],
    ids=["whole", "D by column", "no branch", "65 ranks", "60 columns", "x 2 bytes on", "D 2 bytes on", "D's rows apart", "D's columns apart"],
)  # fmt: skip
def test_quantizer(x_MK: torch.Tensor, down_RK: torch.Tensor, runs: bool) -> None:
    assert hopper_quant.hopper_quant_runs(x_MK, down_RK) is runs
