"""Measure a published adapter's score again, here, and hold it against the published figures.

Same captions, seeds, steps and guidance as the entry says; the data is drawn or read again. A figure agrees if its 95 % interval and the
published one overlap. On the same machine and versions the images are equal, and so are the figures.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from loragraft.adapters.checkpoint import Adapter, load_adapter
from loragraft.backbones.spec import Backbone
from loragraft.data.sources import Sample, open_source
from loragraft.disk import write_atomic
from loragraft.evaluation.image_sets import device_name
from loragraft.evaluation.score import ScorePlan, measure_score, render_score
from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import Recipe
from loragraft.versions import installed_versions
from loragraft.zoo.contents import WEIGHTS
from loragraft.zoo.entry import Entry, Score, ZooError, canonical
from loragraft.zoo.scores import ANY_N, PROTOCOL, scores_of

SAME = 1e-4
"""Relative; what another order of summation may change. Figures nearer than this agree without an interval."""
TAKEN = ("base", "numerics", "data")
"""What of a published recipe is used: nothing that names weights, places or a network."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One published figure and the same one here."""

    published: Score
    here: Score

    @property
    def comparable(self) -> bool:
        """Equal settings; N may differ where the statistic does not depend on it."""
        a, b = self.published, self.here
        settings = ("protocol", "references", "split", "steps", "guidance")
        same = all(getattr(a, key) == getattr(b, key) for key in settings)
        return same and (a.n == b.n or a.metric in ANY_N)

    @property
    def agrees(self) -> bool | None:
        """None: there is no interval to judge by, or the settings differ."""
        a, b = self.published, self.here
        if not self.comparable:
            return None
        if math.isclose(a.value, b.value, rel_tol=SAME):
            return True
        if a.low is None or a.high is None or b.low is None or b.high is None:
            return None
        return a.low <= b.high and b.low <= a.high


def bench(
    folder: Path,
    entry: Entry,
    root: Path,
    open_backbone: Callable[[Recipe], Backbone],
    cache_root: Path,
    *,
    images: int | None = None,
    data: Path | None = None,
) -> list[Comparison]:
    """Scores the adapter in `folder` and writes `root`/bench.json; images there are not drawn again.

    images: N; default the published one. data: the folder of images, where the recipe's data does not come with this package.
    Raises ZooError without published figures, for another protocol, and for data that is not here or not the same.
    """
    if not entry.scores:
        raise ZooError(f"{entry.name} {entry.version} was published without a score: there is nothing to compare with")
    settings = entry.scores[0]
    if settings.protocol != PROTOCOL:
        raise ZooError(
            f"{entry.name} was scored by protocol {settings.protocol!r}, this version measures {PROTOCOL!r}: install the "
            f"version that it names ({entry.versions.get('loragraft', 'unknown')})"
        )
    adapter = load_adapter(folder / WEIGHTS)
    recipe = published_recipe(adapter, data)
    backbone = open_backbone(recipe)
    backbone.resolution = max(recipe.data.edges(backbone.spec.resolution))
    held_out = _held_out(open_source(recipe.data, backbone.resolution, cache_root), settings, entry)
    plan = ScorePlan(
        adapter=adapter,
        config=replace(
            recipe.eval,
            images=images or settings.n,
            split="test" if settings.split == "test" else "validation",
            steps=settings.steps,
            guidance=settings.guidance,
            seed=settings.seed,
        ),
        held_out=held_out,
        train=(),
        references=settings.references if settings.references < len(held_out) else 0,
    )
    folders = render_score(backbone, plan, root)
    result = measure_score(plan, folders, root, str(backbone.device), backbone.resolution, print).result
    here = {score.metric: score for score in scores_of({**result, "device": device_name(backbone.device)})}
    found = [Comparison(published=score, here=here[score.metric]) for score in entry.scores if score.metric in here]
    write_atomic(root / "bench.json", canonical(_report(entry, found)))
    return found


def published_recipe(adapter: Adapter, data: Path | None) -> Recipe:
    """The part of the recipe in the weights' header that a score depends on.

    Raises ZooError if its data is neither generated here nor given, RecipeError for a recipe that this version cannot read.
    """
    about: Mapping[str, Any] = adapter.metadata.get("recipe", {})
    block = dict(about.get("data", {}))
    if data is not None:
        block |= {"folder": str(data.absolute()), "dataset": None, "domain": None}
    elif not block.get("domain"):
        source = block.get("folder") or block.get("dataset") or "no data that it names"
        raise ZooError(f"{adapter.name} was trained on {source}, which is not published with it: give --data FOLDER")
    block["allow_download"] = False
    recipe = {key: about[key] for key in TAKEN if key in about} | {"name": adapter.name, "data": block}
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "published.yaml"
        file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return load_recipe(str(file))


def _held_out(samples: list[Sample], settings: Score, entry: Entry) -> tuple[Sample, ...]:
    found = tuple(sample for sample in samples if sample.split == settings.split)
    if len(found) < settings.references:
        raise ZooError(
            f"{entry.name} was compared with {settings.references} images of the {settings.split} split, here are {len(found)}: this is "
            "other data"
        )
    return found


def _report(entry: Entry, found: list[Comparison]) -> dict[str, Any]:
    return {
        "name": entry.name,
        "version": entry.version,
        "entry_sha256": entry.sha256,
        "versions": installed_versions("loragraft", "torch", "diffusers"),
        "scores": [{"published": asdict(c.published), "here": asdict(c.here), "agrees": c.agrees} for c in found],
    }


def table(found: list[Comparison]) -> Iterator[str]:
    """Lines for a reader."""
    for c in found:
        word = {True: "agrees", False: "DIFFERS", None: "not judged"}[c.agrees]
        yield f"{c.published.metric:42s} published {_cell(c.published):32s} here {_cell(c.here):32s} {word}"
    first = found[0]
    yield f"N {first.published.n} published, {first.here.n} here; {first.published.references} references; {json.dumps(first.published.protocol)}"
    yield f"published: {first.published.hardware}"
    yield f"here:      {first.here.hardware}"


def _cell(score: Score) -> str:
    spread = "" if score.low is None or score.high is None else f" ({score.low:.4f} to {score.high:.4f})"
    return f"{score.value:.4f}{spread}"
