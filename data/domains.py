"""Built-in domains: image-caption sets that are drawn on the spot from installed, licensed packages.

A domain is a module of this folder that exports `DOMAIN` and has one line in DOMAINS. It yields pictures as SVG; this
module rasterises them once into a folder named by what went in, and later runs find that folder.
"""

import difflib
import hashlib
import importlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tqdm.auto import tqdm

from loragraft.data.dice import Dice
from loragraft.data.folders import build_once
from loragraft.data.splits import Split, split_concepts
from loragraft.recipes.schema import DataConfig

DOMAINS = {"marketing": "loragraft.data.marketing", "design": "loragraft.data.design"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """What a domain draws of one concept, not yet rasterised."""

    svg: str
    """A whole SVG document with a square view box."""
    caption: str
    """All that is drawn, as a careful person would write it; at most 30 MiniLM tokens."""
    short: str
    """The same request as a lazy person would type it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One image of a domain, not yet rasterised."""

    name: str
    """File stem, unique in its domain."""
    svg: str
    caption: str
    short: str
    concept: str
    split: Split


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """What a domain module exports as DOMAIN."""

    name: str
    version: int
    """Raise it whenever pictures or captions change: it is part of the folder's key."""
    licence: str
    """SPDX name, for every picture."""
    attribution: str
    """Markdown that the licence asks for; written beside the images."""
    concepts: tuple[str, ...]
    """The things that it shows; they are dealt out evenly and split so that no concept is in two splits."""
    compose: Callable[[str, Dice], Composition]
    """One image of a concept, all else drawn from the dice; a pure function."""

    def pictures(self, count: int, seed: int, validation_fraction: float, test_fraction: float) -> Iterator[Picture]:
        """`count` pictures; the same arguments give the same pictures."""
        splits = split_concepts(self.concepts, seed, validation_fraction, test_fraction)
        dealt = self.compositions(self.concepts, f"{self.name}/{seed}")
        for index, (concept, made) in enumerate(itertools.islice(dealt, count)):
            yield Picture(
                name=f"{index:06d}",
                svg=made.svg,
                caption=made.caption,
                short=made.short,
                concept=concept,
                split=splits[concept],
            )

    def compositions(self, concepts: Sequence[str], seed: str) -> Iterator[tuple[str, Composition]]:
        """Endless (concept, composition): all concepts in a new order, again and again."""
        dice = Dice(seed)
        while True:
            for concept in dice.shuffled(concepts):
                yield concept, self.compose(concept, dice)


def domain(name: str) -> Domain:
    """The domain of that name. Raises ValueError naming the nearest."""
    if name not in DOMAINS:
        near = difflib.get_close_matches(name, DOMAINS, n=1, cutoff=0.0)
        raise ValueError(f"unknown domain {name!r}; did you mean {near[0]}? Known: {', '.join(sorted(DOMAINS))}")
    module = importlib.import_module(DOMAINS[name])
    found: Domain = module.DOMAIN
    return found


def build_domain(config: DataConfig, resolution: int, cache_root: Path) -> Path:
    """The folder with the domain's PNG files, `metadata.jsonl` and `ATTRIBUTION.md`; drawn if it is not there yet."""
    assert config.domain is not None
    made = domain(config.domain)
    options = [made.version, config.count, config.seed, config.validation_fraction, config.test_fraction, resolution]
    key = hashlib.sha256(json.dumps([made.name, *options, version("resvg_py")]).encode()).hexdigest()[:16]
    folder = cache_root / "domains" / f"{made.name}-{key}"
    return build_once(folder, lambda scratch: _write(made, config, resolution, scratch))


def render(svg: str, resolution: int) -> bytes:
    """An SVG document as a PNG of `resolution` pixels square. Fonts differ between machines, so none are loaded."""
    import resvg_py  # a machine that reads what was drawn elsewhere need not have it

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
                "short": picture.short,
                "split": picture.split,
                "concept": picture.concept,
                "licence": made.licence,
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    (folder / "ATTRIBUTION.md").write_text(made.attribution, encoding="utf-8")
