"""What a user types for adapters and runs, and the mistakes in it."""

from pathlib import Path

import pytest

from loragraft.adapters.opening import open_adapters, open_control, open_run


def test_a_control_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--control .*nowhere does not exist: give another run folder"):
        open_control(tmp_path / "nowhere")


def test_a_weight_must_be_a_number() -> None:
    with pytest.raises(ValueError, match="what follows @ is the adapter's weight"):
        open_adapters(["runs/mine@strong"])


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
    with pytest.raises(ValueError, match="runs holds runs: give one of them, such as runs/tiles"):
        open_adapters(["runs"])
