"""What a user types to name adapters and runs -> the adapters themselves."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loragraft.adapters.checkpoint import RUN_RECIPE, Adapter, load_adapter
from loragraft.adapters.formats.contract import START_NAME
from loragraft.quantization.names import nearest_path
from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import Recipe


def open_adapters(given: Sequence[str], *, denoiser_only: bool = False) -> list[tuple[Adapter, float]]:
    """`PATH` or `PATH@WEIGHT`, where PATH is a run, an adapter folder or a .safetensors file in any dialect.

    Adapters of one name, such as two runs of a recipe, get their paths into their names. Raises ValueError for a weight that is no
    finite number, and for an adapter that changes more than the denoiser, unless `denoiser_only` drops the rest of it.
    """
    found = []
    for entry in given:
        path, weight = _split_weight(entry)
        adapter = load_adapter(path)
        adapter = adapter.denoiser_only() if denoiser_only else adapter
        adapter.check_whole()
        found.append((adapter, path, weight))
    names = [adapter.name for adapter, _, _ in found]
    return [
        (adapter if names.count(adapter.name) == 1 else replace(adapter, name=f"{adapter.name} ({path})"), weight)
        for adapter, path, weight in found
    ]


def _split_weight(entry: str) -> tuple[str, float]:
    """A path that exists is one, whatever it is called. Raises ValueError for a weight that is none."""
    path, at, weight = entry.rpartition("@")
    if not at or Path(entry).exists():
        return entry, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"{entry!r}: what follows @ is the adapter's weight, a number such as 0.8; there is no such path"
        )
    return path, value


def recipe_of_run(given: str) -> Recipe | None:
    """The recipe of the run folder in `PATH` or `PATH@WEIGHT`, or None where that is no run folder."""
    recipe = Path(_split_weight(given)[0]) / RUN_RECIPE
    return load_recipe(str(recipe)) if recipe.is_file() else None


def open_run(run: Path) -> tuple[Adapter, Recipe]:
    """The adapter and the recipe of a finished run folder. Raises ValueError saying what it lacks."""
    if not run.exists():
        raise ValueError(f"there is no run {run}: give the folder that training wrote{nearest_path(run)}")
    if not (run / RUN_RECIPE).exists():
        raise ValueError(f"{run} is no run folder (it has no recipe.yaml): give the folder that training wrote")
    if not any(file.name != START_NAME for file in (run / "adapter").glob("*.safetensors")):
        raise ValueError(f"{run} is not finished: run `accelerate launch train/lora.py` with the same recipe to go on")
    return load_adapter(run / "adapter"), load_recipe(str(run / RUN_RECIPE))


def open_control(path: Path) -> Adapter:
    """The adapter of another run, an adapter folder or file. Raises ValueError where there is none, and as `load_adapter`."""
    if not path.exists():
        raise ValueError(
            f"--control {path} does not exist: give another run folder, an adapter folder or a .safetensors file{nearest_path(path)}"
        )
    return load_adapter(path)
