"""What a run is: frozen dataclasses, one per block of a recipe.

The text under each field says what it means, its unit and its range. Every class checks its own ranges when it is
built, so a `Recipe` that exists is valid. Reading YAML is `load.py`'s work; nothing here touches a file.
"""

from dataclasses import dataclass
from typing import Literal

from loragraft.recipes.data_config import DataConfig as DataConfig
from loragraft.recipes.data_config import PriorConfig as PriorConfig
from loragraft.recipes.ranges import LARGEST_SEED, is_plain_name
from loragraft.recipes.ranges import RecipeError as RecipeError
from loragraft.recipes.ranges import check_range as _check_range

Numerics = Literal[
    "native",
    "interchange",
    "weight-only",
    "16bit",
    "fp8",
    "int8",
    "nf4",
    "nf4-double",
    "nvfp4",
    "mxfp4",
    "int3",
    "int2",
]
Switch = Literal["auto", "always", "never"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsConfig:
    """Where the weights of a base come from that does not travel with the package: every base but `pocket`."""

    path: str = ""
    """One of: the folder of a diffusers pipeline, or its name on the Hub (`black-forest-labs/FLUX.1-dev`); a transformer's
    folder, 16-bit or an INT4 checkpoint of ours; a file or folder of SVDQuant weights for Nunchaku, diffusers or ComfyUI
    (`user/name/file.safetensors` on the Hub). 16-bit weights are quantized once, into the cache; others keep their own
    numerics, whatever `numerics` says. A relative path starts at the recipe's own folder."""
    encoders: str = ""
    """The pipeline that lends its text encoders and autoencoder where `path` holds a transformer alone; a folder or a name on
    the Hub. Empty = the pipeline that `path` lies in."""
    allow_download: bool = False
    """Whether names on the Hub may be fetched; otherwise only what is on this machine is found."""
    random: bool = False
    """Random values in the true shapes, to try memory and speed without any file: nothing is learned."""
    seed: int = 0
    """Seed of the random values."""

    def __post_init__(self) -> None:
        _check_range("weights.seed", self.seed, 0, LARGEST_SEED)
        if self.random and (self.path or self.encoders):
            raise RecipeError(
                f"weights.random=true and weights.path={self.path or self.encoders!r} exclude each other: leave one out",
                "weights.random",
                "weights.path" if self.path else "weights.encoders",
            )
        if self.encoders and not self.path:
            raise RecipeError(
                "weights.encoders goes with the transformer that weights.path names, and weights.path is empty",
                "weights.encoders",
                "weights.path",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """The LoRA: y += (alpha / rank) B A x on every target."""

    rank: int = 16
    """Rank r of A[r, K] and B[N, r]; 1 to 1024."""
    alpha: float = 16.0
    """Numerator of the scale alpha / rank; greater than 0. It is baked into B when the adapter is saved."""
    targets: tuple[str, ...] = ()
    """Regular expressions matched against full module paths; empty = the base's default list."""
    init: Literal["default", "loftq"] = "default"
    """Where training starts, as in PEFT's `init_lora_weights`. `default`: A random, B zero; the adapter is an update of W, *portable*
    to the 16-bit base and every quantization of it. `loftq`: B A is the best rank-r approximation of what quantization took from W, so
    that the start is nearer to the 16-bit base; the adapter is *compensating*, for its own base alone, until `loragraft adapter export
    --portable` takes the start off (at twice the rank). Needs the 16-bit weights and a quantized `numerics`."""
    seed: int = 0
    """Seed of A's initial values (B starts at zero); `loftq` draws nothing."""

    def __post_init__(self) -> None:
        _check_range("adapter.rank", self.rank, 1, 1024)
        _check_range("adapter.alpha", self.alpha, 0, open_low=True)
        _check_range("adapter.seed", self.seed, 0, LARGEST_SEED)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The loop. One step = one optimizer update = `batch_size * accumulation` samples."""

    steps: int = 400
    """Optimizer steps; at least 1."""
    batch_size: int = 16
    """Samples of one forward pass; 1 to 65,536."""
    accumulation: int = 1
    """Forward passes per optimizer step; 1 to 65,536."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this L2 norm over all adapter parameters; 0 = no clipping."""
    seed: int = 0
    """Seed of sample order, timesteps, noise and text dropout."""
    text_dropout: float = 0.1
    """Chance that a caption is replaced by the empty prompt, which guidance needs at sampling; 0 to 1."""
    save_x: Literal["quantized", "raw"] = "quantized"
    """What a linear keeps of its input for dA: its low-bit codes, or the input itself (exact, more memory)."""
    dgrad: Literal["dequantized", "int8"] = "dequantized"
    """How the gradient passes back through the frozen weight: dequantized tiles, or INT8 codes of the gradient."""
    compile: Switch = "auto"
    """Whether the model's repeated blocks are compiled (norms, modulation and the like are fused): `auto` does it on a GPU
    for models of more than 0.5 GB, where the half minute pays."""
    cuda_graph: Switch = "auto"
    """Whether a step is captured once and replayed, so that Python's time does not count: `auto` does it on GPUs,
    unless they divide the base."""
    join_factors: bool = True
    """Whether a captured step keeps the adapter joined with the base's branch in 16 bits: 3 % faster, 2 bytes a parameter."""
    attention: Literal["sdpa", "cudnn_forward", "flash_attn_4"] = "sdpa"
    """What computes attention: torch's SDPA (flash-2 on a GPU); cuDNN forward and flash-2 backward (16-bit GPUs from compute
    capability 8.0); FlashAttention-4 (from 9.0, needs the extra `flash-attn-4`)."""
    checkpointing: Literal["none", "gelu", "cheap", "block", "selective"] = "none"
    """Gradient checkpointing: `gelu` computes GELU and the layer before it again (a quarter less memory, a twentieth more
    time), `cheap` norms and RoPE as well (a third less memory, a twelfth more time); `block` keeps the input of each block and
    computes the rest again in the backward pass (least memory, about a third more time); `selective` does so for the first
    `checkpoint_blocks` blocks only. The result is the same."""
    checkpoint_blocks: int = 0
    """Blocks that `checkpointing: selective` applies to, counted from the first; at least 1 with it, 0 otherwise."""
    offload_activations: bool = False
    """Whether the inputs of checkpointed blocks wait in host memory; on a GPU only."""
    checkpoint_every: int = 100
    """Steps between checkpoints that a run can resume from; 0 = only at the end."""
    validate_every: int = 100
    """Steps between validation losses; 0 = only at the start and the end."""
    patience: int = 0
    """Stop after so many validations in a row without a lower loss, and save the adapter of the best one; 0 = train all
    steps and save the last. Needs a validation split."""
    sample_every: int = 0
    """Steps between sample images; 0 = only at the end."""
    log_every: int = 10
    """Steps between points of the logged curves; at least 1."""
    threads: int = 0
    """CPU threads; 0 = all cores (`accelerate launch` would leave one)."""

    def __post_init__(self) -> None:
        _check_range("train.steps", self.steps, 1)
        _check_range("train.batch_size", self.batch_size, 1, 65_536)
        _check_range("train.accumulation", self.accumulation, 1, 65_536)
        _check_range("train.max_grad_norm", self.max_grad_norm, 0)
        _check_range("train.seed", self.seed, 0, LARGEST_SEED)
        _check_range("train.text_dropout", self.text_dropout, 0, 1)
        _check_range("train.checkpoint_blocks", self.checkpoint_blocks, 0)
        if (self.checkpointing == "selective") != (self.checkpoint_blocks > 0):
            raise RecipeError(
                f"train.checkpoint_blocks is {self.checkpoint_blocks} with train.checkpointing={self.checkpointing}: it says "
                "how many blocks `selective` applies to, and nothing else reads it",
                "train.checkpoint_blocks",
                "train.checkpointing",
            )
        if self.offload_activations and self.checkpointing not in ("block", "selective"):
            raise RecipeError(
                "train.offload_activations moves the inputs of checkpointed blocks, and train.checkpointing is "
                f"{self.checkpointing}: set it to block or selective",
                "train.offload_activations",
                "train.checkpointing",
            )
        _check_range("train.checkpoint_every", self.checkpoint_every, 0)
        _check_range("train.validate_every", self.validate_every, 0)
        _check_range("train.patience", self.patience, 0)
        if self.patience and not self.validate_every:
            raise RecipeError(
                "train.patience counts validations, and train.validate_every is 0: set how many steps lie between them",
                "train.patience",
                "train.validate_every",
            )
        _check_range("train.sample_every", self.sample_every, 0)
        _check_range("train.log_every", self.log_every, 1)
        _check_range("train.threads", self.threads, 0, 4096)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter, 2019) and its learning-rate schedule."""

    name: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw` keeps its two moments in float32, `adamw8bit` in 8 bits: 2 bytes a parameter instead of 8, steps off by some 6 %."""
    learning_rate: float = 1e-3
    """Peak learning rate; greater than 0, at most 1."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the first and second moment; each at least 0 and below 1."""
    eps: float = 1e-8
    """Added to the root of the second moment; greater than 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay per step, times the learning rate; 0 to 1."""
    warmup_steps: int = 20
    """Steps of linear warm-up from 0; at least 0."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """What follows the warm-up: constant, or down to 0 along a half cosine or a line."""

    def __post_init__(self) -> None:
        _check_range("optim.learning_rate", self.learning_rate, 0, 1, open_low=True)
        for beta in self.betas:
            _check_range("optim.betas", beta, 0, 1, open_high=True)
        _check_range("optim.eps", self.eps, 0, open_low=True)
        _check_range("optim.weight_decay", self.weight_decay, 0, 1)
        _check_range("optim.warmup_steps", self.warmup_steps, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Images made during and after training, and the default of `generate`."""

    prompts: tuple[str, ...] = ()
    """Prompts; empty = the first captions of the test split."""
    negative_prompt: str = ""
    """What guidance moves away from; empty = the empty prompt."""
    steps: int = 20
    """Sampling steps; 1 to 1000."""
    guidance: float = 3.0
    """Guidance in the base's own kind, 1 to 100. Classifier-free (`pocket`, `sdxl`): 1 = off, one pass per step instead of two.
    Embedded (`flux1-dev`): an input of the transformer, always one pass. `flux1-schnell` and the Turbo bases have none."""
    true_guidance: float = 1.0
    """Classifier-free guidance of a distilled base, beside `guidance`; 1 = off; 1 to 100. A negative prompt needs it."""
    seed: int = 0
    """Seed of the initial noise; image i of a prompt uses seed + i."""
    per_prompt: int = 1
    """Images per prompt; 1 to 1024."""

    def __post_init__(self) -> None:
        _check_range("sample.steps", self.steps, 1, 1000)
        _check_range("sample.guidance", self.guidance, 1, 100)
        _check_range("sample.true_guidance", self.true_guidance, 1, 100)
        _check_range("sample.seed", self.seed, 0, LARGEST_SEED)
        _check_range("sample.per_prompt", self.per_prompt, 1, 1024)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """The score after training: images of held-out captions against held-out images."""

    images: int = 64
    """Images to generate; 0 = no score."""
    split: Literal["validation", "test"] = "test"
    """The split whose captions are the prompts and whose images are the reference."""
    steps: int = 20
    """Euler steps; 1 to 1000."""
    guidance: float = 3.0
    """Guidance as in `sample`; 1 to 100."""
    seed: int = 1234
    """Seed of the initial noise."""

    def __post_init__(self) -> None:
        _check_range("eval.images", self.images, 0, 1_000_000)
        _check_range("eval.steps", self.steps, 1, 1000)
        _check_range("eval.guidance", self.guidance, 1, 100)
        _check_range("eval.seed", self.seed, 0, LARGEST_SEED)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Experiment tracking with Weights & Biases, through accelerate. Private by default."""

    project: str = "loragraft"
    """Project that the run belongs to."""
    mode: Literal["offline", "auto", "online", "disabled"] = "offline"
    """`offline` writes the run to disk and touches no network; `online` needs a login; `auto` is online where
    you are logged in, offline otherwise; `disabled` keeps nothing."""

    def __post_init__(self) -> None:
        if not self.project.strip():
            raise RecipeError("tracking.project must not be empty", "tracking.project")


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishConfig:
    """Where `loragraft publish RUN` takes the finished adapter; training itself publishes nothing."""

    to: str = ""
    """A folder, a URL that fsspec opens, or `hf://OWNER`; empty = `--to` says it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A run, complete: with the same code and the same base it gives the same adapter."""

    name: str
    """Name of the run's family; the recipe file's name unless the file says otherwise."""
    base: str = "pocket"
    """Base model: a module of `backbones/`. Naming one that has defaults of its own (`recipes/_on-<base>.yaml`) sets them,
    below what stands beside the name."""
    weights: WeightsConfig = WeightsConfig()
    """Where its weights are, unless they travel with the package."""
    numerics: Numerics = "native"
    """The base's precision. `native` = W4A8, lowest error; `interchange` = W4A4 g64, what SVDQuant files elsewhere mean. Train
    on the one that you will ship. To compare with: `16bit`, ordinary LoRA; `weight-only` = W4A16, whose activations are not
    rounded; weights and activations in `fp8` or `int8` (W8A8, a scale per row and token), `nvfp4` or `mxfp4` (E2M1 in blocks;
    computed as Blackwell does, at no gain in speed); weights alone in `nf4` (QLoRA's, `nf4-double` with 8-bit absmax) or, with
    an SVD branch, in `int3` or `int2` groups. Bits and sources: quantization/formats.py."""
    data: DataConfig
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    sample: SampleConfig = SampleConfig()
    eval: EvalConfig = EvalConfig()
    tracking: TrackingConfig = TrackingConfig()
    publish: PublishConfig = PublishConfig()

    def __post_init__(self) -> None:
        for key, value in (("name", self.name), ("base", self.base)):
            if not value.strip():
                raise RecipeError(f"{key} must not be empty", key)
        if "/" in self.name:
            raise RecipeError(
                f"name {self.name!r} is a path, and runs are kept under it; the place of one run is --out", "name"
            )
        if not is_plain_name(self.name):
            raise RecipeError(
                f"name {self.name!r} is none for an adapter: it has letters, digits and ' .+()@-_', 100 at most, and begins with "
                "one of the first two; without `name` a recipe is called as its file",
                "name",
            )
        if self.adapter.init == "loftq" and self.numerics == "16bit":
            raise RecipeError(
                "adapter.init=loftq makes up for an error of quantization, and numerics=16bit has none: choose another of the two",
                "adapter.init",
                "numerics",
            )
        if self.data.prior.images and self.train.batch_size < 2:
            raise RecipeError(
                "train.batch_size must be at least 2 with data.prior.images: half of a batch shows the class",
                "train.batch_size",
                "data.prior.images",
            )
