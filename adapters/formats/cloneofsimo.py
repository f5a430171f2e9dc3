"""cloneofsimo/lora files: `unet:7:down`, factors numbered in the order in which diffusers' modules were walked, names lost.

`lora_diffusion/lora.py` (`_find_modules`) walks model.modules(), stops at every CrossAttention and GEGLU and numbers the linears
in them. With the UNets of 2022: per transformer block to_q, to_k, to_v, to_out.0 of attn1, the GEGLU's projection, then attn2's
four; down blocks, up blocks, middle. The scale is 1. `<s1>` are token embeddings that the adapter wants in its text encoder.
The header says which classes were walked; which UNet it was follows from the shapes, and all of them have to fit.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from loragraft.adapters.formats.families import UNETS
from loragraft.quantization.tensor_file import CheckpointError

KEY = re.compile(r"(unet|text_encoder):(\d{1,4}):(up|down)")
EMBEDDING = "<embed>"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def is_cloneofsimo(keys: Mapping[str, object]) -> bool:
    """Whether any key is numbered in this way."""
    return any(KEY.fullmatch(key) for key in keys)


def renamed(
    file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors under diffusers' names, token embeddings). Raises CheckpointError where the numbers fit no known UNet."""
    unet: dict[int, dict[str, Tensor]] = {}
    found: dict[str, Tensor] = {}
    embeddings: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            if header.get(key) != EMBEDDING:
                raise CheckpointError(
                    f"{file}: tensor {key!r} is neither a numbered factor nor an embedding of the header"
                )
            embeddings[key] = tensor
        elif match[1] == "unet":
            unet.setdefault(int(match[2]), {})[match[3]] = tensor
        else:
            found[f"text_encoder.{match[2]}.lora_{match[3]}.weight"] = tensor
    paths = _paths(file, unet, header)
    for number, path in enumerate(paths):
        found |= {f"unet.{path}.lora_{part}.weight": tensor for part, tensor in unet[number].items()}
    return found, embeddings


def _paths(file: Path, unet: Mapping[int, Mapping[str, Tensor]], header: Mapping[str, str]) -> list[str]:
    try:
        walked = set(map(str, json.loads(header.get("unet", '["CrossAttention", "Attention", "GEGLU"]'))))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file}: 'unet' of its header is no list of classes") from error
    if not unet or sorted(unet) != list(range(len(unet))):
        raise CheckpointError(f"{file}: the numbers of its unet factors have gaps, so their layers cannot be told")
    sizes = [
        (parts["down"].shape[-1], parts["up"].shape[0]) if {"down", "up"} <= parts.keys() else None
        for _, parts in sorted(unet.items())
    ]
    tried = []
    for name, table in UNETS.items():
        blocks = list(dict.fromkeys(path.split(".attn1.")[0] for path in table.layers if ".attn1." in path))
        first, second = ([f"attn{k}.{part}" for part in ATTENTION] for k in (1, 2))
        middle = ["ff.net.0.proj"] if "GEGLU" in walked else []
        paths = [f"{block}.{layer}" for block in blocks for layer in (*first, *middle, *second)]
        if [(table.layers[path][1], table.layers[path][0]) for path in paths] == sizes:
            return paths
        tried.append(f"{name} has {len(paths)}")
    raise CheckpointError(
        f"{file}: its {len(unet)} numbered unet factors ({', '.join(sorted(walked))}) fit no UNet known here in number and shape "
        f"({', '.join(tried)}); the layers cannot be told"
    )
