"""Module paths: look one up, expand full-path regular expressions, and say what is nearest when nothing matches; files too."""

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The most similar known names, for an error message."""
    found = difflib.get_close_matches(name.replace("\\", ""), list(known), n=count, cutoff=0.3)
    return "nearest: " + ", ".join(found) if found else "nothing similar exists"


def nearest_path(path: Path) -> str:
    """`; did you mean X?` of the first part of `path` that does not exist, or nothing."""
    path = path.absolute()
    parent = next(p for p in path.parents if p.is_dir())
    names = [p.name for p in parent.iterdir()]
    near = difflib.get_close_matches(path.relative_to(parent).parts[0], names, n=1, cutoff=0.5)
    return f"; did you mean {_as_typed(parent / near[0])}?" if near else ""


def _as_typed(path: Path) -> Path:
    """Below the working directory without the way to it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def named_module(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path. Raises KeyError naming the nearest paths."""
    modules = dict(model.named_modules())
    if path not in modules:
        raise KeyError(f"no module {path!r} in {type(model).__name__}; {nearest(path, modules)}")
    return modules[path]


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` where the module at `path` was."""
    parent, _, name = path.rpartition(".")
    setattr(named_module(model, parent) if parent else model, name, new)


def match_paths(patterns: Sequence[str], paths: Sequence[str]) -> dict[str, list[str]]:
    """Each pattern -> the paths that it matches as a whole (`re.fullmatch`).

    Raises ValueError for a malformed pattern and for one that matches nothing.
    """
    matched = {}
    for pattern in patterns:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
        matched[pattern] = [path for path in paths if regex.fullmatch(path)]
        if not matched[pattern]:
            raise ValueError(f"pattern {pattern!r} matches no module path as a whole; {nearest(pattern, paths)}")
    return matched
