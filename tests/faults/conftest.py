"""A user's folder with a recipe, images and a run that is half done: what a fault must leave as it is."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from loragraft import cli
from loragraft.backbones.load import load_backbone
from loragraft.backbones.spec import Backbone
from loragraft.train import lora

RECIPE = """\
extends: _base
data: {folder: ./photos, validation_fraction: 0.2}
adapter: {rank: 4}
train: {steps: 2, batch_size: 2, threads: 1, checkpoint_every: 1}
sample: {steps: 1, guidance: 1, prompts: [a red disc]}
tracking: {mode: disabled}
"""


@dataclass(frozen=True)
class User:
    """Working directory, command and what they see."""

    root: Path
    capture: pytest.CaptureFixture[str]

    @property
    def photos(self) -> Path:
        return self.root / "photos"

    @property
    def run(self) -> Path:
        return self.root / "runs" / "mine"

    def draw(self, number: int) -> None:
        """photos/<number>.png, a coloured disc."""
        picture = Image.new("RGB", (96, 96), "white")
        ImageDraw.Draw(picture).ellipse((10, 10, 30 + 6 * number, 80), fill=("red", "green", "blue")[number % 3])
        picture.save(self.photos / f"{number}.png")

    def train(self, *options: str) -> tuple[int, str]:
        """Exit code and stderr of `loragraft train --recipe mine.yaml ...`."""
        return self.command("train", "--recipe", "mine.yaml", "--cpu", *options)

    def command(self, *arguments: str) -> tuple[int, str]:
        self.capture.readouterr()
        code = cli.main(list(arguments))
        return code, self.capture.readouterr().err

    def tree(self, *folders: str) -> dict[str, str]:
        """Path -> sha256 of every file, hidden ones too; not the image hashes that the overlap check may add to its cache."""
        places = [self.root / folder for folder in folders] if folders else [self.root]
        files = sorted(path for place in places for path in place.rglob("*") if path.is_file())
        files = [path for path in files if path.parent.name != "overlap"]
        return {str(p.relative_to(self.root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[User]:
    threads = torch.get_num_threads()
    found = User(tmp_path, capsys)
    found.photos.mkdir()
    for number in range(6):
        found.draw(number)
        (found.photos / f"{number}.txt").write_text(f"a disc number {number}")
    (tmp_path / "mine.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAGRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORAGRAFT_TRACEBACK", raising=False)
    yield found
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """Loaded once; for commands that fail before they train."""
    return load_backbone("pocket", "native", "cpu", tmp_path_factory.mktemp("unused"))


@pytest.fixture
def loaded(pocket: Backbone, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    """The command finds `pocket` in memory."""
    monkeypatch.setattr(lora, "load_backbone", lambda *_: pocket)
    return pocket


@pytest.fixture
def limit_file_size() -> Iterator[Callable[[int], None]]:
    """Files of this process may grow to so many bytes: a write beyond fails as on a full disk, with EFBIG."""
    resource = pytest.importorskip("resource", reason="limits on file sizes are a POSIX thing")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda count: resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
