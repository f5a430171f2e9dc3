"""`loragraft preflight --fit`: the cheapest setting of a recipe with which a run fits a card.

Three things save memory and leave the result what it is, or nearly. They combine, and are tried by what they cost together, as
measured on FLUX.1-dev in per cent of a step (`docs/log.md`):

    checkpointing      gelu 5, cheap 8, block 33, block with its inputs in host memory 40
    states             optim.name=adamw8bit 1 (no time; its steps differ by 6 %), then train.join_factors=false 3
    batches            half the batch, accumulated twice: 4 each time

What none of them makes fit needs fewer pixels, and what those do not, a smaller adapter with as many as then fit. One dry run a kind of checkpointing is enough to tell which
settings are worth one of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loragraft.recipes.schema import Recipe
from loragraft.train.memory import Checkpointing, supported_policies
from loragraft.train.preflight import GIB, Preflight, open_subject, preflight

COSTS: dict[tuple[Checkpointing, bool], float] = {
    ("none", False): 0, ("gelu", False): 5, ("cheap", False): 8, ("block", False): 30, ("block", True): 31,
}  # fmt: skip
"""(policy, offloading) -> per cent of a step."""
SMALL_STATES, APART, HALF_BATCH = 1, 3, 4
STATE_LEFT = 2.03 / 8
"""Of the optimizer's bytes, with `adamw8bit`."""
GELU_KEEPS = 0.07
"""Of the prediction, what a compiled block keeps beyond it under `gelu`."""
DOUBT = 0.01
"""Of the card, by which an estimate may be off: closer calls get a dry run."""


@dataclass(frozen=True)
class Setting:
    """One way to run a recipe."""

    overrides: str
    """To type after the recipe; "" changes nothing."""
    recipe: Recipe
    cost: float
    """Per cent of a step, beside the recipe as it is."""
    plain: Recipe
    """The recipe with this kind of checkpointing and nothing else changed."""


def settings(recipe: Recipe, policies: tuple[Checkpointing, ...]) -> list[Setting]:
    """All of them, the cheapest first. policies: what the model supports."""
    own = (recipe.train.checkpointing, recipe.train.offload_activations)
    spent = COSTS.get(own, COSTS["cheap", False])  # `selective` lies between it and `block`
    kinds = {own: 0.0} | {
        kind: cost - spent for kind, cost in COSTS.items() if kind[0] in policies and cost > spent and kind != own
    }
    least = 2 if recipe.data.prior.images else 1
    found = []
    for (policy, offload), cost in kinds.items():
        plain = _Typed(recipe)
        if (policy, offload) != own:
            blocks = {"checkpoint_blocks": 0} if recipe.train.checkpoint_blocks else {}
            plain.change("train", checkpointing=policy, **blocks, **({"offload_activations": True} if offload else {}))
        for states in range(3):
            typed = plain.copy()
            if states and recipe.optim.name == "adamw":
                typed.change("optim", name="adamw8bit")
            if states == 2 and recipe.train.join_factors:
                typed.change("train", join_factors=False)
            beside = cost + (0, SMALL_STATES, SMALL_STATES + APART)[states]
            while True:
                found.append(Setting(typed.text, typed.recipe, beside, plain.recipe))
                batch = typed.recipe.train.batch_size
                if batch <= least:
                    break
                size = max(least, batch // 2)
                typed = typed.copy()
                typed.change("train", batch_size=size, accumulation=typed.recipe.train.accumulation * (batch // size))
                beside += HALF_BATCH
    unique = {setting.overrides: setting for setting in sorted(found, key=lambda setting: setting.cost, reverse=True)}
    return sorted(unique.values(), key=lambda setting: setting.cost)


def reductions(recipe: Recipe, typed_so_far: str, resolution: int) -> list[list[tuple[str, Recipe]]]:
    """(overrides, recipe): a row for each rank from the recipe's own down to 4, from the most pixels to the fewest. The recipe as
    it is is not among them."""
    edges, ranks = [resolution], [recipe.adapter.rank]
    while (edge := edges[-1] * 3 // 4 // 64 * 64) >= 256:
        edges.append(edge)
    while ranks[-1] > 4:
        ranks.append(ranks[-1] // 2)
    rows = []
    for rank in ranks:
        row = []
        for edge in edges:
            typed = _Typed(recipe, typed_so_far)
            if edge != resolution:
                single = {"resolutions": ()} if recipe.data.resolutions else {}
                typed.change("data", **single, resolution=edge)
            if rank != recipe.adapter.rank:
                alpha = recipe.adapter.alpha * rank / recipe.adapter.rank
                typed.change("adapter", rank=rank, alpha=alpha)
            row.append((typed.text, typed.recipe))
        rows.append(row)
    return [row for row in (rows[0][1:], *rows[1:]) if row]


class _Typed:
    """A recipe and the overrides that made it; a later override of a key replaces the earlier one."""

    def __init__(self, recipe: Recipe, text: str = "") -> None:
        self.recipe = recipe
        self._values = dict(part.split("=", 1) for part in text.split())

    @property
    def text(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self._values.items())

    def copy(self) -> "_Typed":
        return _Typed(self.recipe, self.text)

    def change(self, block: str, **values: Any) -> None:
        before = getattr(self.recipe, block)
        self.recipe = replace(self.recipe, **{block: replace(before, **values)})
        for key, value in values.items():
            if getattr(before, key) != value:
                self._values[f"{block}.{key}"] = _typed_value(value)


def _typed_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "[]" if value == () else str(value)


def estimate(base: Preflight, setting: Setting) -> int:
    """Bytes that a card must have, from the dry run of `setting.plain`: each saving taken off the stages that it serves."""
    train, plain, chosen = base.train, setting.plain, setting.recipe
    states = 0.0
    if plain.optim.name != chosen.optim.name:
        states = train.at_peak["optimizer"] * (1 - STATE_LEFT)
    joined = train.at_peak["adapter"] / 2 if plain.train.join_factors != chosen.train.join_factors else 0
    moving = train.at_peak["activations"] + train.at_peak["workspace"] - train.library
    smaller = moving * (1 - chosen.train.batch_size / plain.train.batch_size)
    stages = {stage.name: float(stage.peak) for stage in base.stages}
    stages["train"] -= joined + smaller
    served = ("train", "validate", "sample", "save")
    return base.card_for(round(max(peak - (states if name in served else 0) for name, peak in stages.items())))


def what_fits(
    recipe: Recipe,
    found: Preflight,
    card: int,
    cache_root: Path,
    progress: Callable[[str], object] = print,
    processes: int = 1,
) -> tuple[str, Preflight] | None:
    """The cheapest of `settings`, or else of `reductions` the one of the highest rank and then the most pixels, with which the run fits `card` bytes, and its prediction;
    ("", found) if it does already.

    None if none does. `progress` hears of each that is tried.
    """
    if found.fits(card):
        return "", found
    subject = open_subject(recipe, cache_root)
    bases = {_kind(recipe): found}

    def predicted(changed: Recipe) -> Preflight:
        return preflight(changed, cache_root, subject, processes=processes, like=found)

    tried = settings(recipe, supported_policies(subject.transformer()))
    for setting in tried[1:]:
        kind = _kind(setting.plain)
        if kind not in bases:
            bases[kind] = predicted(setting.plain)
        room = card / (1 + GELU_KEEPS) if setting.recipe.train.checkpointing == "gelu" else card
        about = estimate(bases[kind], setting)
        if about > room * (1 + DOUBT):
            progress(f"{setting.overrides}: about {about / GIB:.1f} GiB")
            continue
        answer = bases[kind] if setting.recipe == setting.plain else predicted(setting.recipe)
        progress(f"{setting.overrides}: {answer.needed / GIB:.1f} GiB")
        if answer.needed <= room:
            return setting.overrides, answer
    last = min(tried, key=lambda setting: estimate(bases[_kind(setting.plain)], setting))

    def reduced(choice: tuple[str, Recipe]) -> Preflight:
        answer = predicted(choice[1])
        progress(f"{choice[0]}: {answer.needed / GIB:.1f} GiB")
        return answer

    for row in reductions(last.recipe, last.overrides, found.resolution):
        if (answer := reduced(row[-1])).fits(card):
            return _most_pixels(row, answer, card, reduced)
    return None


def _most_pixels(
    row: list[tuple[str, Recipe]], smallest: Preflight, card: int, reduced: Callable[[tuple[str, Recipe]], Preflight]
) -> tuple[str, Preflight]:
    """The first of `row` that fits, whose last, `smallest`, does: halved, as a dry run takes a quarter of a minute."""
    low, high, fitting = 0, len(row) - 1, smallest
    while low < high:
        middle = (low + high) // 2
        if (answer := reduced(row[middle])).fits(card):
            high, fitting = middle, answer
        else:
            low = middle + 1
    return row[high][0], fitting


def _kind(recipe: Recipe) -> tuple[str, bool]:
    """What a dry run tells apart: uncompiled, `gelu` and `cheap` keep the same."""
    policy = recipe.train.checkpointing
    return "cheap" if policy == "gelu" else policy, recipe.train.offload_activations
