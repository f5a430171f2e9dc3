"""NF4: 16 values at the quantiles of a normal distribution, one float32 absmax per 64 weights; bit for bit bitsandbytes' own.

    absmax_b = max|w| of 64 consecutive weights, row after row,   code = the nearest of NF4[c] to w / absmax_b,   w ~ NF4[c] absmax_b

Double quantization (QLoRA, section 3) stores absmax - mean(absmax) in 8 bits: blocks of 256, each with its own largest value, codes
of the dynamic data type of "8-bit approximations for parallelism" (arXiv:1511.04561): 4.127 bits per weight instead of 4.5.
Source: Dettmers et al., "QLoRA", arXiv:2305.14314; bitsandbytes `functional.quantize_4bit`. The high nibble is the even weight,
as there.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK, ABSMAX_BLOCK = 64, 256
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""QLoRA, appendix E."""
ZERO = NF4.index(0.0)
SMALLEST = 1e-38
"""In place of the absmax of a block of zeros."""


def layout(N: int, K: int, double: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Rows are kept apart where blocks do not cross them."""
    rows = N if K % BLOCK == 0 else 1
    blocks = -(-N * K // BLOCK)
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"qweight": ((rows, -(-N * K // 2) // rows), torch.uint8)}
    if not double:
        return found | {"absmax": ((rows, blocks // rows), torch.float32)}
    return found | {
        "absmax": ((rows, blocks // rows), torch.uint8),
        "absmax_scale": ((-(-blocks // ABSMAX_BLOCK),), torch.float32),
        "absmax_mean": ((1,), torch.float32),
    }


def tables(double: bool) -> dict[str, Tensor]:
    """What is looked up and never stored: `pairs` [256, 2], the two weights of a byte, and the codes of an absmax."""
    code, byte = torch.tensor(NF4), torch.arange(256)
    found = {"pairs": torch.stack((code[byte >> 4], code[byte & 15]), dim=1)}
    return found | {"dynamic": dynamic_map()} if double else found


def dynamic_map() -> Tensor:
    """[256] float32, ascending: 0, 1 and +-10^(i - 6) times the midpoints of 2^i equal parts of [0.1, 1], i = 0..6."""
    positive = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        positive.append(10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2))
    values = torch.cat(positive)
    return torch.cat([values, -values, torch.tensor([0.0, 1.0])]).sort().values


def encode(weight_NK: Tensor, double: bool) -> dict[str, Tensor]:
    """Codes and absmax under their checkpoint names."""
    N, K = weight_NK.shape
    codes, absmax = nearest_codes(weight_NK.float(), torch.tensor(NF4, device=weight_NK.device), BLOCK)
    codes = pad(codes, (0, len(codes) % 2), value=ZERO).view(-1, 2)
    tensors = {"qweight": (codes[:, 0] << 4) | codes[:, 1]}
    if double:
        mean = absmax.mean()
        small, scale = nearest_codes(absmax - mean, dynamic_map().to(absmax.device), ABSMAX_BLOCK)
        tensors |= {"absmax": small, "absmax_scale": scale, "absmax_mean": mean[None]}
    else:
        tensors["absmax"] = absmax
    return {name: tensors[name].reshape(shape) for name, (shape, _) in layout(N, K, double).items()}


def nearest_codes(values: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(uint8 index of the nearest code of each value / absmax, flattened; absmax [blocks]). A tie takes the lower code."""
    flat = values.flatten()
    blocks = pad(flat, (0, -len(flat) % block)).view(-1, block)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST))[:, None]).clamp_(-1, 1).flatten()[: len(flat)]
    return torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8), absmax


def block_absmax(tensors: dict[str, Tensor]) -> Tensor:
    """[blocks] float32, double quantization undone."""
    stored = tensors["absmax"].flatten()
    if "absmax_scale" not in tensors:
        return stored
    scale = tensors["absmax_scale"].repeat_interleave(ABSMAX_BLOCK)[: len(stored)]
    return tensors["dynamic"][stored.int()] * scale + tensors["absmax_mean"]


def decode(tensors: dict[str, Tensor], N: int, K: int) -> Tensor:
    """[N, K] in float32."""
    values = tensors["pairs"].index_select(0, tensors["qweight"].flatten().int()).flatten()[: N * K]
    if N * K % BLOCK:
        values = pad(values, (0, -N * K % BLOCK))
    return (values.view(-1, BLOCK) * block_absmax(tensors)[:, None]).flatten()[: N * K].view(N, K)


@cache
def has_bitsandbytes() -> bool:
    """Whether its kernels can be asked for."""
    return find_spec("bitsandbytes") is not None


def decode_bitsandbytes(tensors: dict[str, Tensor], N: int, K: int, dtype: torch.dtype) -> Tensor:
    """[N, K] in a 16- or 32-bit dtype, by bitsandbytes' kernel."""
    import bitsandbytes  # noqa: F401  # it registers the op

    packed, absmax = tensors["qweight"].reshape(-1, 1), block_absmax(tensors)
    found: Tensor = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, BLOCK, "nf4", [N, K], dtype)
    return found
