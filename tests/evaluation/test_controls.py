"""Controls are what they say they are."""

import pytest
import torch

from loragraft.evaluation.controls import GENERAL_PROMPTS, derangement, product_norm, untrained_like

from .conftest import make_adapter


def test_an_untrained_adapter_is_as_strong_layer_by_layer_and_points_elsewhere() -> None:
    adapter = make_adapter("mine")
    made = untrained_like(adapter, seed=3)
    assert made.pairs.keys() == adapter.pairs.keys()
    for path, (down, up) in adapter.pairs.items():
        random_down, random_up = made.pairs[path]
        assert (random_down.shape, random_up.shape) == (down.shape, up.shape)
        assert float((random_up @ random_down).norm()) == pytest.approx(float((up @ down).norm()), rel=1e-5)
        assert not torch.allclose(random_up @ random_down, up @ down)
    again = untrained_like(adapter, seed=3)
    assert all(torch.equal(again.pairs[path][k], made.pairs[path][k]) for path in made.pairs for k in (0, 1))
    assert made.metadata == adapter.metadata, "it is for the same base"


def test_product_norm_is_the_norm_of_the_product() -> None:
    (down, up), _ = make_adapter("mine").pairs.values()
    assert product_norm(down, up) == pytest.approx(float((up @ down).norm()), rel=1e-6)


@pytest.mark.parametrize("count", [2, 3, 17])
def test_a_derangement_leaves_nothing_in_place(count: int) -> None:
    shuffled = derangement(count, seed=1)
    assert sorted(shuffled.tolist()) == list(range(count))
    assert not (shuffled == torch.arange(count)).any()


def test_general_prompts_are_distinct() -> None:
    assert len(set(GENERAL_PROMPTS)) == len(GENERAL_PROMPTS) == 32
