"""LoRA factors onto a frozen base, through PEFT: A [r, K] and B [N, r] beside every target, y += (alpha / r) B A x.

PEFT does the walking, naming and bookkeeping; `SVDQuantLoraLinear` and `SVDQuantLoraConv2d` are the modules it lacks. They hand A and (alpha/r) B to
the base layer's fused op, so that the adapter is computed where the SVD branch is, and what is trained is what a graft runs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from loragraft.kernels.branch import Joined
from loragraft.quantization.branched import BranchedLinear
from loragraft.quantization.conv import SVDQuantConv2d, is_quantizable
from loragraft.quantization.names import match_paths, nearest, replace_module
from loragraft.recipes.schema import AdapterConfig

DEFAULT_NAME = "default"


class _PlainLora(nn.Module, LoraLayer):
    """What PEFT's LoRA layers over ours share: plain LoRA, any number of active adapters, no merging."""

    def __init__(
        self,
        base_layer: BranchedLinear,
        adapter_name: str,
        config: LoraConfig,
        r: int,
        lora_alpha: float,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter. Raises ValueError for what the fused op does not compute."""
        _check_plain(config)
        LoraLayer.update_layer(self, adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)  # type: ignore[arg-type]

    def _active(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """Names of the adapters that count now. Raises ValueError for any argument besides x."""
        if args or kwargs:
            raise ValueError(f"{type(self).__name__} takes x only, got {len(args)} more and {sorted(kwargs)}")
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always raises: four-bit codes take no adapter without being quantized again."""
        raise NotImplementedError("a SVDQuant layer is not merged into; save the adapter and graft it (adapters.graft)")

    def unmerge(self) -> None:
        """Always raises, as `merge` does."""
        raise NotImplementedError("a SVDQuant layer is never merged; use adapters.graft.ungraft")


class SVDQuantLoraLinear(_PlainLora):
    """PEFT's LoRA layer over a `SVDQuantLinear` or a `QuantizedLinear`: plain LoRA, any number of active adapters, no merging.

    joined_down, joined_up: branch and adapter in one, in the compute dtype; kept up to date by `joined.JoinedFactors`, and read
    where gradients are computed only. joined_together: joined_down of all layers that read one x, this one's from row
    joined_first on.
    """

    joined_down: Tensor | None
    joined_up: Tensor | None
    joined_together: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("joined_down", None, persistent=False)
        self.register_buffer("joined_up", None, persistent=False)
        self.register_buffer("joined_together", None, persistent=False)
        self.joined_first = 0

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, BranchedLinear)  # PEFT reaches us through the registered type
        return module.in_features, module.out_features

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's forward with the active adapters' ranks concatenated, in the order they are active."""
        base, active = self.get_base_layer(), self._active(args, kwargs)
        if not active:
            return base(x)
        factors = [layer_factors(self, name) for name in active]
        downs: list[Tensor] = [down for down, _ in factors]
        # alpha = r, the default: B itself then waits for the backward pass, not a float32 copy of every layer's
        scaled = zip((self.scaling[name] for name in active), factors, strict=True)
        ups = [up if scale == 1 else up * scale for scale, (_, up) in scaled]
        if len(active) == 1:
            return base(x, downs[0], ups[0], self._joined() if torch.is_grad_enabled() else None)
        return base(x, torch.cat(downs), torch.cat(ups, dim=1))

    def _joined(self) -> Joined | None:
        if self.joined_down is None or self.joined_up is None:
            return None
        return Joined(self.joined_down, self.joined_up, self.joined_together, self.joined_first)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """(alpha / r) B A [N, K]."""
        down, up = layer_factors(self, adapter)
        return self.scaling[adapter] * (up @ down)


class SVDQuantLoraConv2d(_PlainLora):
    """The same over a `SVDQuantConv2d`: A [r, C, k, k] and B [N, r, 1, 1] as PEFT has them for `nn.Conv2d`."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, SVDQuantConv2d)  # PEFT reaches us through the registered type
        return module.in_channels, module.out_channels

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter, its factors as kernels. Raises ValueError as the linear layer's."""
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        base = self.get_base_layer()
        assert isinstance(base, SVDQuantConv2d)
        # PEFT made matrices for a linear layer of as many channels; its own `_ConvNd` makes them of the base layer's class.
        window = base.kernel_size, base.stride, base.padding
        self.lora_A[adapter_name] = nn.Conv2d(base.in_channels, r, *window, bias=False)
        self.lora_B[adapter_name] = nn.Conv2d(r, base.out_channels, 1, bias=False)
        if config.init_lora_weights:
            self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's forward with the active adapters' ranks concatenated, in the order they are active."""
        base, active = self.get_base_layer(), self._active(args, kwargs)
        assert isinstance(base, SVDQuantConv2d)
        if not active:
            return base(x)
        factors = [(layer_factors(self, name), self.scaling[name]) for name in active]
        downs = [base.adapter_columns(down) for (down, _), _ in factors]
        ups = [up.flatten(1) if scale == 1 else up.flatten(1) * scale for (_, up), scale in factors]
        if len(active) == 1:
            return base(x, downs[0], ups[0])
        return base(x, torch.cat(downs), torch.cat(ups, dim=1))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """(alpha / r) B A [N, C, k, k]."""
        down, up = layer_factors(self, adapter)
        return self.scaling[adapter] * (up.flatten(1) @ down.flatten(1)).view(-1, *down.shape[1:])


def _check_plain(config: LoraConfig) -> None:
    refused = {
        "lora_dropout": config.lora_dropout > 0,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
        "lora_bias": config.lora_bias,
        "init_lora_weights": config.init_lora_weights not in (True, False, "gaussian"),
    }
    asked = [name for name, wanted in refused.items() if wanted]
    if asked:
        raise ValueError(
            f"{', '.join(asked)} cannot be used on a SVDQuant layer: it computes plain LoRA, (alpha / r) B A x, inside "
            "its low-rank branch; leave the option at its default"
        )


def expand_targets(transformer: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Full-path regular expressions -> paths of the layers that get an adapter, in module order.

    Targets are quantized layers; in a model that has none (the 16-bit base) they are `nn.Linear` and `nn.Conv2d`. Raises ValueError for a
    pattern that matches nothing, or something that cannot carry an adapter of ours, with the nearest layers.
    """
    if not patterns:
        raise ValueError("no adapter targets: give at least one full-path regular expression")
    modules = {path: module for path, module in transformer.named_modules() if path}
    quantized = any(isinstance(module, BranchedLinear) for module in modules.values())
    kind = "quantized layer" if quantized else "Linear or ungrouped Conv2d"

    def carries(module: nn.Module) -> bool:
        return isinstance(module, BranchedLinear) if quantized else is_quantizable(module)

    eligible = [path for path, module in modules.items() if carries(module)]
    chosen: set[str] = set()
    for pattern, paths in match_paths(patterns, list(modules)).items():
        wrong = [path for path in paths if not carries(modules[path])]
        if wrong:
            what = type(modules[wrong[0]]).__name__
            raise ValueError(
                f"target pattern {pattern!r} matches {wrong[0]!r}, a {what}, not a {kind}; "
                f"{nearest(wrong[0], eligible)}"
            )
        chosen.update(paths)
    return [path for path in eligible if path in chosen]


def inject_adapter(
    transformer: nn.Module, config: AdapterConfig, default_targets: Sequence[str], *, name: str = DEFAULT_NAME
) -> list[nn.Parameter]:
    """Freeze the base, add an adapter at every target, and return its float32 parameters, A and B alternating.

    A is drawn as PEFT draws it (Kaiming uniform, a = sqrt 5) from `config.seed`; B starts at zero, so the model's output
    does not change. The global random state is left alone. Raises ValueError as `expand_targets` does, or if `name`
    is injected already.
    """
    carriers = _carriers(transformer)
    if any(name in layer.lora_A for layer in carriers.values()):
        raise ValueError(f"an adapter named {name!r} is injected already; remove_adapter first, or give another name")
    if carriers:
        raise ValueError("the transformer carries an injected adapter already; train one at a time, graft the others")
    paths = expand_targets(transformer, config.targets or default_targets)
    transformer.requires_grad_(False)
    peft_config = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=_exactly(paths))  # type: ignore[arg-type]
    peft_config._register_custom_module({SVDQuantConv2d: SVDQuantLoraConv2d, BranchedLinear: SVDQuantLoraLinear})
    with torch.random.fork_rng(devices=[]):  # PEFT initialises on the CPU and moves
        torch.default_generator.manual_seed(config.seed)  # torch.manual_seed would reach every GPU's generator too
        inject_adapter_in_model(peft_config, transformer, adapter_name=name)
    parameters = []
    for layer in _carriers(transformer).values():
        for factor in layer_factors(layer, name):
            factor.data = factor.data.float()
            factor.requires_grad_(True)
            parameters.append(factor)
    return parameters


def _exactly(paths: Sequence[str]) -> str:
    """One regular expression that fullmatches these paths and nothing else: PEFT matches lists by suffix."""
    return "|".join(path.replace(".", r"\.") for path in paths)


def layer_factors(layer: LoraLayer, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A [r, K] and B [N, r] of one adapter on one layer; of a convolution A [r, C, k, k] and B [N, r, 1, 1]."""
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    assert isinstance(down, nn.Parameter)
    assert isinstance(up, nn.Parameter)
    return down, up


def _carriers(transformer: nn.Module) -> dict[str, LoraLayer]:
    return {path: module for path, module in transformer.named_modules() if isinstance(module, LoraLayer)}


def remove_adapter(transformer: nn.Module) -> None:
    """Take every injected adapter off: the base layers, untouched, are back in their places."""
    layers = [(path, module) for path, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)]
    for path, layer in layers:
        replace_module(transformer, path, layer.get_base_layer())
    if layers:
        transformer.__dict__.pop("peft_config", None)


def adapter_factors(transformer: nn.Module, name: str = DEFAULT_NAME) -> dict[str, tuple[Tensor, Tensor]]:
    """Path -> (A [r, K], (alpha / r) B [N, r]) of an injected adapter, detached, in its own dtype.

    Raises ValueError if no layer carries `name`.
    """
    carriers = {path: layer for path, layer in _carriers(transformer).items() if name in layer.lora_A}
    if not carriers:
        raise ValueError(f"no adapter named {name!r} is injected; inject_adapter first")
    factors = {path: layer_factors(layer, name) for path, layer in carriers.items()}
    return {path: (down.detach(), up.detach() * carriers[path].scaling[name]) for path, (down, up) in factors.items()}


def load_factors(transformer: nn.Module, factors: dict[str, tuple[Tensor, Tensor]], name: str = DEFAULT_NAME) -> None:
    """Put saved (A, scaled B) into an injected adapter, to train on from there. Raises ValueError on paths or shapes."""
    carriers = {path: layer for path, layer in _carriers(transformer).items() if name in layer.lora_A}
    if carriers.keys() != factors.keys():
        odd = sorted(carriers.keys() ^ factors.keys())
        raise ValueError(
            f"adapter and injected layers differ, e.g. at {odd[0]!r}; inject with the adapter's own targets"
        )
    for path, (down, up) in factors.items():
        layer = carriers[path]
        for factor, saved in zip(layer_factors(layer, name), (down, up / layer.scaling[name]), strict=True):
            if factor.shape != saved.shape:
                raise ValueError(f"{path}: saved factor {tuple(saved.shape)}, injected {tuple(factor.shape)}")
            factor.data.copy_(saved)
