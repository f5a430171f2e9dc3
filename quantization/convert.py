"""Turn a float model into an SVDQuant model in place: every linear layer and convolution is in the plan or kept on purpose.

plan = plan_layers(model, rules={r"transformer_blocks\\.\\d+\\.attn\\..*": QuantSettings()}, keep=[r"x_embedder", ...])
reports = quantize_backbone(model, plan, run_calibration, keep=[...])
"""

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from loragraft.quantization.branched import BranchedLinear
from loragraft.quantization.calibrate import ActivationStats, collect
from loragraft.quantization.conv import SVDQuantConv2d, is_quantizable
from loragraft.quantization.linear import share_inputs
from loragraft.quantization.names import match_paths, named_module, nearest, replace_module
from loragraft.quantization.quantized_linear import from_linear
from loragraft.quantization.settings import LayerReport, QuantSettings

Progress = Callable[[int, int, str], object]
"""Called with (layers done, layers in all, path of the layer now done)."""


def linear_paths(model: nn.Module) -> list[str]:
    """Paths of all `nn.Linear` modules, in module order."""
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]


def layer_paths(model: nn.Module) -> list[str]:
    """Paths of everything that can be quantized, in module order: `nn.Linear`, and `nn.Conv2d` but for `why_16bit`."""
    return [path for path, module in model.named_modules() if is_quantizable(module)]


def _always_16bit(model: nn.Module) -> list[str]:
    """Paths of the convolutions that cannot be quantized; a keep pattern may name them, and need not."""
    return [
        path for path, module in model.named_modules() if isinstance(module, nn.Conv2d) and not is_quantizable(module)
    ]


def plan_layers(
    model: nn.Module, rules: Mapping[str, QuantSettings], keep: Sequence[str] = ()
) -> dict[str, QuantSettings]:
    """Expand full-path regular expressions into path -> settings, in module order. Raises as `plan_paths` does."""
    return plan_paths(layer_paths(model), rules, keep, _always_16bit(model))


def plan_paths(
    paths: Sequence[str],
    rules: Mapping[str, QuantSettings],
    keep: Sequence[str] = (),
    always_16bit: Sequence[str] = (),
) -> dict[str, QuantSettings]:
    """Expand full-path regular expressions into path -> settings, in the order of `paths`, all that can be quantized.

    `always_16bit` are layers that cannot be, which `keep` may name too.
    Raises ValueError for a pattern that matches no such layer, a layer that two rules claim with different settings,
    a layer both planned and kept, and a layer that is neither.
    """
    plan: dict[str, QuantSettings] = {}
    for pattern, matched in match_paths(list(rules), paths).items():
        for path in matched:
            if plan.setdefault(path, rules[pattern]) != rules[pattern]:
                raise ValueError(
                    f"layer {path!r} is claimed by two rules with different settings; the second is {pattern!r}"
                )
    _check_cover(paths, plan, keep, always_16bit)
    return {path: plan[path] for path in paths if path in plan}


def _check_cover(
    paths: Sequence[str], plan: Mapping[str, QuantSettings], keep: Sequence[str], always_16bit: Sequence[str]
) -> None:
    kept = {path for matched in match_paths(keep, [*paths, *always_16bit]).values() for path in matched}
    unknown = [path for path in plan if path not in paths]
    if unknown:
        raise ValueError(
            f"plan names {unknown[0]!r}, no nn.Linear of the model and no convolution that can be quantized; {nearest(unknown[0], paths)}"
        )
    both = sorted(kept & plan.keys())
    if both:
        raise ValueError(f"layer {both[0]!r} is both planned and kept in 16 bits; narrow one of the patterns")
    neither = [path for path in paths if path not in plan and path not in kept]
    if neither:
        listed = ", ".join(neither[:8]) + (", ..." if len(neither) > 8 else "")
        raise ValueError(f"{len(neither)} layer(s) are neither planned nor kept: {listed}; name them in one of both")


def quantize_model(
    model: nn.Module,
    plan: Mapping[str, QuantSettings],
    stats: Mapping[str, ActivationStats],
    progress: Progress | None = None,
    *,
    keep: Sequence[str] = (),
) -> list[LayerReport]:
    """Swap every planned `nn.Linear` for a `SVDQuantLinear` or a `QuantizedLinear`, and `nn.Conv2d` for a `SVDQuantConv2d`, in
    the plan's order.

    `keep` are full-path patterns of layers that stay as they are. Everything that can be refused is checked before the
    first layer is swapped. Raises as `plan_layers` and `quantize_linear` do.
    """
    _check_cover(layer_paths(model), plan, keep, _always_16bit(model))
    uncalibrated = [p for p, settings in plan.items() if settings.needs_statistics and p not in stats]
    if uncalibrated:
        raise ValueError(
            f"no activation statistics for {len(uncalibrated)} layer(s), the first is {uncalibrated[0]!r}; "
            "calibrate them, or ask for smoothing='auto', 'weight' or 'hadamard' without gptq"
        )
    reports = []
    for done, (path, settings) in enumerate(plan.items(), start=1):
        layer, report = _quantized(named_module(model, path), stats.get(path), settings, path)
        replace_module(model, path, layer)
        reports.append(report)
        if progress is not None:
            progress(done, len(plan), path)
    share_inputs(model)
    return reports


def _quantized(
    module: nn.Module, stats: ActivationStats | None, settings: QuantSettings, path: str
) -> tuple[BranchedLinear, LayerReport]:
    if isinstance(module, nn.Conv2d):
        return SVDQuantConv2d.from_conv(module, stats, settings, path=path)
    assert isinstance(module, nn.Linear)  # _check_cover
    return from_linear(module, stats, settings, path=path)


def quantize_backbone(
    model: nn.Module,
    plan: Mapping[str, QuantSettings],
    run_calibration: Callable[[], None] | None,
    progress: Progress | None = None,
    *,
    keep: Sequence[str] = (),
) -> list[LayerReport]:
    """Calibrate, then quantize: `run_calibration` drives the model over representative inputs.

    None skips the calibration, which `quantize_model` refuses unless every layer's smoothing is data-free.
    """
    _check_cover(layer_paths(model), plan, keep, _always_16bit(model))
    stats = {} if run_calibration is None else collect(model, plan, run_calibration)
    return quantize_model(model, plan, stats, progress, keep=keep)
