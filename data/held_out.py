"""Whether enough images are held out for a score, which is known before training and too late after it."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from loragraft.data.sample import Sample
from loragraft.data.splits import split_concepts
from loragraft.recipes.schema import DataConfig, EvalConfig

SCORED = 4
"""Held-out images that `loragraft score` needs at least."""
LARGEST = 50
"""The largest share that a recipe may hold out, in hundredths."""
_log = logging.getLogger(__name__)


def warn_few_held_out(samples: Sequence[Sample], data: DataConfig, score: EvalConfig) -> None:
    """`few_held_out` as a warning."""
    if found := few_held_out(samples, data, score):
        _log.warning("%s", found)


def few_held_out(samples: Sequence[Sample], data: DataConfig, score: EvalConfig) -> str | None:
    """A sentence with the remedy where the scored split has fewer than SCORED of `samples`; None where it has enough, or where
    no score is wanted (`eval.images` = 0)."""
    held = sum(sample.split == score.split for sample in samples)
    if held >= SCORED or not score.images:
        return None
    return (
        f"`loragraft score` needs {SCORED} images of the {score.split} split, and of these {len(samples)} images {held} are in it: "
        f"{_remedy(samples, data, score)}, or do without a score: eval.images=0"
    )


def _remedy(samples: Sequence[Sample], data: DataConfig, score: EvalConfig) -> str:
    if data.domain is not None:
        return "raise data.count"
    if data.limit:
        return f"raise data.limit or data.{score.split}_fraction"
    if _drawn(samples, data) != [sample.split for sample in samples]:
        return f"give more of them the split {score.split!r} where the others have theirs"
    for hundredths in range(1, LARGEST + 1):
        fraction = hundredths / 100
        tested = score.split == "test"
        changed = replace(data, test_fraction=fraction) if tested else replace(data, validation_fraction=fraction)
        splits = _drawn(samples, changed)
        if splits.count(score.split) >= SCORED and "train" in splits:
            return f"data.{score.split}_fraction={fraction:g} holds out {splits.count(score.split)}"
    return "add images, as no fraction holds out enough"


def _drawn(samples: Sequence[Sample], data: DataConfig) -> list[str]:
    """The split that `data` draws for each sample."""
    concepts = [sample.concept for sample in samples]
    drawn = split_concepts(concepts, data.seed, data.validation_fraction, data.test_fraction)
    return [drawn[concept] for concept in concepts]
