"""A whole run of the benchmark goes from its own pictures to a saved adapter; here on `pocket`, on a CPU without a cap."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from loragraft.recipes.load import load_recipe


@pytest.fixture
def module(benchmark_module: Callable[..., ModuleType]) -> ModuleType:
    return benchmark_module("whole_run", "timed_alone")


def test_a_run_on_its_own_pictures(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAGRAFT_CACHE", "put back afterwards")
    overrides = ("base=pocket", "train.threads=1", "train.batch_size=2")
    found = module.run(overrides, cap_gib=8, random_weights=False)
    assert found["summary"]["steps"] == 3
    assert found["summary"]["validation_loss_end"] > 0
    assert "--random-weights" not in found["arguments"]
    if not torch.cuda.is_available():
        assert (found["reserved_gib"], found["peak_gib"], found["cap_gib"]) == (None, None, None)


def test_the_runs_are_of_flux_and_below_their_caps_by_the_memory_they_ask_for(module: ModuleType) -> None:
    recipes = {
        name: load_recipe("marketing", [*module.COMMON, *asked.overrides, "data.folder=pictures"])
        for name, asked in module.WHOLE_RUNS.items()
    }
    assert {name: asked.cap_gib for name, asked in module.WHOLE_RUNS.items()} == {
        "whole_run_1024": 11,
        "whole_run_512": 8,
    }
    for name, edge in {"whole_run_1024": 1024, "whole_run_512": 512}.items():
        assert (recipes[name].base, recipes[name].data.resolution) == ("flux1-dev", edge)
        assert recipes[name].train.checkpointing == "block"
    assert recipes["whole_run_512"].optim.name == "adamw8bit"
