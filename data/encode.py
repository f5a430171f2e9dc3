"""Run the autoencoder and the text encoder once over a data set, into the cache.

This module never sees a model: it is given two functions. Only what the cache lacks is encoded, and by several processes at
once each a part of it (`claims.py`). Two layouts:

* plain squares of less than `buckets.LARGE` pixels: image and caption together, one entry a sample;
* otherwise apart: a latent for every (image, H, W), all of them first, then an embedding for every different caption, so that
  the two encoders need not be in memory together and shared captions and several resolutions cost nothing twice.
"""

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import NoReturn, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from loragraft.data.buckets import Sizes
from loragraft.data.cache import SHARD_SAMPLES, ShardStore, latent_key, sample_key, text_key
from loragraft.data.claims import Claim, claimed, exclusively, wait_for
from loragraft.data.dataset import Entry, LatentCache
from loragraft.data.images import load_pixels
from loragraft.data.order import pure_chunks
from loragraft.data.sample import Sample, Shape

EncodeImages = Callable[[Tensor], Tensor]
"""pixels [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w]"""
EncodeText = Callable[[list[str]], dict[str, Tensor]]
"""B prompts -> named tensors [B, ...]"""

PIXELS_AT_ONCE = 2**20
"""Pixels of one call of the image encoder: one image of 1024 x 1024, whose feature maps take gigabytes."""
SHARD_BYTES = 64 * 2**20
"""A shard is written once it holds so much, however few samples that are: what encoding keeps in memory."""
CLAIM = 64
"""Latents or texts that a process claims at a time where they are cached apart: the grain of sharing among processes."""

T = TypeVar("T")
_NO_IMAGE = b"the empty prompt has no image"
_log = logging.getLogger(__name__)


def encode_dataset(
    samples: Sequence[Sample],
    encode_images: EncodeImages,
    encode_text: EncodeText,
    encoder_id: str,
    resolution: int,
    cache_root: Path,
    batch_size: int = 32,
    progress: bool = True,
    shard_samples: int = SHARD_SAMPLES,
    sizes: Sizes | None = None,
    readers: int = 0,
) -> LatentCache:
    """Every sample encoded, from the cache where it is there and whole: at `resolution`, or at `sizes` and then apart.

    readers: threads that decode the next images while a GPU encodes; 0 = none. encoder_id names the weights of both encoders: another id never meets this one's entries. Returns when all is there,
    whichever process encoded it. Raises ValueError for an image that cannot be read, or where an encoder returns NaN or
    infinity.
    """
    job = _Job(encode_images, encode_text, encoder_id, cache_root, batch_size, progress, shard_samples, readers)
    entries = planned(samples, encoder_id, resolution, sizes)
    return job.together(entries, resolution) if _are_together(samples, sizes) else job.apart(entries)


def planned(samples: Sequence[Sample], encoder_id: str, resolution: int, sizes: Sizes | None = None) -> list[Entry]:
    """What `encode_dataset` makes entries of, and under which keys. Images are read, nothing is encoded."""
    if not _are_together(samples, sizes):
        sizes = sizes or Sizes((resolution,), buckets=False)
        return [entry for sample in samples for entry in _entries(sample, sizes, encoder_id)]
    keys = [sample_key(s.image.read_bytes(), s.caption, resolution, encoder_id) for s in samples]
    return [Entry(sample, (resolution, resolution), key) for sample, key in zip(samples, keys, strict=True)]


def _are_together(samples: Sequence[Sample], sizes: Sizes | None) -> bool:
    return sizes is None and not any(sample.captions for sample in samples)


def not_encoded(samples: Sequence[Sample], encoder_id: str, cache_root: Path, sizes: Sizes) -> list[Sample]:
    """The samples whose latent or a caption of which the cache lacks. No image is opened where digest and size are known."""
    images, texts = (ShardStore(cache_root, encoder_id, "latents"), ShardStore(cache_root, encoder_id, "texts"))
    entries = [entry for sample in samples for entry in _entries(sample, sizes, encoder_id)]
    latents = images.verify([entry.key for entry in entries])
    said = texts.verify([key for entry in entries for key in entry.texts])
    lacking = [e.sample for e in entries if e.key not in latents or not said.issuperset(e.texts)]
    return list(dict.fromkeys(lacking))


@dataclass(frozen=True, slots=True)
class _Job:
    """The arguments of `encode_dataset` that both layouts share."""

    encode_images: EncodeImages
    encode_text: EncodeText
    encoder_id: str
    cache_root: Path
    batch_size: int
    progress: bool
    shard_samples: int
    readers: int

    def together(self, entries: Sequence[Entry], resolution: int) -> LatentCache:
        """Image and caption as one entry."""
        store, shape = ShardStore(self.cache_root, self.encoder_id, resolution), (resolution, resolution)
        empty_key = sample_key(_NO_IMAGE, "", resolution, self.encoder_id)

        def encode(batch: Sequence[Sample]) -> dict[str, Tensor]:
            return pictures(batch) | _checked(self.encode_text([s.caption for s in batch]), batch)

        self._empty(store, empty_key)
        todo = {entry.key: entry.sample for entry in entries}
        with Pictures(self.encode_images, shape, self.readers) as pictures:
            _fill(
                store,
                todo,
                encode,
                self.batch_size,
                self.shard_samples,
                "encoding",
                self.progress,
                ahead=pictures.ahead,
            )
        return LatentCache(store, None, entries, empty_key)

    def apart(self, entries: Sequence[Entry]) -> LatentCache:
        """Latents at every size, then captions."""
        images = ShardStore(self.cache_root, self.encoder_id, "latents")
        texts = ShardStore(self.cache_root, self.encoder_id, "texts")
        empty_key, claim = text_key("", self.encoder_id), min(CLAIM, self.shard_samples)
        buckets = [[entries[i] for i in chunk] for chunk in pure_chunks([e.shape for e in entries], len(entries))]
        for wait in (False, True):  # who finds a bucket taken goes on with the next, and waits at the end
            for bucket in buckets:
                shape = bucket[0].shape
                at_once = max(1, min(self.batch_size, PIXELS_AT_ONCE // (shape[0] * shape[1])))
                todo = {entry.key: entry.sample for entry in bucket}
                what = f"encoding {shape[1]} x {shape[0]}"
                with Pictures(self.encode_images, shape, self.readers) as pictures:
                    _fill(images, todo, pictures, at_once, claim, what, self.progress, pictures.ahead, wait)
        said = {key: (text, e.sample) for e in entries for key, text in zip(e.texts, e.sample.said, strict=True)}

        def encode_said(batch: Sequence[tuple[str, Sample]]) -> dict[str, Tensor]:
            return _checked(self.encode_text([text for text, _ in batch]), [sample for _, sample in batch])

        self._empty(texts, empty_key)
        _fill(texts, said, encode_said, self.batch_size, claim, "encoding captions", self.progress)
        return LatentCache(images, texts, entries, empty_key)

    def _empty(self, store: ShardStore, key: str) -> None:
        _fill(store, {key: ""}, lambda empty: self.encode_text(list(empty)), 1, 1, "encoding", progress=False)


class Pictures:
    """Samples -> latents of one size. Of the samples that it is told of, `readers` threads decode the next few.

    Both sides meet in queues written in C. A ctrl-C inside the standard library's futures may leave a lock taken that the threads
    need to end.
    """

    def __init__(self, encode_images: EncodeImages, shape: Shape, readers: int) -> None:
        self._encode, self._shape, self._readers = encode_images, shape, readers
        self._told: deque[Sample] = deque()
        self._asked: SimpleQueue[tuple[int, Sample] | None] = SimpleQueue()
        self._found: SimpleQueue[tuple[int, Tensor | BaseException]] = SimpleQueue()
        self._early: dict[int, Tensor | BaseException] = {}
        """Decoded before their turn."""
        self._next, self._after = 0, 0
        """The number that is expected, and the first that was not asked for yet."""
        self._threads: list[Thread] = []
        self._closed = False

    def ahead(self, samples: Sequence[Sample]) -> None:
        """These will be asked for, in this order."""
        self._told.extend(samples)

    def __call__(self, batch: Sequence[Sample]) -> dict[str, Tensor]:
        return _checked({"latents": self._encode(torch.stack([self._pixels(sample) for sample in batch]))}, batch)

    def _pixels(self, sample: Sample) -> Tensor:
        while len(self._threads) < self._readers:
            self._threads.append(Thread(target=self._work, name="pictures", daemon=True))
            self._threads[-1].start()
        while self._readers and self._told and self._after < self._next + 2 * self._readers:
            self._asked.put((self._after, self._told.popleft()))
            self._after += 1
        if self._next == self._after:  # no threads, or not told of it
            return load_pixels(sample.image, self._shape)
        while self._next not in self._early:
            number, decoded = self._found.get()
            self._early[number] = decoded
        found = self._early.pop(self._next)
        self._next += 1
        if isinstance(found, BaseException):
            raise found
        return found

    def _work(self) -> None:
        for number, sample in iter(self._asked.get, None):
            if self._closed:
                continue
            try:
                self._found.put((number, load_pixels(sample.image, self._shape)))
            except BaseException as error:
                self._found.put((number, error))

    def __enter__(self) -> "Pictures":
        return self

    def __exit__(self, *_: object) -> None:
        """Drops what was not begun and ends the threads."""
        self._closed = True
        for _thread in self._threads:
            self._asked.put(None)
        for thread in self._threads:
            if thread.is_alive():  # not one whose start was interrupted
                thread.join()


def _entries(sample: Sample, sizes: Sizes, encoder_id: str) -> list[Entry]:
    digest = sample.digest or hashlib.sha256(sample.image.read_bytes()).digest()
    texts = tuple(text_key(text, encoder_id) for text in sample.said)
    return [Entry(sample, shape, latent_key(digest, shape, encoder_id), texts) for shape in sizes.of(sample)]


def _fill(
    store: ShardStore,
    wanted: Mapping[str, T],
    encode: Callable[[Sequence[T]], dict[str, Tensor]],
    batch_size: int,
    shard_samples: int,
    what: str,
    progress: bool,
    ahead: Callable[[Sequence[T]], None] = lambda items: None,
    wait: bool = True,
) -> None:
    """Encodes what of `wanted` the store lacks and nobody else encodes; with `wait`, returns once all of it is there.

    ahead: told of everything that will be encoded next, in order.
    """
    lacking = len(wanted) - len(store.verify(list(wanted)))
    bar = tqdm(total=len(wanted), initial=len(wanted) - lacking, desc=what, disable=not progress or not lacking)
    with bar:
        while lacking:
            with exclusively(store.folder):
                store.refresh()
                missing = [key for key in wanted if key not in store]
                others = claimed(store.folder)
                taken = set().union(*others.values())
                free = [key for key in missing if key not in taken]
                claim = Claim(store.folder, free[:shard_samples]) if free else None
            if claim is not None:
                try:
                    ahead([wanted[key] for key in claim.keys])
                    _encode_claim(store, claim.keys, wanted, encode, batch_size, bar)
                finally:
                    claim.release()
            elif missing and not wait:
                return
            elif missing:
                wait_for(next(path for path, keys in others.items() if not keys.isdisjoint(missing)))
            else:
                lacking = len(wanted) - len(store.verify(list(wanted)))
            bar.n = len(wanted) - sum(key not in store for key in wanted)
            bar.refresh()


def _encode_claim(
    store: ShardStore,
    keys: Sequence[str],
    wanted: Mapping[str, T],
    encode: Callable[[Sequence[T]], dict[str, Tensor]],
    batch_size: int,
    bar: "tqdm[NoReturn]",
) -> None:
    """Encodes claimed keys in batches and writes them in shards of at most about SHARD_BYTES."""
    parts: list[dict[str, Tensor]] = []
    written = 0
    for first in range(0, len(keys), batch_size):
        batch = keys[first : first + batch_size]
        with torch.no_grad():
            tensors = encode([wanted[key] for key in batch])
        parts.append({name: tensor.cpu().to(torch.bfloat16) for name, tensor in tensors.items()})
        bar.update(len(batch))
        done = first + len(batch)
        held = sum(tensor.nbytes for part in parts for tensor in part.values())
        if done == len(keys) or held >= SHARD_BYTES:
            store.write(keys[written:done], {name: torch.cat([p[name] for p in parts]) for name in parts[0]})
            parts, written = [], done


def check_captions(samples: Sequence[Sample], readable: Callable[[str], str], cut: bool) -> None:
    """Nothing of a caption is lost unseen. `readable`: caption -> the part that the text encoder reads.

    Raises ValueError with the number of captions that are too long, the first one's file and the words that would be
    lost; with `cut`, that is a warning.
    """
    said = [(sample, text) for sample in samples for text in sample.said]
    too_long = [(sample, text) for sample, text in said if readable(text) != text]
    if not too_long:
        return
    first, text = too_long[0]
    lost = text.removeprefix(readable(text)).strip()
    sentence = (
        f"{len(too_long)} of {len(said)} captions are longer than the base's text encoder reads; "
        f"of {first.image} the end is lost: {lost!r}"
    )
    if not cut:
        raise ValueError(f"{sentence}. Shorten them (what matters first), or accept the cut: data.long_captions=cut")
    _log.warning("%s", sentence)


def _checked(tensors: dict[str, Tensor], batch: Sequence[Sample]) -> dict[str, Tensor]:
    """The tensors themselves; raises ValueError naming the sample at fault."""
    for name, tensor in tensors.items():
        if tensor.shape[0] != len(batch):
            raise ValueError(f"the encoder returned {name} of shape {tuple(tensor.shape)} for {len(batch)} samples")
        bad = ~tensor.flatten(1).isfinite().all(1)
        if bad.any():
            culprit = batch[int(bad.nonzero()[0])]
            raise ValueError(f"the encoder gave a {name} that is not finite for {culprit.image} ({culprit.caption!r})")
    return tensors
