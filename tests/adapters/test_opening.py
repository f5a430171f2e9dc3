"""What a user types for adapters and runs, and the mistakes in it."""

from pathlib import Path

import pytest
import torch

from loragraft.adapters.checkpoint import load_adapter, write_adapter
from loragraft.adapters.opening import open_adapters, open_control, open_run, recipe_of_run


def test_a_control_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--control .*nowhere does not exist: give another run folder"):
        open_control(tmp_path / "nowhere")


@pytest.mark.parametrize("weight", ["strong", "nan", "inf", ""])
def test_a_weight_must_be_a_number(weight: str) -> None:
    """NaN is one for Python, and a black picture for everybody else."""
    with pytest.raises(ValueError, match="what follows @ is the adapter's weight"):
        open_adapters([f"runs/mine@{weight}"])


def test_a_path_may_hold_the_sign_of_weights(tmp_path: Path) -> None:
    run = _write(tmp_path / "me@home", 0)
    (tmp_path / "me@home" / "recipe.yaml").write_text("extends: marketing\n")
    for given, weight in ((run, 1.0), (f"{run}@0.5", 0.5)):
        assert [found for _, found in open_adapters([given])] == [weight]
        assert recipe_of_run(given) is not None


def test_two_runs_of_one_recipe_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    """As the demo's page does; the same path twice keeps its name, and is refused where it is used."""
    runs = [_write(tmp_path / name, seed) for seed, name in enumerate(("first", "second"))]
    names = [adapter.name for adapter, _ in open_adapters([runs[0], f"{runs[1]}@0.5"])]
    assert names == [f"mine ({run})" for run in runs]
    assert [adapter.name for adapter, _ in open_adapters(runs[:1])] == ["mine"]


def test_a_folder_of_runs_names_them(tmp_path: Path) -> None:
    runs = [_write(tmp_path / "runs" / name, 0) for name in ("first", "second")]
    with pytest.raises(ValueError, match=f"give the file; in it are {runs[0]}, {runs[1]}$"):
        open_adapters([str(tmp_path / "runs")])


@pytest.mark.parametrize("rank", [0, -3])
def test_a_largest_rank_is_a_rank(tmp_path: Path, rank: int) -> None:
    with pytest.raises(ValueError, match=r"--rank\): it is at least 1"):
        load_adapter(_write(tmp_path / "run", 0), rank)


def _write(run: Path, seed: int) -> str:
    torch.manual_seed(seed)
    about = {"name": "mine", "base": "pocket", "base_id": "ab"}
    write_adapter({"a": (torch.randn(2, 4), torch.randn(4, 2))}, run / "adapter", about)
    return str(run)


def test_a_run_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run folder"):
        open_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text("extends: _base\n")
    for opened in (open_run, lambda run: open_adapters([str(run)])):
        with pytest.raises(ValueError, match="is not finished"):
            opened(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "start.safetensors").write_bytes(b"x")  # adapter.init=loftq writes it before the first step
    with pytest.raises(ValueError, match="a run that is not finished: give its training command again"):
        open_adapters([str(tmp_path)])


def test_a_weight_that_no_picture_survives_is_refused() -> None:
    for weight in ("nan", "inf"):
        with pytest.raises(ValueError, match="what follows @ is the adapter's weight"):
            open_adapters([f"runs/mine@{weight}"])


def test_what_is_not_there_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "tiles").mkdir(parents=True)
    (tmp_path / "runs" / "tiles" / "recipe.yaml").write_text("extends: _base\n")
    monkeypatch.chdir(tmp_path)
    for opened in (open_run, open_control, lambda run: open_adapters([str(run)])):
        with pytest.raises(ValueError, match=r"did you mean runs/tiles\?"):
            opened(Path("runs/tils"))
