"""One `Case` per base: the base as the suite runs it, tiny, from a diffusers folder on disk."""

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loragraft.adapters.checkpoint import Adapter, load_adapter, write_adapter
from loragraft.adapters.inject import adapter_factors, expand_targets, inject_adapter, remove_adapter
from loragraft.backbones.load import find_spec, list_bases, load_16bit, load_backbone
from loragraft.backbones.skeleton import meta_transformer
from loragraft.backbones.spec import Backbone, BaseSpec, Profile
from loragraft.recipes.schema import AdapterConfig, WeightsConfig

EDGE = 64
CAPTION = "a promo tile"


@dataclass(frozen=True)
class Case:
    """A base under test. What is loaded is the caller's to change."""

    spec: BaseSpec
    """The tiny one, which `find_spec` returns as well while the suite runs."""
    folder: Path | None
    """Its diffusers pipeline; None where the weights travel with the package."""
    cache: Path
    true: Mapping[str, Any] = field(default_factory=dict)
    """The configuration that is published."""

    @property
    def weights(self) -> WeightsConfig | None:
        return None if self.folder is None else WeightsConfig(path=str(self.folder))

    @property
    def overrides(self) -> list[str]:
        """Of a recipe: this base, small, on one thread."""
        where = [] if self.folder is None else [f"weights.path={self.folder}"]
        return [
            f"base={self.spec.name}", *where, "data.count=16", f"data.resolution={EDGE}", "data.long_captions=cut", "train.batch_size=2",
            "train.threads=1", "train.validate_every=0", "train.checkpoint_every=0", "optim.warmup_steps=0",
            "adapter.rank=2", "adapter.alpha=2", "sample.steps=1", "sample.prompts=[promo tile]", "tracking.mode=disabled",
        ]  # fmt: skip

    def load(self, profile: Profile | None = "native") -> Backbone:
        backbone = load_backbone(self.spec.name, profile, "cpu", self.cache, self.weights)
        backbone.resolution = EDGE
        return backbone

    def plain(self) -> nn.Module:
        """The 16-bit denoiser, in float32."""
        model = load_16bit(self.spec) if self.folder is None else self.load(None).transformer
        return nn.Module.to(model, dtype=torch.float32).requires_grad_(False).eval()

    def layers(self, base: str) -> dict[str, tuple[int, ...]]:
        """Target -> shape of its weight in a base at its true shapes, where an adapter goes."""
        spec = self.spec if base == self.spec.name else find_spec(base)
        assert spec.external is not None
        config = self.true if spec is self.spec else spec.external.config
        model = meta_transformer(spec.transformer_class, config)
        return {
            path: tuple(model.get_parameter(f"{path}.weight").shape)
            for path in expand_targets(model, spec.lora_targets)
        }

    def predict(self, backbone: Backbone, model: nn.Module | None = None, seed: int = 0) -> Tensor:
        """What `model` (the backbone's own unless given) answers to two noisy latents, a caption and no caption."""
        generator = torch.Generator().manual_seed(seed)
        text = backbone.encoders.encode_text([CAPTION, ""])
        latents = backbone.encoders.encode_images(torch.zeros(2, 3, EDGE, EDGE, dtype=backbone.dtype))
        noisy = torch.randn(latents.shape, generator=generator)
        text = {key: value.to(torch.float32) for key, value in text.items()}
        times = torch.tensor([0.3, 0.8])
        chosen = backbone.transformer if model is None else model
        return self.spec.family.predict(chosen, noisy, times, text, self.spec.training_guidance)

    def adapter(self, folder: Path, strength: float = 2.0) -> Adapter:
        """An adapter on every target, strong enough to change the answer, through its file."""
        backbone = self.load()
        inject_adapter(backbone.transformer, AdapterConfig(rank=3, alpha=3), self.spec.lora_targets)
        generator = torch.Generator().manual_seed(7)
        pairs = {}
        for path, (down, up) in adapter_factors(backbone.transformer).items():
            drawn = torch.randn(up.shape, generator=generator)
            pairs[path] = (down, strength * drawn / down.shape[0] ** 0.5)
        remove_adapter(backbone.transformer)
        about = {"base": self.spec.name, "base_id": backbone.base_id, "name": "strong"}
        return load_adapter(write_adapter(pairs, folder, about, component=self.spec.family.component))


def _accept(config: Any, where: str) -> None:
    """In the place of `External.check`: a tiny configuration is no published one."""


@pytest.fixture(scope="module", params=list_bases())
def case(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    module_of: Callable[[Path, str], ModuleType],
) -> Iterator[Case]:
    """Each base in turn, quantized with one round and one candidate. No longer than a module: `find_spec` answers for all tests."""
    root = tmp_path_factory.mktemp(request.param)
    spec = find_spec(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loragraft.backbones.architectures.FOLDER_ROUNDS", 1)
        patch.setattr("loragraft.backbones.architectures.DATA_FREE_GRID", 1)
        patch.setenv("LORAGRAFT_CACHE", str(root / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        if spec.external is None:
            yield Case(spec, None, root / "cache")
            return
        tiny = module_of(Path(__file__).with_name("tiny.py"), "conformance_tiny")
        config = tiny.tiny_config(spec.external.config)
        folder = tiny.write_pipeline(spec, config, root / "pipeline")
        opened = spec.external.open_encoders
        external = dataclasses.replace(
            spec.external, config=config, check=_accept,
            random_encoders=lambda _, device, dtype: opened(folder, device, dtype),
        )  # fmt: skip
        small = dataclasses.replace(spec, external=external)
        patch.setattr(importlib.import_module(f"loragraft.backbones.{spec.name.replace('-', '_')}"), "SPEC", small)
        yield Case(small, folder, root / "cache", spec.external.config)
