"""Files that people made: each is read as what it is, or refused for the right reason."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loragraft.adapters.checkpoint import Adapter, load_adapter
from loragraft.adapters.formats.families import UNETS
from loragraft.quantization.tensor_file import CheckpointError

LORAS = Path(__file__).parents[4] / "shared" / "data" / "loras"
pytestmark = pytest.mark.skipif(not LORAS.is_dir(), reason="../shared/data/loras is not here")
KNOWN = {
    "catundchat_sd15.safetensors": ("attention processors", 128, 4, set()),
    "cloneofsimo_lora_disney.safetensors": ("cloneofsimo", 144, 1, {"text_encoder", "embedding"}),
    "lycoris_smart_falcon_4_lokr.safetensors": ("LyCORIS LoKr", 278, 16, {"text_encoder"}),
}
REFUSED = {"cloneofsimo_lora_pop.pt": "is a pickle, which can run code"}


def test_every_file_is_accounted_for() -> None:
    assert {file.name for file in LORAS.iterdir()} == KNOWN.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", KNOWN)
def test_read(name: str) -> None:
    """Dialect, layers and ranks; every pair has the shape of that layer of the published SD 1.5."""
    dialect, layers, rank, extras = KNOWN[name]
    adapter = load_adapter(LORAS / name)
    assert (adapter.dialect, str(adapter.family), len(adapter.pairs)) == (dialect, "sd15", layers)
    assert {down.shape[0] for down, _ in adapter.pairs.values()} == {rank}
    assert adapter.extras.keys() == extras
    assert adapter.errors == {}
    for path, (down, up) in adapter.pairs.items():
        assert (up.shape[0], *down.shape[1:]) == UNETS["sd15"].layers[path]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=REFUSED[name]):
        load_adapter(LORAS / name)


def product(adapter: Adapter, path: str) -> torch.Tensor:
    down, up = adapter.pairs[path]
    return up.double().flatten(1) @ down.double().flatten(1)


def test_the_lokr_file_means_kronecker_products() -> None:
    """alpha = r = 4: no scale."""
    file = LORAS / "lycoris_smart_falcon_4_lokr.safetensors"
    raw, adapter = load_file(file), load_adapter(file)
    for path in ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "down_blocks.1.resnets.0.conv1"):
        module = f"lora_unet_{path.replace('.', '_')}"
        w1, w2 = (raw[f"{module}.lokr_w{k}_a"].double() @ raw[f"{module}.lokr_w{k}_b"].double() for k in (1, 2))
        expected = torch.kron(w1, w2) * float(raw[f"{module}.alpha"]) / 4
        assert (product(adapter, path) - expected).norm() < 1e-6 * expected.norm()


def test_the_processor_file_means_its_own_factors() -> None:
    file = LORAS / "catundchat_sd15.safetensors"
    raw, adapter = load_file(file), load_adapter(file)
    module = "up_blocks.3.attentions.2.transformer_blocks.0.attn2"
    down, up = adapter.pairs[f"{module}.to_out.0"]
    assert torch.equal(down, raw[f"{module}.processor.to_out_lora.down.weight"])
    assert torch.equal(up, raw[f"{module}.processor.to_out_lora.up.weight"])


def test_the_numbered_file_is_walked_as_its_trainer_did() -> None:
    """unet:4 is the first GEGLU (8 x 320 outputs), unet:6 the first projection of text (768 inputs)."""
    file = LORAS / "cloneofsimo_lora_disney.safetensors"
    raw, adapter = load_file(file), load_adapter(file)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert torch.equal(adapter.pairs[f"{block}.ff.net.0.proj"][1], raw["unet:4:up"])
    assert torch.equal(adapter.pairs[f"{block}.attn2.to_k"][0], raw["unet:6:down"])
    assert torch.equal(
        adapter.pairs["mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"][0], raw["unet:143:down"]
    )
    assert set(adapter.extras["embedding"]) == {"<s1>", "<s2>"}
