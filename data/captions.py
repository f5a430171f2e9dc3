"""What is said about an image: a template and a trigger around each caption, and the variants that training shows in turn.

Text embeddings are cached, so what changes from epoch to epoch is drawn beforehand: k variants of a training sample, of
which epoch e shows number (e + a constant of the sample) mod k. An image with m captions and no shuffling has those m;
with `shuffle_tags` it has max(m, `caption_variants`), number v being caption v mod m with its tags in an order drawn from
(seed, file name, v), number 0 as it was written. Equal ones count once. Held-out samples keep the first caption, so that
their loss stays comparable.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from loragraft.data.dice import Dice
from loragraft.data.sample import Sample
from loragraft.recipes.schema import DataConfig


def dressed(caption: str, config: DataConfig) -> str:
    """A caption in `caption_template`, behind the trigger unless it says it; an empty one stays empty."""
    if caption and config.caption_template:
        caption = config.caption_template.replace("{caption}", caption)
    return with_trigger(caption, config.trigger)


def as_shown(samples: Sequence[Sample], config: DataConfig) -> list[Sample]:
    """Every sample with what is said of it: template and trigger, `short_captions` of the training samples with their short
    caption, and variants."""
    dressed_samples = [
        replace(
            sample,
            caption=dressed(sample.caption, config),
            short=dressed(sample.short, config),
            captions=tuple(dressed(caption, config) for caption in sample.captions),
        )
        for sample in samples
    ]
    return [
        with_variants(replace(s, caption=s.short, captions=()) if _says_less(s, config) else s, config)
        for s in dressed_samples
    ]


def _says_less(sample: Sample, config: DataConfig) -> bool:
    """Whether sha256(seed, file name, caption) gives a training sample its short caption. Held-out ones keep the long one."""
    if not config.short_captions or sample.split != "train" or not sample.short:
        return False
    digest = hashlib.sha256(f"{config.seed}/{sample.image.name}/{sample.caption}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < config.short_captions * 2**64


def with_trigger(text: str, trigger: str) -> str:
    """A caption or a prompt behind the trigger, unless it says it already; an empty one stays empty."""
    return text if not trigger or not text or trigger in text else f"{trigger}, {text}"


def with_variants(sample: Sample, config: DataConfig) -> Sample:
    """The sample with all captions that it will be shown with, `caption` first."""
    given = sample.said
    variants = list(given) if sample.split == "train" and not config.shuffle_tags else []
    shuffled = sample.split == "train" and config.shuffle_tags
    for number in range(max(len(given), config.caption_variants) if shuffled else 0):
        caption = given[number % len(given)]
        dice = Dice(f"{config.seed}/{sample.image.name}/{number}")
        variants.append(_shuffled(caption, config.keep_tags, dice) if number else caption)
    different = tuple(dict.fromkeys(variants))
    return replace(sample, captions=different if len(different) > 1 else ())


def caption_lines(value: object) -> Sequence[str] | None:
    """One caption, or a list of them, stripped and without empty ones; None where it is neither text nor a list of text."""
    listed = value if isinstance(value, list | tuple) else [value]
    texts = [text.strip() for text in listed if isinstance(text, str)]
    return (
        [text for text in texts if text] if len(texts) + sum(text is None for text in listed) == len(listed) else None
    )


def _shuffled(caption: str, keep: int, dice: Dice) -> str:
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    return ", ".join([*tags[:keep], *dice.shuffled(tags[keep:])])
