"""benchmarks/adapters.py in small: graft deviations and switches measured, the tables scored, parts made one file."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from loragraft.adapters.checkpoint import Adapter, load_adapter
from loragraft.backbones.architectures import FLUX, folder_settings
from loragraft.backbones.load import find_spec, load_16bit
from loragraft.backbones.skeleton import meta_transformer, plan_architecture, randomize
from loragraft.quantization.checkpoint import quantized_layers
from loragraft.recipes.load import load_recipe

KEYS = "device versions commit command seed graft_rel_dev_bf16 graft_rel_dev_fp32 switch_ms transfer merge_requantize"
BESIDE = ("flux_graft", "graft_proof", "transfer", "convergence")


@pytest.fixture(scope="module")
def benchmark(benchmark_module: Callable[..., ModuleType]) -> ModuleType:
    return benchmark_module("adapters", beside=BESIDE)


@pytest.fixture(scope="module")
def transfer(benchmark_module: Callable[..., ModuleType]) -> ModuleType:
    return benchmark_module("transfer", beside="convergence")


@pytest.mark.parametrize("profile", ["native", "interchange"])
def test_an_adapter_trained_on_fluxs_shapes_grafts_exactly(benchmark: ModuleType, profile: str, tmp_path: Path) -> None:
    """It has learned, it is read back from its file, and it moves every layer; what misses a bound does not pass."""
    found = benchmark.flux_shapes(1, profile, 0, "cpu", tmp_path, steps=20)
    assert (found["layers"], found["width"], found["factors"]) == (20, 128, "trained, 20 steps")
    assert found["loss_left"] < 0.8
    assert load_adapter(tmp_path).rank == 16
    assert 0 < found["fp32_worst"] <= 1e-5
    assert 0 < found["bf16_worst"] <= 5e-3
    assert found["smallest_effect"] > 0.01
    assert benchmark.exact(found)
    for key, value in (("fp32_worst", 1e-4), ("bf16_worst", 0.1), ("undo_restores_every_byte", False)):
        assert not benchmark.exact({**found, key: value})


def test_switches_are_timed_and_undone(benchmark: ModuleType) -> None:
    config = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "guidance_embeds": False}
    main = folder_settings("native", calibrated=False, smoothing="hadamard")
    skeleton = meta_transformer(FluxTransformer2DModel, config, partial(plan_architecture, FLUX, main))
    model = randomize(skeleton, "cpu", torch.bfloat16, 0)
    found = benchmark.switch_times(model, list(quantized_layers(model)), 4, 0)
    assert found["undo_restores_every_byte"]
    assert found["switch_allocated_bytes"] == 0
    assert 0 < found["switch_ms"] <= found["switch_ms_slowest"]
    one = sum(2 * 4 * (m.in_features + m.out_features) for m in quantized_layers(model).values())
    assert found["switch_copied_mb"] == pytest.approx(one / 1e6)
    assert found["resident_gib"] == pytest.approx(5 * one / 2**30)


def _cell(value: float, change: float | None = None) -> dict[str, Any]:
    kid = {"value": value, "low": value - 0.01, "high": value + 0.01}
    return {"kid_lite0": kid} | ({} if change is None else {"kid_change": kid | {"value": change}})


def test_parts_become_one_file(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is lacking is named; without a GPU the time of a switch is null, and the reason stands beside it."""
    out, folder = tmp_path / "adapters.json", tmp_path / "work" / "parts"
    monkeypatch.setattr(
        "sys.argv", ["adapters.py", "--work", str(tmp_path / "work"), "--out", str(out), "--stages", "switch"]
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert benchmark.main() == 0
    assert not out.exists()
    assert "run the stage `measure` first" in capsys.readouterr().err
    exact = {
        "fp32_worst": 1e-7, "bf16_worst": 2e-3, "bf16_grafted_vs_float64_worst": 2e-3, "bf16_apart_vs_float64_worst": 2e-3,
        "undo_restores_every_byte": True,
    }  # fmt: skip
    flux = {"native": exact, "interchange": {**exact, "fp32_worst": 3e-6}}
    (folder / "graft.json").write_text(json.dumps({"device": "cpu", "pocket": exact, "flux_shapes": flux}))
    table = {"none": {"W4A8": _cell(0.3)}, "W4A8": {"W4A8": _cell(0.1)}, "16-bit": {"W4A8": _cell(0.12, 0.02)}}
    merged = {"RTN W4A4": _cell(0.2, 0.05)}
    part = {"transfer": table, "merge_requantize": merged, "drawn_on": ["cpu"]}
    (folder / "measure-marketing.json").write_text(json.dumps(part))
    assert benchmark.main() == 0
    result = json.loads(out.read_text())
    assert [key for key in KEYS.split() if key not in result] == []
    assert (result["graft_rel_dev_fp32"], result["graft_rel_dev_bf16"]) == (3e-6, 2e-3)
    assert result["switch_ms"] is None
    assert "GPU" in result["switch"]["why"]
    assert result["transfer"]["marketing"] == table
    lines = capsys.readouterr().out.splitlines()
    assert "| 16-bit | 0.1200 (0.1100 to 0.1300) |" in lines
    assert any(line.startswith("| RTN W4A4 | 0.2000") and "+0.0500" in line for line in lines)
    (folder / "graft.json").write_text(
        json.dumps({"device": "cpu", "pocket": {**exact, "bf16_worst": 0.1}, "flux_shapes": flux})
    )
    assert benchmark.main() == 1


def test_cells_are_compared_with_what_belongs_to_them(
    transfer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell with the adapter trained where it runs, a merged model with the 16-bit adapter's graft at its precision."""
    random = torch.Generator().manual_seed(0)
    real = torch.randn(12, 8, generator=random).double()
    pictures = {
        name: torch.randn(9, 8, generator=random).double() for name in ("88", "816", "168", "1616", "n8", "n16", "m")
    }

    class Store:
        def __init__(self, *_: object) -> None: ...

        def of(self, paths: list[Path], *_: object) -> torch.Tensor:
            return pictures[paths[0].name]

    monkeypatch.setattr(transfer, "open_run", lambda run: (None, None))
    monkeypatch.setattr(transfer, "FeatureStore", Store)
    monkeypatch.setattr(transfer, "real_features", lambda store, recipe: real)
    cells = {
        "none": {"W4A8": [Path("n8")], "16-bit": [Path("n16")]},
        "W4A8": {"W4A8": [Path("88")], "16-bit": [Path("816")]},
        "16-bit": {"W4A8": [Path("168")], "16-bit": [Path("1616")]},
    }
    args = argparse.Namespace(work=tmp_path, precisions=["W4A8", "16-bit"])
    table, merged = transfer.score(args, "marketing", cells, {"SVDQuant W4A8, rank R": [Path("m")]})
    assert "kid_change" not in table["W4A8"]["W4A8"]
    change = partial(transfer.kernel_distance_change, y_MD=real)
    assert table["16-bit"]["W4A8"]["kid_change"] == asdict(change(pictures["88"], pictures["168"]))
    assert table["W4A8"]["16-bit"]["kid_change"] == asdict(change(pictures["1616"], pictures["816"]))
    assert merged["SVDQuant W4A8, rank R"]["kid_change"] == asdict(change(pictures["168"], pictures["m"]))


@pytest.mark.parametrize(
    ("name", "profile", "smoothing", "rank"),
    [
        ("RTN W4A4", "interchange", "none", 0),
        ("SVDQuant W4A4, rank R", "interchange", "weight", 16),
        ("SVDQuant W4A8, rank R + r", "native", "weight", 16 + 3),
    ],
)
def test_merged_weights_are_quantized_again(
    transfer: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    profile: str,
    smoothing: str,
    rank: int,
) -> None:
    spec, path = find_spec("pocket"), "transformer_blocks.0.attn.to_q"
    asked: dict[str, object] = {}
    down, up = torch.randn(3, 256) / 16, torch.randn(256, 3)
    adapter = Adapter("a", {"base": "pocket", "base_id": "of the 16-bit base"}, {path: (down, up)})

    def quantize(changed: Any, profile: str, folder: Path, device: str, *, smoothing: str, rank: int) -> None:
        weight, before = (load_16bit(base).get_submodule(path).get_parameter("weight") for base in (changed, spec))
        assert torch.equal(weight, (before.float() + up @ down).to(torch.bfloat16))
        asked.update(profile=profile, smoothing=smoothing, rank=rank)
        raise InterruptedError

    monkeypatch.setattr(transfer, "quantize_base", quantize)
    args = argparse.Namespace(work=tmp_path, smoothing="weight")
    with pytest.raises(InterruptedError):
        transfer.requantized(args, "marketing", name, adapter, load_recipe("marketing"), "cpu")
    assert asked == {"profile": profile, "smoothing": smoothing, "rank": rank}
