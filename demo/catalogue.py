"""The adapters that a page offers: everything finished in the folders that were named, read again on each look."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from loragraft.adapters.checkpoint import Adapter, load_adapter
from loragraft.adapters.formats.contract import START_NAME
from loragraft.zoo.entry import INDEX
from loragraft.zoo.file_place import open_files


@dataclass(frozen=True)
class Listing:
    """What the folders hold now."""

    adapters: dict[str, Path]
    """Label -> file. A label is the adapter's name, with its place where two have the same name."""
    problems: tuple[str, ...]
    """One sentence for each folder or file that could not be read."""


@dataclass
class Catalogue:
    """Adapters in `folders`: runs, folders of runs, published folders, adapter folders or .safetensors files."""

    folders: Sequence[Path]
    _read: dict[Path, tuple[int, Adapter]] = field(default_factory=dict)
    """File -> (time of change in ns, adapter): a file is read again only if it changed."""

    def listing(self) -> Listing:
        """Looks into the folders. Nothing is raised: what cannot be read is among `problems`."""
        problems: list[str] = []
        named: list[tuple[str, Path]] = []
        for folder in self.folders:
            if not folder.exists():
                problems.append(
                    f"{folder}: no such folder. Training writes runs/NAME, publishing the folder after --to"
                )
            try:
                files = adapter_files(folder)
            except ValueError as error:
                problems.append(str(error))
                continue
            for file in files:
                try:
                    named.append((self._load(file).name, file))
                except (ValueError, OSError) as error:
                    problems.append(str(error))
        names = [name for name, _ in named]
        labelled = {name if names.count(name) == 1 else f"{name} ({_place(file)})": file for name, file in named}
        return Listing(dict(sorted(labelled.items())), tuple(problems))

    def load(self, label: str) -> Adapter:
        """The adapter of that label, named by it. Raises ValueError if it is no longer there or damaged."""
        known = self.listing().adapters
        if label not in known:
            raise ValueError(f"adapter {label!r} is not in the folders any more; reload the page to see what is")
        return dataclasses.replace(self._load(known[label]), name=label)

    def _load(self, file: Path) -> Adapter:
        changed = file.stat().st_mtime_ns
        if file not in self._read or self._read[file][0] != changed:
            self._read[file] = changed, load_adapter(file)
        return self._read[file][1]


def adapter_files(folder: Path) -> list[Path]:
    """Adapter files of one run, of an adapter folder, of a folder that holds such or loose files of any dialect (ComfyUI's
    models/loras), or of a zoo; a file stands for itself."""
    if folder.is_file():
        return [folder]
    own = [folder / LORA_WEIGHT_NAME_SAFE, folder / "adapter" / LORA_WEIGHT_NAME_SAFE]
    inside = [
        place / LORA_WEIGHT_NAME_SAFE
        for child in (sorted(folder.iterdir()) if folder.is_dir() else [])
        if child.is_dir() and not child.name.startswith(".")
        for place in (child, child / "adapter")
    ]
    loose = [] if any(file.is_file() for file in own) else sorted(folder.glob("*.safetensors"))
    found = dict.fromkeys([*own, *inside, *_published(folder), *(file for file in loose if file.name != START_NAME)])
    return [file for file in found if file.is_file()]


def _published(folder: Path) -> list[Path]:
    """Of a zoo, the newest version of every adapter that is not yanked. Raises ZooError for a damaged index."""
    if not (folder / INDEX).is_file():
        return []
    usable = [item.entry for item in open_files(str(folder)).listed() if not item.status.yanked]
    newest = {
        entry.name: folder / entry.name / entry.version for entry in usable
    }  # in the index's order: the last wins
    return [path / LORA_WEIGHT_NAME_SAFE for path in newest.values()]


def _place(file: Path) -> str:
    folder = file.parent
    return str(folder.parent if folder.name == "adapter" else folder)
