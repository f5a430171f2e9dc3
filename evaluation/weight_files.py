"""The files that standard metrics need: which, where from, with which content; found in one folder, or fetched on request.

A metric carries its standard name only with its published weights: a file of another content is refused, and every result
states the sha256 of what it was computed with. Nothing is fetched unless `allow_download` says so.

    WEIGHTS/inception-2015-12-05.pt                 fid-*, kid-inception
    WEIGHTS/alexnet-owt-7be5be79.pth                lpips-alex
    WEIGHTS/lpips_v0.1_alex.pth                     lpips-alex
    WEIGHTS/clip-vit-large-patch14/...              clip
    WEIGHTS/ImageReward.pt, bert-base-uncased/...   image-reward
"""

import difflib
import hashlib
import urllib.error
from dataclasses import dataclass, field
from pathlib import Path

import torch

from loragraft.disk import naming_full_disk

_CLIP = "https://huggingface.co/openai/clip-vit-large-patch14/resolve/32bd64288804d66eefd0ccbe215aa642df71cc41"


@dataclass(frozen=True)
class WeightFile:
    """One published file."""

    name: str
    """Path below the weights folder."""
    source: str
    """Address that it is published at."""
    sha256: str
    """Hex digest of the published content; empty where none was published: then the tensors' names and shapes are checked by
    whoever loads it, and the digest found is stated as not pinned."""

    @property
    def content(self) -> str:
        return f"sha256 {self.sha256}" if self.sha256 else "sha256 not published"


INCEPTION = WeightFile(
    "inception-2015-12-05.pt",
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
)
ALEXNET = WeightFile(
    "alexnet-owt-7be5be79.pth",
    "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
)
LPIPS_HEADS = WeightFile(
    "lpips_v0.1_alex.pth",
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/alex.pth",
    "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
)
CLIP_FILES = (
    WeightFile(
        "clip-vit-large-patch14/model.safetensors",
        f"{_CLIP}/model.safetensors",
        "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
    ),
    WeightFile(
        "clip-vit-large-patch14/config.json",
        f"{_CLIP}/config.json",
        "8a09b467700c58138c29d53c605b34ebc69beaadd13274a8a2af8ad2c2f4032a",
    ),
    WeightFile(
        "clip-vit-large-patch14/merges.txt",
        f"{_CLIP}/merges.txt",
        "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
    ),
    WeightFile("clip-vit-large-patch14/vocab.json", f"{_CLIP}/vocab.json", ""),
)
IMAGE_REWARD = WeightFile("ImageReward.pt", "https://huggingface.co/THUDM/ImageReward/resolve/main/ImageReward.pt", "")
BERT_VOCABULARY = WeightFile(
    "bert-base-uncased/vocab.txt",
    "https://huggingface.co/google-bert/bert-base-uncased/resolve/main/vocab.txt",
    "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
)


@dataclass
class WeightFolder:
    """A folder of such files."""

    root: Path
    allow_download: bool = False
    _digests: dict[str, str] = field(default_factory=dict)

    def path(self, file: WeightFile) -> Path:
        """Where `file` lies, its content checked once; fetched if it is missing and that is allowed.

        Raises FileNotFoundError naming the file, its source and its sha256, and ValueError for another content.
        """
        path = self.root / file.name
        if not path.is_file():
            if not self.allow_download:
                raise FileNotFoundError(
                    f"{path} is missing{self._nearest(file)}. It is published at {file.source} ({file.content}): put it "
                    "there, or let it be fetched with --allow-download"
                )
            _fetch(file, path)
        if file.name not in self._digests:
            digest = file_sha256(path)
            if file.sha256 and digest != file.sha256:
                raise ValueError(
                    f"{path} is not the published file: its sha256 is {digest}, expected {file.sha256}. A score of it would "
                    f"carry a wrong name; take the file from {file.source}"
                )
            self._digests[file.name] = digest
        return path

    def digest(self, file: WeightFile) -> str:
        """sha256 of a file that `path` has found."""
        self.path(file)
        return self._digests[file.name]

    def _nearest(self, file: WeightFile) -> str:
        wanted = Path(file.name)
        folder = self.root / wanted.parent
        if not folder.is_dir():
            return f" (there is no folder {folder})"
        near = difflib.get_close_matches(wanted.name, sorted(p.name for p in folder.iterdir()), n=1)
        return f"; {folder / near[0]} has another name" if near else ""


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(file: WeightFile, path: Path) -> None:
    """torch's downloader writes beside the target, compares the digest and renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming_full_disk(path):
            torch.hub.download_url_to_file(file.source, str(path), hash_prefix=file.sha256 or None)
    except urllib.error.URLError as error:
        raise ValueError(f"{path} could not be fetched from {file.source} ({error})") from error
    except RuntimeError as error:  # a digest that differs
        raise ValueError(f"{file.source} gave another content than expected ({error})") from error
