"""The keys of a LoRA file, taken apart: which component, which module, and which part of its update each tensor is.

    transformer.x_embedder.lora_A.weight     -> denoiser, x_embedder, down
    lora_te1_text_model_..._q_proj.alpha     -> text_encoder, text_model_..._q_proj, alpha
    double_blocks.0.processor.qkv_lora1.up.weight -> denoiser, double_blocks.0.processor.qkv_lora1, up

PEFT and diffusers write lora_A and lora_B, kohya lora_down and lora_up, diffusers before 0.25 `_lora.down`, LyCORIS lokr_* and
hada_*; ComfyUI's `weight_adapter/` reads the same list.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from loragraft.quantization.tensor_file import CheckpointError

DENOISER = "denoiser"
WRAPPERS = ("unet.base_model.model.", "base_model.model.")
COMPONENTS = {
    "transformer.": DENOISER,
    "unet.": DENOISER,
    "diffusion_model.": DENOISER,
    "lora_transformer_": DENOISER,
    "lora_unet_": DENOISER,
    "lycoris_": DENOISER,
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "text_encoder.": "text_encoder",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "t5",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
"""Prefix -> component. The first that fits; `diffusion_model.` is ComfyUI's, `lora_te2_` in a FLUX file is T5."""
PARTS = {
    "down": r"\.lora_A(?:\.\w+)?\.weight|\.lora_A|\.lora_down\.weight|_lora\.down\.weight|\.lora\.down\.weight"
    r"|\.lora_linear_layer\.down\.weight|\.down\.weight",
    "up": r"\.lora_B(?:\.\w+)?\.weight|\.lora_B|\.lora_up\.weight|_lora\.up\.weight|\.lora\.up\.weight"
    r"|\.lora_linear_layer\.up\.weight|\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"\.alpha",
    "bias": r"\.lora_B(?:\.\w+)?\.bias|\.diff_b",
    "dora": r"\.dora_scale|\.lora_magnitude_vector(?:\.\w+)*",
    "diff": r"\.diff",
    "norm": r"\.scale|\.set_weight|\.scale\.set_weight",
    "norm_diff": r"\.w_norm",
    "norm_bias": r"\.b_norm",
    "reshape": r"\.reshape_weight",
    "scalar": r"\.scalar",
    "other": r"\.oft_\w+|\.boft_\w+|\.rescale|\.on_input|\.[ab][12]\.weight",
}
LYCORIS = r"lokr_w[12](?:_[ab])?|lokr_t2|hada_w[12]_[ab]|hada_t[12]"
KEY = re.compile(
    "(?P<module>.+?)(?:"
    + "|".join(f"(?P<{part}>{form})" for part, form in PARTS.items())
    + rf"|\.(?P<lycoris>{LYCORIS}))"
)


@dataclass(frozen=True)
class Entry:
    """The update of one module of one component, as the file has it."""

    module: str
    """Without its component's prefix."""
    flat: bool = False
    """The name has underscores for dots: it means what a table says, nothing else."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    """Part -> key in the file."""


def entries_of(file: object, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Entry]]:
    """Component -> module -> entry. Raises CheckpointError for keys that are no part of any update, or that meet twice."""
    found: dict[str, dict[str, Entry]] = {}
    foreign = []
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            foreign.append(key)
            continue
        component, module, flat = split_component(match["module"])
        part = match["lycoris"] or next(part for part in PARTS if match[part])
        entry = found.setdefault(component, {}).setdefault(module, Entry(module, flat))
        if part in entry.parts:
            raise CheckpointError(
                f"{file}: {entry.keys[part]!r} and {key!r} are the same part of one layer; the file holds more than one adapter"
            )
        entry.parts[part], entry.keys[part] = tensor, key
    if foreign:
        raise CheckpointError(
            f"{file}: {len(foreign)} tensor(s) are no part of a LoRA, LoKr or LoHa, the first: {_listed(foreign)}"
        )
    return found


def split_component(module: str) -> tuple[str, str, bool]:
    """(component, module, whether it is flattened) of a name; a name without a prefix is the denoiser's."""
    name = _unwrapped(module)
    for prefix, component in COMPONENTS.items():
        if name.startswith(prefix):
            return component, _current(_unwrapped(name.removeprefix(prefix))), prefix.endswith("_")
    return DENOISER, _current(name), False


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def _current(module: str) -> str:
    """diffusers' name of a module for its old one, when LoRA lived in attention processors."""
    name = module.replace(".processor.to_", ".to_")
    return f"{name}.0" if name.endswith(".to_out") else name


def _listed(keys: Iterable[str], most: int = 5) -> str:
    keys = sorted(keys)
    return ", ".join(repr(key) for key in keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
