"""The folder of one run: everything that a resumed process, a reader or `generate` needs, each file written atomically.

    recipe.yaml          the resolved recipe
    metrics.jsonl        one line per step: step, loss, learning_rate, grad_norm, validation_loss where measured
    checkpoint.pt        adapter, optimizer, scheduler, step: the state after `step` whole steps
    samples/             step_000400.png
    adapter/             pytorch_lora_weights.safetensors, at the end; start.safetensors from the start on (adapter.init=loftq)
    summary.json         what the run measured, at the end

Steps draw everything random from (seed, step), so a checkpoint needs no generator state.
"""

import fcntl
import io
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from loragraft.adapters.formats.contract import START_NAME
from loragraft.disk import naming_full_disk, sweep, write_atomic
from loragraft.recipes.load import recipe_hash, recipe_to_dict
from loragraft.recipes.schema import Recipe

STARTED = ("metrics.jsonl", "checkpoint.pt", "summary.json")
"""A folder with any of these holds work of its recipe."""
REMEDY = "Give another folder with --out, or start over with --fresh (the old run is moved aside)."


class RunError(ValueError):
    """A run folder that this run must not touch, or a damaged checkpoint."""


@dataclass
class RunFolder:
    """An open run. `step` counts the whole steps done; `checkpoint` holds the state to resume from, if any."""

    path: Path
    recipe_hash: str
    base_id: str
    step: int = 0
    finished: bool = False
    checkpoint: dict[str, Any] | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    step_seconds: float | None = None
    """Of this process's steps, once they are done; no file has it."""
    data: str | None = None
    """Fingerprint of the data set that is trained on, as `check_data` has it."""
    lock: "FolderLock | None" = None
    """Open while no other process may train here."""

    @classmethod
    def open(
        cls, path: Path, recipe: Recipe, base_id: str, *, fresh: bool = False, exclusive: bool = False
    ) -> "RunFolder":
        """Opens, creates or resumes `path`; `exclusive` keeps other processes out for as long as the result lives.

        Raises RunError when another process trains in the folder, when it holds a run of another recipe or another base,
        a recipe or an adapter that no run put there, or a checkpoint that cannot be read; `fresh` moves such a folder aside
        instead (nothing is deleted).
        """
        if path.is_file():
            raise RunError(f"{path} is a file: give a folder for the run with --out")
        if fresh and path.exists():
            lock = FolderLock(path)
            path.rename(path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
            lock.close()
        run = cls(path=path, recipe_hash=recipe_hash(recipe), base_id=base_id)
        path.mkdir(parents=True, exist_ok=True)
        run.lock = FolderLock(path) if exclusive else None
        for place in (path, run.adapter_folder, path / "samples"):
            sweep(place, older_than_hours=0)
        if any((path / name).exists() for name in STARTED):
            run._resume(recipe)
        else:  # new, or given up before the first step: another recipe may have it
            run._check_free(recipe)
            if exclusive:
                run.start_file.unlink(missing_ok=True)
            write_atomic(path / "recipe.yaml", yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False).encode())
        return run

    def _check_free(self, recipe: Recipe) -> None:
        """Raises RunError where writing here would replace what no run of ours left."""
        file = self.path / "recipe.yaml"
        if file.exists() and not recipe_to_dict(recipe).keys() <= self._stored_recipe().keys():
            raise RunError(f"{file} is not the resolved recipe of a run and would be overwritten. {REMEDY}")
        if self.adapter_file.exists():
            raise RunError(f"{self.adapter_file} is of a run that is not here, and would be overwritten. {REMEDY}")

    def _stored_recipe(self) -> dict[str, Any]:
        """recipe.yaml; empty where it is none."""
        try:
            stored = yaml.safe_load((self.path / "recipe.yaml").read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            return {}
        return stored if isinstance(stored, dict) else {}

    def _resume(self, recipe: Recipe) -> None:
        if not (self.path / "recipe.yaml").exists():
            raise RunError(f"{self.path} holds a run but no recipe.yaml, so nobody can tell whose. {REMEDY}")
        stored = self._stored_recipe()
        if _flat(stored) != _flat(json.loads(json.dumps(recipe_to_dict(recipe)))):
            mine = _flat(json.loads(json.dumps(recipe_to_dict(recipe))))
            theirs = _flat(stored)
            keys = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
            shown = ", ".join(f"{key} ({theirs.get(key)!r} there, {mine.get(key)!r} here)" for key in keys[:4])
            raise RunError(f"{self.path} holds a run of another recipe: {shown}. {REMEDY}")
        if (self.path / "summary.json").exists():
            self.summary = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
            self.finished, self.step = True, int(self.summary["steps"])
            (self.path / "checkpoint.pt").unlink(missing_ok=True)  # killed within `finish`
            return
        file = self.path / "checkpoint.pt"
        if not file.exists():  # killed before the first checkpoint: step 1 comes again
            self._truncate_metrics()
            return
        try:
            checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise RunError(f"{file} cannot be read ({error}). {REMEDY}") from error
        if checkpoint["base_id"] != self.base_id:
            raise RunError(
                f"{file} was trained on base {checkpoint['base_id'][:16]}, but the base here is "
                f"{self.base_id[:16]}. {REMEDY}"
            )
        self.checkpoint, self.step = checkpoint, int(checkpoint["step"])
        self._truncate_metrics()

    def check_data(self, fingerprint: str) -> None:
        """Raises RunError where the checkpoint was trained on another data set than the one of `fingerprint`."""
        self.data = fingerprint
        if self.checkpoint is not None and self.checkpoint.get("data") not in (None, fingerprint):
            raise RunError(
                f"{self.path} was trained to step {self.step} on other data: images, captions or their splits have changed since. "
                f"Put back what was there, and the run goes on. {REMEDY}"
            )

    def _truncate_metrics(self) -> None:
        """Drops the lines after the checkpoint, which the resumed run writes again, and a half-written last line."""
        file = self.path / "metrics.jsonl"
        if file.exists():
            lines = file.read_text(encoding="utf-8").splitlines()[: self.step]
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.step]
            write_atomic(file, "".join(line + "\n" for line in kept).encode())

    @property
    def adapter_folder(self) -> Path:
        return self.path / "adapter"

    @property
    def adapter_file(self) -> Path:
        return self.adapter_folder / "pytorch_lora_weights.safetensors"

    @property
    def start_file(self) -> Path:
        """What a compensating adapter starts from."""
        return self.adapter_folder / START_NAME

    def append_metrics(self, metrics: dict[str, float | int]) -> None:
        """One JSON line. Lines beyond the last checkpoint are written again on resume."""
        path = self.path / "metrics.jsonl"
        with naming_full_disk(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Writes `state` (tensors and plain values) as the state after `self.step` steps; old or new, never half."""
        about = {"step": self.step, "recipe_hash": self.recipe_hash, "base_id": self.base_id, "data": self.data}
        state = {**state, **about}
        content = io.BytesIO()
        torch.save(state, content)
        write_atomic(self.path / "checkpoint.pt", content.getbuffer())

    def finish(self) -> None:
        """Marks the run as done: writes summary.json, then removes the checkpoint that nothing needs any more."""
        self.finished = True
        write_atomic(self.path / "summary.json", (json.dumps(self.summary, indent=1) + "\n").encode())
        (self.path / "checkpoint.pt").unlink(missing_ok=True)


class FolderLock:
    """Keeps other processes out of a folder until it is closed or its process ends, `kill -9` included.

    It matters after ctrl-C under `accelerate launch`: the prompt is back while the run still writes its checkpoint.
    Raises RunError if another process holds the folder.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"another process is training in {path}: wait until it has stopped, or give another folder with --out"
            ) from error

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
