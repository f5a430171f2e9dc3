"""An adapter in the naming that a program reads, with its scale where that program looks for it.

| style | FLUX | SDXL, SD 2, SD 1.5 | scale |
|---|---|---|---|
| diffusers | transformer.<path>.lora_A.weight | unet.<path>.lora_A.weight | header (alpha = r), and in B |
| kohya | lora_unet_<BFL's name>.lora_down.weight, qkv and linear1 fused | lora_unet_<LDM's name>, SD: diffusers' | .alpha = r |
| comfyui | transformer.<path>.lora_A.weight | lora_unet_<diffusers' name>.lora_down.weight | .alpha = r |

alpha = r everywhere and the scale is in B: a program that knows neither header nor alpha applies the same update. ComfyUI and
stable-diffusion.cpp ignore the header; diffusers refuses a file with both a header configuration and .alpha. comfyui's FLUX
files are unfused, at the adapter's own rank, because ComfyUI (`comfy/lora.py`) patches the rows of its fused weights by itself;
diffusers reads them too.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from torch import Tensor

from loragraft.adapters.checkpoint import DOWN, UP, Adapter, peft_metadata
from loragraft.adapters.formats.comfyui_workflow import workflow
from loragraft.adapters.formats.factors import Factors, shaped
from loragraft.adapters.formats.families import UNETS, kernel_of
from loragraft.adapters.formats.file_metadata import described
from loragraft.adapters.formats.fusing import Pair, fused_flux
from loragraft.disk import write_atomic
from loragraft.quantization.tensor_file import write_tensors

STYLES = ("diffusers", "kohya", "comfyui")
KOHYA_DOWN, KOHYA_UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
WORKFLOW_SUFFIX = ".workflow.json"


def export_adapter(adapter: Adapter, style: str, out: Path, dtype: torch.dtype | None = None) -> list[Path]:
    """Writes the adapter to `out`, a .safetensors file or a folder for it; returns what was written, the file first.

    comfyui adds a workflow where ComfyUI knows the base. dtype: of the factors (None: as they are). Raises ValueError for an
    unknown style, an adapter that is more than its pairs (`check_whole`), layers that the style has no name for, factors
    that are not finite in `dtype`, and FileExistsError for a file that is there.
    """
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}; there are {', '.join(STYLES)}")
    adapter.check_whole()
    own = LORA_WEIGHT_NAME_SAFE if style == "diffusers" else f"{adapter.name}.safetensors"
    file = out if out.suffix == ".safetensors" else out / own
    tensors = styled(adapter, style, dtype)
    header = described(adapter, tensors)
    if style == "diffusers":
        header[LORA_ADAPTER_METADATA_KEY] = json.dumps(peft_metadata(adapter.pairs, adapter.component), sort_keys=True)
    drawing = workflow(adapter, file.name) if style == "comfyui" else None
    beside = file.with_name(file.stem + WORKFLOW_SUFFIX)
    for path in (file, *((beside,) if drawing else ())):
        if path.exists():
            raise FileExistsError(f"{path} exists already: give another --out, or move it away")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, tensors, header)
    if drawing is None:
        return [file]
    try:
        write_atomic(beside, (json.dumps(drawing, indent=2, ensure_ascii=False) + "\n").encode())
    except BaseException:
        file.unlink()  # both or none: the same command would find the file in its way
        raise
    return [file, beside]


def styled(adapter: Adapter, style: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a file in `style`. Raises ValueError as `export_adapter` does."""
    pairs = {path: _with_kernel(adapter, path, pair) for path, pair in adapter.pairs.items()}
    if style == "diffusers" or (style == "comfyui" and adapter.family.name not in UNETS):
        tensors = _tensors(pairs, lambda path: f"{adapter.component}.{path}", (DOWN, UP), dtype, style != "diffusers")
    elif adapter.family.name == "flux":
        tensors = _tensors(fused_flux(pairs), _flat, (KOHYA_DOWN, KOHYA_UP), dtype, alpha=True)
    elif adapter.family.name in UNETS:
        ldm = UNETS[adapter.family.name].ldm_names() if (style, adapter.family.name) == ("kohya", "sdxl") else {}
        tensors = _tensors(pairs, lambda path: _flat(ldm.get(path, path)), (KOHYA_DOWN, KOHYA_UP), dtype, alpha=True)
    else:
        raise ValueError(
            f"kohya's names are known for FLUX, SDXL, SD 2 and SD 1.5; of adapter {adapter.name!r} the base is "
            f"{adapter.family}. Export it in the style diffusers"
        )
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite in {tensor.dtype}; export in another dtype")
    return tensors


def _flat(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


def _tensors(
    pairs: Mapping[str, Pair],
    named: Callable[[str], str],
    suffixes: tuple[str, str],
    dtype: torch.dtype | None,
    alpha: bool,
) -> dict[str, Tensor]:
    """Both factors of every module, and alpha = r in float32: bfloat16 counts exactly to 256 only."""
    tensors: dict[str, Tensor] = {}
    for module, pair in pairs.items():
        name = named(module)
        for suffix, factor in zip(suffixes, pair, strict=True):
            tensors[name + suffix] = factor.detach().to("cpu", dtype or factor.dtype, copy=True).contiguous()
        if alpha:
            tensors[name + ALPHA] = torch.tensor(float(pair[0].shape[0]))
    return tensors


def _with_kernel(adapter: Adapter, path: str, pair: Pair) -> Pair:
    """A convolution's factors in a convolution's shapes: other programs take no flat ones."""
    kernel = kernel_of(path, adapter.family) if adapter.component == "unet" else None
    if kernel is None or pair[0].ndim == 4:
        return pair
    found = shaped(Factors(*pair, 0), kernel)
    return found.down, found.up
