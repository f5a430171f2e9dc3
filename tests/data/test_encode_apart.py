"""Buckets, resolutions and caption variants in the cache, and several processes that fill one cache together."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from torch import Tensor

from loragraft.data import encode
from loragraft.data.buckets import Sizes
from loragraft.data.dataset import LatentCache
from loragraft.data.encode import encode_dataset
from loragraft.data.images import load_pixels
from loragraft.data.order import BatchOrder
from loragraft.data.sample import Sample

SHAPES = ((40, 40), (80, 30), (30, 80), (70, 60))  # (width, height) of the images, in turn
BUCKETS = Sizes((32,), buckets=True)


class Encoder:
    """Writes down what it encodes, one line an item, in a file that several processes share; waits `pause` seconds an image."""

    def __init__(self, log: Path, pause: float = 0.0) -> None:
        self.log, self.pause = log, pause

    def note(self, what: str, items: list[str]) -> None:
        with self.log.open("a") as file:
            file.write("".join(f"{what} {item}\n" for item in items))

    def noted(self, what: str) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.removeprefix(f"{what} ") for line in lines if line.startswith(what)]

    def encode_images(self, pixels: Tensor) -> Tensor:
        for picture in pixels:
            time.sleep(self.pause)
            self.note("image", [f"{picture[0].mean():.4f} {tuple(pixels.shape[2:])}"])
        return pixels[:, :, ::8, ::8]

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        self.note("text", prompts)
        length = torch.tensor([float(len(p)) for p in prompts])
        return {"prompt_embeds": length.view(-1, 1, 1).expand(-1, 3, 5), "pooled_prompt_embeds": length.view(-1, 1)}


def make_samples(folder: Path, count: int) -> list[Sample]:
    samples = []
    for i in range(count):
        path = folder / f"{i}.png"
        if not path.exists():
            Image.new("RGB", SHAPES[i % len(SHAPES)], (i * 7 % 256, 0, 0)).save(path)
        samples.append(Sample(path, f"caption {i // 2}", "test" if i % 8 == 7 else "train", f"c{i}", "CC0-1.0"))
    return samples


def fill(samples: list[Sample], cache: Path, encoder: Encoder, sizes: Sizes = BUCKETS, shard: int = 4) -> LatentCache:
    arguments = (samples, encoder.encode_images, encoder.encode_text, "enc", 32, cache)
    return encode_dataset(*arguments, batch_size=3, progress=False, shard_samples=shard, sizes=sizes)


def test_every_sample_at_the_size_of_its_bucket_and_every_caption_once(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path / "log")
    cache = fill(make_samples(tmp_path, 16), tmp_path / "cache", encoder)
    assert len(encoder.noted("image")) == 16
    assert sorted(encoder.noted("text")) == sorted(["", *(f"caption {i}" for i in range(8))])
    train = cache.split("train")
    assert len(train) == 14
    for i, shape in enumerate(train.shapes):
        item = train[i]
        assert isinstance(item["latents"], Tensor)
        assert tuple(item["latents"].shape) == (3, -(-shape[0] // 8), -(-shape[1] // 8))
    assert set(train.shapes) == {(32, 32), (16, 48), (48, 16)}
    order = BatchOrder(train.shapes, 2, seed=0)
    for number in range(20):
        assert train.batch(*order(number))["prompt_embeds"].shape == (2, 3, 5)
    again = fill(list(reversed(make_samples(tmp_path, 16))), tmp_path / "cache", encoder)
    assert len(encoder.noted("image")) == 16
    assert again.fingerprint == cache.fingerprint


def test_several_resolutions_share_the_captions(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path / "log")
    cache = fill(make_samples(tmp_path, 8), tmp_path / "cache", encoder, Sizes((16, 32), buckets=True))
    assert sorted(set(cache.split("train").shapes)) == [(16, 16), (16, 48), (32, 32), (48, 16)]
    assert len(encoder.noted("image")) == len(cache) > 8
    assert len(encoder.noted("text")) == 1 + 4
    assert len(cache.split("test")) == 1, "a held-out image counts once"


def test_each_epoch_shows_the_next_variant(tmp_path: Path) -> None:
    samples = [
        Sample(s.image, "a, b", s.split, s.concept, "", captions=("a, b", "b, aa", "aaa")) if i == 0 else s
        for i, s in enumerate(make_samples(tmp_path, 3))
    ]
    encoder = Encoder(tmp_path / "log")
    arguments = (samples, encoder.encode_images, encoder.encode_text, "enc", 32, tmp_path / "cache")
    train = encode_dataset(*arguments, progress=False).split("train")
    assert train.shapes == [(32, 32)] * 3, "squares, unless asked otherwise"
    shown = [train.item(0, epoch) for epoch in range(6)]
    assert {str(item["caption"]) for item in shown[:3]} == {"a, b", "b, aa", "aaa"}
    assert [item["caption"] for item in shown[:3]] == [item["caption"] for item in shown[3:]]
    for item in shown:
        assert isinstance(item["pooled_prompt_embeds"], Tensor)
        assert item["pooled_prompt_embeds"].tolist() == [len(str(item["caption"]))]
    assert {train.item(1, epoch)["caption"] for epoch in range(4)} == {"caption 0"}


def test_a_shard_is_written_before_it_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "SHARD_BYTES", 200)  # a latent of 3 x 4 x 4 takes 96
    samples = [s for i, s in enumerate(make_samples(tmp_path, 40)) if i % 4 == 0]
    cache = fill(samples, tmp_path / "cache", Encoder(tmp_path / "log"), shard=20)
    sizes = [len(json.loads(m.read_text())["samples"]) for m in cache.store.folder.glob("*.json")]
    assert sorted(sizes) == [1, 3, 3, 3]


@pytest.mark.parametrize("readers", [1, 3])
def test_decoding_ahead_changes_nothing_and_names_a_corrupt_image(tmp_path: Path, readers: int) -> None:
    samples = make_samples(tmp_path, 16)
    encoder = Encoder(tmp_path / "log")
    arguments = (samples, encoder.encode_images, encoder.encode_text, "enc", 32)
    options = {"batch_size": 3, "progress": False, "shard_samples": 4, "sizes": BUCKETS}
    plain = encode_dataset(*arguments, tmp_path / "cache", **options).split("train")
    ahead = encode_dataset(*arguments, tmp_path / "other", **options, readers=readers).split("train")
    for i in range(len(plain)):
        assert torch.equal(plain.batch([i])["latents"], ahead.batch([i])["latents"])
    samples[9].image.write_bytes(samples[9].image.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"9\.png is not a readable image"):
        encode_dataset(*arguments, tmp_path / "third", **options, readers=readers)
    assert not any(thread.name.startswith("pictures") for thread in threading.enumerate())


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_pixels_are_right_and_the_threads_end(seed: int, tmp_path: Path) -> None:
    """One or several readers, a corrupt image or none, leaving early, ctrl-C at any moment, leaving included."""
    random = Random(seed)
    samples = make_samples(tmp_path, 12)
    expected = [load_pixels(sample.image, (32, 32)) for sample in samples]
    (tmp_path / "corrupt").mkdir()
    corrupt = make_samples(tmp_path / "corrupt", 12)
    corrupt[5].image.write_bytes(b"nothing")
    before, interrupted = signal.signal(signal.SIGALRM, signal.default_int_handler), 0
    for _ in range(30):
        leaves, bad = random.randint(1, 12), random.random() < 0.2
        given, number = corrupt if bad else samples, 1
        pictures = encode.Pictures(lambda pixels: pixels, (32, 32), readers=random.randint(1, 4))
        pictures.ahead(given)
        assert torch.equal(pictures([given[0]])["latents"][0], expected[0])  # starts the threads
        try:
            try:
                with pictures:
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 2e-3))
                    while number < leaves:
                        assert torch.equal(pictures([given[number]])["latents"][0], expected[number])
                        number += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupted += 1
        except ValueError:
            assert bad and number == 5
        leaving = threading.Thread(target=pictures.__exit__, daemon=True)
        leaving.start()
        leaving.join(timeout=120)
        assert not leaving.is_alive(), "leaving stands still"
        deadline = time.monotonic() + 120  # nobody joins a thread twice whose join was interrupted, but it ends
        while any(thread.name == "pictures" for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.001)
    signal.signal(signal.SIGALRM, before)
    assert interrupted


def test_a_corrupt_image_in_a_bucket_is_named_and_the_other_buckets_are_kept(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 16)
    whole = samples[9].image.read_bytes()
    samples[9].image.write_bytes(whole[: len(whole) // 2])
    encoder = Encoder(tmp_path / "log")
    with pytest.raises(ValueError, match=r"9\.png is not a readable image .*; repair it, or take it out of the set"):
        fill(samples, tmp_path / "cache", encoder)
    before = len(encoder.noted("image"))
    assert not list((tmp_path / "cache").rglob("*.claim"))
    samples[9].image.write_bytes(whole)
    cache = fill(samples, tmp_path / "cache", encoder)
    assert len(cache) == 16
    assert before > 0
    assert len(encoder.noted("image")) - before < 16


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_encode_apart as t
folder, count, pause, ready = Path({folder!r}), {count}, {pause}, Path({ready!r})
ready.touch()
while len(list(folder.glob("ready-*"))) < {processes}:
    time.sleep(0.01)
t.fill(t.make_samples(folder, count), folder / "cache", t.Encoder(folder / "log", pause), shard=2)
"""


def start(folder: Path, count: int, name: str, processes: int, pause: float = 0.03) -> "subprocess.Popen[bytes]":
    script = SCRIPT.format(
        tests=str(Path(__file__).parent), folder=str(folder), count=count, pause=pause,
        ready=str(folder / f"ready-{name}"), processes=processes,
    )  # fmt: skip
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)


def until(happened: Callable[[], bool]) -> None:
    """Waits for it."""
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_runs_with_overlapping_data_encode_every_sample_once(tmp_path: Path) -> None:
    make_samples(tmp_path, 16)
    runs = [start(tmp_path, count, str(count), 2) for count in (16, 12)]
    for run in runs:
        assert run.wait(timeout=100) == 0, run.communicate()[1].decode()
    encoder = Encoder(tmp_path / "log")
    assert len(encoder.noted("image")) == 16
    assert sorted(encoder.noted("text")) == sorted(["", *(f"caption {i}" for i in range(8))])
    fill(make_samples(tmp_path, 16), tmp_path / "cache", encoder)
    assert len(encoder.noted("image")) == 16
    assert not list((tmp_path / "cache").rglob("*.claim"))


def test_a_killed_run_gives_its_claims_back_to_the_one_that_waits(tmp_path: Path) -> None:
    make_samples(tmp_path, 16)
    slow = start(tmp_path, 16, "slow", 1, pause=600)
    until(lambda: any((tmp_path / "cache").rglob("*.claim")))
    other = start(tmp_path, 16, "other", 1, pause=0.01)
    until(lambda: len(Encoder(tmp_path / "log").noted("image")) >= 14)
    assert other.poll() is None, "it waits for the claims of the slow one"
    slow.send_signal(signal.SIGKILL)
    slow.wait(timeout=60)
    assert other.wait(timeout=120) == 0, other.communicate()[1].decode()
    encoder = Encoder(tmp_path / "log")
    fill(make_samples(tmp_path, 16), tmp_path / "cache", encoder)
    assert len(encoder.noted("image")) == 16, "the slow one had encoded none"
    assert not list((tmp_path / "cache").rglob("*.claim"))
