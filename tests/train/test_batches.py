"""Batches of buckets, and reading ahead: the same tensors as without, in every order of events."""

import signal
import threading
import time
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from loragraft.backbones.flow import Flow
from loragraft.data.buckets import Sizes
from loragraft.data.dataset import LatentCache
from loragraft.data.encode import encode_dataset
from loragraft.data.sample import Sample
from loragraft.recipes.load import load_recipe
from loragraft.train.batches import Batches, MicroBatch, ReadAhead
from loragraft.train.loop import validation_loss

BACKBONE: Any = SimpleNamespace(
    device=torch.device("cpu"),
    dtype=torch.float32,
    spec=SimpleNamespace(training_guidance=None, family=SimpleNamespace(process=Flow())),
)


def _text(prompts: list[str]) -> dict[str, Tensor]:
    length = torch.tensor([float(len(p)) for p in prompts])
    return {"prompt_embeds": length.view(-1, 1, 1).expand(-1, 3, 5), "pooled_prompt_embeds": length.view(-1, 1)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    """23 images of three aspect ratios."""
    folder = tmp_path_factory.mktemp("images")
    samples = []
    for i in range(23):
        path = folder / f"{i}.png"
        Image.new("RGB", [(64, 64), (64, 40), (40, 64)][i % 3], (i * 11, 0, 0)).save(path)
        variants = ("a", "bb", "ccc") if i == 0 else ()
        samples.append(Sample(path, "a" * (i + 1), "train" if i < 18 else "validation", f"{i}", "", "", variants))
    arguments = (samples, lambda pixels: pixels[:, :, ::8, ::8], _text, "enc", 64, folder / "cache")
    return encode_dataset(*arguments, progress=False, sizes=Sizes((64,), buckets=True))


def make(cache: LatentCache, batch_size: int, rank: int = 0, world: int = 1, **options: int) -> Batches:
    recipe = load_recipe(
        "marketing", [f"train.batch_size={batch_size}", *(f"train.{k}={v}" for k, v in options.items())]
    )
    accelerator: Any = SimpleNamespace(process_index=rank, num_processes=world)
    return Batches(cache.split("train"), cache.empty, recipe, BACKBONE, accelerator)


def same(one: MicroBatch, other: MicroBatch) -> bool:
    tensors = zip((*one[:3], *one[3].values()), (*other[:3], *other[3].values()), strict=True)
    return all(torch.equal(a, b) for a, b in tensors)


def test_batches_are_of_one_bucket_and_noise_has_its_shape(cache: LatentCache) -> None:
    batches = make(cache, 4, accumulation=2)
    shapes = set()
    for step in range(12):
        for latents, noise, times, text in batches(step):
            assert latents.shape == noise.shape
            assert latents.shape[0] == times.shape[0] == text["prompt_embeds"].shape[0] == 4
            shapes.add(tuple(latents.shape[2:]))
    assert shapes == {(8, 8), (6, 10), (10, 6)}


def test_processes_see_together_what_one_sees_and_always_the_same_bucket(cache: LatentCache) -> None:
    whole, parts = make(cache, 4), [make(cache, 2, rank, 2) for rank in (0, 1)]
    for step in range(15):
        (expected,) = whole(step)
        found = [next(part(step)) for part in parts]
        assert found[0][0].shape == found[1][0].shape
        for i in range(3):
            assert torch.equal(torch.stack([part[i] for part in found], dim=1).flatten(0, 1), expected[i])  # type: ignore[misc]


def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(cache: LatentCache) -> None:
    trace = [list(make(cache, 4, accumulation=2)(step)) for step in range(10)]
    resumed = make(cache, 4, accumulation=2)
    for step in range(6, 10):
        assert all(same(a, b) for a, b in zip(resumed(step), trace[step], strict=True))


def test_variants_come_in_turn(cache: LatentCache) -> None:
    batches = make(cache, 6)
    lengths = set()
    first = cache.split("train")[0]["latents"]
    for number in range(40):
        draw = batches.order(number)
        batch = batches.dataset.batch(draw.indices, draw.epochs)
        for place, index in enumerate(draw.indices):
            if index == 0:
                assert isinstance(first, Tensor)
                assert torch.equal(batch["latents"][place], first)
                lengths.add(batch["caption"][place])
    assert lengths == {"a", "bb", "ccc"}


def test_validation_takes_buckets_one_after_the_other(cache: LatentCache, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def loss(model: object, latents: Tensor, *_: object, **__: object) -> Tensor:
        seen.append(tuple(latents.shape))
        return torch.tensor(float(len(latents)))

    monkeypatch.setattr(BACKBONE.spec.family, "loss", loss, raising=False)
    recipe = load_recipe("marketing", ["train.batch_size=4"])
    value = validation_loss(torch.nn.Identity(), BACKBONE, cache.split("validation"), recipe)
    assert sorted(seen) == [(1, 3, 10, 6), (2, 3, 6, 10), (2, 3, 8, 8)]
    assert value == (1 + 4 + 4) / 5


class Reader:
    """Counts, and says which thread read."""

    def __init__(self, slow: float = 0.0, fails_at: int = -1) -> None:
        self.numbers: list[int] = []
        self.threads: set[str] = set()
        self.slow, self.fails_at = slow, fails_at

    def __call__(self, number: int) -> MicroBatch:
        time.sleep(self.slow)
        self.numbers.append(number)
        self.threads.add(threading.current_thread().name)
        if number == self.fails_at:
            raise OSError(f"no batch {number}")
        value = torch.tensor([number])
        return value, value, value, {}


def test_reading_ahead_gives_the_same_in_order_and_not_beyond_the_end() -> None:
    reader = Reader()
    ahead = ReadAhead(reader, depth=3, end=8)
    assert [int(ahead(number)[0]) for number in range(8)] == list(range(8))
    ahead.close()
    assert reader.numbers == list(range(8)), "each once, none beyond the end"
    assert all(name.startswith("batches") for name in reader.threads)
    assert not any(t.name.startswith("batches") for t in threading.enumerate())


def test_while_one_batch_is_used_the_next_are_read() -> None:
    reader = Reader()
    ahead = ReadAhead(reader, depth=2, end=100)
    ahead(0)
    deadline = time.monotonic() + 60
    while len(reader.numbers) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reader.numbers == [0, 1, 2], "two ahead, and no more"
    ahead.close()


def test_an_error_is_raised_where_its_batch_is_asked_for() -> None:
    ahead = ReadAhead(Reader(fails_at=2), depth=3, end=10)
    assert [int(ahead(number)[0]) for number in range(2)] == [0, 1]
    with pytest.raises(OSError, match="no batch 2"):
        ahead(2)
    ahead.close()


def test_stopping_in_the_middle_ends_the_thread_and_another_start_is_right() -> None:
    reader = Reader(slow=0.5)
    ahead = ReadAhead(reader, depth=8, end=100)
    ahead(0)
    ahead.close()
    assert len(reader.numbers) < 9, "what was not begun is dropped"
    ahead = ReadAhead(Reader(), depth=2, end=100)
    assert [int(ahead(number)[0]) for number in (5, 6, 50, 51, 7)] == [5, 6, 50, 51, 7]
    ahead.close()


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_values_are_right_and_the_thread_ends(seed: int) -> None:
    """Slow and failing reads, leaps, leaving with much asked for, ctrl-C at any moment and going on after it."""
    random = Random(seed)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupted = 0
    for _ in range(40):
        end, leaves = random.randint(2, 40), random.randint(1, 40)
        reader = Reader(slow=random.choice((0, 0, 1e-4)), fails_at=random.choice((-1, -1, end // 2)))
        ahead = ReadAhead(reader, depth=random.randint(1, 6), end=end)
        number = int(ahead(0)[0])
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 1e-3))
                while number < min(end, leaves):
                    assert int(ahead(number)[0]) == number
                    number += 1 if random.random() < 0.9 else random.randint(-number, 2)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupted += 1
        except OSError:
            assert number == reader.fails_at
        if number != reader.fails_at:
            assert int(ahead(number)[0]) == number
        closing = threading.Thread(target=ahead.close, daemon=True)
        closing.start()
        closing.join(timeout=120)
        assert not closing.is_alive(), "leaving stands still"
        assert not any(t.name.startswith("batches") for t in threading.enumerate())
    signal.signal(signal.SIGALRM, before)
    assert interrupted > 5


def test_depth_zero_needs_no_thread() -> None:
    reader = Reader()
    assert int(ReadAhead(reader, depth=0, end=3)(7)[0]) == 7
    assert reader.threads == {threading.current_thread().name}


def test_batches_read_ahead_are_those_read_at_once(cache: LatentCache) -> None:
    plain, ahead = make(cache, 4, accumulation=2, steps=6), make(cache, 4, accumulation=2, steps=6)
    ahead.ahead = ReadAhead(ahead.read, depth=3, end=12)
    with ahead:
        for step in range(6):
            assert all(same(a, b) for a, b in zip(ahead(step), plain(step), strict=True))
