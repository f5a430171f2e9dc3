"""What a run will take before it starts: memory of every stage, time per step and image, the cards it fits, what would help.

    encode captions   the text encoders, streamed layer by layer where the base does that; the transformer waits elsewhere
    encode images     the autoencoder's encoder, one image at a time
    train             the real step on fake tensors (`dry_run.dry_train`)
    validate          the forward pass alone
    sample            the recipe's prompts as one batch, then the autoencoder's decoder, one image at a time
    save              the adapter, copied once

The largest stage decides. A card must hold it with the allocator's unused rests (`SLACK`) and the CUDA context (`CONTEXT`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from loragraft.adapters.inject import inject_adapter
from loragraft.adapters.joined import JoinedFactors
from loragraft.backbones import attention
from loragraft.backbones.architectures import stand_in_settings
from loragraft.backbones.compiled import compiles, fills_card
from loragraft.backbones.load import find_spec, load_backbone
from loragraft.backbones.sampler import drawn_together
from loragraft.backbones.skeleton import meta_transformer, plan_architecture
from loragraft.backbones.spec import BaseSpec
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.recipes.schema import Recipe
from loragraft.train import memory
from loragraft.train.dry_run import DryRun, dry_infer, dry_train
from loragraft.train.op_cost import OpCost
from loragraft.train.optim import choose_optimizer
from loragraft.train.previews import DEFAULT_PROMPTS, previewed_together
from loragraft.train.text_stage import text_stage

GIB = 2**30
CARDS_GIB = (8, 10, 12, 16, 24, 48, 80)
SLACK = 0.04
"""Share of the peak that lies in blocks too small for the next request."""
CONTEXT = GIB // 2
"""CUDA context and kernels, outside the allocator."""
DTYPE = torch.bfloat16
"""What a GPU computes in."""


@dataclass(frozen=True)
class Stage:
    """One phase of a run."""

    name: str
    peak: int
    """Bytes, as `torch.cuda.max_memory_allocated` counts."""


@dataclass(frozen=True)
class Preflight:
    """The prediction for one recipe."""

    stages: tuple[Stage, ...]
    train: DryRun
    sample: DryRun = field(repr=False)
    """One pass over the sampled batch."""
    decode: DryRun = field(repr=False)
    """One image through the decoder."""
    images: int
    """Images in the sampled batch."""
    passes: int
    """Of the transformer per batch of images: steps, twice that with classifier-free guidance."""
    adapter_parameters: int
    resolution: int
    captured: bool
    """Whether steps are replayed from a CUDA graph, so that Python's time does not count."""
    compiled: bool
    """Whether blocks are compiled, so that their time is that of fused kernels; memory is predicted as they are written."""

    @property
    def peak(self) -> int:
        """Bytes of the largest stage."""
        return max(stage.peak for stage in self.stages)

    @property
    def needed(self) -> int:
        """Bytes that a card must have."""
        return self.card_for(self.peak)

    @staticmethod
    def card_for(peak: int) -> int:
        """Bytes of the smallest card for a peak, with the allocator's rests and CUDA's own."""
        return round(peak * (1 + SLACK)) + CONTEXT

    def fits(self, card: int) -> bool:
        """Whether the whole run fits a card of `card` bytes."""
        return self.needed <= card

    @property
    def unknown(self) -> tuple[str, ...]:
        """Ops that no formula covers."""
        return tuple(sorted({*self.train.unknown, *self.sample.unknown}))

    def image_ops(self) -> Iterator[tuple[OpCost, float]]:
        """Ops of one sampled image, with how often each runs."""
        for run, times in ((self.sample, self.passes / self.images), (self.decode, 1.0)):
            for counts in run.ops.values():
                yield from ((cost, times * count) for cost, count in counts.items())


@dataclass(frozen=True)
class Subject:
    """A base without its weights: what the stages are run on."""

    spec: BaseSpec
    transformer: Callable[[], nn.Module]
    """Builds it without an adapter; meta or real, it is the caller's to change."""
    vae: nn.Module
    text: dict[str, Tensor]
    """Embeddings of one caption; shapes alone count."""
    encoders: tuple[nn.Module, ...]
    """Text encoders that lie on the device as a whole."""

    def batch(self, count: int, edge: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(latents, text) of `count` samples; fake under FakeTensorMode."""
        config: Any = self.vae.config
        channels, factor = config.latent_channels, 2 ** (len(_widths(config)) - 1)
        latents = torch.empty(count, channels, edge // factor, edge // factor, dtype=DTYPE)
        text = {key: torch.empty(count, *value.shape[1:], dtype=DTYPE) for key, value in self.text.items()}
        return latents, text


def _widths(config: Any) -> Sequence[int]:
    return tuple(
        config["block_out_channels"] if "block_out_channels" in config else config["encoder_block_out_channels"]
    )


def open_subject(recipe: Recipe, cache_root: Path) -> Subject:
    """The recipe's base as shapes. Raises ValueError for an unknown base."""
    spec = find_spec(recipe.base)
    if spec.external is None:
        backbone = load_backbone(recipe.base, recipe.numerics, "cpu", cache_root)
        modules = tuple(part for part in vars(backbone.encoders).values() if isinstance(part, nn.Module))
        vae = backbone.encoders.pipeline_parts["vae"]
        text = backbone.encoders.encode_text(["a"])
        backbone.encoders.release_text()

        def build() -> nn.Module:
            return load_backbone(recipe.base, recipe.numerics, "cpu", cache_root).transformer

        assert isinstance(vae, nn.Module)
        return Subject(spec, build, vae, text, tuple(part for part in modules if part is not vae))
    external, plan = spec.external, None
    with init_empty_weights():
        encoders = external.random_encoders(0, torch.device("cpu"), DTYPE)
    if recipe.numerics != "16bit":
        plan = partial(plan_architecture, spec, stand_in_settings(recipe.numerics))
    build = partial(meta_transformer, spec.transformer_class, external.config, plan)
    return Subject(spec, build, encoders.pipeline_parts["vae"], encoders.encode_text(["a"]), ())


def preflight(
    recipe: Recipe,
    cache_root: Path,
    subject: Subject | None = None,
    *,
    processes: int = 1,
    like: Preflight | None = None,
) -> Preflight:
    """The prediction for `recipe` on any GPU, for each of `processes`. Takes half a minute of one core for FLUX.1.

    Memory of compiled blocks is predicted as they are written: compiled, they keep up to a tenth less or more. like: the prediction for a
    recipe that differs in its training alone; encoding, sampling and decoding are taken from it.
    """
    subject = open_subject(recipe, cache_root) if subject is None else subject
    resolution = max(recipe.data.edges(subject.spec.resolution))
    captured = recipe.train.cuda_graph != "never" and processes == 1
    train, parameters, rests, compiled = train_run(recipe, subject, resolution, captured=captured)
    if like is not None and like.resolution == resolution:
        sample, decode, count = like.sample, like.decode, like.images
        encoding = [stage for stage in like.stages if stage.name.startswith("encode")]
    else:
        sample, decode, count = sample_runs(recipe, subject, resolution)
        encode = dry_infer(subject.vae, partial(_encode_one, subject.vae, resolution))
        encoding = [
            Stage("encode captions", text_stage(subject.spec, subject.encoders)),
            Stage("encode images", encode.peak),
        ]
    adapter = train.at_peak["adapter"]
    resting = train.static + train.library + rests
    scaled = (sample.peak - sample.static - sample.library) * recipe.train.batch_size // count
    stages = (
        *encoding,
        Stage("train", train.peak),
        Stage("validate", resting + scaled),
        Stage("sample", resting + max(sample.peak - sample.static - sample.library, decode.peak - decode.library)),
        Stage("save", resting + adapter),
    )
    two = subject.spec.guided(recipe.sample.guidance, recipe.sample.true_guidance)["guidance"] > 1
    passes = recipe.sample.steps * (2 if two else 1)
    return Preflight(stages, train, sample, decode, count, passes, parameters, resolution, captured, compiled)


class TrainRun(NamedTuple):
    """A training step."""

    run: DryRun
    parameters: int
    """How many it trains."""
    rests: int
    """Bytes between steps beside `static`: what `GraphStep.pause` leaves."""
    compiled: bool
    """Whether `step.choose_step` compiles its blocks on a GPU."""


def train_run(recipe: Recipe, subject: Subject, resolution: int, *, captured: bool = False) -> TrainRun:
    """The step that `recipe` asks for."""
    config = recipe.train
    model = subject.transformer()
    nn.Module.to(model, dtype=DTYPE)
    for module in model.modules():
        if isinstance(module, SVDQuantLinear):
            module.save_x, module.dgrad = config.save_x, config.dgrad
    with mock.patch.object(attention, "check_backend"):  # it asks for a GPU
        attention.set_attention(model, config.attention)
    parameters = inject_adapter(model, recipe.adapter, subject.spec.lora_targets)
    wanted = config.compile == "always" or (config.compile == "auto" and fills_card(model))
    compiled, rests = wanted and compiles(model), 0
    if captured:  # as `step.graph_step` does; the joined factors stay on the layers
        joined = JoinedFactors(model, DTYPE).nbytes if config.join_factors else 0
        rests = -joined if fills_card(model) else sum(parameter.nbytes for parameter in parameters)
    with _dry_offload():
        memory.set_checkpointing(
            model, config.checkpointing, config.checkpoint_blocks, offload=config.offload_activations
        )

    def loss() -> Tensor:
        latents, text = subject.batch(config.batch_size, resolution)
        times, guidance = torch.empty(config.batch_size), subject.spec.training_guidance
        return subject.spec.family.loss(model, latents, torch.empty_like(latents), times, text, guidance=guidance)

    run = dry_train(
        model,
        loss,
        partial(choose_optimizer, config=recipe.optim, fused=True),
        accumulation=config.accumulation,
        max_grad_norm=config.max_grad_norm,
        captured=captured,
    )
    return TrainRun(run, sum(parameter.numel() for parameter in parameters), rests, compiled)


def sample_runs(recipe: Recipe, subject: Subject, edge: int) -> tuple[DryRun, DryRun, int]:
    """(one pass over the sampled batch, one image through the decoder, images of the batch)."""
    h, w = subject.batch(1, edge)[0].shape[-2:]
    wanted = (len(recipe.sample.prompts) or DEFAULT_PROMPTS) * recipe.sample.per_prompt
    model = subject.transformer()
    count = min(wanted, previewed_together(model) or drawn_together(subject.spec.family.tokens(h, w)))
    nn.Module.to(model, dtype=DTYPE)

    def call() -> Tensor:
        latents, text = subject.batch(count, edge)
        return subject.spec.family.predict(model, latents, torch.empty(count), text, subject.spec.training_guidance)

    def decode() -> Tensor:
        latents, _ = subject.batch(1, edge)
        picture: Tensor = subject.vae.decode(latents, return_dict=False)[0]  # type: ignore[operator]
        return picture

    return dry_infer(model, call), dry_infer(nn.Module.to(subject.vae, dtype=DTYPE), decode), count


def _encode_one(vae: nn.Module, edge: int) -> Any:
    return vae.encode(torch.empty(1, 3, edge, edge, dtype=DTYPE))  # type: ignore[operator]


@contextmanager
def _dry_offload() -> Iterator[None]:
    """Inputs of checkpointed blocks that go to the host are gone from the device: a dry run has one device only."""

    def pack(tensor: Tensor) -> Tensor | tuple[torch.Size, torch.dtype]:
        return tensor if tensor.dim() < 3 else (tensor.shape, tensor.dtype)

    def unpack(packed: Tensor | tuple[torch.Size, torch.dtype]) -> Tensor:
        return packed if isinstance(packed, Tensor) else torch.empty(packed[0], dtype=packed[1])

    with (
        mock.patch.object(memory, "offloaded_inputs", lambda _: saved_tensors_hooks(pack, unpack)),  # noqa: PT008
        mock.patch.object(memory, "_check_offload"),
    ):
        yield
