"""How many kernels an op of this project launches from Python: what its host time grows with.

    launches_of(name, args) -> int

Triton prepares a launch in Python (arguments, descriptors of tensor memory accesses, the current stream), which takes it as long as
ten or twenty ops of torch's; whatever else an op of ours does there counts as one op of torch's. On an NVIDIA GPU; the portable kernels launch as
often as Hopper's.
"""

from collections.abc import Callable
from typing import Any

from loragraft.kernels.taps import Window
from loragraft.kernels.w4a16_skinny import fits


def launches_of(name: str, args: tuple[Any, ...]) -> int:
    """Of the op `name`, without its namespace, called with `args`. One where nothing else is known."""
    count = _LAUNCHES.get(name)
    return 1 if count is None else count(args)


def _given(args: tuple[Any, ...], place: int) -> bool:
    """Whether an argument, optional at the end, was passed."""
    return len(args) > place and args[place] is not None


def _w4a8(args: tuple[Any, ...]) -> int:
    """The product, and quantizing unless x came with its codes."""
    return 1 if _given(args, 13) else 2


def _w4a8_dgrad(args: tuple[Any, ...]) -> int:
    """W_eff, which torch multiplies with; int8: codes of dy, the weight's transpose, the product."""
    return 1 if _given(args, 8) else 3


def _w4a4(args: tuple[Any, ...]) -> int:
    """W_eff and the rounding of x; codes of 8 bits where the backward pass reads them."""
    return 2 + (_given(args, 7) and args[10] == "quantized")


def _w4a16(args: tuple[Any, ...]) -> int:
    """Few tokens: the branch, if there is one, has a kernel too; otherwise torch multiplies."""
    x, qweight = args[:2]
    rank = args[4].shape[0] + (args[7].shape[0] if _given(args, 7) else 0)
    return 2 if rank and fits(x, qweight) else 1


def _conv(args: tuple[Any, ...]) -> int:
    """Maxima of pixels, codes, the branch's sum over taps, the product; pixels' codes where the backward pass reads them."""
    return 4 + (_given(args, 8) and args[12] == "quantized")


def _conv_adapter_gradients(args: tuple[Any, ...]) -> int:
    """dy B by taps, a product for each of them, dB."""
    return Window(*args[6]).taps + 2


_LAUNCHES: dict[str, Callable[[tuple[Any, ...]], int]] = {
    "w4a8_linear": _w4a8,
    "w4a8_dgrad": _w4a8_dgrad,
    "w4a4_linear": _w4a4,
    "w4a16_linear": _w4a16,
    "w4a8_conv": _conv,
    "conv_adapter_gradients": _conv_adapter_gradients,
    "quantize_activation": lambda args: int(args[0].shape[0] > 0),
}
"""The others launch one."""
