"""The cache: reuse, interruption, corruption, another encoder; and the order of batches."""

import json
import logging
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from loragraft.data.cache import default_cache_root
from loragraft.data.dataset import LatentCache, collate
from loragraft.data.encode import encode_dataset
from loragraft.data.order import batch_indices
from loragraft.data.sources import Sample


class Encoder:
    """Counts what it encodes; the outputs identify the inputs."""

    def __init__(self) -> None:
        self.images = 0
        self.texts: list[str] = []

    def encode_images(self, pixels: Tensor) -> Tensor:
        self.images += len(pixels)
        return pixels[:, :, ::4, ::4]

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        self.texts += prompts
        length = torch.tensor([float(len(p)) for p in prompts])
        return {"prompt_embeds": length.view(-1, 1, 1).expand(-1, 3, 5), "pooled_prompt_embeds": length.view(-1, 1)}


def _samples(folder: Path, count: int) -> list[Sample]:
    samples = []
    for i in range(count):
        path = folder / f"{i}.png"
        Image.new("RGB", (8, 8), (i * 7 % 256, i * 13 % 256, i * 29 % 256)).save(path)
        samples.append(Sample(path, "x" * (i + 1), "test" if i % 5 == 4 else "train", f"c{i}", "CC0-1.0"))
    return samples


def _encode(samples: Sequence[Sample], cache: Path, encoder: Encoder, encoder_id: str = "enc") -> LatentCache:
    return encode_dataset(
        samples,
        encoder.encode_images,
        encoder.encode_text,
        encoder_id,
        8,
        cache,
        batch_size=3,
        progress=False,
        shard_samples=4,
    )


def test_content_splits_and_dtype(tmp_path: Path) -> None:
    samples = _samples(tmp_path, 10)
    cache = _encode(samples, tmp_path / "cache", Encoder())
    assert len(cache) == 10
    assert (len(cache.split("train")), len(cache.split("test")), len(cache.split("validation"))) == (8, 2, 0)
    item = cache.split("test")[1]
    assert item["caption"] == samples[9].caption
    assert isinstance(item["latents"], Tensor)
    assert item["latents"].dtype == torch.bfloat16
    expected = torch.tensor([63, 117, 261 % 256]) / 127.5 - 1
    assert torch.equal(item["latents"][:, 0, 0], expected.to(torch.bfloat16))
    batch = cache.split("train").batch([0, 7])
    assert batch["prompt_embeds"].shape == (2, 3, 5)
    assert batch["pooled_prompt_embeds"].flatten().tolist() == [1.0, 9.0]
    assert batch["caption"] == ["x", "x" * 9]
    assert cache.empty["prompt_embeds"].shape == (3, 5)
    assert cache.empty["pooled_prompt_embeds"].tolist() == [0.0]


def test_second_run_encodes_nothing_and_new_samples_only_themselves(tmp_path: Path) -> None:
    samples = _samples(tmp_path, 10)
    first = _encode(samples, tmp_path / "cache", Encoder())
    encoder = Encoder()
    again = _encode(list(reversed(samples)), tmp_path / "cache", encoder)
    assert (encoder.images, encoder.texts) == (0, [])
    assert again.fingerprint == first.fingerprint
    more = _samples(tmp_path, 12)
    changed = [Sample(more[0].image, "another caption", "train", "c0", ""), *more[1:]]
    assert _encode(changed, tmp_path / "cache", encoder).fingerprint != first.fingerprint
    assert encoder.images == 3


def test_equal_samples_are_encoded_once(tmp_path: Path) -> None:
    sample = _samples(tmp_path, 1)[0]
    encoder = Encoder()
    assert len(_encode([sample, sample], tmp_path / "cache", encoder)) == 2
    assert encoder.images == 1


def test_another_encoder_or_resolution_never_collides(tmp_path: Path) -> None:
    samples = _samples(tmp_path, 5)
    _encode(samples, tmp_path / "cache", Encoder(), "one")
    encoder = Encoder()
    _encode(samples, tmp_path / "cache", encoder, "two")
    assert encoder.images == 5
    stores = list((tmp_path / "cache/encoded").iterdir())
    assert len(stores) == 2
    source, target = sorted(stores, key=lambda s: json.loads(next(s.glob("*.json")).read_text())["encoder_id"])
    for path in source.iterdir():  # someone copies files from one store into the other
        (target / path.name).write_bytes(path.read_bytes())
    encoder = Encoder()
    _encode(samples, tmp_path / "cache", encoder, "two")
    keys = {k for m in target.glob("*.json") for k in json.loads(m.read_text())["samples"]}
    assert len(keys) == 6  # five samples and the empty prompt
    assert {json.loads(m.read_text())["encoder_id"] for m in target.glob("*.json")} == {"two"}


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_damaged_shard_is_encoded_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    samples = _samples(tmp_path, 8)
    before = _encode(samples, tmp_path / "cache", Encoder())
    expected = [before.split("train")[i]["latents"] for i in range(7)]
    shard = before.store._rows[before.entries[0].key].shard
    content = bytearray(shard.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        shard.write_bytes(content)
    elif damage == "truncate":
        shard.write_bytes(content[:-100])
    elif damage == "delete":
        shard.unlink()
    else:
        shard.with_suffix(".json").write_text("{")
    encoder = Encoder()
    with caplog.at_level(logging.WARNING):
        after = _encode(samples, tmp_path / "cache", encoder)
    assert "is not usable" in caplog.text
    assert encoder.images == 4  # the other shard is kept
    for i, latents in enumerate(expected):
        found = after.split("train")[i]["latents"]
        assert isinstance(found, Tensor)
        assert isinstance(latents, Tensor)
        assert torch.equal(found, latents)


def test_kill_while_encoding_loses_the_current_shard_only(tmp_path: Path) -> None:
    samples = _samples(tmp_path, 12)
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        import test_encode as t
        class Dying(t.Encoder):
            def encode_images(self, pixels):
                if self.images >= 8:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().encode_images(pixels)
        folder = Path({str(tmp_path)!r})
        t._encode(t._samples(folder, 12), folder / "cache", Dying())
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert process.returncode == -signal.SIGKILL
    encoder = Encoder()
    assert len(_encode(samples, tmp_path / "cache", encoder)) == 12
    assert encoder.images == 4


def test_not_finite_is_refused_and_named(tmp_path: Path) -> None:
    samples = _samples(tmp_path, 2)
    encoder = Encoder()
    encoder.encode_images = lambda pixels: pixels / 0  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"latents that is not finite for .*0.png"):
        _encode(samples, tmp_path / "cache", encoder)


def test_dataset_passes_through_a_loader_with_workers(tmp_path: Path) -> None:
    cache = _encode(_samples(tmp_path, 6), tmp_path / "cache", Encoder())
    loader = DataLoader(cache.split("train"), batch_size=5, num_workers=1, collate_fn=collate)
    assert next(iter(loader))["latents"].shape == (5, 3, 2, 2)


def test_cache_root_is_read_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAGRAFT_CACHE", str(tmp_path))
    assert default_cache_root() == tmp_path
    monkeypatch.delenv("LORAGRAFT_CACHE")
    assert default_cache_root() == Path.home() / ".cache/loragraft"


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (7, 7), (2, 5)])
def test_every_sample_once_per_epoch(n: int, batch_size: int) -> None:
    walk = [i for step in range(n) for i in batch_indices(step, batch_size, n, seed=3)]
    epochs = [walk[e * n : (e + 1) * n] for e in range(batch_size)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 5:
        assert epochs[0] != epochs[1]


def test_order_is_stateless_and_depends_on_the_seed() -> None:
    forward = [batch_indices(step, 4, 100, seed=1) for step in range(60)]
    assert [batch_indices(step, 4, 100, seed=1) for step in reversed(range(60))] == forward[::-1]
    assert batch_indices(0, 4, 100, seed=2) != forward[0]
    with pytest.raises(ValueError, match="no samples"):
        batch_indices(0, 4, 0, seed=1)
