"""The kernels that an op of this project launches from Python, and how long that takes: what its host time grows with.

    launches_of(name, args) -> Launches          .weight: as so many launches of a small kernel

Triton prepares a launch in Python: arguments, the current device and stream, a descriptor of every tensor that is fetched by TMA.
Whatever else an op of ours does there counts as one op of torch's. On Hopper; the portable kernels launch as often, without descriptors.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from loragraft.kernels.taps import Window
from loragraft.kernels.w4a16_skinny import fits

PRODUCT, QUANTIZER = 3.2, 2.5
"""Time of a launch over a small kernel's: 75, 58 and 22 to 25 us on a CPU whose driver does nothing (Triton 3.6); five descriptors, two,
and none."""


class Launches(NamedTuple):
    """Of one op, by what is launched."""

    products: int = 0
    """Of INT8 codes."""
    quantizers: int = 0
    """Per token, with the branch's first product or without."""
    others: int = 0

    @property
    def weight(self) -> float:
        """As so many launches of a small kernel."""
        return PRODUCT * self.products + QUANTIZER * self.quantizers + self.others


def launches_of(name: str, args: tuple[Any, ...]) -> Launches:
    """Of the op `name`, without its namespace, called with `args`. One small kernel where nothing else is known."""
    count = _LAUNCHES.get(name)
    return Launches(others=1) if count is None else count(args)


def _given(args: tuple[Any, ...], place: int) -> bool:
    """Whether an argument, optional at the end, was passed."""
    return len(args) > place and args[place] is not None


def _w4a8(args: tuple[Any, ...]) -> Launches:
    """The product, and quantizing unless x came with its codes."""
    return Launches(products=1, quantizers=int(not _given(args, 13)))


def _w4a8_dgrad(args: tuple[Any, ...]) -> Launches:
    """W_eff, which torch multiplies with; int8: codes of dy, the weight's transpose, the product."""
    return Launches(others=1) if _given(args, 8) else Launches(1, 1, 1)


def _w4a4(args: tuple[Any, ...]) -> Launches:
    """W_eff and the rounding of x; codes of 8 bits where the backward pass reads them."""
    return Launches(quantizers=int(_given(args, 7) and args[10] == "quantized"), others=2)


def _w4a16(args: tuple[Any, ...]) -> Launches:
    """Few tokens: the branch, if there is one, has a kernel too; otherwise torch multiplies."""
    x, qweight = args[:2]
    rank = args[4].shape[0] + (args[7].shape[0] if _given(args, 7) else 0)
    return Launches(others=2 if rank and fits(x, qweight) else 1)


def _conv(args: tuple[Any, ...]) -> Launches:
    """Maxima of pixels, codes, the branch's sum over taps, the product; pixels' codes where the backward pass reads them."""
    return Launches(products=1, quantizers=int(_given(args, 8) and args[12] == "quantized"), others=3)


def _conv_adapter_gradients(args: tuple[Any, ...]) -> Launches:
    """dy B by taps, a product for each of them, dB; every product adds up its parts."""
    return Launches(others=2 * Window(*args[6]).taps + 3)


def _adapter_gradients(args: tuple[Any, ...]) -> Launches:
    """Both products in parts, and their sums."""
    return Launches(others=2)


_LAUNCHES: dict[str, Callable[[tuple[Any, ...]], Launches]] = {
    "w4a8_linear": _w4a8,
    "w4a8_dgrad": _w4a8_dgrad,
    "w4a4_linear": _w4a4,
    "w4a16_linear": _w4a16,
    "w4a8_conv": _conv,
    "conv_adapter_gradients": _conv_adapter_gradients,
    "adapter_gradients": _adapter_gradients,
    "quantize_activation": lambda args: Launches(quantizers=int(args[0].shape[0] > 0)),
}
"""The others launch one."""
