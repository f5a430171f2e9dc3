"""The metrics that papers report, each under its full name: FID, KID, CLIP score, ImageReward, LPIPS, PSNR, SSIM.

What they are computed with is published weights (`weight_files.py`) or a formula (`metrics.py`). A result says what it is:
name, variant, N, and the sha256 of the weights; results of different variants or N are different columns, never one.

    references    generated images against real ones: fid-*, kid-inception
    prompts       each image with what was asked for: clip, image-reward
    pairs         two sets image by image, at equal prompts and seeds: lpips-alex, psnr, ssim
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from torch import Tensor

from loragraft.evaluation.clip_score import ClipScorer
from loragraft.evaluation.features import stored_features
from loragraft.evaluation.image_reward import ImageReward
from loragraft.evaluation.image_sets import read_images
from loragraft.evaluation.inception import FEATURES, Inception, Resizing
from loragraft.evaluation.lpips_alex import LPIPSAlex
from loragraft.evaluation.measure import as_tensor
from loragraft.evaluation.metrics import (
    Interval,
    frechet_distance_interval,
    kernel_distance_interval,
    mean_interval,
    psnr,
    ssim,
)
from loragraft.evaluation.weight_files import (
    ALEXNET,
    BERT_VOCABULARY,
    CLIP_FILES,
    IMAGE_REWARD,
    INCEPTION,
    LPIPS_HEADS,
    WeightFile,
    WeightFolder,
)

Kind = Literal["references", "prompts", "pairs"]
BATCH = 16
FEW = 4
"""Images a side below which a distance of two sets has no interval."""
_NETWORK = "Inception-v3 2015-12-05"


@dataclass(frozen=True)
class Metric:
    """One metric of this module."""

    key: str
    title: str
    variant: str
    kind: Kind
    higher_is_better: bool
    files: tuple[WeightFile, ...] = ()
    digits: int = 3


METRICS = {
    metric.key: metric
    for metric in (
        Metric("fid-clean", "FID", f"clean resizing, {_NETWORK}", "references", False, (INCEPTION,), 2),
        Metric(
            "fid-legacy-pytorch", "FID", f"legacy PyTorch resizing, {_NETWORK}", "references", False, (INCEPTION,), 2
        ),
        Metric(
            "fid-legacy-tensorflow",
            "FID",
            f"legacy TensorFlow resizing, {_NETWORK}",
            "references",
            False,
            (INCEPTION,),
            2,
        ),
        Metric(
            "kid-inception", "KID", f"clean resizing, {_NETWORK}, cubic kernel", "references", False, (INCEPTION,), 5
        ),
        Metric("clip", "CLIP score", "100 cos, OpenAI ViT-L/14", "prompts", True, CLIP_FILES, 2),
        Metric("image-reward", "ImageReward", "v1.0", "prompts", True, (IMAGE_REWARD, BERT_VOCABULARY)),
        Metric("lpips-alex", "LPIPS", "v0.1, AlexNet", "pairs", False, (ALEXNET, LPIPS_HEADS)),
        Metric("psnr", "PSNR in dB", "mean of images, range 1", "pairs", True, digits=2),
        Metric("ssim", "SSIM", "11 x 11 Gaussian window, range 1", "pairs", True),
    )
}
SHORT = {"fid": "fid-clean", "kid": "kid-inception", "lpips": "lpips-alex"}
"""What SVDQuant's and most papers' plain names stand for here; the result carries the full name."""


@dataclass(frozen=True)
class Result:
    """One number and what it is."""

    metric: str
    n: int
    references: int
    """Real images that it was compared with; 0 where there are none."""
    value: float
    low: float | None
    high: float | None
    """95 % interval: bootstrap, of FID jackknife; None where there are too few images for one."""
    notes: tuple[str, ...]
    weights: Mapping[str, str]
    """File -> sha256."""

    @property
    def header(self) -> str:
        """Full name, variant and N: the head of its column."""
        return header(self.metric, self.n, self.references)

    @property
    def cell(self) -> str:
        digits = METRICS[self.metric].digits
        interval = "" if self.low is None else f" [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return f"{self.value:.{digits}f}{interval}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "notes": list(self.notes), "header": self.header}


def header(key: str, n: int, references: int) -> str:
    """`FID (clean resizing, Inception-v3 2015-12-05; N = 5000 against 5000; lower is better)`."""
    metric = METRICS[key]
    against = f" against {references}" if references else " pairs" if metric.kind == "pairs" else ""
    better = "higher" if metric.higher_is_better else "lower"
    return f"{metric.title} ({metric.variant}; N = {n}{against}; {better} is better)"


def chosen(names: str | Sequence[str]) -> list[Metric]:
    """Metrics by name, comma-separated or listed, without repeats. Raises ValueError with the nearest name."""
    found: dict[str, Metric] = {}
    for name in names.split(",") if isinstance(names, str) else names:
        key = SHORT.get(name.strip().lower(), name.strip().lower())
        if key not in METRICS:
            known = [*METRICS, *SHORT]
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"there is no metric {name.strip()!r}; {remedy}")
        found[key] = METRICS[key]
    return list(found.values())


class StandardMetrics:
    """Chosen metrics with their weights, on one device. Everything that is missing is said before anything is computed."""

    def __init__(
        self, names: str | Sequence[str], weights: WeightFolder | None, device: torch.device | str, store: Path
    ) -> None:
        """store: folder for features that are kept. Raises ValueError, and FileNotFoundError for a weight file."""
        self.metrics, self.device, self.store = chosen(names), torch.device(device), store
        needing = [metric.key for metric in self.metrics if metric.files]
        if needing and weights is None:
            listed = "; ".join(
                f"{f.name} from {f.source} ({f.content})"
                for f in dict.fromkeys(f for m in self.metrics for f in m.files)
            )
            raise ValueError(
                f"no weights for {', '.join(needing)}: put the published files into a folder and name it with --weights, where "
                f"--allow-download fetches them too: {listed}"
            )
        self._weights = weights
        for metric in self.metrics:
            for file in metric.files:
                self._path(file)
        self._loaded: dict[str, Any] = {}

    def of_kind(self, kind: Kind) -> list[Metric]:
        return [metric for metric in self.metrics if metric.kind == kind]

    def against_references(
        self, images: Sequence[Path], references: Sequence[Path], read_reference: Callable[[Path], Image], how: str
    ) -> list[Result]:
        """FID and KID of generated files against real ones; `how` names the way that the real ones are read."""
        results = []
        for metric in self.of_kind("references"):
            kept = metric.key.removeprefix("fid-")
            resizing: Resizing = "clean" if metric.key == "kid-inception" else kept  # type: ignore[assignment]
            x_ND = self._inception(images, _read, "generated", resizing)
            y_MD = self._inception(references, read_reference, how, resizing)
            if metric.key == "kid-inception":
                results.append(self._result(metric, len(x_ND), kernel_distance_interval(x_ND, y_MD), len(y_MD)))
            else:
                value = frechet_distance_interval(x_ND, y_MD)
                results.append(self._result(metric, len(x_ND), value, len(y_MD), _rank_note(len(x_ND), len(y_MD))))
        return results

    def with_prompts(self, images: Sequence[Path], prompts: Sequence[str]) -> list[Result]:
        """CLIP score and ImageReward; raises ValueError where files and prompts are not as many."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts do not belong together")
        results = []
        for metric in self.of_kind("prompts"):
            scorer = self._clip() if metric.key == "clip" else self._image_reward()
            parts = [
                scorer([_read(path) for path in images[start : start + BATCH]], prompts[start : start + BATCH])
                for start in range(0, len(images), BATCH)
            ]
            notes: tuple[str, ...] = ()
            if metric.key == "clip" and (cut := self._clip().cut(prompts)):
                notes = (f"{cut} of {len(prompts)} prompts are longer than CLIP reads, and were cut at 77 tokens",)
            results.append(self._result(metric, len(images), mean_interval(torch.cat(parts)), notes=notes))
        return results

    def paired(self, before: Sequence[Path], after: Sequence[Path]) -> list[Result]:
        """LPIPS, PSNR and SSIM between files at equal places; raises ValueError for sets of different sizes."""
        if len(before) != len(after):
            raise ValueError(f"pairs need two sets of one size, got {len(before)} and {len(after)} images")
        metrics = self.of_kind("pairs")
        parts: dict[str, list[Tensor]] = {metric.key: [] for metric in metrics}
        for one, other in zip(before, after, strict=True) if metrics else ():
            a, b = (as_tensor([_read(path)]) for path in (one, other))
            if a.shape != b.shape:
                raise ValueError(f"{one} and {other} differ in size: {tuple(a.shape[-2:])} and {tuple(b.shape[-2:])}")
            for metric in metrics:
                parts[metric.key].append(self._of_pair(metric.key, a, b))
        results = []
        for metric in metrics:
            values = torch.cat(parts[metric.key]).double()
            finite = values[torch.isfinite(values)]
            if not len(finite):
                raise ValueError(f"{metric.title}: all {len(values)} pairs are equal images, there is no mean")
            same = len(values) - len(finite)
            notes = (f"{same} of {len(values)} pairs are equal images and left out of the mean",) if same else ()
            results.append(self._result(metric, len(finite), mean_interval(finite), notes=notes))
        return results

    def _of_pair(self, key: str, a: Tensor, b: Tensor) -> Tensor:
        if key == "lpips-alex":
            network = self._once(
                "lpips", lambda: LPIPSAlex.load(self._path(ALEXNET), self._path(LPIPS_HEADS), self.device)
            )
            distance: Tensor = network(a, b)
            return distance
        return psnr(a, b) if key == "psnr" else ssim(a, b)

    def _inception(self, paths: Sequence[Path], read: Callable[[Path], Image], how: str, resizing: Resizing) -> Tensor:
        def extract(images: Sequence[Image]) -> Tensor:
            network: Inception = self._once("inception", lambda: Inception(self._path(INCEPTION), self.device))
            return network(images, resizing)

        return stored_features(self.store, f"{self._digests((INCEPTION,))} {resizing}", paths, read, how, extract)

    def _clip(self) -> ClipScorer:
        scorer: ClipScorer = self._once("clip", lambda: ClipScorer.load(self._path(CLIP_FILES[0]).parent, self.device))
        return scorer

    def _image_reward(self) -> ImageReward:
        def load() -> ImageReward:
            return ImageReward.load(self._path(IMAGE_REWARD), self._path(BERT_VOCABULARY), self.device)

        scorer: ImageReward = self._once("image-reward", load)
        return scorer

    def _once(self, name: str, load: Callable[[], Any]) -> Any:
        if name not in self._loaded:
            self._loaded[name] = load()
        return self._loaded[name]

    def _path(self, file: WeightFile) -> Path:
        assert self._weights is not None  # the constructor asked for it
        return self._weights.path(file)

    def _digests(self, files: Sequence[WeightFile]) -> dict[str, str]:
        assert self._weights is not None or not files
        return {file.name: self._weights.digest(file) for file in files} if self._weights else {}

    def _result(
        self, metric: Metric, n: int, value: Interval, references: int = 0, notes: Sequence[str] = ()
    ) -> Result:
        few = n < 2 or (metric.kind == "references" and min(n, references) < FEW)  # draws of so few are one draw
        free = [
            f"{file.name} has no published sha256; the one found is stated" for file in metric.files if not file.sha256
        ]
        low, high = (None if few or math.isnan(bound) else bound for bound in (value.low, value.high))
        found = self._digests(metric.files)
        return Result(metric.key, n, references, value.value, low, high, (*notes, *free), found)


def _rank_note(n: int, m: int) -> tuple[str, ...]:
    if min(n, m) > FEATURES:
        return ()
    return (
        f"{min(n, m)} images span at most {min(n, m) - 1} of {FEATURES} dimensions: this FID is far above that of many images; "
        "read it against the same N and M only, and prefer KID",
    )


def _read(path: Path) -> Image:
    return read_images([path])[0]
