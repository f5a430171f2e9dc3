"""Images from a list of names, prompts and seeds: drawn once, resumed, and not mixed with others."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loragraft.cli import main
from loragraft.evaluation.generate import Settings
from loragraft.evaluation.prompt_file import Cost, Line, draw_lines, read_lines
from loragraft.evaluation.standard_command import images_of, prompts_of

from .conftest import EDGE, Studio, make_adapter

LINES = [Line(f"n{i}", f"thing {i}", 100 + i) for i in range(5)]
SETTINGS = Settings(prompt="", steps=2)


@pytest.fixture
def drawing(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> Studio:
    monkeypatch.setattr("loragraft.evaluation.prompt_file.render", studio)
    return studio


def test_each_line_gives_its_image_with_its_own_seed(backbone: Any, drawing: Studio, tmp_path: Path) -> None:
    cost = draw_lines(backbone, [], LINES, SETTINGS, tmp_path, batch=2)
    assert drawing.drawn == [(f"thing {i}", 100 + i) for i in range(5)]
    assert cost.drawn == 5 and cost.seconds_per_image is not None and cost.peak_gib is None
    assert cost.as_row.startswith("seconds_per_image=") and "peak" not in cost.as_row
    assert prompts_of(images_of(tmp_path), None) == [line.prompt for line in LINES], "measure reads the prompts back"


def test_a_killed_run_goes_on(backbone: Any, drawing: Studio, tmp_path: Path) -> None:
    drawing.fail_after = 3
    with pytest.raises(KeyboardInterrupt):
        draw_lines(backbone, [], LINES, SETTINGS, tmp_path, batch=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n0.png", "n1.png"]
    drawing.fail_after = 10**9
    assert draw_lines(backbone, [], LINES, SETTINGS, tmp_path, batch=2).drawn == 3
    assert draw_lines(backbone, [], LINES, SETTINGS, tmp_path, batch=2) == Cost(0, None, None)


def test_two_settings_do_not_share_a_folder(backbone: Any, drawing: Studio, tmp_path: Path) -> None:
    draw_lines(backbone, [], LINES, SETTINGS, tmp_path)
    with pytest.raises(ValueError, match=r"n0\.png was drawn with another steps; give another --out"):
        draw_lines(backbone, [], LINES, Settings(prompt="", steps=3), tmp_path)
    with pytest.raises(ValueError, match="another adapters"):
        draw_lines(backbone, [(make_adapter("mine"), 1.0)], LINES, SETTINGS, tmp_path)
    backbone.resolution = 2 * EDGE
    with pytest.raises(ValueError, match="another resolution"):
        draw_lines(backbone, [], LINES, SETTINGS, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompt"),
        (
            '{"name": "a", "prompt": "x"}',
            r":1 must be an object with name, prompt and seed, such as .* \(it has no 'seed'\)",
        ),
        ('{"name": "../a", "prompt": "x", "seed": 1}', "cannot name a file"),
        ('{"name": "a", "prompt": "x", "seed": 1}\n{"name": "a", "prompt": "y", "seed": 1}', "comes twice"),
    ],
)
def test_spoilt_lists_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_lines(path)


def test_the_command_refuses_what_the_list_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"name": "a", "prompt": "x", "seed": 1}))
    assert main(["generate", "--prompt-file", str(path), "--seed", "3", "--prompt", "x"]) == 2
    assert "leave out --prompt, --seed" in capsys.readouterr().err


def test_the_command_draws_with_the_embedded_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"name": "mug", "prompt": "a blue mug", "seed": 7}))
    options = ["--prompt-file", str(path), "--steps", "1", "--guidance", "1", "--out", str(tmp_path / "out")]
    assert main(["generate", *options]) == 0
    assert "1 images drawn, 1 in" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "mug.png") as image:
        about = json.loads(image.info["loragraft"])
    assert (about["prompt"], about["seed"], about["steps"]) == ("a blue mug", 7, 1)
