"""The house stays liveable: imports point down, nothing shadows another package, files stay readable."""

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "recipes": set(),
    "kernels": set(),
    "data": {"recipes"},
    "quantization": {"kernels"},
    "backbones": {"quantization"},
    "adapters": {"quantization", "recipes"},
    "train": {"recipes", "data", "backbones", "adapters"},
    "evaluation": {"recipes", "data", "backbones", "adapters"},
    "zoo": {"recipes", "data", "backbones", "adapters", "evaluation"},
    "demo": {"data", "evaluation", "zoo"},
}
"""What each folder builds on directly; what those build on is below it too."""
LONGEST_FILE = 450


def below(folder: str) -> set[str]:
    return MAY_IMPORT[folder].union(*(below(other) for other in MAY_IMPORT[folder]))


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_folders(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("loragraft.")} & set(MAY_IMPORT)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_down(folder: str) -> None:
    assert sources(folder), f"{folder}/ is empty"
    for file in sources(folder):
        above = imported_folders(file) - below(folder) - {folder}
        assert not above, (
            f"{file.relative_to(ROOT)} imports {sorted(above)}; {folder} may import {sorted(below(folder))}"
        )


def test_every_folder_is_linked_into_the_package() -> None:
    for folder in MAY_IMPORT:
        link = ROOT / "src" / "loragraft" / folder
        assert link.is_symlink(), f"src/loragraft/{folder} is no link"
        assert link.resolve() == ROOT / folder


def test_top_folders_are_no_packages_by_themselves() -> None:
    """`kernels/__init__.py` would hide the installed package `kernels` whenever the root is on sys.path."""
    assert [folder for folder in MAY_IMPORT if (ROOT / folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_no_file_shadows_an_importable_name(folder: str) -> None:
    """`python train/lora.py` puts train/ first on sys.path: train/types.py would replace the standard library's."""
    installed = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    assert [file.name for file in sources(folder) if file.stem in installed] == []


def test_files_stay_readable() -> None:
    folders = [*MAY_IMPORT, "pretrain", "benchmarks", "src/loragraft"]
    files = {file.resolve() for folder in folders for file in sources(folder)}
    long = {
        str(file.relative_to(ROOT)): n for file in files if (n := len(file.read_text().splitlines())) > LONGEST_FILE
    }
    assert long == {}


def test_nothing_local_is_committed() -> None:
    """The project speaks of itself only: no machine paths in what people read."""
    for file in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "pretrain").rglob("*.md")]:
        text = file.read_text(encoding="utf-8")
        assert "/root/" not in text, f"{file} names a machine path"
        assert "/home/" not in text, f"{file} names a machine path"
