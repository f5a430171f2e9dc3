"""A model quantized from its files: what quantizing the model in memory gives, one layer in memory at a time, resumable."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from loragraft.quantization import stream
from loragraft.quantization.calibrate import ActivationStats, StatsFile, collect, save_stats
from loragraft.quantization.checkpoint import CONFIG_NAME, WEIGHTS_NAME, load_quantized, quantization_config
from loragraft.quantization.convert import plan_layers, quantize_model
from loragraft.quantization.partial_file import JOURNAL
from loragraft.quantization.settings import LayerReport, QuantSettings
from loragraft.quantization.stream import REPORT_NAME, plan_source, quantize_stream, weight_layers
from loragraft.quantization.svdquant import quantize_linear
from loragraft.quantization.tensor_file import CheckpointError, read_tensors, write_tensors
from loragraft.quantization.weight_source import FileSource

Rules = Callable[..., dict[str, QuantSettings]]
QUICK = {"rank": 4, "iterations": 2, "grid": 2, "smoothing": "auto", "search": "subsampled"}


@pytest.fixture
def folder(tiny_flux: FluxTransformer2DModel, tmp_path: Path) -> Path:
    """The tiny model in bfloat16, in shards."""
    nn.Module.to(tiny_flux, torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="300KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    return tmp_path / "model"


@pytest.fixture
def quantize(flux_rules: Rules, flux_keep: tuple[str, ...]) -> Callable[..., list[LayerReport]]:
    def run(
        folder: Path, out: Path, stats: StatsFile | None = None, config: dict[str, object] | None = None, **more: object
    ) -> list[LayerReport]:
        source = FileSource(folder)
        plan = plan_source(source, flux_rules("w4a8", **{**QUICK, **more}), flux_keep)
        return quantize_stream(source, plan, config or source.config or {}, out, stats=stats, progress=False)

    return run


def test_equals_the_model_quantized_in_memory(
    folder: Path,
    quantize: Callable[..., list[LayerReport]],
    tiny_flux: FluxTransformer2DModel,
    flux_rules: Rules,
    flux_keep: tuple[str, ...],
    tmp_path: Path,
) -> None:
    reports = quantize(folder, tmp_path / "out")
    plan = plan_layers(tiny_flux, flux_rules("w4a8", **QUICK), flux_keep)
    expected = quantize_model(tiny_flux, plan, {}, keep=flux_keep)
    assert sorted(reports, key=lambda r: r.path) == sorted(expected, key=lambda r: r.path)
    loaded = load_quantized(tmp_path / "out", FluxTransformer2DModel)
    for name, tensor in tiny_flux.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    config = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())
    assert config["quantization_config"] == quantization_config(tiny_flux)
    assert "_name_or_path" not in config
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([CONFIG_NAME, REPORT_NAME, WEIGHTS_NAME])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_it_says_what_it_waited_for(
    folder: Path, flux_rules: Rules, flux_keep: tuple[str, ...], tmp_path: Path
) -> None:
    """A slow reader shows as such, with the first tensor at least: later ones are read while another layer is quantized."""

    class Slow(FileSource):
        def read(self, name: str) -> Tensor:
            if not read:
                time.sleep(0.5)
            read.append(name)
            return super().read(name)

    read: list[str] = []
    source, waits = Slow(folder), {"reader": 0.0, "writer": 0.0}

    def waited(what: str, seconds: float) -> None:
        waits[what] += seconds

    plan = plan_source(source, flux_rules("w4a8", **QUICK), flux_keep)
    quantize_stream(source, plan, source.config or {}, tmp_path / "out", progress=False, waited=waited)
    assert waits["reader"] > 0.1


def test_layers_are_in_natural_order(folder: Path) -> None:
    source = FileSource(folder)
    layers = weight_layers(source)
    assert len(layers) == len(set(layers)) == 28
    assert "transformer_blocks.0.attn.to_q" in layers
    assert "transformer_blocks.0.attn.norm_q" not in layers
    assert stream._natural("b.9.x") < stream._natural("b.10.x")


def test_an_error_half_way_keeps_what_is_done_and_it_is_not_redone(
    folder: Path, quantize: Callable[..., list[LayerReport]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize(folder, tmp_path / "whole")
    seen: list[str] = []
    broken = True

    def failing(*args: object, path: str, **more: object) -> tuple[dict[str, Tensor], LayerReport]:
        seen.append(path)
        if len(seen) == 9 and broken:
            raise RuntimeError("no more")
        return quantize_linear(*args, path=path, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(stream, "quantize_linear", failing)
    with pytest.raises(RuntimeError, match="no more"):
        quantize(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="other weights, settings"):
        quantize(folder, tmp_path / "out", rank=5)
    failed, broken = seen.pop(), False
    assert quantize(folder, tmp_path / "out") == whole
    assert len(seen) == len(set(seen)) == len(whole)
    assert seen[8] == failed
    for name in (WEIGHTS_NAME, CONFIG_NAME, REPORT_NAME):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_killed_right_before_the_journal_is_removed(
    folder: Path, quantize: Callable[..., list[LayerReport]], tmp_path: Path
) -> None:
    whole = quantize(folder, tmp_path / "out")
    source = FileSource(folder)
    key_line = json.dumps({"key": "foreign"})
    (tmp_path / "out" / JOURNAL).write_text(key_line + "\n")
    with pytest.raises(CheckpointError, match="other weights, settings"):
        quantize(folder, tmp_path / "out")
    (tmp_path / "out" / JOURNAL).unlink()
    with pytest.raises(FileExistsError, match="exists"):
        quantize(folder, tmp_path / "out")
    assert len(whole) == len(weight_layers(source)) - 8


def test_statistics_are_read_layer_by_layer(
    folder: Path,
    quantize: Callable[..., list[LayerReport]],
    tiny_flux: FluxTransformer2DModel,
    flux_inputs: Callable[[int], dict[str, Tensor]],
    flux_rules: Rules,
    flux_keep: tuple[str, ...],
    tmp_path: Path,
) -> None:
    tiny_flux.float()
    plan = plan_layers(tiny_flux, flux_rules("w4a8", **QUICK), flux_keep)
    paths = [path for path, settings in plan.items() if settings.numerics == "w4a8"]
    stats = collect(tiny_flux, paths, lambda: [tiny_flux(**flux_inputs(i)) for i in range(4)] and None)
    save_stats(tmp_path / "stats.safetensors", stats)
    file = StatsFile(tmp_path / "stats.safetensors")
    assert file.layers == set(paths)
    reports = {r.path: r for r in quantize(folder, tmp_path / "out", file, gptq=True)}
    weight = FileSource(folder).read(f"{paths[0]}.weight")
    found = file.read(paths[0])
    assert torch.equal(found.absmax_K, stats[paths[0]].absmax_K)
    _, expected = quantize_linear(
        weight, None, found, plan[paths[0]].__class__("w4a8", gptq=True, **QUICK), path=paths[0]
    )  # type: ignore[arg-type]
    assert reports[paths[0]] == expected
    # Without them GPTQ is refused before anything is written.
    with pytest.raises(ValueError, match=r"no activation statistics for 17 layer\(s\)"):
        quantize(folder, tmp_path / "other", gptq=True)
    assert not list(tmp_path.glob(".other*"))


def test_foreign_statistics_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"a.absmax": torch.ones(3)}, {})
    with pytest.raises(CheckpointError, match="holds no activation statistics"):
        StatsFile(tmp_path / "x.safetensors")
    save_stats(tmp_path / "y.safetensors", {"a": ActivationStats(torch.ones(3), torch.ones(2, 3))})
    assert StatsFile(tmp_path / "y.safetensors").read("a").samples_SK.shape == (2, 3)


def test_wide_tensors_are_stored_in_bfloat16(
    tiny_flux: FluxTransformer2DModel, quantize: Callable[..., list[LayerReport]], tmp_path: Path
) -> None:
    tiny_flux.save_pretrained(tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out")
    tensors, _ = read_tensors(tmp_path / "out" / WEIGHTS_NAME)
    assert tensors["x_embedder.weight"].dtype == tensors["transformer_blocks.0.attn.to_q.bias"].dtype == torch.bfloat16
    assert torch.equal(tensors["x_embedder.weight"], tiny_flux.x_embedder.weight.to(torch.bfloat16))


def test_damaged_weights_name_the_layer(
    folder: Path, quantize: Callable[..., list[LayerReport]], tiny_flux: FluxTransformer2DModel, tmp_path: Path
) -> None:
    tiny_flux.transformer_blocks[0].attn.to_k.weight[1, 1] = torch.nan
    tiny_flux.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn\.to_k.*NaN"):
        quantize(tmp_path / "broken", tmp_path / "out")


@pytest.mark.parametrize("name", ["transformer_blocks.0.attn.to_k.bias", "x_embedder.weight"])
def test_what_is_not_quantized_is_finite_too(
    quantize: Callable[..., list[LayerReport]], tiny_flux: FluxTransformer2DModel, tmp_path: Path, name: str
) -> None:
    tiny_flux.get_parameter(name).view(-1)[1] = torch.nan
    tiny_flux.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=re.escape(name) + ".*NaN"):
        quantize(tmp_path / "broken", tmp_path / "out")
