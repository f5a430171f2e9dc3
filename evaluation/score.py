"""How far an adapter moved the base into its domain, and what that is worth: sets of images, statistics, controls.

Two stages, both resumable. *Render* (`render_score`) draws the sets below under `RUN/score/<key>/<set>/` and skips what is
there. *Measure* (`measure_score`) reads whatever is there; it needs no GPU.

    base, adapter               held-out captions of the split, equal seeds
    wrong-NAME                  another adapter on these captions: what any change of style would score
    --full adds
    base-short, adapter-short   the short form of the same requests, where the data has one
    untrained                   random factors as strong as the adapter's, layer by layer
    drift-base, drift-adapter   general prompts, which the adapter should leave alone
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loragraft.adapters.checkpoint import Adapter
from loragraft.backbones.minilm import MiniLMEncoder
from loragraft.backbones.spec import Backbone
from loragraft.data.buckets import Sizes
from loragraft.data.dataset import fingerprint_of
from loragraft.data.encode import planned
from loragraft.data.held_out import SCORED
from loragraft.data.sources import Sample
from loragraft.evaluation import measure
from loragraft.evaluation.controls import GENERAL_PROMPTS, untrained_like
from loragraft.evaluation.features import FeatureStore
from loragraft.evaluation.image_sets import ImageSet, adapter_hash, present, render_missing, rendered_on
from loragraft.evaluation.retrieval import load_towers, text_features
from loragraft.evaluation.standard import StandardMetrics
from loragraft.evaluation.standard_report import measure_sets
from loragraft.recipes.schema import DataConfig, EvalConfig

DRIFT_IMAGES = 2 * len(GENERAL_PROMPTS)
FULL_IMAGES = 256
WRONG = "wrong-"
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ScorePlan:
    """What to draw and what to compare it with."""

    adapter: Adapter
    config: EvalConfig
    """`images` is N, the images per set."""
    held_out: tuple[Sample, ...]
    """Samples of `config.split`: image i asks for the caption of sample i (modulo their number)."""
    train: tuple[Sample, ...]
    """Looked through for copies with `full`; otherwise unused."""
    controls: tuple[Adapter, ...] = ()
    references: int = 0
    """Compare with so many held-out images; 0 = all."""
    full: bool = False

    def __post_init__(self) -> None:
        if len(self.held_out) < SCORED:
            raise ValueError(
                f"a score needs at least {SCORED} held-out images, and the {self.config.split} split has {len(self.held_out)}; "
                f"raise data.{self.config.split}_fraction and train again"
            )
        if self.config.images < 4:
            raise ValueError(f"a score needs at least 4 images per set, not {self.config.images}; see --images")
        if self.references < 4 and self.references != 0:
            raise ValueError(f"a score needs at least 4 held-out images to compare with, not {self.references}")
        mine = adapter_hash(self.adapter)
        for control in self.controls:
            if adapter_hash(control) == mine:
                raise ValueError(f"control {control.name!r} is the scored adapter itself: name one of another domain")

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(sample.caption for sample in self.held_out)

    @property
    def short_captions(self) -> tuple[str, ...]:
        """The short forms, or () unless every held-out sample has one."""
        shorts = tuple(sample.short for sample in self.held_out)
        return shorts if all(shorts) else ()

    def sets(self) -> list[ImageSet]:
        """Everything to draw, the most wanted first."""
        config = self.config
        base = ImageSet(
            name="base",
            prompts=self.captions,
            count=config.images,
            seed=config.seed,
            steps=config.steps,
            guidance=config.guidance,
        )
        moved = replace(base, name="adapter", adapter=self.adapter)
        wanted = [base, moved]
        for number, control in enumerate(self.controls):
            plain = WRONG + re.sub(r"[^\w.-]", "_", control.name)  # it names a folder
            taken = any(entry.name == plain for entry in wanted)
            name = f"{plain}-{number}" if taken else plain
            wanted.append(replace(base, name=name, adapter=control))
        if not self.full:
            return wanted
        wanted.append(replace(base, name="untrained", adapter=untrained_like(self.adapter, config.seed)))
        short = [replace(s, name=f"{s.name}-short", prompts=self.short_captions) for s in (moved, base)]
        drift = [replace(s, name=f"drift-{s.name}", prompts=GENERAL_PROMPTS, count=DRIFT_IMAGES) for s in (base, moved)]
        return [*wanted, *short[:1], *drift, *short[1:]] if self.short_captions else [*wanted, *drift]


def is_trained_data(adapter: Adapter, samples: Sequence[Sample], data: DataConfig, backbone: Backbone) -> bool | None:
    """Whether `samples` are what the adapter was trained on, split as they were then: else a held-out image may be a trained one.

    None where that cannot be told: of a stream, whose training images are gone, and of an adapter that does not say.
    """
    trained = adapter.metadata.get("data_fingerprint")
    if data.streaming or trained is None:
        return None
    sizes = Sizes.asked(data, backbone.spec.resolution, backbone.spec.grain)
    return fingerprint_of(planned(samples, backbone.encoders.id, backbone.resolution, sizes)) == trained


def render_score(backbone: Backbone, plan: ScorePlan, root: Path) -> dict[str, Path]:
    """Draws what is missing under `root`; returns set name -> folder. Raises ValueError for adapters of another base."""
    score_folders(backbone, plan, root)
    return render_missing(backbone, plan.sets(), root)


def score_folders(backbone: Backbone, plan: ScorePlan, root: Path) -> dict[str, Path]:
    """Set name -> folder, drawn or not. Raises ValueError for adapters of another base."""
    for adapter in (plan.adapter, *plan.controls):
        adapter.check_base(backbone.base_id)
    return {entry.name: entry.folder(root, backbone) for entry in plan.sets()}


@dataclass(frozen=True)
class Measured:
    """The figures, and the files that a report shows."""

    result: dict[str, Any]
    images: dict[str, list[Path]]
    """Set -> the images that were measured."""
    memory: measure.Memory | None


def measure_score(
    plan: ScorePlan,
    folders: Mapping[str, Path],
    root: Path,
    device: str,
    resolution: int,
    say: Say,
    standard: StandardMetrics | None = None,
) -> Measured:
    """All statistics of the sets that are complete; `say` gets one line per set that is left out, and why.

    `standard`: metrics under their published names, beside those of this module. N is `config.images`, or what both `base` and `adapter` have, so that every set is measured at one N.
    """
    images, skipped = _complete(plan, folders)
    for line in skipped:
        say(line)
    store = FeatureStore(root / "features", device)
    features = {name: store.of(paths, measure.read_image, measure.GENERATED) for name, paths in images.items()}
    read, how = measure.reference_reader(resolution), f"reference {resolution}"
    real_all = store.of([sample.image for sample in plan.held_out], read, how)
    real = real_all[: plan.references or None]
    n = len(images["base"])
    towers, about = load_towers()
    encode = MiniLMEncoder()
    captions = plan.captions[: min(n, len(plan.captions))]
    gallery = measure.gallery_of(captions, towers.embed_text(text_features(encode, captions)))
    main = [name for name in images if not name.startswith("drift-")]
    found = {name: measure.hits(gallery, towers, features[name]) for name in main}
    found_real = measure.hits(gallery, towers, real_all)

    def compare(before: str, after: str) -> dict[str, Any]:
        return measure.compare(features[before], features[after], real, found[before], found[after])

    result: dict[str, Any] = {
        "adapter": plan.adapter.name,
        "adapter_hash": adapter_hash(plan.adapter),
        "split": plan.config.split,
        "images": n,
        "references": len(real),
        "steps": plan.config.steps,
        "guidance": plan.config.guidance,
        "seed": plan.config.seed,
        "sets": {name: measure.measure_set(features[name], real, found[name]) for name in main},
        "floors": measure.floors(real, found_real, plan.config.seed),
        "retrieval": {"gallery": gallery.size, "at": measure.RECALL_AT, "chance": gallery.chance, "projection": about},
        "change": compare("base", "adapter"),
        "controls": {name: compare(name, "adapter") for name in main if name == "untrained" or name.startswith(WRONG)},
        "shuffled_captions": measure.shuffled(gallery, towers, features["adapter"], plan.config.seed),
        "short_gap": {name: compare(name, f"{name}-short") for name in ("base", "adapter") if f"{name}-short" in main},
        "skipped": skipped,
        "rendered_on": rendered_on([path for paths in images.values() for path in paths]),
    }
    if "drift-base" in images and "drift-adapter" in images:
        result["drift"] = measure.measure_pairs(images["drift-base"], images["drift-adapter"], store)
    if standard is not None:
        paths = [sample.image for sample in plan.held_out][: plan.references or None]
        result["standard"] = measure_sets(standard, images, plan.captions, paths, read, how)
    memory = None
    if plan.full and plan.train:
        train = store.of([sample.image for sample in plan.train], read, how)
        memory = measure.memory(features["adapter"], real_all, train)
        result["memorisation"] = {"training_images": len(train), **memory.to_dict()}
    return Measured({**_headline(result), **result}, images, memory)


def _complete(plan: ScorePlan, folders: Mapping[str, Path]) -> tuple[dict[str, list[Path]], list[str]]:
    """The files per set at one N, and a line per set that has fewer."""
    wanted = {entry.name: entry.count for entry in plan.sets()}
    found = {name: present(folders[name], count) for name, count in wanted.items()}
    n = min(len(found["base"]), len(found["adapter"]))
    if n < 4:
        raise ValueError(
            f"{folders['adapter']} and {folders['base']} hold only {n} common image(s): render first "
            "(the same command without --measure-only)"
        )
    images, skipped = {}, []
    for name, paths in found.items():
        needed = wanted[name] if name.startswith("drift-") else n
        if len(paths) >= needed:
            images[name] = paths[:needed]
        else:
            skipped.append(f"{name}: left out, {len(paths)} of {needed} images are there")
    if n < plan.config.images:
        skipped.append(f"every set: measured at N = {n}, {plan.config.images} were asked for")
    if plan.full and not plan.short_captions:
        skipped.append("base-short, adapter-short: left out, the data gives no short captions")
    return images, skipped


def _headline(result: Mapping[str, Any]) -> dict[str, Any]:
    """What `score.json` has had from the start."""
    base, moved = (result["sets"][name]["kid_lite0"] for name in ("base", "adapter"))
    return {
        "kid_lite0_base": base,
        "kid_lite0_adapter": moved,
        "kid_lite0_floor": result["floors"]["kid_lite0"]["value"],
        "improvement": 1 - moved["value"] / base["value"],
    }
