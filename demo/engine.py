"""What the page drives: one loaded base, adapters resident on it and exchanged between pictures, seconds for every part.

    text      caption and negative prompt through the text encoder
    start     the start picture through the autoencoder's encoder
    adapters  the base's branches exchanged for those with adapters
    steps     the transformer: every Euler step, both passes where guidance is above 1
    decoding  the autoencoder's decoder, and to an 8-bit image

Nothing here knows of a browser.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.switching import AdapterSwitch
from loragraft.backbones.load import find_spec, load_backbone
from loragraft.backbones.sampler import build_pipeline, generate_from_text, unread
from loragraft.backbones.spec import Backbone, Guided, Profile
from loragraft.data.images import load_pixels
from loragraft.demo.catalogue import Catalogue
from loragraft.demo.figures import ModelSize, model_size
from loragraft.evaluation.generate import Settings

PRECISIONS: dict[str, Profile | None] = {"native": "native", "interchange": "interchange", "16bit": None}


MOST_STEPS = 200


class StoppedError(Exception):
    """The user pressed stop; the message says where."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """One press of the button."""

    settings: Settings
    base: str = "pocket"
    precision: str = "native"
    """A key of `PRECISIONS`."""
    adapters: tuple[tuple[str, float], ...] = ()
    """(label in the catalogue, weight)."""
    any_base: bool = False
    start: Path | None = None
    """A picture to begin from."""
    strength: float = 0.6


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Wall-clock time of each part (module docstring). `text` and `start` are shared by both pictures of an order."""

    text: float
    start: float | None
    adapters: float
    steps: float
    decoding: float

    @property
    def own(self) -> float:
        """What this picture alone took."""
        return self.adapters + self.steps + self.decoding

    @property
    def total(self) -> float:
        return self.text + (self.start or 0.0) + self.own


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One result."""

    image: Image
    adapted: bool
    """False: the base alone."""
    seconds: Seconds
    steps: int
    """Euler steps taken; fewer than asked for where a start picture was given."""
    passes: int
    """Transformer calls per step: 2 with guidance, 1 without."""


@dataclass(frozen=True)
class Loaded:
    """A base in memory."""

    backbone: Backbone
    precision: str
    """A key of `PRECISIONS`."""
    size: ModelSize
    """Without adapters."""
    adapters: AdapterSwitch
    """What is in use, and what stays for the next order."""


OnStep = Callable[[bool, int, int], None]
"""(with adapters, steps done, steps in all)."""


class Engine:
    """Draws orders, one at a time, on whatever base the order names; one base stays in memory."""

    def __init__(self, catalogue: Catalogue, device: torch.device | str, cache_root: Path) -> None:
        self.catalogue = catalogue
        self.device = torch.device(device)
        self.cache_root = cache_root
        self._lock = threading.Lock()
        self.loaded: Loaded | None = None
        """The base in memory; None before the first, and while one takes the place of another."""

    def backbone(self, base: str, precision: str) -> Backbone:
        """The base in that precision, loaded unless it is the one in memory. Raises ValueError as `load_backbone` does."""
        if self.loaded is None or (self.loaded.backbone.spec.name, self.loaded.precision) != (base, precision):
            if precision not in PRECISIONS:
                raise ValueError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
            find_spec(base)  # a misspelt name must not cost the base that is loaded
            self.loaded = None  # two large bases would not fit
            backbone = load_backbone(base, PRECISIONS[precision], self.device, self.cache_root)
            size, switch = model_size(backbone.transformer), AdapterSwitch(backbone.transformer)
            self.loaded = Loaded(backbone, precision, size, switch)
        return self.loaded.backbone

    def draw(self, order: Order, on_step: OnStep) -> Iterator[Picture]:
        """The base's picture, then (if the order has adapters) the adapted one from the same seed.

        Everything that can be wrong with an order is found before the first step. Raises ValueError in the user's words;
        what `on_step` raises passes through. Adapters stay resident, and the base is left computing without them.
        """
        with self._lock:
            check_order(order)
            adapters = [(self.catalogue.load(label), weight) for label, weight in order.adapters]
            backbone = self.backbone(order.base, order.precision)
            prompt, negative = order.settings.prompt.strip(), order.settings.negative_prompt.strip()
            check_length(backbone, "prompt", prompt)
            check_length(backbone, "negative prompt", negative)
            if not order.any_base:
                for adapter, _ in adapters:
                    adapter.check_base(backbone.base_id)
            clock = _Clock(self.device)
            encode = backbone.encoders.encode_text
            text, empty = encode([prompt]), encode([negative])
            text_seconds = clock.lap()
            start, start_seconds = None, None
            if order.start is not None:
                pixels = _start_pixels(order.start, backbone.resolution)
                clock.lap()
                start = backbone.encoders.encode_images(pixels[None])
                start_seconds = clock.lap()
            for using in ([], adapters) if adapters else ([],):
                steps = _Steps(clock, on_step, bool(using))
                clock.lap()  # what the reader did with the last picture
                with self._using(using, order.any_base):
                    exchange = clock.lap()
                    image = self._sample(backbone, text, empty, order, start, steps)
                    decoding = clock.lap()
                yield Picture(
                    image=image,
                    adapted=bool(using),
                    seconds=Seconds(
                        text=text_seconds,
                        start=start_seconds,
                        adapters=exchange,
                        steps=steps.seconds,
                        decoding=decoding,
                    ),
                    steps=steps.count,
                    passes=2 if _guided(backbone, order.settings)["guidance"] > 1 else 1,
                )

    @contextmanager
    def _using(self, adapters: Sequence[tuple[Adapter, float]], any_base: bool) -> Iterator[None]:
        assert self.loaded is not None
        try:
            self.loaded.adapters.use(adapters, any_base=any_base)
            yield
        finally:
            self.loaded.adapters.use([])

    @staticmethod
    def _sample(
        backbone: Backbone,
        text: dict[str, Tensor],
        empty: dict[str, Tensor],
        order: Order,
        start: Tensor | None,
        steps: "_Steps",
    ) -> Image:
        settings = order.settings
        (image,) = generate_from_text(
            backbone.spec.family,
            build_pipeline(backbone.spec.family, backbone.transformer, backbone.encoders),
            text,
            empty,
            [settings.seed],
            resolution=backbone.resolution,
            steps=settings.steps,
            **_guided(backbone, settings),
            start=start,
            strength=order.strength,
            on_step=steps,
            replay=backbone.replay,
        )
        return image


def _guided(backbone: Backbone, settings: Settings) -> Guided:
    return backbone.spec.guided(settings.guidance, settings.true_guidance, settings.negative_prompt.strip())


def check_order(order: Order) -> None:
    """What can be said without a model. Raises ValueError."""
    settings = order.settings
    if not settings.prompt.strip():
        raise ValueError("The prompt is empty: say what to draw, or pick an example.")
    if not 1 <= settings.steps <= MOST_STEPS:
        raise ValueError(f"Steps is {settings.steps}: give 1 to {MOST_STEPS}; 20 is enough for most pictures.")
    if not (math.isfinite(settings.guidance) and settings.guidance >= 1):
        raise ValueError(f"Guidance is {settings.guidance}: give 1 (off) or more; 3 to 5 is usual.")
    if not 0 <= settings.seed < 2**63:
        raise ValueError(f"Seed is {settings.seed}: give a whole number from 0.")
    if order.start is not None and not 0 < order.strength <= 1:
        raise ValueError(
            f"Strength is {order.strength}: give more than 0 (keep the picture) and at most 1 (ignore it)."
        )


def check_length(backbone: Backbone, name: str, caption: str) -> None:
    """Raises ValueError for a caption whose end the text encoder would not read."""
    if lost := unread(backbone.encoders, caption):
        raise ValueError(
            f"The {name} is longer than {backbone.spec.name} reads: shorten it. What would be lost is its end, "
            f"{lost!r}. Nothing was drawn."
        )


def _start_pixels(file: Path, resolution: int) -> Tensor:
    try:
        return load_pixels(file, resolution)
    except ValueError as error:  # worded for data sets, with a path that the user never saw
        raise ValueError(f"The start picture {file.name} is not a readable image: save it as PNG or JPEG.") from error


class _Clock:
    """Laps in seconds; a GPU is waited for, so that a part's work counts where it was asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = time.perf_counter()

    def lap(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        before, self._last = self._last, time.perf_counter()
        return self._last - before


class _Steps:
    """Counts and times steps: what remains on the clock after the last one is decoding."""

    def __init__(self, clock: _Clock, on_step: OnStep, adapted: bool) -> None:
        self._clock, self._on_step, self._adapted = clock, on_step, adapted
        self.count, self.seconds = 0, 0.0

    def __call__(self, done: int, steps: int) -> None:
        self.count = done
        self.seconds += self._clock.lap()
        self._on_step(self._adapted, done, steps)
        self._clock.lap()  # what the page does with the report is nobody's time
