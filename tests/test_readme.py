"""The README says what the committed results say. (Its commands are run in test_main_job.py.)"""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

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
