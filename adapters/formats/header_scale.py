"""alpha / r where it stands outside the tensors: diffusers' `lora_adapter_metadata`, PEFT's adapter_config.json.

PEFT scales by lora_alpha / r, rsLoRA by lora_alpha / sqrt(r); rank_pattern and alpha_pattern override both for some modules, as
`peft.utils.get_pattern_key` matches them.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key

from loragraft.quantization.tensor_file import CheckpointError

PLAIN_PATTERN = re.compile(r"\^?[\w.\\-]+\$?")
"""A module's name, perhaps anchored or escaped. PEFT would take any regular expression, also one that never ends."""
PEFT_CONFIG = "adapter_config.json"
CONFIG_LIMIT = 4 * 2**20


@dataclass(frozen=True)
class HeaderScale:
    """The configuration of one component, or nothing at all."""

    fields: Mapping[str, Any]

    @property
    def given(self) -> bool:
        """The file has a scale outside its tensors."""
        return "r" in self.fields or "lora_alpha" in self.fields

    def of(self, path: str, rank: int) -> float:
        """The scale at `path`, whose factors have `rank`. Raises ValueError where the configuration says another rank."""
        ranks, alphas = self._pattern("rank_pattern"), self._pattern("alpha_pattern")
        said = ranks.get(get_pattern_key(list(ranks), path), self.fields.get("r", rank))
        if said != rank:
            raise ValueError(f"has rank {rank}, its configuration says {said}")
        alpha = alphas.get(get_pattern_key(list(alphas), path), self.fields.get("lora_alpha", rank))
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ValueError(f"has alpha {alpha!r} in its configuration, which is no number")
        return float(alpha) / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def _pattern(self, name: str) -> dict[str, Any]:
        pattern = self.fields.get(name) or {}
        if not isinstance(pattern, dict) or not all(PLAIN_PATTERN.fullmatch(key) for key in pattern):
            raise ValueError(f"cannot be scaled: {name} of the file's configuration is no list of module names")
        return pattern


def header_scales(file: Path, header: Mapping[str, str]) -> dict[str, HeaderScale]:
    """Prefix ("transformer", "unet", "text_encoder"; "" = PEFT's folder) -> configuration. Raises CheckpointError."""
    text, source = header.get(LORA_ADAPTER_METADATA_KEY), LORA_ADAPTER_METADATA_KEY
    beside = file.parent / PEFT_CONFIG
    if text is None and file.name == "adapter_model.safetensors" and beside.is_file():
        if beside.stat().st_size > CONFIG_LIMIT:
            raise CheckpointError(f"{beside} has more than {CONFIG_LIMIT} bytes; that is no adapter's configuration")
        text, source = beside.read_text(encoding="utf-8"), PEFT_CONFIG
    try:
        fields = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: {source} is not JSON") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file}: {source} is not a JSON object")
    found: dict[str, dict[str, Any]] = {}
    for key, value in fields.items():
        prefix, dot, name = key.rpartition(".")
        found.setdefault(prefix if dot else "", {})[name] = value
    for prefix, config in found.items():
        if config.get("use_dora"):
            raise CheckpointError(
                f"{file}: {source} says DoRA for {prefix or 'the model'}, which is no low-rank update"
            )
    return {prefix: HeaderScale(config) for prefix, config in found.items()}
