"""What the Hopper product fetches of an image's codes, box by box, without a GPU: its windows, whole and in order."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import pad

from loragraft.kernels import hopper_gemm
from loragraft.kernels.block_codes import blocks_of, quantize_blocks, windows_of
from loragraft.kernels.layout import pack_words, padded
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
    """The producer's source as plain Python, and how many bytes it has loaded so far."""
    loaded = [0]

    def load(desc, coordinates, _barrier, buffer):
        (row, column), (rows, columns) = coordinates, buffer.shape
        inside = desc[max(row, 0) : row + rows, column : column + columns]
        buffer.copy_(pad(inside, (0, columns - inside.shape[1], 0, rows - inside.shape[0])))
        loaded[0] += buffer.numel()

    language = SimpleNamespace(
        where=lambda condition, a, b: a if condition else b, static_range=range, cdiv=lambda a, b: -(-a // b),
        program_id=lambda _: 0, num_programs=lambda _: 1, minimum=min, constexpr=object(),
    )  # fmt: skip
    monkeypatch.setattr(hopper_gemm, "gl", language)
    monkeypatch.setattr(hopper_gemm, "tma_load", load)
    monkeypatch.setattr(
        hopper_gemm, "_part", lambda buffer, part, BM, BX: buffer.view(BM // BX, BX, 64)[part] if BX < BM else buffer
    )
    for name in ("_tile", "_load_boxes", "_load_stage"):
        monkeypatch.setattr(hopper_gemm, name, getattr(hopper_gemm, name).fn)
    return loaded


@pytest.mark.parametrize(("window", "columns", "BM"), CASES)
def test_boxes_are_the_windows(window, columns, BM, python, monkeypatch):
    blocks, WN = blocks_of(window), 64
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (blocks.code_rows, columns), dtype=torch.int8, generator=generator)
    matrix = windows_of(codes, blocks)
    (P, KP), steps, seen = matrix.shape, padded(window.taps * columns) // 128, []
    xs, ws = Buffers(2 * STAGES, BM, 64), Buffers(2 * STAGES, WN, 64)
    tiles, announced = -(-P // BM), [0]

    def expect(_barrier, size):
        """A stage begins: what the one before holds is complete."""
        if announced[0]:
            seen.append(xs.tiles[2 * (len(seen) % STAGES) :][:2].clone())
        assert announced == python
        announced[0] += size

    monkeypatch.setattr(hopper_gemm, "mbarrier", SimpleNamespace(wait=lambda *_: None, expect=expect))
    barriers = SimpleNamespace(index=lambda _stage: None)
    weight = torch.zeros(128, KP // 2, dtype=torch.int8)
    hopper_gemm._produce.fn(
        codes, weight, None, None, barriers, barriers, xs, ws, P, 128, steps, GROUP_M,
        *hopper_gemm._geometry(blocks, columns), BX=blocks.columns, PACKED=True, UP_BY_RANK=False, RANKS=0,
        BM=BM, WN=WN, STAGES=STAGES,
    )  # fmt: skip
    seen.append(xs.tiles[2 * (len(seen) % STAGES) :][:2].clone())
    assert announced == python
    assert len(seen) == tiles * steps
    found = torch.stack(seen).view(tiles, steps, 2, BM, 64).permute(0, 3, 1, 2, 4).reshape(tiles * BM, KP)
    assert torch.equal(found[:P], matrix)
    assert not found[P:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [0, 48])
@pytest.mark.parametrize("BM", [128, 256])
@pytest.mark.parametrize("window", [window for window, *_ in CASES])
def test_the_product_of_boxes_is_that_of_windows(window, BM, rank):
    """Bit for bit: the same INT32 sums, the same epilogue."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is sm_90's")
    torch.manual_seed(0)
    blocks, C, N, half = blocks_of(window), 72, 200, {"device": "cuda", "dtype": torch.bfloat16}
    KP = padded(window.taps * 128)
    words = pack_words(*(torch.full((KP // 64, N), value, dtype=torch.uint8, device="cuda") for value in (9, 8)), 64)
    weight = torch.randint(0, 256, (N, KP // 2), dtype=torch.uint8, device="cuda")
    s_N, bias = torch.rand(N, device="cuda") / 1000, torch.randn(N, **half)
    h, up = torch.randn(window.out_pixels, rank, **half), torch.randn(N, rank, **half)
    codes, scale = quantize_blocks(torch.randn(window.pixels, C, **half), None, False, blocks)
    rest = (scale, weight, words, s_N, h, up, bias, {"BM": BM, "WN": 64, "GROUP_M": 2})
    boxes = hopper_gemm.hopper_gemm(codes, *rest, blocks=blocks)
    assert boxes.isfinite().all()
    assert torch.equal(boxes, hopper_gemm.hopper_gemm(windows_of(codes, blocks), *rest))
