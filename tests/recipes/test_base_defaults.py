"""Every base that needs weights of its own has recipe defaults that load, and that say what nobody has run."""

from pathlib import Path

import pytest

from loragraft.backbones.load import find_spec, list_bases
from loragraft.recipes.load import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("name", [name for name in list_bases() if find_spec(name).external is not None])
def test_real_weights_have_defaults_and_are_marked_as_not_run(name: str) -> None:
    spec = find_spec(name)
    text = (RECIPES / f"_on-{name}.yaml").read_text(encoding="utf-8")
    assert "Real weights: not run" in text
    assert any(word in text for word in ("Expected of the quantized base", "no figures of")), "no band and no reason"
    recipe = load_recipe("marketing", [f"base={name}"])
    assert recipe.base == name and recipe.name == "marketing"
    for drawn in (recipe.sample, recipe.eval):
        assert (drawn.steps, drawn.guidance) == (spec.steps, spec.guidance), "not what the base is drawn with"
    assert recipe.train.checkpointing == "block" or spec.refuses_training


def test_what_is_written_beside_the_base_wins() -> None:
    assert load_recipe("marketing", ["base=flux1-schnell", "sample.steps=2"]).sample.steps == 2
