"""Encoded samples on disk: safetensors shards, found by what went into them.

A sample's key is sha256(image bytes, caption, resolution, encoder id, transform version), so a changed caption, image or
encoder is another key and nothing is ever stale. Samples of one encoder, resolution and transform share a store; where
images and captions are cached apart, the latents of one encoder share one, whatever their sizes, and its texts another:

    <cache root>/encoded/<store id>/<shard id>.safetensors     stacked bf16 tensors, row i = sample i
    <cache root>/encoded/<store id>/<shard id>.json            its manifest: sha256 of the shard, keys, encoder

The manifest is written after its shard, both by rename: a shard counts only once its manifest is there, so `kill -9`
loses the shard being filled and no more. The folder can be deleted at any time.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from loragraft.data.images import TRANSFORM_VERSION
from loragraft.disk import sweep, write_atomic

FORMAT_VERSION = 1
SHARD_SAMPLES = 256

_log = logging.getLogger(__name__)


def default_cache_root() -> Path:
    """`$LORAGRAFT_CACHE`, else `~/.cache/loragraft`. The variable is read here and nowhere else."""
    return Path(os.environ.get("LORAGRAFT_CACHE") or "~/.cache/loragraft").expanduser()


def sample_key(image: bytes, caption: str, resolution: int, encoder_id: str) -> str:
    """sha256 (hex) over image bytes, caption, resolution, encoder id and transform version."""
    rest = json.dumps([caption, resolution, encoder_id, TRANSFORM_VERSION])
    return hashlib.sha256(hashlib.sha256(image).digest() + rest.encode()).hexdigest()


def latent_key(digest: bytes, shape: tuple[int, int], encoder_id: str) -> str:
    """sha256 (hex) over the image's own sha256, (H, W) in pixels, encoder id and transform version."""
    rest = json.dumps([*shape, encoder_id, TRANSFORM_VERSION])
    return hashlib.sha256(digest + rest.encode()).hexdigest()


def text_key(caption: str, encoder_id: str) -> str:
    """sha256 (hex) over caption and encoder id."""
    return hashlib.sha256(json.dumps(["text", caption, encoder_id]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Row:
    """Where one sample lies."""

    shard: Path
    index: int


class ShardStore:
    """The shards of one encoder at one resolution, or its `latents` or `texts` where the two are cached apart.

    Opening it reads the manifests; `verify` reads the shards that are needed, once. Rows are read through memory maps, so
    what is held is the operating system's to drop. Several processes may write to it: `claims.py` keeps them apart.
    """

    def __init__(self, cache_root: Path, encoder_id: str, resolution: int | Literal["latents", "texts"]) -> None:
        self.encoder_id = encoder_id
        self.resolution = resolution
        store_id = hashlib.sha256(
            json.dumps([FORMAT_VERSION, encoder_id, resolution, TRANSFORM_VERSION]).encode()
        ).hexdigest()[:16]
        self.folder = cache_root / "encoded" / store_id
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder, older_than_hours=24)
        self._hashes: dict[Path, str] = {}
        self._rows: dict[str, Row] = {}
        self._verified: set[Path] = set()
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def refresh(self) -> None:
        """Reads the manifests that other processes have written since."""
        for manifest in sorted(self.folder.glob("*.json")):
            if manifest.with_suffix(".safetensors") not in self._hashes:
                self._read_manifest(manifest)

    def verify(self, keys: Sequence[str]) -> set[str]:
        """The keys of `keys` that are here and whole. A shard whose bytes differ from its manifest is dropped, with a
        warning, and its samples count as absent."""
        shards = sorted({self._rows[key].shard for key in keys if key in self._rows} - self._verified)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run; gigabytes of it
            digests = list(pool.map(_digest, shards))
        for shard, found in zip(shards, digests, strict=True):
            if found == self._hashes[shard]:
                self._verified.add(shard)
            else:
                self._drop(shard, f"its sha256 is {found}, its manifest says {self._hashes[shard]}")
        return {key for key in keys if key in self._rows}

    def write(self, keys: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Store a shard: `tensors` are stacked [len(keys), ...] and kept in bf16."""
        shard = self.folder / f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:24]}.safetensors"
        content = save({name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()})
        digest = hashlib.sha256(content).hexdigest()
        manifest = self._header() | {"sha256": digest, "samples": list(keys)}
        write_atomic(shard, content)
        write_atomic(shard.with_suffix(".json"), json.dumps(manifest).encode())
        self._index(shard, digest, keys)
        self._verified.add(shard)

    def read(self, key: str) -> dict[str, Tensor]:
        """One sample's tensors, bf16, without the sample dimension."""
        row = self._rows[key]
        with safe_open(row.shard, framework="pt") as shard:
            return {name: shard.get_slice(name)[row.index] for name in shard.keys()}  # noqa: SIM118 - not a mapping

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT_VERSION,
            "encoder_id": self.encoder_id,
            "resolution": self.resolution,
            "transform": TRANSFORM_VERSION,
        }

    def _read_manifest(self, path: Path) -> None:
        shard = path.with_suffix(".safetensors")
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if {key: manifest[key] for key in self._header()} != self._header():
                self._drop(shard, "its manifest belongs to another encoder or format")
            else:
                self._index(shard, manifest["sha256"], manifest["samples"])
        except (ValueError, KeyError, TypeError) as error:
            self._drop(shard, f"its manifest cannot be read ({error!r})")

    def _index(self, shard: Path, digest: str, keys: Sequence[str]) -> None:
        self._hashes[shard] = digest
        for index, key in enumerate(keys):
            self._rows[key] = Row(shard, index)

    def _drop(self, shard: Path, reason: str) -> None:
        _log.warning("cache shard %s is not usable: %s; its samples will be encoded again", shard, reason)
        self._rows = {key: row for key, row in self._rows.items() if row.shard != shard}
        self._hashes.pop(shard, None)
        shard.with_suffix(".json").unlink(missing_ok=True)
        shard.unlink(missing_ok=True)


def _digest(shard: Path) -> str:
    try:
        with shard.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except FileNotFoundError:
        return "no such file"
