"""Evaluation prompts: what a data set's test split could be asked for, each request in full and in short.

A domain composes new requests about its test concepts, by the grammar of its training captions but from draws of their
own; a folder has the captions of its test images. The list depends on the recipe's data block and the count alone,
whatever the machine and the Python, and `prompts_id` tells whether two scores used the same one.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from loragraft.data.captions import dressed
from loragraft.data.domains import domain
from loragraft.data.errors import DataError
from loragraft.data.sources import open_source
from loragraft.data.splits import split_concepts
from loragraft.recipes.schema import DataConfig

MOST_DRAWS = 100
"""Draws per prompt asked for, before a grammar counts as exhausted."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request."""

    long: str
    short: str
    """The same in a hurry; empty where the data set has no short captions."""
    concept: str


def evaluation_prompts(config: DataConfig, count: int, cache_root: Path) -> list[Prompt]:
    """`count` requests about test concepts; no long and no short text comes twice. A folder may have fewer.

    cache_root: where own data that is not a folder yet is written to. Raises DataError where a domain cannot phrase as
    many, and where there is nothing to ask for.
    """
    if count < 1:
        raise DataError(f"{count} prompts were asked for: give 1 or more")
    return _of_domain(config, count) if config.domain else _of_samples(config, count, cache_root)


def prompts_id(prompts: Sequence[Prompt]) -> str:
    """sha256 (hex) of the list as canonical JSON."""
    canonical = json.dumps([asdict(prompt) for prompt in prompts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _of_domain(config: DataConfig, count: int) -> list[Prompt]:
    assert config.domain is not None
    made = domain(config.domain)
    splits = split_concepts(made.concepts, config.seed, config.validation_fraction, config.test_fraction)
    concepts = [concept for concept in made.concepts if splits[concept] == "test"]
    if not concepts:
        raise DataError("the test split has no concept: raise data.test_fraction")
    found: list[Prompt] = []
    seen: set[str] = set()
    stream = made.compositions(concepts, f"{made.name}/prompts/{config.seed}")
    for _ in range(count * MOST_DRAWS):
        concept, composed = next(stream)
        if composed.caption not in seen and composed.short not in seen:
            seen |= {composed.caption, composed.short}
            long, short = (dressed(text, config) for text in (composed.caption, composed.short))
            found.append(Prompt(long, short, concept))
        if len(found) == count:
            return found
    raise DataError(
        f"the grammar of {made.name} gave only {len(found)} different prompts about its {len(concepts)} test concepts; "
        "ask for fewer, or raise data.test_fraction"
    )


def _of_samples(config: DataConfig, count: int, cache_root: Path) -> list[Prompt]:
    held_out = [s for s in open_source(config, config.resolution, cache_root) if s.split == "test"]
    if not held_out:
        raise DataError("the test split has no image, hence no caption to ask for: raise data.test_fraction")
    first = {sample.caption: Prompt(sample.caption, sample.short, sample.concept) for sample in reversed(held_out)}
    return list(reversed(first.values()))[:count]
