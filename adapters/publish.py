"""Publish a finished run to a folder, and list what such a folder holds. Nothing here touches a network."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from loragraft.adapters.card import adapter_card
from loragraft.adapters.checkpoint import load_adapter


def publish_folder(run: Path, zoo: Path) -> Path:
    """Copies adapter, card, score and the last samples of `run` to `zoo`/<name>; returns that folder.

    The folder appears as a whole or not at all. Raises ValueError if the run is not finished or the name is taken by
    another adapter (publishing the same one again changes nothing).
    """
    source = run / "adapter" / "pytorch_lora_weights.safetensors"
    if not source.exists():
        raise ValueError(f"{run} holds no finished adapter: give the folder that training wrote, after it ended")
    adapter = load_adapter(source)
    target = zoo / adapter.name
    if target.exists():
        if (target / source.name).read_bytes() == source.read_bytes():
            return target
        raise ValueError(f"{target} holds another adapter of that name: move it away, or give the recipe another name")
    score_file = run / "score.json"
    score = json.loads(score_file.read_text(encoding="utf-8")) if score_file.exists() else None
    zoo.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=zoo, prefix=".publishing-") as temporary:
        staged = Path(temporary) / adapter.name
        staged.mkdir()
        shutil.copy2(source, staged)
        (staged / "README.md").write_text(adapter_card(adapter, score), encoding="utf-8")
        if score is not None:
            shutil.copy2(score_file, staged)
        for picture in sorted((run / "samples").glob("*.png"))[-1:]:
            shutil.copy2(picture, staged / "samples.png")
        os.replace(staged, target)
    return target


def list_published(zoo: Path) -> list[tuple[str, dict[str, Any]]]:
    """(name, metadata) of every adapter in a published folder, by name. Raises ValueError if there is no such folder."""
    if not zoo.is_dir():
        raise ValueError(f"{zoo} is no folder: give the one that `loragraft publish --to` wrote")
    adapters = [load_adapter(folder) for folder in sorted(zoo.iterdir()) if folder.is_dir() and folder.name[0] != "."]
    return [(adapter.name, adapter.metadata) for adapter in adapters]
