"""Grafting: an adapter becomes more ranks of the SVD branch. Exact, reversible, nothing is quantized again.

    y = Q(x') deq(q)^T + (x [D; A]^T) [U, w B]^T + bias          branch ranks R -> R + r

The branch reads raw x (SVDQUANT's `lora_down` is stored divided by the smoothing vector), so a LoRA trained on raw x joins it
as it is. The originals stay in memory: every change recomposes the branch from them, hence any order of grafting,
re-weighting and removing ends in the same bytes, and after the last removal in the original ones.

A convolution's A [r, C, k, k] and B [N, r, 1, 1] join as matrices over (tap, channel). In a 16-bit layer, which has no branch,
W + w B A takes the place of W, by the same bookkeeping.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loragraft.adapters.checkpoint import UNKNOWN_BASE, Adapter, check_fits
from loragraft.adapters.formats.contract import check_together
from loragraft.kernels.layout import relative_rms
from loragraft.quantization.branched import BranchedLinear
from loragraft.quantization.checkpoint import branched_layers, recorded_base_id
from loragraft.quantization.conv import SVDQuantConv2d, is_quantizable
from loragraft.quantization.names import named_module

STATE = "loragraft_grafts"
RESIDENT = "loragraft_resident"
"""Where `resident.ResidentAdapters` notes itself: it owns the branches, as grafts do."""


@dataclass
class _Grafts:
    """What is grafted on one transformer, and the tensors that were there before."""

    base_id: str
    adapters: dict[str, tuple[Adapter, float]] = field(default_factory=dict)
    originals: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """Path -> (lora_down, lora_up), or (weight,) of a 16-bit layer."""


def graft(
    transformer: nn.Module,
    adapter: Adapter,
    weight: float = 1.0,
    name: str | None = None,
    *,
    any_base: bool = False,
) -> None:
    """Concatenate `adapter`, times `weight`, into the branches; `name` (default: the adapter's) identifies it later.

    Nothing changes unless everything fits. Raises ValueError for a weight that is not finite, an adapter of another base unless
    `any_base`, a name in use, targets or shapes that do not fit, a second compensating adapter, one that changes more than the denoiser's layers (`check_whole`), and a
    transformer with an injected (training) adapter.
    """
    name = adapter.name if name is None else name
    check_weight(name, weight)
    if getattr(transformer, RESIDENT, None) is not None:
        raise ValueError("the transformer has resident adapters; add this one to them, or clear() them before grafting")
    state = getattr(transformer, STATE, None) or _Grafts(recorded_base_id(transformer))
    if name in state.adapters:
        raise ValueError(f"an adapter named {name!r} is grafted already; set_weight changes it, ungraft removes it")
    check_graftable(transformer, adapter, state.base_id, any_base=any_base)
    check_together(
        [(other, there.metadata) for other, (there, _) in state.adapters.items()] + [(name, adapter.metadata)]
    )
    for path in adapter.pairs:
        if path not in state.originals:
            state.originals[path] = _current(named_module(transformer, path))
    state.adapters[name] = (adapter, float(weight))
    setattr(transformer, STATE, state)
    _compose(transformer, state, list(adapter.pairs))


def check_graftable(transformer: nn.Module, adapter: Adapter, base_id: str, *, any_base: bool) -> None:
    """Raises ValueError as `graft` does for what is wrong with the adapter or the transformer."""
    if any(path.endswith(".base_layer") for path, _ in transformer.named_modules()):
        raise ValueError("the transformer carries an injected adapter; remove_adapter before grafting")
    adapter.check_portable(base_id)  # first: --any-base does not help there
    if not any_base and adapter.base_id != UNKNOWN_BASE:
        adapter.check_base(base_id)
    adapter.check_whole()
    check_fits(adapter, _targets(transformer))
    if not any_base:  # a file that does not say its base is asked last: one that does not fit needs no --any-base
        adapter.check_base(base_id)


def check_weight(name: str, weight: float) -> None:
    """Raises ValueError for NaN and infinity, which would make every picture black."""
    if not math.isfinite(weight):
        raise ValueError(f"weight {weight} of adapter {name!r}: expected a finite number, such as 0.8")


def ungraft(transformer: nn.Module, name: str) -> None:
    """Remove a grafted adapter. Raises ValueError with the grafted names if `name` is none of them."""
    state = _state(transformer, name)
    adapter, _ = state.adapters.pop(name)
    _compose(transformer, state, list(adapter.pairs))
    if not state.adapters:
        delattr(transformer, STATE)


def set_weight(transformer: nn.Module, name: str, weight: float) -> None:
    """Change the strength of a grafted adapter. Raises ValueError as `ungraft` does, and for a weight that is not finite."""
    state = _state(transformer, name)
    check_weight(name, weight)
    adapter, _ = state.adapters[name]
    state.adapters[name] = (adapter, float(weight))
    _compose(transformer, state, list(adapter.pairs))


def grafted(transformer: nn.Module) -> dict[str, float]:
    """Name -> weight of what is grafted, oldest first."""
    state: _Grafts | None = getattr(transformer, STATE, None)
    return {} if state is None else {name: weight for name, (_, weight) in state.adapters.items()}


def _state(transformer: nn.Module, name: str) -> _Grafts:
    state: _Grafts | None = getattr(transformer, STATE, None)
    if state is None or name not in state.adapters:
        raise ValueError(f"no grafted adapter named {name!r}; grafted: {', '.join(grafted(transformer)) or 'none'}")
    return state


def _targets(transformer: nn.Module) -> dict[str, tuple[tuple[int, ...], int]]:
    """Path -> (shape of A without its rank, N) of the layers that can carry a graft: quantized ones, and linear layers and
    ungrouped convolutions that are in 16 bits."""
    targets = {}
    for path, module in transformer.named_modules():
        if isinstance(module, BranchedLinear):
            targets[path] = _inputs(module), module.out_features
        elif is_quantizable(module):
            weight = module.get_parameter("weight")
            targets[path] = tuple(weight.shape[1:]), weight.shape[0]
    return targets


def _inputs(layer: BranchedLinear) -> tuple[int, ...]:
    """(K,), or (C, k, k) of a convolution."""
    return layer.adapter_shape if isinstance(layer, SVDQuantConv2d) else (layer.in_features,)


def as_matrices(layer: BranchedLinear, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(A, B) as the layer's branch has its factors: [r, in_features] and [N, r]. A 1x1 kernel may be flat, or a flat one 1x1."""
    down, up = pair[0].reshape(len(pair[0]), *_inputs(layer)), pair[1].flatten(1)
    return (layer.adapter_columns(down), up) if isinstance(layer, SVDQuantConv2d) else (down, up)


def _current(layer: nn.Module) -> tuple[Tensor, ...]:
    if isinstance(layer, BranchedLinear):
        return layer.lora_down, layer.lora_up
    assert isinstance(layer, nn.Linear | nn.Conv2d)  # check_fits
    return (layer.weight.detach(),)


def _compose(transformer: nn.Module, state: _Grafts, paths: list[str]) -> None:
    """Rebuild the branches at `paths` from the originals and whatever is grafted there now."""
    for path in paths:
        layer = named_module(transformer, path)
        pairs = [(a.pairs[path], weight) for a, weight in state.adapters.values() if path in a.pairs]
        device = _current(layer)[0].device  # the model may have moved since the originals were put aside
        originals = tuple(tensor.to(device) for tensor in state.originals[path])
        if isinstance(layer, BranchedLinear):
            down, up = originals
            matrices = [(as_matrices(layer, pair), weight) for pair, weight in pairs]
            layer.set_branch(*_widened(down, up, matrices) if pairs else (down, up))
        else:
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            layer.weight = nn.Parameter(_merged(originals[0], pairs), requires_grad=False)
        if not pairs:
            del state.originals[path]


def _widened(down: Tensor, up: Tensor, pairs: list[tuple[tuple[Tensor, Tensor], float]]) -> tuple[Tensor, Tensor]:
    """[D; A ...], [U, w B ...] in the branch's dtype; w B is rounded once."""
    downs, ups = [down], [up]
    for (adapter_down, adapter_up), weight in pairs:
        downs.append(adapter_down.to(down.device, down.dtype))
        ups.append((adapter_up.to(up.device, torch.float32) * weight).to(up.dtype))
    return torch.cat(downs), torch.cat(ups, dim=1)


def _merged(original: Tensor, pairs: list[tuple[tuple[Tensor, Tensor], float]]) -> Tensor:
    """W + sum w B A, added in float32 and rounded once; W itself when nothing is left to add."""
    if not pairs:
        return original
    total = original.float()
    for (down, up), weight in pairs:
        total = total + weight * (up.to(total).flatten(1) @ down.to(total).flatten(1)).view_as(total)
    return total.to(original.dtype)


@dataclass(frozen=True)
class GraftDeviation:
    """How far one grafted layer is from the same layer with the adapter kept apart (RMS ratios)."""

    path: str
    merged_vs_apart: float
    """In the dtype of x."""
    merged_vs_exact: float
    """Against the formula in float64, with the integer part as the layer computes it."""
    apart_vs_exact: float
    effect: float
    """RMS of what the adapter adds, relative to the layer's output without it."""


@torch.no_grad()
def graft_deviation(
    transformer: nn.Module, adapter: Adapter, inputs: dict[str, Tensor], weight: float = 1.0
) -> list[GraftDeviation]:
    """Compare y(grafted) with y(base) + adapter for x = `inputs[path]` [..., K] (images for a convolution) at each quantized
    layer named there.

    The adapter kept apart has the same bfloat16 factors as the graft, as the branch's dtype demands. `transformer` must
    carry no graft; it is left as it was. Raises ValueError as `graft` does.
    """
    if grafted(transformer):
        raise ValueError(
            f"ungraft {', '.join(grafted(transformer))} first: deviations are measured against the bare base"
        )
    layers = branched_layers(transformer)
    check_fits(adapter, {path: (_inputs(layer), layer.out_features) for path, layer in layers.items()})
    deviations = []
    for path, x in inputs.items():
        layer = layers[path]
        down, up = as_matrices(layer, adapter.pairs[path])
        original = layer.lora_down, layer.lora_up
        wide_down, wide_up = _widened(*original, [((down, up), weight)])
        rank = original[0].shape[0]
        down, up = wide_down[rank:], wide_up[:, rank:]
        plain, apart = layer(x), layer(x, down, up)
        layer.set_branch(wide_down, wide_up)
        merged = layer(x)
        layer.set_branch(*original)
        added = exactly_added(layer, x.double(), down.double(), up.double())
        exact = layer(x.float()).double() + added
        deviations.append(
            GraftDeviation(
                path,
                relative_rms(merged, apart),
                relative_rms(merged, exact),
                relative_rms(apart, exact),
                relative_rms(plain.double() + added, plain),
            )
        )
    return deviations


def exactly_added(layer: BranchedLinear, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """What the adapter adds, in x's dtype."""
    if not isinstance(layer, SVDQuantConv2d):
        return (x @ down.T) @ up.T
    h = F.conv2d(x, layer.as_kernel(down), None, layer.stride, layer.padding)
    return F.conv2d(h, up[..., None, None])
