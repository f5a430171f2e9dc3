"""Run the autoencoder and the text encoder once over a data set, into the cache.

This module never sees a model: it is given two functions. Only samples that the cache lacks are encoded.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from loragraft.data.cache import SHARD_SAMPLES, ShardStore, sample_key
from loragraft.data.dataset import LatentCache
from loragraft.data.images import load_pixels
from loragraft.data.sources import Sample

EncodeImages = Callable[[Tensor], Tensor]
"""pixels [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w]"""
EncodeText = Callable[[list[str]], dict[str, Tensor]]
"""B prompts -> named tensors [B, ...]"""

_log = logging.getLogger(__name__)
_NO_IMAGE = b"the empty prompt has no image"


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
) -> LatentCache:
    """Every sample encoded at `resolution`, from the cache where it is there and whole.

    encoder_id names the weights of both encoders: another id never meets this one's entries.
    Raises ValueError for an image that cannot be read, or where an encoder returns NaN or infinity.
    """
    store = ShardStore(cache_root, encoder_id, resolution)
    keys = [sample_key(s.image.read_bytes(), s.caption, resolution, encoder_id) for s in samples]
    empty_key = sample_key(_NO_IMAGE, "", resolution, encoder_id)
    present = store.verify([*keys, empty_key])
    missing = {key: sample for key, sample in zip(keys, samples, strict=True) if key not in present}
    if empty_key not in present:
        with torch.no_grad():
            store.write([empty_key], encode_text([""]))
    todo = list(missing.items())
    with tqdm(
        total=len(keys), initial=len(keys) - len(todo), desc="encoding", unit="image", disable=not progress or not todo
    ) as bar:
        for start in range(0, len(todo), shard_samples):
            shard = todo[start : start + shard_samples]
            parts: list[dict[str, Tensor]] = []
            for first in range(0, len(shard), batch_size):
                batch = [sample for _, sample in shard[first : first + batch_size]]
                parts.append(_encode(batch, encode_images, encode_text, resolution))
                bar.update(len(batch))
            store.write([key for key, _ in shard], {name: torch.cat([p[name] for p in parts]) for name in parts[0]})
    return LatentCache(store, keys, samples, empty_key)


def check_captions(samples: Sequence[Sample], readable: Callable[[str], str], cut: bool) -> None:
    """Nothing of a caption is lost unseen. `readable`: caption -> the part that the text encoder reads.

    Raises ValueError with the number of captions that are too long, the first one's file and the words that would be
    lost; with `cut`, that is a warning.
    """
    too_long = [sample for sample in samples if readable(sample.caption) != sample.caption]
    if not too_long:
        return
    first = too_long[0]
    lost = first.caption.removeprefix(readable(first.caption)).strip()
    sentence = (
        f"{len(too_long)} of {len(samples)} captions are longer than the base's text encoder reads; "
        f"of {first.image} the end is lost: {lost!r}"
    )
    if not cut:
        raise ValueError(f"{sentence}. Shorten them (what matters first), or accept the cut: data.long_captions=cut")
    _log.warning("%s", sentence)


@torch.no_grad()
def _encode(
    batch: Sequence[Sample], encode_images: EncodeImages, encode_text: EncodeText, resolution: int
) -> dict[str, Tensor]:
    pixels = torch.stack([load_pixels(sample.image, resolution) for sample in batch])
    tensors = {"latents": encode_images(pixels), **encode_text([sample.caption for sample in batch])}
    for name, tensor in tensors.items():
        if tensor.shape[0] != len(batch):
            raise ValueError(f"the encoder returned {name} of shape {tuple(tensor.shape)} for {len(batch)} samples")
        bad = ~tensor.flatten(1).isfinite().all(1)
        if bad.any():
            culprit = batch[int(bad.nonzero()[0])]
            raise ValueError(f"the encoder gave a {name} that is not finite for {culprit.image} ({culprit.caption!r})")
    return {name: tensor.cpu().to(torch.bfloat16) for name, tensor in tensors.items()}
