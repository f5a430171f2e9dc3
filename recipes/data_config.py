"""The `data` block of a recipe: which images and captions, and how they are cut, said and read. Read with `schema.py`."""

from dataclasses import dataclass
from typing import Literal

from loragraft.recipes.ranges import LARGEST_SEED, RecipeError, check_range


@dataclass(frozen=True, kw_only=True, slots=True)
class PriorConfig:
    """Prior preservation (Ruiz et al., "DreamBooth", 2023): half of every batch shows the base's own images of the class,
    so that the adapter learns one thing and keeps the rest. loss = mean over the batch of w l, w = 1 or `weight`."""

    prompt: str = ""
    """The class in words that the base knows, without the trigger: `mug icon`."""
    images: int = 0
    """Class images; the frozen base draws them before training, once. 0 = no prior preservation."""
    weight: float = 1.0
    """Weight of a class image in the loss; 0 to 100."""
    steps: int = 20
    """Euler steps of a class image; 1 to 1000."""
    guidance: float = 3.0
    """Classifier-free guidance of a class image; 1 to 100."""
    seed: int = 0
    """Class image i is drawn from seed + i."""

    def __post_init__(self) -> None:
        check_range("data.prior.images", self.images, 0, 1_000_000)
        check_range("data.prior.weight", self.weight, 0, 100)
        check_range("data.prior.steps", self.steps, 1, 1000)
        check_range("data.prior.guidance", self.guidance, 1, 100)
        check_range("data.prior.seed", self.seed, 0, LARGEST_SEED)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where images and captions come from: exactly one of `domain`, `folder` and `dataset`."""

    domain: str | None = None
    """A built-in generated domain, such as `marketing`: a module of `data/` that builds it from installed packages."""
    folder: str | None = None
    """A folder of images with captions: `metadata.jsonl`, or a `.txt` beside each image, or file names as captions.
    A relative path starts at the recipe's own folder (at the working directory when given on the command line).
    Empty = yours to give: the recipe loads, and training asks for it."""
    dataset: str | None = None
    """A data set that Hugging Face's `datasets` reads and that has an image and a caption column: what `save_to_disk`
    wrote, a folder or file of parquet, an image folder, or a hub's `user/name` (see `allow_download`).
    A relative path starts where that of `folder` does."""
    dataset_split: str = "train"
    """The split of `dataset` to read; its concepts are then divided as a folder's are."""
    image_column: str = ""
    """Column of `dataset` that holds the images; empty = its only image column."""
    allow_download: bool = False
    """Whether `dataset` may be fetched from a hub; otherwise nothing is, whatever its name."""
    count: int = 2400
    """Images that a domain generates; 1 to 1,000,000. Ignored for own data."""
    seed: int = 0
    """Seed of the generator and of the split; any non-negative integer."""
    caption_column: str = ""
    """Field of `metadata.jsonl`, or column of `dataset`, that holds the caption; empty = `text`, else `caption`."""
    caption: str = ""
    """One caption for every image that has none of its own, such as `a photo in sks style`; file names are then not
    read as captions. `{trigger}` stands for the trigger. Empty = an image without caption is an error."""
    trigger: str = ""
    """Words put before every caption that lacks them, so that a prompt can call the style by name; empty = none.
    `{trigger}` in `data.caption` and in `sample.prompts` stands for them."""
    short_captions: float = 0.0
    """Share of the training samples that are shown with their short caption (column `short`) instead of the long one,
    chosen by hash, so that short prompts become enough; 0 to 1."""
    long_captions: Literal["error", "cut"] = "error"
    """What to do with captions longer than the base's text encoder reads (`pocket`: 32 word pieces, about 20 words):
    refuse them, naming the words that would be lost, or cut them, with a warning."""
    caption_template: str = ""
    """What every caption is put into, such as `"{trigger}, {caption}"` or `a photo of {caption}`; empty = the caption alone.
    `{trigger}` stands for the trigger, which otherwise comes before the whole."""
    shuffle_tags: bool = False
    """Whether training captions are split at commas and shown in other orders, so that no tag is learned by its place.
    Held-out captions stay as they are."""
    keep_tags: int = 1
    """Tags at the front of a caption that stay there when the others are shuffled (the trigger is one); 0 to 1000."""
    caption_variants: int = 4
    """Orders of an image's tags that are drawn, once, and encoded: each is shown in one epoch of as many, in turn. Embeddings
    are cached, so a new order every epoch is not to be had; each variant of a T5 caption takes 4 MB of disk. 1 to 64."""
    validation_fraction: float = 0.1
    """Share of the concepts kept for the validation loss; 0 to 0.5."""
    test_fraction: float = 0.1
    """Share of the concepts kept for evaluation; 0 to 0.5."""
    resolution: int = 0
    """Edge of the square image in pixels, a multiple of 16; 0 = the base's own."""
    resolutions: tuple[int, ...] = ()
    """Several edges instead of `resolution`, such as [512, 768, 1024]: a training image is shown at each that it fills
    without being enlarged, a held-out one at the largest of those."""
    buckets: bool = False
    """Whether images keep their aspect ratio: each is scaled and cropped to the nearest of about 19 sizes of up to
    `resolution` squared pixels, between 2:5 and 5:2, and every batch is of one size. Otherwise they become squares."""
    streaming: bool = False
    """Whether `dataset` is read row by row and encoded as it comes: neither all of its images nor the whole file is kept,
    only what is encoded and the held-out images. Needs `limit`, of the stream's first rows."""
    shuffle_buffer: int = 0
    """Rows of a stream that are held and drawn from at random before `limit` counts; 0 = the stream's own order."""
    prefetch: int = 2
    """Batches that a background thread reads ahead while a GPU computes; 0 = none. On a CPU there is nothing to hide."""
    limit: int = 0
    """Use at most this many samples, evenly spaced over each split; 0 = all."""
    licence: str = "unspecified"
    """Licence of your own images (an SPDX name where there is one), written into the adapter's card.
    A domain knows its own."""
    allow_overlap: bool = False
    """Whether an image of your own may stand in the training split and, the same or almost, in a held-out one. It makes
    validation and score too good; otherwise it is an error."""
    prior: PriorConfig = PriorConfig()
    """Images of the class beside those of the one thing."""

    def __post_init__(self) -> None:
        places = ("domain", "folder", "dataset")
        given = {key: value for key in places if (value := getattr(self, key)) is not None}
        if len(given) != 1:
            found = " and ".join(f"{key}={value!r}" for key, value in given.items()) or "none"
            raise RecipeError(
                f"data needs exactly one of data.domain, data.folder and data.dataset, and got {found}; "
                "set one, and clear an inherited one with `null`",
                *(f"data.{key}" for key in given or places),
            )
        check_range("data.count", self.count, 1, 1_000_000)
        check_range("data.seed", self.seed, 0, LARGEST_SEED)
        check_range("data.short_captions", self.short_captions, 0, 1)
        check_range("data.validation_fraction", self.validation_fraction, 0, 0.5)
        check_range("data.test_fraction", self.test_fraction, 0, 0.5)
        check_range("data.resolution", self.resolution, 0, 8192)
        check_range("data.limit", self.limit, 0)
        check_range("data.keep_tags", self.keep_tags, 0, 1000)
        check_range("data.caption_variants", self.caption_variants, 1, 64)
        check_range("data.shuffle_buffer", self.shuffle_buffer, 0, 1_000_000)
        check_range("data.prefetch", self.prefetch, 0, 64)
        self._check_sizes()
        if self.caption_template and "{caption}" not in self.caption_template:
            raise RecipeError(
                f"data.caption_template {self.caption_template!r} has no {{caption}}, so all images would say the same; "
                "one caption for all is data.caption",
                "data.caption_template",
            )
        if self.streaming and self.dataset is None:
            raise RecipeError("data.streaming reads data.dataset, and none is given", "data.streaming", "data.dataset")
        if self.streaming and not self.limit:
            raise RecipeError(
                "data.streaming needs data.limit: how many rows of the stream are used", "data.streaming", "data.limit"
            )
        if self.shuffle_buffer and not self.streaming:
            raise RecipeError("data.shuffle_buffer is for data.streaming=true", "data.shuffle_buffer", "data.streaming")

    def edges(self, native: int) -> tuple[int, ...]:
        """The resolutions to train at, for a base whose own is `native`."""
        return self.resolutions or (self.resolution or native,)

    def _check_sizes(self) -> None:
        if self.resolution % 16:
            raise RecipeError(
                f"data.resolution must be a multiple of 16, or 0 for the base's own, not {self.resolution}",
                "data.resolution",
            )
        for edge in self.resolutions:
            check_range("data.resolutions", edge, 16, 8192)
            if edge % 16:
                raise RecipeError(f"data.resolutions must be multiples of 16, not {edge}", "data.resolutions")
        if self.resolutions and self.resolution:
            raise RecipeError(
                f"data.resolution is {self.resolution} and data.resolutions {list(self.resolutions)}: give one of them",
                "data.resolutions",
                "data.resolution",
            )
        if (self.buckets or self.resolutions) and self.prior.images:
            raise RecipeError(
                "class images are squares of the base's own size and share batches with yours: data.prior.images goes "
                "neither with data.buckets nor with data.resolutions",
                "data.buckets" if self.buckets else "data.resolutions",
                "data.prior.images",
            )
