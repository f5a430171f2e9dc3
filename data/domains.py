"""Built-in domains: image-caption sets that are drawn on the spot from installed, licensed packages.

A domain is a module of this folder that exports `DOMAIN` and has one line in DOMAINS. It yields pictures as SVG; this
module rasterises them once into a folder named by what went in, and later runs find that folder.
"""

import difflib
import hashlib
import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import resvg_py
from tqdm.auto import tqdm

from loragraft.data.splits import Split
from loragraft.disk import naming_full_disk, scratch_name, sweep
from loragraft.recipes.schema import DataConfig

DOMAINS = {"marketing": "loragraft.data.marketing"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One image of a domain, not yet rasterised."""

    name: str
    """File stem, unique in its domain."""
    svg: str
    """A whole SVG document with a square view box."""
    caption: str
    concept: str
    split: Split


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """What a domain module exports as DOMAIN."""

    name: str
    version: int
    """Raise it whenever the pictures change: it is part of the folder's key."""
    licence: str
    """SPDX name, for every picture."""
    attribution: str
    """Markdown that the licence asks for; written beside the images."""
    pictures: Callable[[int, int, float, float], Iterator[Picture]]
    """(count, seed, validation_fraction, test_fraction) -> pictures; a pure function."""


def domain(name: str) -> Domain:
    """The domain of that name. Raises ValueError naming the nearest."""
    if name not in DOMAINS:
        near = difflib.get_close_matches(name, DOMAINS, n=1, cutoff=0.0)
        raise ValueError(f"unknown domain {name!r}; did you mean {near[0]}? Known: {', '.join(sorted(DOMAINS))}")
    module = importlib.import_module(DOMAINS[name])
    found: Domain = module.DOMAIN
    return found


def build_domain(config: DataConfig, resolution: int, cache_root: Path) -> Path:
    """The folder with the domain's PNG files, `metadata.jsonl` and `ATTRIBUTION.md`; drawn if it is not there yet.

    It is filled under a temporary name and renamed at the end, so a folder of the final name is always complete.
    """
    assert config.domain is not None
    made = domain(config.domain)
    options = [made.version, config.count, config.seed, config.validation_fraction, config.test_fraction, resolution]
    key = hashlib.sha256(json.dumps([made.name, *options, version("resvg_py")]).encode()).hexdigest()[:16]
    folder = cache_root / "domains" / f"{made.name}-{key}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent, older_than_hours=24)
    scratch = scratch_name(folder)
    with naming_full_disk(folder):
        try:
            scratch.mkdir()
            _write(made, config, resolution, scratch)
            try:
                scratch.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was faster, with the same content
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def render(svg: str, resolution: int) -> bytes:
    """An SVG document as a PNG of `resolution` pixels square. Fonts differ between machines, so none are loaded."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=resolution, height=resolution, skip_system_fonts=True)
    return bytes(png)


def _write(made: Domain, config: DataConfig, resolution: int, folder: Path) -> None:
    pictures = made.pictures(config.count, config.seed, config.validation_fraction, config.test_fraction)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for picture in tqdm(pictures, total=config.count, desc=f"drawing {made.name}", unit="image", leave=False):
            file_name = f"{picture.name}.png"
            (folder / file_name).write_bytes(render(picture.svg, resolution))
            row = {
                "file_name": file_name,
                "text": picture.caption,
                "split": picture.split,
                "concept": picture.concept,
                "licence": made.licence,
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    (folder / "ATTRIBUTION.md").write_text(made.attribution, encoding="utf-8")
