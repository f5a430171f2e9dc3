"""From one numerics to another, on request only, with what it costs: W4A4 <-> W4A8, and unsigned activations to signed.

Both kinds of codes stand for the same residual R of W_eff = (R H) / smooth + lora_up lora_down. Converting dequantizes R,
rounds it in the other code system and leaves smooth, branch and bias as they are; what is rounded twice is not as good as what
is quantized once from the 16-bit weight, hence the report. W4A16 layers stay.

    w4a4 -> w4a8    progressive codes of R, groups of 64; INT8 activations per token
    w4a8 -> w4a4    symmetric codes of R H, i.e. without the rotation; of R H s' / s for another smoothing factor s'
    unsigned        bias + 0.171875 sum_j R_ij / smooth_j over the unsigned columns: the function of the layer without
                    rounding of x (SVDQuant's `ShiftedLinear` backwards); W4A8 has no unsigned activations, so goes through it
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from loragraft.kernels.act_quant import GELU_SHIFT
from loragraft.kernels.layout import apply_hadamard, pack_int4, relative_rms
from loragraft.quantization.checkpoint import check_saveable, quantized_layers, record_base_id
from loragraft.quantization.conv import SVDQuantConv2d
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.names import replace_module
from loragraft.quantization.weight_quant import round_progressive, round_symmetric

ROWS, SEED = 32, 0
"""Synthetic inputs per layer that the output errors are measured on."""
Progress = Callable[[int, int, str], object]


@dataclass(frozen=True)
class Conversion:
    """What became of one layer. Errors are RMS ratios."""

    path: str
    before: str
    after: str
    """Numerics; `w4a4u` has unsigned activations."""
    weight_error: float
    """|W_eff after - W_eff before| / |W_eff before|: the added error."""
    output_before: float
    output_after: float
    """Against x W_eff^T with the W_eff from before, x ~ smooth N(0, 1) (tanh-GELU of it in unsigned columns)."""


def convert_numerics(
    model: nn.Module,
    numerics: Literal["w4a8", "w4a4"],
    progress: Progress | None = None,
    *,
    device: torch.device | str | None = None,
    together: Sequence[Sequence[str]] = (),
) -> list[Conversion]:
    """Convert every W4A4 or W4A8 layer that is not in `numerics`, in place; the model is another base afterwards.

    together (w4a4 only): paths of layers over one input that are to have one smoothing factor, the geometric mean of theirs.
    device: where each layer is worked on, before it goes back to where it was (None: there).
    Raises ValueError for a model with injected or grafted adapters, before anything is changed.
    """
    if numerics not in ("w4a8", "w4a4"):
        raise ValueError(f"numerics {numerics!r}: expected w4a8 or w4a4")
    found = quantized_layers(model).items()
    layers = {p: m for p, m in found if m.numerics in ("w4a8", "w4a4") and not isinstance(m, SVDQuantConv2d)}
    common = _common_smoothing(layers, together) if numerics == "w4a4" else {}
    rotated = {path for path, layer in layers.items() if numerics == "w4a4" and layer.hadamard}
    chosen = {p: m for p, m in layers.items() if m.numerics != numerics or p in rotated or p in common}

    def convert(path: str, layer: SVDQuantLinear) -> SVDQuantLinear:
        return to_w4a8(layer) if numerics == "w4a8" else to_w4a4(layer, common.get(path))

    return _replace(model, chosen, convert, progress, device)


def _common_smoothing(layers: dict[str, SVDQuantLinear], together: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """Path -> the smoothing factor of its group, for groups that do not agree yet."""
    common: dict[str, Tensor] = {}
    for group in together:
        present = [path for path in group if path in layers]
        smooths = [smooth for path in present if (smooth := layers[path].smooth) is not None]
        if any(not torch.equal(smooth, smooths[0]) for smooth in smooths):
            mean = torch.stack([smooth.float().log() for smooth in smooths]).mean(0).exp().to(torch.bfloat16)
            common |= dict.fromkeys(present, mean)
    return common


def sign_activations(
    model: nn.Module, progress: Progress | None = None, *, device: torch.device | str | None = None
) -> list[Conversion]:
    """Give every layer with unsigned activations signed ones, in place, for formats and kernels that know no others.

    Raises as `convert_numerics` does.
    """
    chosen = {path: layer for path, layer in quantized_layers(model).items() if layer.act_unsigned}
    return _replace(model, chosen, lambda _path, layer: to_signed(layer), progress, device)


def _replace(
    model: nn.Module,
    chosen: dict[str, SVDQuantLinear],
    convert: Callable[[str, SVDQuantLinear], SVDQuantLinear],
    progress: Progress | None,
    device: torch.device | str | None,
) -> list[Conversion]:
    check_saveable(model, bake_grafts=False)
    report = []
    for done, (path, layer) in enumerate(chosen.items(), start=1):
        home = layer.qweight.device
        layer.to(home if device is None else device)
        after = convert(path, layer)
        report.append(_compare(path, layer, after))
        replace_module(model, path, after.to(home))
        if progress is not None:
            progress(done, len(chosen), path)
    if chosen:
        record_base_id(model)
    return report


def to_w4a8(layer: SVDQuantLinear) -> SVDQuantLinear:
    """The layer with progressive codes; its rotation, if any, stays."""
    rounded = round_progressive(_residual(layer), 64)
    return _rebuilt(layer, "w4a8", {"qweight": pack_int4(rounded.codes_NK), **rounded.scales}, hadamard=layer.hadamard)


def to_w4a4(layer: SVDQuantLinear, smooth: Tensor | None = None) -> SVDQuantLinear:
    """The layer with symmetric codes and signed activations, without a rotation; with another smoothing factor if given."""
    residual = apply_hadamard(_residual(layer)) if layer.hadamard else _residual(layer)
    if smooth is not None:
        assert layer.smooth is not None  # w4a4 or w4a8
        smooth = smooth.to(residual.device)
        residual = residual * (smooth.float() / layer.smooth.float())
    rounded = round_symmetric(residual, 64)
    codes = {"qweight": pack_int4(rounded.codes_NK), **rounded.scales}
    return _rebuilt(layer, "w4a4", codes, hadamard=False, smooth=smooth)


def to_signed(layer: SVDQuantLinear) -> SVDQuantLinear:
    """The W4A4 layer with signed activations and the bias that goes with them; codes and branch stay."""
    return _rebuilt(layer, "w4a4", {"qweight": layer.qweight, "wscale": layer.wscale}, hadamard=layer.hadamard)


def signed_bias(layer: SVDQuantLinear) -> Tensor | None:
    """The bias without the part that makes up for the shift; float32 if the layer is unsigned."""
    if not layer.act_unsigned:
        return layer.bias
    assert layer.smooth is not None  # w4a4
    share_NK = (_residual(layer) / layer.smooth.float())[:, layer.unsigned_from :]
    given = share_NK.new_zeros(layer.out_features) if layer.bias is None else layer.bias.float()
    return given + GELU_SHIFT * share_NK.sum(dim=1)


def _residual(layer: SVDQuantLinear) -> Tensor:
    """R [N, K] in float32, still smoothed and rotated."""
    return layer.dequantized_codes(torch.float32)[:, : layer.in_features]


def _rebuilt(
    layer: SVDQuantLinear, numerics: Literal["w4a8", "w4a4"], codes: dict[str, Tensor], *, hadamard: bool,
    smooth: Tensor | None = None,
) -> SVDQuantLinear:  # fmt: skip
    assert layer.smooth is not None  # w4a4 or w4a8
    tensors = codes | {
        "smooth": layer.smooth if smooth is None else smooth,
        "lora_down": layer.lora_down,
        "lora_up": layer.lora_up,
    }
    bias = signed_bias(layer)
    tensors |= {} if bias is None else {"bias": bias}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return SVDQuantLinear(layer.in_features, layer.out_features, numerics, tensors, hadamard=hadamard)


def _compare(path: str, before: SVDQuantLinear, after: SVDQuantLinear) -> Conversion:
    weight = before.dequantized_weight()
    generator = torch.Generator().manual_seed(SEED)
    assert before.smooth is not None  # w4a4 or w4a8
    x = torch.randn(ROWS, before.in_features, generator=generator).to(weight.device) * before.smooth.float()
    if before.act_unsigned:
        first = before.unsigned_from
        x[:, first:] = torch.nn.functional.gelu(x[:, first:], approximate="tanh")
    bias = signed_bias(before)
    exact = x @ weight.T if bias is None else torch.addmm(bias.float(), x, weight.T)
    return Conversion(
        path=path,
        before=_name(before),
        after=_name(after),
        weight_error=relative_rms(after.dequantized_weight(), weight),
        output_before=relative_rms(before(x), exact),
        output_after=relative_rms(after(x), exact),
    )


def _name(layer: SVDQuantLinear) -> str:
    return layer.numerics + ("u" if layer.act_unsigned else "")


def conversion_table(report: list[Conversion]) -> str:
    """One line per layer, errors in per cent, and the means."""
    head = ("path", "from", "to", "added weight %", "output % before", "after")
    rows = [
        (c.path, c.before, c.after, *(f"{100 * e:.2f}" for e in (c.weight_error, c.output_before, c.output_after)))
        for c in report
    ]
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in (head, *rows)]
    if report:
        means = [
            sum(getattr(c, n) for c in report) / len(report) for n in ("weight_error", "output_before", "output_after")
        ]
        text.append(
            f"{len(report)} layers: mean added weight error {100 * means[0]:.2f} %, output error {100 * means[1]:.2f} % -> "
            f"{100 * means[2]:.2f} % (synthetic inputs; against what the codes before stood for, not the 16-bit weights)"
        )
    return "\n".join(text)
