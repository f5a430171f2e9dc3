"""A base's name to a frozen `Backbone`, quantizing on first use where no ready-made checkpoint exists."""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from tqdm import tqdm

from loragraft.backbones.architectures import NUMERICS, SMOOTHED
from loragraft.backbones.bases import known_base, list_bases
from loragraft.backbones.sampler import build_pipeline, generate_from_text
from loragraft.backbones.spec import Backbone, BaseSpec, Encoders, Profile, Weights
from loragraft.kernels.layout import check_card
from loragraft.quantization.branched import BranchedLinear
from loragraft.quantization.checkpoint import load_quantized, record_base_id, recorded_base_id, save_quantized
from loragraft.quantization.convert import plan_layers, quantize_backbone
from loragraft.quantization.formats import FORMATS
from loragraft.quantization.ledger import build_ledger
from loragraft.quantization.settings import LayerReport, QuantSettings, Smoothing
from loragraft.quantization.tensor_file import CheckpointError

CALIBRATION_STEPS = 10
BASE_RANK = 16
"""Rank of the branch of a base that travels with the package."""
__all__ = ["BASE_RANK", "find_spec", "list_bases", "load_16bit", "load_backbone", "quantize_base", "shipped_bases"]


def shipped_bases() -> list[str]:
    """The bases whose weights travel with the package."""
    return [name for name in list_bases() if find_spec(name).external is None]


def find_spec(name: str) -> BaseSpec:
    """The `SPEC` of `backbones/<name>.py`. Raises ValueError naming the nearest base."""
    module = known_base(name).replace("-", "_")
    spec: BaseSpec = importlib.import_module(f"loragraft.backbones.{module}").SPEC
    return spec


def load_backbone(
    name: str,
    profile: Profile | Literal["16bit"] | None,
    device: torch.device | str,
    cache_root: Path,
    weights: Weights | None = None,
    wait: bool = False,
    encoders: Encoders | None = None,
) -> Backbone:
    """The frozen base `name` in `profile` (None or "16bit": not quantized), with its encoders, on `device`.

    weights: for a base that does not travel with the package. Ready-made INT4 weights keep their own profile, which
    `Backbone.profile` then says. A profile that is not ready-made is quantized once into `cache_root`/bases and reused.
    wait: the transformer stays on the CPU until `Backbone.onto_device`, so that encoders have the device for themselves.
    encoders: instead of a shipped base's own, such as ones that read what was encoded before.
    Raises ValueError for an unknown base, for weights that are not there and for a GPU that has no kernel for them,
    `CheckpointError` for a damaged checkpoint.
    """
    spec = find_spec(name)
    profile = None if profile == "16bit" else profile
    device = torch.device(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if spec.external is None and not (weights and (weights.path or weights.random)):
        encoders = encoders or _shipped(spec)[1](device, dtype)
        transformer = _open_shipped(spec, profile, device, cache_root)
    else:
        transformer, encoders, profile = _open_external(spec, profile, device, dtype, cache_root, weights)
    transformer.eval().requires_grad_(False)
    nn.Module.to(transformer, dtype=dtype)  # INT4 layers keep the dtypes of their buffers
    ledger = build_ledger(transformer)
    check_card((row.numerics for row in ledger.rows), device)
    backbone = Backbone(
        spec=spec,
        profile=profile,
        transformer=transformer,
        encoders=encoders,
        base_id=recorded_base_id(transformer),
        ledger=ledger,
        device=device,
        dtype=dtype,
        resolution=spec.resolution,
    )
    if not wait:
        backbone.onto_device()
    return backbone


def _open_shipped(spec: BaseSpec, profile: Profile | None, device: torch.device, cache_root: Path) -> nn.Module:
    if profile is None:
        return load_16bit(spec)
    folder = shipped_folder(spec, profile, device, cache_root)
    try:
        model: nn.Module = load_quantized(folder, spec.transformer_class)
    except CheckpointError as error:
        if folder == spec.transformer_int4.get(profile):
            raise
        raise CheckpointError(f"{error}. {folder} is a cache: delete it, and it is quantized again") from error
    return model


def shipped_folder(spec: BaseSpec, profile: Profile | None, device: torch.device | str, cache_root: Path) -> Path:
    """Where the transformer of a base that travels with the package lies in `profile`; quantized into the cache if it must be."""
    transformer_16bit, _ = _shipped(spec)
    if profile is None:
        return transformer_16bit
    if profile in spec.transformer_int4:
        return spec.transformer_int4[profile]
    folder = cache_root / "bases" / f"{spec.name}-{profile}-{recorded_base_id(load_16bit(spec))[:16]}"
    if not folder.exists():
        print(f"{spec.name} ships no {profile} checkpoint: quantizing it once into {folder}", file=sys.stderr)
        quantize_base(spec, profile, folder, device)
    return folder


def _open_external(
    spec: BaseSpec,
    profile: Profile | None,
    device: torch.device,
    dtype: torch.dtype,
    cache_root: Path,
    weights: Weights | None,
) -> tuple[nn.Module, Encoders, Profile | None]:
    from loragraft.backbones import external  # the Hub's client and the readers of foreign files: not for `pocket`

    external.check_weights(spec, weights)
    assert spec.external is not None and weights is not None  # check_weights
    if weights.random:
        encoders = spec.external.random_encoders(weights.seed, device, dtype)
        transformer = external.random_transformer(spec, spec.external, profile, device, dtype, weights.seed)
        return transformer, encoders, profile
    place = external.locate(spec, spec.external, weights)
    encoders = spec.external.open_encoders(place.pipeline, device, dtype)
    transformer, profile = external.open_transformer(
        spec, spec.external, place.transformer, profile, device, cache_root
    )
    return transformer, encoders, profile


def _shipped(spec: BaseSpec) -> tuple[Path, Callable[[torch.device, torch.dtype], Encoders]]:
    """What a base that travels with the package has. Raises ValueError for another."""
    if spec.transformer_16bit is None or spec.load_encoders is None:
        raise ValueError(
            f"the weights of {spec.name} do not travel with the package: give their folder or file in place of the name"
        )
    return spec.transformer_16bit, spec.load_encoders


def load_16bit(spec: BaseSpec) -> nn.Module:
    """The 16-bit transformer as it lies on disk, on the CPU. Raises ValueError for a base that does not travel with the package."""
    folder, _ = _shipped(spec)
    model: nn.Module = spec.transformer_class.from_pretrained(  # type: ignore[attr-defined]
        folder, torch_dtype=torch.bfloat16, local_files_only=True
    )
    record_base_id(model)
    return model


def quantize_base(
    spec: BaseSpec,
    profile: Profile,
    folder: Path,
    device: torch.device | str,
    *,
    smoothing: Smoothing = "calibrated",
    rank: int | None = None,
    group_size: int = 64,
    gptq: bool = False,
) -> list[LayerReport]:
    """Quantizes the 16-bit transformer of `spec` and writes an INT4 checkpoint to `folder`.

    Calibrated and automatic smoothing and GPTQ denoise the spec's calibration prompts once and watch the inputs of every linear.
    `weight-only` and formats have no smoothing. rank: None = `BASE_RANK`, or a format's own.
    """
    smoothing = smoothing if profile in SMOOTHED else "none"
    if rank is None and profile not in FORMATS:
        rank = BASE_RANK
    device = torch.device(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    transformer = load_16bit(spec).eval().requires_grad_(False)
    nn.Module.to(transformer, device=device, dtype=dtype)  # diffusers' own `to` warns about an empty list
    main = QuantSettings(numerics=NUMERICS[profile], rank=rank, group_size=group_size, smoothing=smoothing, gptq=gptq)
    plan = plan_base(spec, transformer, main)
    measured = gptq or smoothing in ("calibrated", "auto")
    calibrate = partial(denoise_calibration_prompts, spec, transformer, dtype) if measured else None
    with tqdm(total=len(plan), desc=f"quantize {spec.name}", unit="layer") as bar:
        reports = quantize_backbone(transformer, plan, calibrate, lambda *_: bar.update(), keep=spec.keep_16bit)
    # Back to what the 16-bit base holds on disk: every value came from there, so nothing is rounded.
    nn.Module.to(transformer, dtype=torch.bfloat16)
    for module in transformer.modules():
        if isinstance(module, BranchedLinear) and module.bias is not None:
            module.bias = module.bias.to(torch.bfloat16)
    save_quantized(transformer, folder)
    return reports


def plan_base(spec: BaseSpec, transformer: nn.Module, main: QuantSettings) -> dict[str, QuantSettings]:
    """Which layer of the 16-bit `transformer` is quantized how: `main`, and `main.for_few_rows()` on the few-row layers."""
    few_rows = main.for_few_rows()
    rules = dict.fromkeys(spec.quantize, main) | dict.fromkeys(spec.quantize_w4a16, few_rows)
    return plan_layers(transformer, rules, spec.keep_16bit)


def denoise_calibration_prompts(spec: BaseSpec, transformer: nn.Module, dtype: torch.dtype) -> None:
    """Runs `transformer` over the trajectories of the spec's calibration prompts; what it draws is thrown away."""
    device = next(transformer.parameters()).device
    _, load_encoders = _shipped(spec)
    encoders = load_encoders(device, dtype)
    pipeline = build_pipeline(spec.family, transformer, encoders)
    prompts = list(spec.calibration_prompts)
    generate_from_text(
        spec.family,
        pipeline,
        encoders.encode_text(prompts),
        encoders.encode_text([""]),
        seeds=range(len(prompts)),
        resolution=spec.resolution,
        steps=CALIBRATION_STEPS,
        **spec.guided(spec.guidance),
    )
