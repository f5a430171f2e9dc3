"""Standard metrics from files to results: names, N, notes and hashes; what is refused; networks are stand-ins."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from loragraft.evaluation import standard
from loragraft.evaluation.metrics import frechet_distance, kernel_distance
from loragraft.evaluation.standard import METRICS, SHORT, Result, StandardMetrics, chosen
from loragraft.evaluation.weight_files import ALEXNET, INCEPTION, LPIPS_HEADS, WeightFolder


def pictures(folder: Path, count: int, seed: int, edge: int = 32) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    rng, paths = np.random.default_rng(seed), []
    for number in range(count):
        path = folder / f"{number:04d}.png"
        Image.fromarray(rng.integers(0, 256, (edge, edge, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


class FakeInception:
    """2048 numbers of each image, others for each resizing."""

    def __init__(self, path: Path, device: Any) -> None:
        self.path = path

    def __call__(self, images: Any, resizing: str) -> torch.Tensor:
        rows = [torch.from_numpy(np.array(image.resize((32, 32)), np.float64)).flatten()[:2048] for image in images]
        return torch.stack(rows) / (255 + len(resizing))


class FakeScorer:
    """Prompts of more than 20 letters are long; the score is their length."""

    def cut(self, prompts: Any) -> int:
        return sum(len(prompt) > 20 for prompt in prompts)

    def __call__(self, images: Any, prompts: Any) -> torch.Tensor:
        return torch.tensor([float(len(prompt)) for prompt in prompts], dtype=torch.float64)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WeightFolder:
    """A folder where every file is present, its content small and not pinned."""
    root = tmp_path / "weights"
    for key, metric in METRICS.items():
        files = tuple(replace(file, sha256="") for file in metric.files)
        for file in files:
            (root / file.name).parent.mkdir(parents=True, exist_ok=True)
            (root / file.name).write_bytes(file.name.encode())
        monkeypatch.setitem(METRICS, key, replace(metric, files=files))
    for name in ("INCEPTION", "ALEXNET", "LPIPS_HEADS", "IMAGE_REWARD", "BERT_VOCABULARY"):
        monkeypatch.setattr(standard, name, replace(getattr(standard, name), sha256=""))
    monkeypatch.setattr(standard, "CLIP_FILES", METRICS["clip"].files)
    monkeypatch.setattr(standard, "Inception", FakeInception)
    monkeypatch.setattr("loragraft.evaluation.standard.ClipScorer.load", lambda *_: FakeScorer())
    monkeypatch.setattr("loragraft.evaluation.standard.ImageReward.load", lambda *_: FakeScorer())
    return WeightFolder(root)


def open_metrics(names: str, weights: WeightFolder | None, tmp_path: Path) -> StandardMetrics:
    return StandardMetrics(names, weights, "cpu", tmp_path / "store")


def test_names_are_full_and_unknown_ones_refused() -> None:
    assert [metric.key for metric in chosen("fid, lpips,psnr,fid-clean")] == ["fid-clean", "lpips-alex", "psnr"]
    assert set(SHORT.values()) <= set(METRICS)
    with pytest.raises(ValueError, match="no metric 'lpip'; did you mean lpips"):
        chosen("lpip")
    with pytest.raises(ValueError, match="there are fid-clean, "):
        chosen("q")


def test_fid_and_kid_with_their_names_n_and_notes(weights: WeightFolder, tmp_path: Path) -> None:
    made, real = pictures(tmp_path / "made", 6, 0), pictures(tmp_path / "real", 9, 1)
    metrics = open_metrics("fid,fid-legacy-pytorch,kid", weights, tmp_path)
    fid, legacy, kid = metrics.against_references(made, real, lambda path: Image.open(path).convert("RGB"), "plain")
    x, y = (FakeInception(Path(), "cpu")([Image.open(p) for p in paths], "clean") for paths in (made, real))
    assert fid.value == pytest.approx(frechet_distance(x, y), rel=1e-9)
    assert kid.value == pytest.approx(kernel_distance(x, y), rel=1e-9)
    assert kid.low is not None and kid.high is not None and kid.low < kid.value < kid.high
    assert legacy.value != pytest.approx(fid.value, rel=1e-3), "each resizing has features of its own in the store"
    assert fid.header == "FID (clean resizing, Inception-v3 2015-12-05; N = 6 against 9; lower is better)"
    assert "legacy PyTorch resizing" in legacy.header
    assert "6 images span at most 5 of 2048 dimensions" in fid.notes[0]
    assert list(fid.weights) == [INCEPTION.name] and len(fid.weights[INCEPTION.name]) == 64
    assert fid.low is not None and fid.high is not None and fid.low < fid.value < fid.high


def test_sets_of_two_have_a_distance_and_no_interval(weights: WeightFolder, tmp_path: Path) -> None:
    made, real = pictures(tmp_path / "made", 2, 0), pictures(tmp_path / "real", 9, 1)
    for found in open_metrics("fid,kid", weights, tmp_path).against_references(made, real, Image.open, "plain"):
        assert (found.n, found.low, found.high) == (2, None, None)


def test_a_set_is_no_less_than_nothing_away_from_itself(weights: WeightFolder, tmp_path: Path) -> None:
    made = pictures(tmp_path / "made", 4, 0)
    (same,) = open_metrics("fid", weights, tmp_path).against_references(made, made, Image.open, "plain")
    assert same.value == pytest.approx(0, abs=1e-6)
    assert same.cell.startswith("0.00 [")


def test_the_rank_note_ends_with_enough_images() -> None:
    assert standard._rank_note(2048, 5000) != () and standard._rank_note(2049, 5000) == ()


def test_scores_of_prompts(weights: WeightFolder, tmp_path: Path) -> None:
    made = pictures(tmp_path / "made", 3, 0)
    clip, reward = open_metrics("clip,image-reward", weights, tmp_path).with_prompts(made, ["a", "b" * 21, "ccc"])
    assert clip.value == reward.value == pytest.approx(25 / 3)
    assert clip.header == "CLIP score (100 cos, OpenAI ViT-L/14; N = 3; higher is better)"
    assert clip.notes[0] == "1 of 3 prompts are longer than CLIP reads, and were cut at 77 tokens"
    assert any("ImageReward.pt has no published sha256" in note for note in reward.notes)
    with pytest.raises(ValueError, match="3 images and 2 prompts"):
        open_metrics("clip", weights, tmp_path).with_prompts(made, ["a", "b"])


def test_pairs_need_no_weights_for_formulas(tmp_path: Path) -> None:
    before = pictures(tmp_path / "a", 3, 0)
    after = pictures(tmp_path / "b", 3, 0)
    for path, step in ((after[0], 8), (after[1], 16)):
        source = np.asarray(Image.open(before[after.index(path)]), np.int16)
        Image.fromarray(np.where(source < 128, source + step, source - step).astype(np.uint8)).save(path)
    psnr, ssim = open_metrics("psnr,ssim", None, tmp_path).paired(before, after)
    steps = [20 * np.log10(255 / step) for step in (8, 16)]
    assert psnr.value == pytest.approx(np.mean(steps), abs=1e-6), "the mean of images, not of errors"
    assert (psnr.n, ssim.n) == (2, 3)
    assert psnr.notes == ("1 of 3 pairs are equal images and left out of the mean",)
    assert psnr.header == "PSNR in dB (mean of images, range 1; N = 2 pairs; higher is better)"
    (single,) = open_metrics("psnr", None, tmp_path).paired(before[:1], after[:1])
    assert (single.n, single.low, single.high) == (1, None, None), "one image has no interval"
    with pytest.raises(ValueError, match="all 3 pairs are equal images"):
        open_metrics("psnr", None, tmp_path).paired(before, before)
    with pytest.raises(ValueError, match="got 3 and 2 images"):
        open_metrics("psnr", None, tmp_path).paired(before, after[:2])
    small = pictures(tmp_path / "small", 3, 0, edge=16)
    with pytest.raises(ValueError, match="differ in size"):
        open_metrics("psnr", None, tmp_path).paired(before, small)


def test_lpips_reads_the_two_files(weights: WeightFolder, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = {
        "0": (64, 3, 11, 11),
        "3": (192, 64, 5, 5),
        "6": (384, 192, 3, 3),
        "8": (256, 384, 3, 3),
        "10": (256, 256, 3, 3),
    }
    state = {f"features.{n}.weight": torch.randn(s) * 0.05 for n, s in shapes.items()}
    state |= {f"features.{n}.bias": torch.zeros(s[0]) for n, s in shapes.items()}
    torch.save(state, weights.root / ALEXNET.name)
    heads = {f"lin{i}.model.1.weight": torch.rand(1, s[0], 1, 1) for i, s in enumerate(shapes.values())}
    torch.save(heads, weights.root / LPIPS_HEADS.name)
    before, after = pictures(tmp_path / "a", 2, 0), pictures(tmp_path / "b", 2, 1)
    (found,) = open_metrics("lpips", weights, tmp_path).paired(before, after)
    assert found.value > 0 and set(found.weights) == {ALEXNET.name, LPIPS_HEADS.name}
    assert found.header == "LPIPS (v0.1, AlexNet; N = 2 pairs; lower is better)"


def test_everything_missing_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"no weights for fid-clean.*{INCEPTION.source}.*{INCEPTION.sha256}"):
        open_metrics("fid,psnr", None, tmp_path)
    with pytest.raises(FileNotFoundError, match="alexnet-owt-7be5be79"):
        open_metrics("lpips", WeightFolder(tmp_path), tmp_path)
    (tmp_path / INCEPTION.name).write_bytes(b"another network")
    with pytest.raises(ValueError, match="not the published file"):
        open_metrics("fid", WeightFolder(tmp_path), tmp_path)


def test_a_result_survives_json() -> None:
    result = Result("psnr", 4, 0, 20.0, 19.0, 21.0, ("a note",), {})
    back = json.loads(json.dumps(result.to_dict()))
    assert back.pop("header") == result.header
    assert Result(**{**back, "notes": tuple(back["notes"])}) == result
