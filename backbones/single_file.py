"""A UNet or a SANA transformer in one file, in the key names of its authors (`model.diffusion_model.input_blocks...`,
`blocks.0.cross_attn.kv_linear...`) or in diffusers': as a folder.

What people share of Stable Diffusion is one safetensors file of the whole pipeline. diffusers converts the denoiser in it
(`from_single_file`), once, into <cache root>/bases/<base>-16bit-<key>: what is quantized from there, and what
the 16-bit model is loaded from. Text encoders and autoencoder come from `weights.encoders`.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError

from loragraft.backbones.architectures import UNET_KEYS
from loragraft.backbones.spec import BaseSpec, External
from loragraft.disk import replacing_folder
from loragraft.quantization.checkpoint import CONFIG_NAME
from loragraft.quantization.tensor_file import CheckpointError
from loragraft.quantization.weight_source import FileSource

TEXT_WIDTH = "attn2.to_k.weight"
"""Ends the name of tensors whose second axis is the width of a UNet's text."""
SANA_KEYS = ("blocks.0.cross_attn.", "model.diffusion_model.blocks.0.cross_attn.", "transformer_blocks.0.attn2.")
ONE_FILE = {"UNet2DConditionModel": ("UNet", UNET_KEYS), "SanaTransformer2DModel": ("SANA transformer", SANA_KEYS)}
"""diffusers' class -> (what it is, how names of its tensors begin): what `from_single_file` converts."""


def is_one_file(spec: BaseSpec, path: Path) -> bool:
    """Whether `path` is a file that `as_folder` is for; one of diffusers' folders is read where it lies."""
    if not path.is_file() or spec.transformer_class.__name__ not in ONE_FILE:
        return False
    return spec.family.component == "unet" or FileSource(path).config is None


def as_folder(spec: BaseSpec, external: External, file: Path, cache_root: Path) -> Path:
    """The folder with the denoiser of `file`, in bfloat16. Raises CheckpointError for a file without one, ValueError for another base's."""
    source = FileSource(file)
    folder = cache_root / "bases" / f"{spec.name}-16bit-{source.identity[:16]}"
    if folder.exists():
        return folder
    what, keys = ONE_FILE[spec.transformer_class.__name__]
    if not any(name.startswith(keys) for name in source.tensors):
        raise CheckpointError(f"{file} holds no {what}, neither in its authors' key names nor in diffusers'")
    _check_width(spec, external, source, file)
    print(f"{file} is one file: converting its {what} once, into {folder}", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as here:
        (Path(here) / CONFIG_NAME).write_text(json.dumps(dict(external.config)))
        try:
            model = spec.transformer_class.from_single_file(  # type: ignore[attr-defined]
                str(file), config=here, dtype=torch.bfloat16, local_files_only=True
            )
        except (KeyError, RuntimeError, ValueError, SingleFileComponentError) as error:
            raise CheckpointError(f"{file} is no {spec.name}: its {what} has other tensors ({error})") from error
    with replacing_folder(folder, overwrite=False) as made:
        model.save_pretrained(made)
    return folder


def _check_width(spec: BaseSpec, external: External, source: FileSource, file: Path) -> None:
    expected = external.config.get("cross_attention_dim")
    found = {i.shape[1] for n, i in source.tensors.items() if n.startswith(UNET_KEYS) and n.endswith(TEXT_WIDTH)}
    if found and found != {expected}:
        raise ValueError(f"{file} reads text of width {found.pop()}, {spec.name} of {expected}: it is another base's")
