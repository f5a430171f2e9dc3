"""A denoiser without weights: its true shapes on the meta device, quantized as planned, and random values to fill it with.

    skeleton = meta_transformer(FluxTransformer2DModel, config, partial(plan_architecture, FLUX, QuantSettings(rank=32)))
    randomize(skeleton, "cuda", torch.bfloat16)          a 12 B model, drawn where it will live: 6.5 GiB, no 24 GB anywhere

Nothing is quantized and nothing is read: speed and memory do not depend on the values, and preflight needs none at all.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from loragraft.backbones.architectures import Architecture, plan_rules
from loragraft.backbones.spec import BaseSpec
from loragraft.kernels.layout import GROUP, pack_int4, pack_words
from loragraft.quantization.branched import BranchedLinear
from loragraft.quantization.checkpoint import record_base_id
from loragraft.quantization.conv import SVDQuantConv2d
from loragraft.quantization.convert import layer_paths, plan_layers
from loragraft.quantization.linear import SVDQuantLinear, share_inputs
from loragraft.quantization.names import nearest
from loragraft.quantization.quantized_linear import QuantizedLinear, make_empty
from loragraft.quantization.settings import QuantSettings

Plan = Mapping[str, QuantSettings]
BRANCH_SHARE = 0.1
"""Size of U D against the residual, as RMS."""
CODE_RMS = {"w4a8": 21.5**0.5, "w4a4": (56 / 3) ** 0.5, "w4a16": 21.25**0.5}
"""RMS of a random code: of u - z with u uniform in 0..15 and z 7 or 8, of -7..7, of u - 7.5."""
GROUP_SCALES = (6, 11)
"""Integer scales s of w4a8 groups, upper end excluded: (u - z) s stays inside +-119."""


def meta_transformer(
    transformer_class: type[nn.Module],
    config: Mapping[str, Any],
    plan: Plan | Callable[[nn.Module], Plan] | None = None,
) -> nn.Module:
    """A frozen diffusers model of `config` on the meta device, the planned layers replaced by empty quantized ones.

    plan: layer -> settings, or what makes one of the 16-bit model (`plan_architecture`); None leaves all in 16 bits. A layer
    is rotated where its settings say "hadamard", and smoothed unless they say that or "none". Buffers that a model computes for itself (positions) are real, as ever.
    Raises ValueError naming the nearest layers for a planned path that is no linear layer.
    """
    with init_empty_weights(include_buffers=False):
        model: nn.Module = transformer_class.from_config(dict(config))  # type: ignore[attr-defined]
    chosen = plan(model) if callable(plan) else (plan or {})
    known = set(layer_paths(model))
    for path, settings in chosen.items():
        if path not in known:
            raise ValueError(f"plan names {path!r}, which is no linear layer of the model; {nearest(path, known)}")
        model.set_submodule(path, _empty_like(model.get_submodule(path), settings))
    share_inputs(model)
    return model.requires_grad_(False).eval()


def plan_architecture(
    lists: Architecture | BaseSpec, main: QuantSettings, model: nn.Module
) -> dict[str, QuantSettings]:
    """Layer -> settings of a 16-bit `model`, as `plan_rules`. Raises as `plan_layers`."""
    named = dict(model.named_modules())
    kernels = {path: m.kernel_size[0] for path in layer_paths(model) if isinstance(m := named[path], nn.Conv2d)}
    return plan_layers(model, *plan_rules(lists, main, kernels))


def _empty_like(linear: nn.Module, settings: QuantSettings) -> BranchedLinear:
    if isinstance(linear, nn.Conv2d):
        rotated = settings.smoothing_mode == "hadamard" and linear.in_channels % GROUP == 0
        rank, group = settings.branch_rank, settings.group_size
        conv = SVDQuantConv2d.empty_like(linear, settings.numerics, rank=rank, group_size=group, hadamard=rotated)
        conv.smoothed = conv.smooth is not None and settings.smoothing_mode not in ("hadamard", "none")
        return conv
    assert isinstance(linear, nn.Linear)  # its path is one of layer_paths
    layer = make_empty(
        linear,
        settings.numerics,
        rank=settings.branch_rank,
        group_size=settings.group_size,
        hadamard=settings.smoothing_mode == "hadamard" and linear.in_features % GROUP == 0,
    )
    if isinstance(layer, SVDQuantLinear):
        layer.smoothed = layer.smooth is not None and settings.smoothing_mode not in ("hadamard", "none")
    return layer


@torch.no_grad()
def randomize(transformer: nn.Module, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """Gives every meta tensor of `transformer` a value on `device`, in place; 16-bit layers in `dtype`. Returns it.

    Codes are random; scales are such that W_eff has a standard deviation of about 1 / sqrt K, the branch is a tenth of it,
    biases are 0, norms 1, other matrices N(0, 1 / fan-in): activations stay of order 1. Drawn on the device itself, one
    layer at a time; equal seeds give equal values on one kind of device. The recorded base id says "random", shapes and seed.
    Before an adapter is injected. Raises ValueError for a meta buffer of a module that it does not know.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    shapes = [f"{name} {tuple(tensor.shape)}" for name, tensor in transformer.state_dict().items()]
    for module in transformer.modules():
        if isinstance(module, BranchedLinear):
            _fill_layer(module, generator)
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = _draw(name, parameter, generator).to(dtype)
                module.register_parameter(name, nn.Parameter(value, requires_grad=parameter.requires_grad))
    left = [name for name, buffer in transformer.named_buffers() if buffer.is_meta]
    if left:
        raise ValueError(f"no rule for the values of buffer {left[0]!r} ({len(left)} in all): they are on meta still")
    nn.Module.to(transformer, device=device, dtype=dtype)
    digest = hashlib.sha256("\n".join(shapes).encode()).hexdigest()
    record_base_id(transformer, f"random-{seed}-{digest[:32]}")
    return transformer


def _fill_layer(layer: BranchedLinear, generator: torch.Generator) -> None:
    """Random values for a layer of either class."""
    if isinstance(layer, SVDQuantLinear):
        _fill_quantized(layer, generator)
    elif isinstance(layer, QuantizedLinear):
        _fill_format(layer, generator)


def _fill_quantized(layer: SVDQuantLinear, generator: torch.Generator) -> None:
    """Values for the buffers as `SVDQuantLinear` keeps them in memory."""
    K, N, R, device = layer.in_features, layer.out_features, layer.rank, generator.device
    packed, groups = tuple(layer.qweight.shape), (2 * layer.qweight.shape[1] // layer.group_size, N)
    unit = 1 / (CODE_RMS[layer.numerics] * K**0.5)

    def uniform(shape: tuple[int, ...], low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=generator, device=device) * (high - low) + low

    def integers(shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device, dtype=dtype)

    if layer.numerics == "w4a8":
        low, high = GROUP_SCALES
        layer.qweight = integers(packed, 0, 256)
        layer.group_words = pack_words(integers(groups, low, high), integers(groups, 7, 9), layer.group_size)
        layer.row_scale = uniform((N,), 0.75, 1.25) * (unit * 2 / (low + high - 1))
    elif layer.numerics == "w4a4":
        layer.qweight = pack_int4(integers((N, 2 * packed[1]), -7, 8, torch.int8))
        layer.wscale = (uniform(groups, 0.75, 1.25) * unit).to(layer.wscale.dtype)
    else:
        layer.qweight = integers(packed, 0, 256)
        layer.wscale = (uniform(groups, 0.75, 1.25) * unit).to(layer.wscale.dtype)
        layer.wzero = (layer.wscale.float() * -7.5).to(layer.wzero.dtype)
    if layer.smooth is not None:
        smooth = uniform((K,), 0.75, 1.25) if layer.smoothed else torch.ones(K, device=device)
        if isinstance(layer, SVDQuantConv2d):  # one value for all taps of a channel
            smooth = smooth[: K // layer.taps].repeat(layer.taps)
        layer.smooth = smooth.to(layer.smooth.dtype)
    layer.lora_down = _normal((R, K), K, generator).to(layer.lora_down.dtype)
    layer.lora_up = (_normal((N, R), max(R, 1), generator) * BRANCH_SHARE).to(layer.lora_up.dtype)
    if layer.bias is not None:
        layer.bias = torch.zeros(N, device=device, dtype=layer.bias.dtype)
    layer._note_smoothing()


def _fill_format(layer: QuantizedLinear, generator: torch.Generator) -> None:
    """A drawn weight, encoded."""
    K, N, R, device = layer.in_features, layer.out_features, layer.rank, generator.device
    for name, tensor in layer.format.encode(_normal((N, K), K, generator)).items():
        setattr(layer, name, tensor)
    layer.lora_down = _normal((R, K), K, generator).to(layer.lora_down.dtype)
    layer.lora_up = (_normal((N, R), max(R, 1), generator) * BRANCH_SHARE).to(layer.lora_up.dtype)
    if layer.bias is not None:
        layer.bias = torch.zeros(N, device=device, dtype=layer.bias.dtype)


def _draw(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Vectors are biases or norms; of anything else all axes but the first are fan-in."""
    if parameter.dim() < 2:
        fill = 0.0 if name == "bias" else 1.0
        return torch.full(parameter.shape, fill, device=generator.device)
    return _normal(tuple(parameter.shape), parameter[0].numel(), generator)


def _normal(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device) / fan_in**0.5
