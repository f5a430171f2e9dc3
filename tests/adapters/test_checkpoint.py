"""The adapter file: loads in stock diffusers, round trips, and refuses what it cannot trust."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from loragraft.adapters.checkpoint import Adapter, load_adapter, save_adapter, write_adapter
from loragraft.adapters.inject import adapter_factors, inject_adapter
from loragraft.kernels.layout import relative_rms
from loragraft.quantization.tensor_file import CheckpointError, read_tensors, write_tensors
from loragraft.recipes.schema import AdapterConfig

Inputs = Callable[[int], dict[str, Tensor]]
FILE = "pytorch_lora_weights.safetensors"
METADATA = {"name": "marketing", "base": "tiny", "base_id": "5" * 64, "rank": 4}
TARGETS = [r"(single_)?transformer_blocks\.\d+\.attn\.to_[qkv]", r"single_transformer_blocks\.\d+\.proj_out"]


@pytest.fixture
def trained(flux: FluxTransformer2DModel) -> FluxTransformer2DModel:
    parameters = inject_adapter(flux, AdapterConfig(rank=4, alpha=12.0), TARGETS)
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return flux


def test_roundtrip(trained: FluxTransformer2DModel, tmp_path: Path) -> None:
    file = save_adapter(trained, tmp_path / "adapter", METADATA)
    assert file == tmp_path / "adapter" / FILE
    assert [path.name for path in file.parent.iterdir()] == [FILE]
    factors = adapter_factors(trained)
    for path in (file, file.parent):
        adapter = load_adapter(path)
        assert adapter.name == "marketing"
        assert adapter.metadata.items() >= METADATA.items()
        assert "created" in adapter.metadata
        assert adapter.rank == 4
        assert adapter.pairs.keys() == factors.keys()
        for name, (down, up) in factors.items():
            assert torch.equal(adapter.pairs[name][0], down)
            assert torch.equal(adapter.pairs[name][1], up)
    layer = trained.get_submodule("transformer_blocks.0.attn.to_q")
    assert torch.equal(factors["transformer_blocks.0.attn.to_q"][1], layer.lora_B["default"].weight * 3)
    half = save_adapter(trained, tmp_path / "half", METADATA, dtype=torch.bfloat16)
    assert all(tensor.dtype == torch.bfloat16 for tensor in read_tensors(half)[0].values())
    save_adapter(trained, tmp_path / "half", METADATA)  # the old file is replaced
    assert all(tensor.dtype == torch.float32 for tensor in read_tensors(half)[0].values())


@pytest.mark.parametrize("through", ["pipeline", "transformer"])
def test_loads_in_stock_diffusers(
    tmp_path: Path, plain_flux: FluxTransformer2DModel, flux_inputs: Inputs, through: str
) -> None:
    """Plain linears, diffusers' own loader: every delta is B A, scale 1, with unequal ranks as well."""
    generator = torch.Generator().manual_seed(1)
    pairs = {
        "transformer_blocks.0.attn.to_q": (torch.randn(4, 128, generator=generator), torch.randn(128, 4, generator=generator)),
        "single_transformer_blocks.0.attn.to_q": (torch.randn(4, 128, generator=generator), torch.randn(128, 4, generator=generator)),
        "single_transformer_blocks.0.proj_out": (torch.randn(6, 640, generator=generator), torch.randn(128, 6, generator=generator)),
    }  # fmt: skip
    write_adapter(pairs, tmp_path, METADATA)
    before = plain_flux(**flux_inputs(0)).sample
    if through == "pipeline":
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        pipeline = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=plain_flux, **parts)
        pipeline.load_lora_weights(str(tmp_path), adapter_name="ours")
    else:
        plain_flux.load_lora_adapter(str(tmp_path), weight_name=FILE, prefix="transformer", adapter_name="ours")
    carrying = {
        path for path, module in plain_flux.named_modules() if hasattr(module, "lora_A") and "ours" in module.lora_A
    }
    assert carrying == pairs.keys()
    for path, (down, up) in pairs.items():
        layer = plain_flux.get_submodule(path)
        assert layer.scaling["ours"] == 1.0
        assert relative_rms(layer.get_delta_weight("ours"), up @ down) < 1e-6
    assert relative_rms(plain_flux(**flux_inputs(0)).sample, before) > 0.05


def test_another_base_is_refused_with_both_ids() -> None:
    adapter = Adapter("a", METADATA, {})
    adapter.check_base("5" * 64)
    with pytest.raises(ValueError, match=f"{'5' * 64}.*tiny.*this base is {'6' * 64}"):
        adapter.check_base("6" * 64)
    with pytest.raises(ValueError, match="unknown"):
        Adapter("foreign", {}, {}).check_base("6" * 64)


A, B = "transformer.fc.lora_A.weight", "transformer.fc.lora_B.weight"
CORRUPTIONS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "lone factor": (lambda t: t.pop(B), "'fc' has only one factor, A"),
    "ranks": (lambda t: t.update({B: torch.zeros(8, 3)}), r"'fc' has A \(2, 16\) and B \(8, 3\)"),
    "nan": (lambda t: t[A].fill_(torch.nan), rf"'{A}' holds NaN"),
    "inf": (lambda t: t[B].fill_(torch.inf), rf"'{B}' holds NaN or infinity"),
    "vector": (lambda t: t.update({A: torch.zeros(16)}), r"'fc' has A \(16,\), expected a matrix"),
    "integers": (lambda t: t.update({A: torch.zeros(2, 16, dtype=torch.int32)}), rf"'{A}' is torch.int32"),
    "alpha": (lambda t: t.update({"transformer.fc.alpha": torch.tensor(4.0)}), "'fc' has two scales, 2 in its alpha"),
    "foreign": (
        lambda t: t.update({"transformer.fc.weight": torch.zeros(1, 1)}),
        r"no part of a LoRA.*'transformer\.fc\.weight'",
    ),
    "empty": (lambda t: t.clear(), "holds no tensors"),
}


@pytest.mark.parametrize("case", CORRUPTIONS)
def test_corrupt_files_are_refused(tmp_path: Path, case: str) -> None:
    file = write_adapter({"fc": (torch.ones(2, 16), torch.ones(8, 2))}, tmp_path, METADATA)
    tensors, header = read_tensors(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change, message = CORRUPTIONS[case]
    change(tensors)
    write_tensors(file, tensors, header)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(file)


def test_other_damage(tmp_path: Path) -> None:
    file = write_adapter({"fc": (torch.ones(2, 16), torch.ones(8, 2))}, tmp_path, METADATA)
    tensors, header = read_tensors(file)
    for name in ("../../evil", "/etc/passwd", "a\\b", "..", 7):
        block = json.dumps({**json.loads(header["loragraft"]), "name": name})
        write_tensors(file, tensors, {**header, "loragraft": block})
        with pytest.raises(CheckpointError, match="no plain name"):
            load_adapter(file)
    write_tensors(file, tensors, {**header, "loragraft": "{"})
    with pytest.raises(CheckpointError, match="not JSON"):
        load_adapter(file)
    write_tensors(file, tensors, header)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=f"truncated: tensor '{B}'"):
        load_adapter(file)
    (tmp_path / "adapter.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"\.safetensors files only"):
        load_adapter(tmp_path / "adapter.bin")
    for name in ("nowhere.safetensors", "nowhere"):
        with pytest.raises(CheckpointError, match=rf"there is no .*{name}: give a run folder"):
            load_adapter(tmp_path / name)


def test_a_file_without_our_block_loads_unnamed(tmp_path: Path) -> None:
    write_tensors(tmp_path / "theirs.safetensors", {A: torch.ones(2, 16), B: torch.ones(8, 2)}, {"format": "pt"})
    adapter = load_adapter(tmp_path / "theirs.safetensors")
    assert adapter.name == "theirs"
    assert "unknown" in adapter.base_id


def test_nothing_doubtful_is_written(tmp_path: Path, flux: FluxTransformer2DModel) -> None:
    good = {"fc": (torch.ones(2, 16), torch.ones(8, 2))}
    with pytest.raises(ValueError, match="lacks base_id"):
        write_adapter(good, tmp_path, {"base": "tiny"})
    with pytest.raises(ValueError, match=r"fc\.lora_B\.weight holds NaN"):
        write_adapter({"fc": (torch.ones(2, 16), torch.full((8, 2), torch.nan))}, tmp_path, METADATA)
    with pytest.raises(ValueError, match="no adapter named 'default'"):
        save_adapter(flux, tmp_path, METADATA)
    assert list(tmp_path.iterdir()) == []
