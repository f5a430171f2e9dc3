"""What `--fit` tries, in which order, and that what it names can be typed and is true."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import Recipe
from loragraft.train import fit
from loragraft.train.fit import estimate, reductions, settings, what_fits
from loragraft.train.memory import supported_policies
from loragraft.train.preflight import GIB, Preflight, open_subject, preflight

ALL = ("none", "gelu", "cheap", "block")
GELU, CHEAP = "train.checkpointing=gelu", "train.checkpointing=cheap"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("marketing", ["train.batch_size=4"])


@pytest.fixture(scope="module")
def found(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Preflight:
    return preflight(recipe, tmp_path_factory.mktemp("cache"))


def test_settings_are_tried_by_their_cost(recipe: Recipe) -> None:
    tried = settings(recipe, ALL)  # type: ignore[arg-type]
    assert len(tried) == 5 * 3 * 3  # kinds of checkpointing, states, batches of 4, 2 and 1
    assert tried[0].overrides == ""
    costs = [setting.cost for setting in tried]
    assert costs == sorted(costs)
    place = {frozenset(setting.overrides.split()): i for i, setting in enumerate(tried)}
    in_order = (
        "optim.name=adamw8bit", "train.batch_size=2 train.accumulation=2", GELU, CHEAP,
        f"train.batch_size=1 train.accumulation=4 {CHEAP}", "train.checkpointing=block",
        "train.checkpointing=block train.offload_activations=true",
    )  # fmt: skip
    places = [place[frozenset(text.split())] for text in in_order]
    assert places == sorted(places)
    assert len(settings(recipe, ("none",))) == 9


def test_what_is_named_can_be_typed(recipe: Recipe) -> None:
    everything = [(setting.overrides, setting.recipe) for setting in settings(recipe, ALL)]  # type: ignore[arg-type]
    last = everything[-1]
    everything += [choice for row in reductions(last[1], last[0], 1024) for choice in row]
    for overrides, changed in everything:
        assert load_recipe("marketing", ["train.batch_size=4", *overrides.split()]) == changed, overrides
    assert everything[-1][0].endswith("data.resolution=256 adapter.rank=4 adapter.alpha=4.0")


def test_what_a_recipe_has_is_kept(recipe: Recipe) -> None:
    spare = load_recipe(
        "marketing",
        ["train.batch_size=1", "train.checkpointing=selective", "train.checkpoint_blocks=2", "optim.name=adamw8bit"],
    )
    block, offload, apart = (
        "train.checkpointing=block train.checkpoint_blocks=0",
        "train.offload_activations=true",
        "train.join_factors=false",
    )
    tried = settings(spare, ALL)  # type: ignore[arg-type]
    expected = ["", apart, block, f"{block} {offload}", f"{block} {apart}", f"{block} {offload} {apart}"]
    assert [setting.overrides for setting in tried] == expected
    blocks = settings(load_recipe("marketing", ["train.batch_size=1", "train.checkpointing=block"]), ALL)  # type: ignore[arg-type]
    assert blocks[2].overrides == offload, "what is so already need not be typed"
    pairs = replace(recipe, data=replace(recipe.data, prior=replace(recipe.data.prior, images=4, prompt="a")))
    sizes = {setting.recipe.train.batch_size for setting in settings(pairs, ("none",))}
    assert sizes == {4, 2}  # an image and a class image


def test_estimates_are_close_to_dry_runs(recipe: Recipe, found: Preflight, tmp_path: Path) -> None:
    subject = open_subject(recipe, tmp_path)
    for setting in settings(recipe, ("none",)):
        if setting.recipe.train.batch_size == 2:
            exact = preflight(setting.recipe, tmp_path, subject, like=found)
            assert estimate(found, setting) == pytest.approx(exact.needed, rel=0.03), setting.overrides
            assert exact.sample is found.sample


def test_the_cheapest_that_fits_is_named(recipe: Recipe, found: Preflight, tmp_path: Path) -> None:
    assert what_fits(recipe, found, found.needed, tmp_path) == ("", found)
    heard: list[str] = []
    answer = what_fits(recipe, found, found.needed - 2**20, tmp_path, heard.append)
    assert answer is not None
    assert answer[0] == "optim.name=adamw8bit"
    assert len(heard) == 1


def test_smaller_images_come_last(
    recipe: Recipe, found: Preflight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Recipe] = []

    def predicted(changed: Recipe, *_: object, **__: object) -> Preflight:
        tried.append(changed)
        return found

    monkeypatch.setattr(fit, "preflight", predicted)
    heard: list[str] = []
    assert what_fits(recipe, found, 2**20, tmp_path, heard.append) is None
    assert heard[-1].startswith("optim.name=adamw8bit")
    assert "adapter.rank=4 adapter.alpha=4.0: " in heard[-1]
    assert sum("about" in line for line in heard) == 5 * 3 * 3 - 1
    assert len(tried) == 3 + 2  # a dry run for cheap (and gelu), block, offloading; ranks of 8 and 4, at 128 px


def test_as_many_pixels_as_fit_in_a_few_dry_runs(
    recipe: Recipe, found: Preflight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GiB needed: rank / 4 + pixels / 2^18."""
    big = replace(found, resolution=1024)

    def predicted(changed: Recipe, *_: object, **__: object) -> SimpleNamespace:
        needed = (changed.adapter.rank / 4 + (changed.data.resolution or 1024) ** 2 / 2**18) * GIB
        return SimpleNamespace(needed=needed, fits=lambda card: needed <= card)

    monkeypatch.setattr(fit, "settings", lambda *_: settings(recipe, ())[:1])
    monkeypatch.setattr(fit, "preflight", predicted)
    monkeypatch.setattr(Preflight, "fits", lambda *_: False)
    expected = {
        7.0: "data.resolution=768",
        5.0: "data.resolution=384",
        4.2: "data.resolution=576 adapter.rank=8 adapter.alpha=8.0",
        1.1: None,
    }
    for gib, overrides in expected.items():
        heard: list[str] = []
        answer = what_fits(recipe, big, int(gib * GIB), tmp_path, heard.append)
        assert (None if answer is None else answer[0]) == overrides, (gib, heard)
        assert len(heard) <= 4, heard


def test_gelu_is_given_room(recipe: Recipe, found: Preflight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compiled blocks keep more than the dry run says."""
    only = [setting for setting in settings(recipe, ALL) if setting.overrides in ("", GELU, CHEAP)]  # type: ignore[arg-type]
    monkeypatch.setattr(fit, "settings", lambda *_: only)
    monkeypatch.setattr(fit, "preflight", lambda *_, **__: found)
    monkeypatch.setattr(fit, "estimate", lambda *_: found.needed)
    monkeypatch.setattr(Preflight, "fits", lambda *_: False)
    for room, named in ((1.05, CHEAP), (1.08, GELU)):
        answer = what_fits(recipe, found, round(found.needed * room), tmp_path, lambda line: None)
        assert answer is not None
        assert answer[0] == named


def test_policies_that_a_model_supports(recipe: Recipe, tmp_path: Path) -> None:
    assert supported_policies(open_subject(recipe, tmp_path).transformer()) == ALL
    assert supported_policies(torch.nn.Linear(2, 2)) == ("none",)
