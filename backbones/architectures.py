"""Which layers of a known denoiser are quantized how, and quantizing one from its files alone.

A base of this folder names its architecture; a folder or file that is no base is recognised by its configuration or, for a
bare FLUX file, by the shapes of its tensors.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights

from loragraft.backbones.family import Component
from loragraft.backbones.spec import BaseSpec, Profile
from loragraft.quantization.calibrate import StatsFile
from loragraft.quantization.formats import FORMATS
from loragraft.quantization.names import match_paths, nearest
from loragraft.quantization.settings import LayerReport, Numerics, QuantSettings, Smoothing
from loragraft.quantization.stream import plan_source, quantize_stream, weight_layers
from loragraft.quantization.tensor_file import CheckpointError
from loragraft.quantization.weight_source import FileSource, WeightSource

NUMERICS: dict[Profile, Numerics] = {
    "native": "w4a8",
    "interchange": "w4a4",
    "weight-only": "w4a16",
    **{found.name: found.name for found in FORMATS.values()},
}
SMOOTHED = ("native", "interchange")
"""Profiles whose layers store a smoothing vector."""
FOLDER_RANK = 32
"""SVDQuant's rank for models of this size."""
FOLDER_ROUNDS = 20
"""Rounds of the alternation; each ends early where it no longer pays."""
DATA_FREE_GRID, CALIBRATED_GRID = 4, 10
ORIGINAL_FLUX_KEYS = ("double_blocks.", "model.diffusion_model.double_blocks.")
UNET_KEYS = ("model.diffusion_model.input_blocks.", "down_blocks.")
"""What tensors of a UNet begin with, in its authors' names and in diffusers'."""
ROPE_AXES = {128: (16, 56, 56)}
"""Width of an attention head -> FLUX's split of it among text, row and column, which no tensor shows."""


@dataclass(frozen=True)
class Architecture:
    """Full-path patterns of layers; every linear layer is in exactly one of the first three lists."""

    class_name: str
    """diffusers' class, the configuration's `_class_name`."""
    quantize: tuple[str, ...]
    """Layers that carry the profile: attention and feed-forward."""
    quantize_w4a16: tuple[str, ...]
    """Layers with few rows (adaLN): INT4 weights, 16-bit activations."""
    keep_16bit: tuple[str, ...]
    quantize_conv: tuple[str, ...] = ()
    """Convolutions that carry the profile; kernels larger than 1x1 in `native` alone (`plan_rules`)."""


_DOUBLE = r"transformer_blocks\.\d+\."
_SINGLE = r"single_transformer_blocks\.\d+\."
FLUX = Architecture(
    class_name="FluxTransformer2DModel",
    quantize=(
        _DOUBLE + r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",
        _DOUBLE + r"(ff|ff_context)\.net\.(0\.proj|2)",
        _SINGLE + r"(attn\.(to_q|to_k|to_v)|proj_mlp|proj_out)",
    ),
    quantize_w4a16=(_DOUBLE + r"(norm1|norm1_context)\.linear", _SINGLE + r"norm\.linear"),
    keep_16bit=("x_embedder", "context_embedder", r"time_text_embed\..*", r"norm_out\.linear", "proj_out"),
)
_TRANSFORMER = r".*\.transformer_blocks\.\d+\."
_RESNET = r".*\.resnets\.\d+\."
UNET = Architecture(
    class_name="UNet2DConditionModel",
    quantize=(
        _TRANSFORMER + r"(attn1\.(to_q|to_k|to_v|to_out\.0)|attn2\.(to_q|to_out\.0)|ff\.net\.(0\.proj|2))"
        r"|.*attentions\.\d+\.(proj_in|proj_out)",
    ),
    quantize_w4a16=(_TRANSFORMER + r"attn2\.(to_k|to_v)", _RESNET + "time_emb_proj"),
    keep_16bit=(r"(time|add)_embedding\.linear_[12]|conv_(in|out)",),
    quantize_conv=(
        _RESNET + r"(conv1|conv2|conv_shortcut)|.*\.(downsamplers|upsamplers)\.\d+\.conv"
        r"|.*attentions\.\d+\.(proj_in|proj_out)",
    ),
)
"""Stable Diffusion's UNets. Few rows: the text's keys and values (77 a picture) and a resnet's time (1). The projections around
the transformers are convolutions of 1x1 in SD1.5, linear layers in SD 2 and SDXL: one pattern of each list finds them."""
_ATTENTION = _DOUBLE + r"attn[12]\.(to_q|to_k|to_v|to_out\.0)"
SANA = Architecture(
    class_name="SanaTransformer2DModel",
    quantize=(_ATTENTION,),
    quantize_w4a16=(r"time_embed\.linear",),
    keep_16bit=(r"time_embed\.emb\..*", r"caption_projection\.linear_[12]", r"proj_out|patch_embed\.proj"),
    quantize_conv=(_DOUBLE + r"ff\.(conv_inverted|conv_point)",),
)
"""Its feed-forward part is made of convolutions: the 1x1 ones carry the profile, the depthwise 3x3 between them stays."""
PIXART = Architecture(
    class_name="PixArtTransformer2DModel",
    quantize=(_ATTENTION, _DOUBLE + r"ff\.net\.(0\.proj|2)"),
    quantize_w4a16=(r"adaln_single\.linear",),
    keep_16bit=(r"adaln_single\.emb\..*", r"caption_projection\.linear_[12]", r"proj_out|pos_embed\.proj"),
)
ARCHITECTURES = {found.class_name: found for found in (FLUX, UNET, SANA, PIXART)}
PIXART_ONCE = "Transformer2DModel"
"""diffusers' class of PixArt until it had one of its own: PixArt-Sigma is published under it."""
COMPONENTS: tuple[Component, ...] = ("transformer", "unet")
"""Folders of a pipeline in which its denoiser may lie."""


def open_model(path: Path) -> tuple[WeightSource, Architecture, dict[str, Any]]:
    """(weights, architecture, configuration) of a denoiser's folder or file, or of a pipeline's folder.

    Raises CheckpointError for damaged files, unknown architectures and key names of other programs.
    """
    if (path / "model_index.json").is_file():
        path = next((path / name for name in COMPONENTS if (path / name).is_dir()), path / COMPONENTS[0])
    source = FileSource(path)
    config = source.config
    if config is not None and "quantization_config" in config:
        method = config["quantization_config"].get("quant_method")
        raise CheckpointError(f"{path} is quantized already ({method}); quantize the 16-bit weights")
    if any(name.startswith(ORIGINAL_FLUX_KEYS) for name in source.tensors):
        raise CheckpointError(
            f"{path} has the original FLUX key names; load it with diffusers' "
            "FluxTransformer2DModel.from_single_file and save_pretrained, then quantize that folder"
        )
    if config is None and any(name.startswith(UNET_KEYS) for name in source.tensors):
        raise CheckpointError(
            f"{path} is a UNet without config.json. A base converts and quantizes it, such as base=sdxl weights.path={path.name} "
            "weights.encoders=PIPELINE; or save it with diffusers' UNet2DConditionModel, and quantize that folder"
        )
    if config is None:
        config = flux_config(source, path)
    if config.get("_class_name") == PIXART_ONCE and config.get("norm_type") == "ada_norm_single":
        sized = "adaln_single.emb.resolution_embedder.linear_1.weight" in source.tensors
        config = {**config, "_class_name": PIXART.class_name, "use_additional_conditions": sized}
    name = str(config.get("_class_name"))
    if name not in ARCHITECTURES:
        raise CheckpointError(f"{path} is a {name}; quantized from files are {', '.join(ARCHITECTURES)}")
    return source, ARCHITECTURES[name], config


def flux_config(source: WeightSource, path: Path) -> dict[str, Any]:
    """The configuration of a FLUX transformer without config.json, read off its shapes. Raises CheckpointError if it is none."""
    shapes = {name: info.shape for name, info in source.tensors.items()}
    needed = (
        "x_embedder.weight", "context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight",
        "transformer_blocks.0.attn.norm_q.weight", "proj_out.weight",
    )  # fmt: skip
    for name in needed:
        if name not in shapes:
            raise CheckpointError(
                f"{path} has no config.json beside it and is no FLUX transformer in diffusers' key names: it lacks "
                f"{name!r}; {nearest(name, shapes)}"
            )
    width, in_channels = shapes["x_embedder.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    if head not in ROPE_AXES:
        raise CheckpointError(f"{path}: attention heads of {head} are not FLUX.1's; put its config.json beside it")
    out_channels = shapes["proj_out.weight"][0]
    return {
        "_class_name": FLUX.class_name,
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": None if out_channels == in_channels else out_channels,
        "num_layers": _blocks(shapes, "transformer_blocks"),
        "num_single_layers": _blocks(shapes, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "axes_dims_rope": list(ROPE_AXES[head]),
    }


def _blocks(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    return len({name.split(".")[1] for name in shapes if name.startswith(f"{prefix}.")})


def folder_settings(
    profile: Profile,
    *,
    calibrated: bool,
    rank: int | None = None,
    group_size: int = 64,
    gptq: bool = False,
    seed: int = 0,
    smoothing: Smoothing = "auto",
) -> QuantSettings:
    """How a large model's attention and feed-forward layers are quantized: `auto`, by a subsampled search.

    `weight-only` and formats have no smoothing, formats a branch of their own rank.
    """
    return QuantSettings(
        numerics=NUMERICS[profile],
        rank=FOLDER_RANK if rank is None and profile not in FORMATS else rank,
        group_size=group_size,
        smoothing=smoothing if profile in SMOOTHED else "none",
        iterations=FOLDER_ROUNDS,
        grid=CALIBRATED_GRID if calibrated else DATA_FREE_GRID,
        search="subsampled",
        gptq=gptq,
        seed=seed,
    )


def stand_in_settings(profile: Profile, seed: int = 0) -> QuantSettings:
    """What data-free `auto` comes to on every one of FLUX.1's layers, for a model that stands for a quantized one."""
    smoothing: Smoothing = "hadamard" if profile == "native" else "weight"
    return folder_settings(profile, calibrated=False, seed=seed, smoothing=smoothing)


def plan_rules(
    lists: Architecture | BaseSpec, main: QuantSettings, convolutions: Mapping[str, int]
) -> tuple[dict[str, QuantSettings], list[str]]:
    """(pattern -> settings, patterns of what stays in 16 bits): `main` everywhere but on the few-row layers (W4A16).

    convolutions: path -> edge of the kernel, of those that can be quantized. 1x1 ones of `quantize_conv` are linear layers and
    carry any of SVDQuant's numerics; larger ones are W4A8 or stay. In the other formats all of them stay.
    """
    rules = dict.fromkeys(lists.quantize, main) | dict.fromkeys(lists.quantize_w4a16, main.for_few_rows())
    keep = list(lists.keep_16bit)
    for path in (path for paths in match_paths(lists.quantize_conv, list(convolutions)).values() for path in paths):
        if main.numerics == "w4a8" or (convolutions[path] == 1 and main.numerics not in FORMATS):
            rules[re.escape(path)] = main
        else:
            keep.append(re.escape(path))
    return rules, keep


def plan_model(source: WeightSource, architecture: Architecture, main: QuantSettings) -> dict[str, QuantSettings]:
    """Layer -> settings of weights in files, as `plan_rules`. Raises as `plan_source`."""
    shapes = {path: source.tensors[f"{path}.weight"].shape for path in weight_layers(source)}
    kernels = {path: shape[2] for path, shape in shapes.items() if len(shape) == 4}
    return plan_source(source, *plan_rules(architecture, main, kernels))


def check_tensors(source: WeightSource, config: Mapping[str, Any], path: Path) -> None:
    """Refuses before any work what the quantized model could not be loaded from: `source` holds exactly the tensors of the model
    that `config` describes, as floating-point numbers. Raises CheckpointError naming the first that is missing, foreign or misshapen.
    """
    with init_empty_weights(include_buffers=False):
        model = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in expected if name not in source.tensors]
    foreign = [name for name in source.tensors if name not in expected]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} tensor(s) of the model that its configuration describes are missing, the first is {missing[0]!r}; "
            "fetch the weights and config.json again, from one place"
        )
    if foreign:
        raise CheckpointError(
            f"{path}: {len(foreign)} tensor(s) belong to no layer of the model that its configuration describes, the first is "
            f"{foreign[0]!r}; {nearest(foreign[0], expected)}"
        )
    for name, info in source.tensors.items():
        if info.shape != expected[name]:
            raise CheckpointError(
                f"{path}: tensor {name!r} has shape {info.shape}, its configuration means {expected[name]}"
            )
        if not info.dtype.is_floating_point:
            raise CheckpointError(f"{path}: tensor {name!r} is {info.dtype}: these are codes, not 16-bit weights")


def quantize_files(
    path: Path,
    folder: Path,
    profile: Profile,
    device: torch.device | str,
    *,
    stats: Path | None = None,
    rank: int | None = None,
    group_size: int = 64,
    gptq: bool = False,
    progress: bool = True,
) -> list[LayerReport]:
    """Quantizes the transformer at `path`, layer by layer, into the checkpoint `folder`; goes on where a killed run ended.

    `stats` is a file of `calibrate.save_stats`; None chooses data-free. Raises as `open_model`, `check_tensors` and
    `quantize_stream` do.
    """
    source, architecture, config = open_model(path)
    check_tensors(source, config, path)
    main = folder_settings(profile, calibrated=stats is not None, rank=rank, group_size=group_size, gptq=gptq)
    plan = plan_model(source, architecture, main)
    measured = None if stats is None else StatsFile(stats)
    return quantize_stream(source, plan, config, folder, device=device, stats=measured, progress=progress)
