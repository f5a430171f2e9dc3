"""Sample images during training: the recipe's prompts at fixed seeds, one grid per preview."""

from dataclasses import dataclass
from pathlib import Path

from diffusers.utils import make_image_grid
from PIL.Image import Image
from torch import Tensor, nn

from loragraft.backbones.compiled import fills_card, uncompiled
from loragraft.backbones.sampler import build_pipeline, generate_from_text, unread
from loragraft.backbones.spec import Backbone
from loragraft.data.dataset import LatentCache
from loragraft.data.images import png_bytes
from loragraft.disk import write_atomic
from loragraft.recipes.schema import SampleConfig

DEFAULT_PROMPTS = 8
COLUMNS = 4


def previewed_together(model: nn.Module) -> int | None:
    """Pictures that are drawn in one batch between steps: one, where the model leaves little of a card; None: the sampler's choice."""
    return 1 if fills_card(model) else None


@dataclass(frozen=True)
class Previews:
    """Prompts already encoded, so that the text encoder can leave memory before the first step."""

    prompts: tuple[str, ...]
    text: dict[str, Tensor]
    empty: dict[str, Tensor]
    config: SampleConfig

    @classmethod
    def prepare(cls, config: SampleConfig, backbone: Backbone, cache: LatentCache) -> "Previews":
        """Encodes the recipe's prompts; without any, the first captions of the test split (or of the training split).

        Raises ValueError for a prompt of the recipe that is longer than the text encoder reads, and as `BaseSpec.guided`.
        """
        backbone.spec.guided(config.guidance, config.true_guidance, config.negative_prompt)
        known = cache.split("test").samples or cache.split("train").samples
        prompts = config.prompts or tuple(dict.fromkeys(sample.caption for sample in known))[:DEFAULT_PROMPTS]
        for prompt in (*config.prompts, config.negative_prompt):
            if lost := unread(backbone.encoders, prompt):
                raise ValueError(
                    f"the recipe's sample prompt {prompt!r} is longer than the base's text encoder reads: {lost!r} would be "
                    "lost. Shorten it, what matters first"
                )
        repeated = [prompt for prompt in prompts for _ in range(config.per_prompt)]
        encode = backbone.encoders.encode_text
        return cls(tuple(repeated), encode(repeated), encode([config.negative_prompt]), config)

    @staticmethod
    def file(run: Path, step: int) -> Path:
        """`run`/samples/step_NNNNNN.png."""
        return run / "samples" / f"step_{step:06d}.png"

    @uncompiled()
    def render(
        self, backbone: Backbone, run: Path, step: int, *, write: bool = True, capture: bool = False
    ) -> list[tuple[Image, str]]:
        """Images with their prompts; also writes `file(run, step)`, unless this process only lends a hand.

        capture: on a GPU from CUDA graphs, which last for these images only: the next step needs their memory.
        """
        seeds = [self.config.seed + i % self.config.per_prompt for i in range(len(self.prompts))]
        images = generate_from_text(
            backbone.spec.family,
            build_pipeline(backbone.spec.family, backbone.transformer, backbone.encoders),
            self.text,
            self.empty,
            seeds,
            resolution=backbone.resolution,
            steps=self.config.steps,
            **backbone.spec.guided(self.config.guidance, self.config.true_guidance, self.config.negative_prompt),
            replay=backbone.replay if capture else None,
            together=previewed_together(backbone.transformer),
        )
        backbone.replay.clear()
        if not write:
            return list(zip(images, self.prompts, strict=True))
        file = self.file(run, step)
        file.parent.mkdir(exist_ok=True)
        blanks = -len(images) % COLUMNS
        padded = images + [images[0].point(lambda _: 255)] * blanks
        write_atomic(file, png_bytes(make_image_grid(padded, len(padded) // COLUMNS, COLUMNS)))
        return list(zip(images, self.prompts, strict=True))
