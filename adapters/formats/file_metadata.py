"""What an exported file says of itself in the words that other programs read: modelspec 1.0.1 and kohya's ss_*.

Nothing local is in it: names, numbers and the base's published name only. Sources: Stability AI's modelspec, sd-scripts
`library/sai_model_spec.py` and `train_network.py`.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from safetensors.torch import save
from torch import Tensor

from loragraft.adapters.checkpoint import METADATA_KEY, Adapter

LOCAL = re.compile(r"^(/|~|\.{1,2}[/\\]|[A-Za-z]:[\\/]|\\\\|file:)")
INSIDE = re.compile(r"(?<![\w.])(?:/(?:home|root|Users|mnt|media|tmp|var|opt)/|[A-Za-z]:\\)[^\s\"']*")
"""A path within a sentence: of people's own places only, as a URL's middle looks like a path too."""
BFL, STABILITY = "https://github.com/black-forest-labs/flux", "https://github.com/Stability-AI/generative-models"
SPECS = {
    "flux": ("flux-1-dev/lora", BFL, "flux1", "networks.lora_flux", 1024),
    "sdxl": ("stable-diffusion-xl-v1-base/lora", STABILITY, "sdxl_base_v1-0", "networks.lora", 1024),
    "sd2": ("stable-diffusion-v2-512/lora", STABILITY, "sd_v2", "networks.lora", 512),
    "sd15": ("stable-diffusion-v1/lora", STABILITY, "sd_v1", "networks.lora", 512),
}
"""Family -> modelspec architecture and implementation, ss_base_model_version, ss_network_module, edge in pixels."""
SCHNELL = "flux1-schnell"


def described(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The header's entries: all strings, and our own block without local paths."""
    return (
        {"format": "pt", METADATA_KEY: json.dumps(without_paths(adapter.metadata), sort_keys=True)}
        | _modelspec(adapter, tensors)
        | _kohya(adapter)
    )


def _modelspec(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    about = adapter.metadata
    found = {
        "sai_model_spec": "1.0.1",
        "title": adapter.name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hash_sha256": f"0x{tensor_hash(tensors)}",
    }
    if adapter.family.name and adapter.family.published:
        architecture, implementation, *_ = SPECS[adapter.family.name]
        found["architecture"] = "flux-1-schnell/lora" if about.get("base") == SCHNELL else architecture
        found["implementation"] = implementation
    else:
        found["architecture"], found["implementation"] = f"{about.get('base') or 'unknown'}/lora", "diffusers"
    edge = _resolution(adapter)
    if edge:
        found["resolution"] = f"{edge}x{edge}"
    return {f"modelspec.{key}": value for key, value in found.items()}


def _kohya(adapter: Adapter) -> dict[str, str]:
    ranks = Counter(down.shape[0] for down, _ in adapter.pairs.values())
    common = str(ranks.most_common(1)[0][0]) if len(ranks) == 1 else "Dynamic"
    recipe = adapter.metadata.get("recipe") or {}
    edge = _resolution(adapter)
    spec = SPECS.get(adapter.family.name) if adapter.family.published else None
    found = {
        "base_model_version": spec[2] if spec else None,
        "network_module": spec[3] if spec else None,
        "network_dim": common,
        "network_alpha": common,
        "output_name": adapter.name,
        "steps": adapter.metadata.get("steps"),
        "learning_rate": (recipe.get("optim") or {}).get("learning_rate"),
        "seed": (recipe.get("train") or {}).get("seed"),
        "resolution": f"({edge}, {edge})" if edge else None,
        "training_comment": f"{adapter.metadata['contract']} adapter" if adapter.metadata.get("contract") else None,
    }
    return {f"ss_{key}": str(value) for key, value in found.items() if value is not None}


def _resolution(adapter: Adapter) -> int | None:
    """Edge in pixels: the recipe's, else the published base's."""
    data = (adapter.metadata.get("recipe") or {}).get("data") or {}
    given = max((data.get("resolution") or 0, *(data.get("resolutions") or ())))
    if given:
        return int(given)
    return SPECS[adapter.family.name][4] if adapter.family.name and adapter.family.published else None


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the file's bytes after its header, as modelspec has it: the same for the same tensors whatever is said of them."""
    data = save(dict(tensors))
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def without_paths(value: Any) -> Any:
    """JSON data with every local path, as a string or within one, cut to the file's name."""
    if isinstance(value, Mapping):
        return {key: without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(entry) for entry in value]
    if isinstance(value, str):
        return _file_name(value) if LOCAL.match(value) else INSIDE.sub(lambda found: _file_name(found[0]), value)
    return value


def _file_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
