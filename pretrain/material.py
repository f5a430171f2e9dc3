"""All that is made on the CPU before training: rendered icons, photos, scenes with captions, token rows."""

import argparse
import multiprocessing.pool
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from captions import draw_scenes
from icons import Icon, Stats, read_icons, render_icons, sampling_weights, split_of
from minilm import TextEncoder
from photos import draw_photos, read_photos
from prompts import PROMPTS

SPLITS = ("train", "name", "style", "photo train", "photo")
PHOTO_SHARE = 0.06
"""Photos in the pool, as a share of the scenes."""


@dataclass(frozen=True)
class Material:
    """All that is made on the CPU: pixels per size, and per split the rows, captions and token rows.

    Splits ``train``, ``name`` (held-out names) and ``style`` are scenes (rows of ``captions.FIELDS``); ``photo train`` and
    ``photo`` (held out) are photos (rows: index, mirrored).
    """

    pixels: list[np.ndarray]
    photos: np.ndarray
    rows: dict[str, np.ndarray]
    captions: dict[str, list[str]]
    tokens: dict[str, np.ndarray]
    prompt_tokens: np.ndarray  # the last row is the empty prompt
    licences: dict[str, tuple[str, str, int]]  # set -> (author, licence, icons used)


_SHARED: dict = {}


def _draw_chunk(job: tuple[str, int, int]) -> tuple[np.ndarray, list[str], np.ndarray]:
    split, count, seed = job
    if split.startswith("photo"):
        rows, captions = draw_photos(_SHARED["photos"], split.split()[-1], count, seed)
        return rows, captions, _SHARED["text"].tokenize(captions)
    icons, stats, weights, members, text = (_SHARED[key] for key in ("icons", "stats", "weights", "members", "text"))
    rows, captions = draw_scenes(icons, stats, weights, members[split], count, seed)
    return rows, captions, text.tokenize(captions)


def split_seed(split: str, pool_seed: int) -> int:
    """Seed of a split's first chunk: 10^8 chunk seeds for each, so that no two splits or pools share one."""
    return (pool_seed * len(SPLITS) + SPLITS.index(split)) * 10**8


def draw_split(split: str, count: int, seed: int, pool: multiprocessing.pool.Pool) -> tuple:
    """``count`` scenes of a split in chunks of 2000, each from its own seed."""
    jobs = [(split, min(2000, count - at), seed + at) for at in range(0, count, 2000)]
    parts = pool.map(_draw_chunk, jobs, chunksize=1)
    rows, captions, tokens = zip(*parts, strict=True)
    return np.concatenate(rows), [text for part in captions for text in part], np.concatenate(tokens)


def prepare(arguments: argparse.Namespace, text: TextEncoder) -> Material:
    """Reads, renders, draws. Runs before CUDA starts, because it forks."""
    icons = read_icons(arguments.icons)
    icons = icons[:: len(icons) // arguments.limit] if arguments.limit else icons
    pixels, stats = render_icons(icons)
    seen = [i for i, stat in enumerate(stats) if stat.solid > 0]  # empty pictures teach nothing
    members = {split: [i for i in seen if split_of(icons[i]) == split] for split in ("train", "name", "style")}
    counts = {"train": arguments.pool, "name": arguments.held_out, "style": arguments.held_out}
    photos, photo_pixels = read_photos(arguments.photos)
    counts |= {"photo train": round(arguments.pool * PHOTO_SHARE), "photo": arguments.held_out // 4}
    _SHARED.update(icons=icons, stats=stats, weights=sampling_weights(icons), members=members, text=text, photos=photos)
    rows, captions, tokens = {}, {}, {}
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for split in (key for key in SPLITS if members.get(key, photos)):
            seed = split_seed(split, arguments.pool_seed)
            rows[split], captions[split], tokens[split] = draw_split(split, counts[split], seed, pool)
    return Material(
        pixels, photo_pixels, rows, captions, tokens, text.tokenize([*PROMPTS[:40], ""]), licences(icons, stats)
    )


def licences(icons: list[Icon], stats: list[Stats]) -> dict[str, tuple[str, str, int]]:
    used: dict[str, tuple[str, str, int]] = {}
    for icon, stat in zip(icons, stats, strict=True):
        if stat.solid > 0 and split_of(icon) == "train":
            used[icon.set] = (icon.author, icon.license, used.get(icon.set, ("", "", 0))[2] + 1)
    return used


def prepare_into(arguments: argparse.Namespace, text: TextEncoder, path: Path) -> None:
    """`prepare` in a process of its own, pickled to ``path``."""
    with path.open("wb") as file:
        pickle.dump(prepare(arguments, text), file, protocol=5)
