"""Image tokens are counted by one formula: what is drawn together, and whether compiling repays, go by it."""

import pytest
import torch

from loragraft.backbones import sampler
from loragraft.backbones.bases import list_bases
from loragraft.backbones.load import find_spec

CPU = torch.device("cpu")
TOKENS = {
    "flux1-dev": 4096, "flux1-schnell": 4096, "pixart-sigma": 4096, "pocket": 64, "sana-06b": 1024, "sana-16b": 1024,
    "sd-turbo": 1024, "sd15": 1024, "sdxl": 4096, "sdxl-turbo": 1024,
}  # fmt: skip
"""Of a picture of the base's own size."""


class CountedError(Exception):
    """Carries what the sampler counted, before it draws."""


def count(tokens: int) -> int:
    raise CountedError(tokens)


@pytest.mark.parametrize("name", list_bases())
def test_the_sampler_counts_tokens_as_the_spec_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = find_spec(name)
    open_encoders = spec.load_encoders or (lambda *at: spec.external.random_encoders(0, *at))  # type: ignore[union-attr]
    if spec.external is None:
        encoders = open_encoders(CPU, torch.float32)
    else:
        with torch.device("meta"):  # shapes alone
            encoders = open_encoders(CPU, torch.float32)
    pipeline = sampler.build_pipeline(spec.family, None, encoders)  # type: ignore[arg-type]
    assert pipeline.vae_scale_factor == spec.stride
    assert spec.tokens(spec.resolution) == TOKENS[name]
    monkeypatch.setattr(sampler, "drawn_together", count)
    text = {"prompt_embeds": torch.zeros(1, 1, 1)}
    for edge in (spec.resolution, spec.resolution // 2 + spec.grain, spec.resolution + spec.stride):
        with pytest.raises(CountedError) as counted:
            sampler.generate_from_text(spec.family, pipeline, text, {}, [0], resolution=edge, steps=1, guidance=1.0)
        assert counted.value.args == (spec.tokens(edge),)
