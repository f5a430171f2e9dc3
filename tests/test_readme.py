"""The README says what the committed results say. (Its commands are run in test_main_job.py.)"""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def test_figures_come_from_the_committed_results(benchmark_module: Callable[[str], ModuleType]) -> None:
    module = benchmark_module("readme_figures")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert module.START in readme
    assert module.with_figures(readme) == readme, "run: python benchmarks/readme_figures.py --write"


def test_links_and_pictures_exist() -> None:
    for file in ("README.md", "CONTRIBUTING.md", "pretrain/README.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        targets = re.findall(r"\]\(([^)#]+)\)", text)
        missing = [
            target for target in targets if "://" not in target and not (ROOT / file).parent.joinpath(target).exists()
        ]
        assert missing == [], f"{file} points to {missing}"


def test_first_steps_beside_others_are_dashes(
    benchmark_module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`flux_training.py all` leaves them null, but for `ours_1024`, which runs alone."""
    module = benchmark_module("readme_figures")
    read = module._read

    def beside(name: str) -> dict[str, Any]:
        result: dict[str, Any] = read(name)
        if name == "flux_training":
            for key, part in result["parts"].items():
                part |= {"timed_alone": True, **({} if key == "ours_1024" else {"first_step_seconds": None})}
        return result

    ours = read("flux_training")["parts"]["ours_1024"]["first_step_seconds"]
    monkeypatch.setattr(module, "_read", beside)
    text = module.figures()
    assert re.search(rf"^\| ours, `gelu` \|.*\| {ours:.0f} \|$", text, re.MULTILINE)
    assert re.search(r"^\| ours, `block` \|.*\| – \|$", text, re.MULTILINE)
    assert "nothing beside it; the others ran side by side" in text
    assert "its first step after" not in text
