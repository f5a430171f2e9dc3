"""What the Hopper product fetches of an image's codes, box by box, without a GPU: its windows, whole and in order."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import pad

from loragraft.kernels import hopper_gemm
from loragraft.kernels.block_codes import blocks_of, windows_of
from loragraft.kernels.layout import padded
from loragraft.kernels.taps import Window

pytestmark = pytest.mark.not_interpreted
STAGES, GROUP_M = 3, 2
CASES = (
    (Window(2, 8, 64, 3, 1, 1), 64, 128),
    (Window(1, 16, 128, 3, 1, 1), 128, 256),
    (Window(1, 32, 64, 3, 2, 1), 64, 128),
    (Window(1, 24, 48, 3, 1, 1), 64, 128),
    (Window(3, 9, 32, 3, 1, 1), 64, 256),
)
"""(window, Ct, BM): tiles of one box and of 8, blocks side by side and below each other, a last tile that is not full."""


class Buffers:
    """Tiles of shared memory: `index` gives one."""

    def __init__(self, *shape: int) -> None:
        self.tiles = torch.full(shape, 99, dtype=torch.int8)

    def index(self, i: int) -> torch.Tensor:
        return self.tiles[i]


@pytest.fixture
def python(monkeypatch):
    """The kernel's source as plain Python; what TMA does, and how many bytes it announced and moved."""
    moved = {"expected": 0, "moved": 0}

    def load(desc, coordinates, _barrier, buffer):
        (row, column), (rows, columns) = coordinates, buffer.shape
        inside = desc[max(row, 0) : row + rows, column : column + columns]
        buffer.copy_(pad(inside, (0, columns - inside.shape[1], 0, rows - inside.shape[0])))
        moved["moved"] += buffer.numel()

    def expect(_barrier, size):
        moved["expected"] += size

    language = SimpleNamespace(
        where=lambda condition, a, b: a if condition else b, static_range=range, cdiv=lambda a, b: -(-a // b),
        program_id=lambda _: 0, num_programs=lambda _: 1, minimum=min, constexpr=object(),
    )  # fmt: skip
    barriers = SimpleNamespace(wait=lambda *_: None, expect=expect)
    monkeypatch.setattr(hopper_gemm, "gl", language)
    monkeypatch.setattr(hopper_gemm, "mbarrier", barriers)
    monkeypatch.setattr(hopper_gemm, "tma_load", load)
    monkeypatch.setattr(
        hopper_gemm, "_part", lambda buffer, part, BM, BX: buffer.view(BM // BX, BX, 64)[part] if BX < BM else buffer
    )
    for name in ("_tile", "_load_boxes", "_load_stage"):
        monkeypatch.setattr(hopper_gemm, name, getattr(hopper_gemm, name).fn)
    return moved


@pytest.mark.parametrize(("window", "columns", "BM"), CASES)
def test_boxes_are_the_windows(window, columns, BM, python, monkeypatch):
    blocks, WN = blocks_of(window), 64
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (blocks.code_rows, columns), dtype=torch.int8, generator=generator)
    matrix = windows_of(codes, blocks)
    (P, KP), steps, seen = matrix.shape, padded(window.taps * columns) // 128, []
    xs, ws = Buffers(2 * STAGES, BM, 64), Buffers(2 * STAGES, WN, 64)
    tiles = -(-P // BM)

    class Barriers:
        """Before the producer waits for a stage to be free, the consumer has seen the one before it."""

        def index(self, _stage: int) -> None:
            return None

    def expect(_barrier, size):
        python["expected"] += size
        if python["moved"]:
            seen.append(xs.tiles[2 * ((len(seen)) % STAGES) :][:2].clone())

    monkeypatch.setattr(hopper_gemm.mbarrier, "expect", expect)
    weight = torch.zeros(128, KP // 2, dtype=torch.int8)
    hopper_gemm._produce.fn(
        codes, weight, None, None, Barriers(), Barriers(), xs, ws, P, 128, steps, GROUP_M,
        *hopper_gemm._geometry(blocks, columns), BX=blocks.columns, PACKED=True, UP_BY_RANK=False, RANK_STEPS=0,
        BM=BM, WN=WN, STAGES=STAGES,
    )  # fmt: skip
    seen.append(xs.tiles[2 * (len(seen) % STAGES) :][:2].clone())
    assert python["expected"] == python["moved"]
    assert len(seen) == tiles * steps
    found = torch.stack(seen).view(tiles, steps, 2, BM, 64).permute(0, 3, 1, 2, 4).reshape(tiles * BM, KP)
    assert torch.equal(found[:P], matrix)
    assert not found[P:].any()
