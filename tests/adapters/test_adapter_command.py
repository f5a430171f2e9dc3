"""`loragraft adapter inspect` and `export` as a user types them."""

import json
from pathlib import Path

import pytest
import torch

from loragraft.adapters.adapter_command import DTYPES, MAX_RANK, STYLES
from loragraft.adapters.checkpoint import load_adapter, write_adapter
from loragraft.adapters.formats import factors, writing
from loragraft.adapters.opening import open_adapters
from loragraft.cli import main
from loragraft.quantization.tensor_file import read_tensors, write_tensors

NAME = "lora_unet_double_blocks_0_img_attn_proj"


@pytest.fixture
def kohya(tmp_path: Path) -> Path:
    """alpha / r = 1/2, and a text encoder; its header tries to move the cursor."""
    tensors = {f"{NAME}.lora_down.weight": torch.ones(2, 8), f"{NAME}.lora_up.weight": torch.ones(8, 2), f"{NAME}.alpha": torch.tensor(1.0)}  # fmt: skip
    te = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    tensors |= {f"{te}.lora_down.weight": torch.ones(2, 4), f"{te}.lora_up.weight": torch.ones(4, 2)}
    write_tensors(tmp_path / "theirs.safetensors", tensors, {"ss_output_name": "a\x1b[2Jb\nc" + "x" * 200})
    return tmp_path / "theirs.safetensors"


def test_constants_are_those_of_the_modules_behind() -> None:
    assert (MAX_RANK, STYLES) == (factors.MAX_RANK, writing.STYLES)
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES.values())


def test_inspect(kohya: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapter", "inspect", str(kohya)]) == 0
    text = capsys.readouterr().out
    for line in ("dialect   kohya", "base      the file does not say; layers: flux's names, other sizes", "rank      2 (1 layers)", "transformer_blocks.*.attn.to_out.0", "also      text_encoder, 2 tensors"):  # fmt: skip
        assert line in text
    assert "\x1b" not in text and "x" * 150 not in text
    assert main(["adapter", "inspect", str(kohya), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["component"], found["layers"], found["ranks"], found["extras"]) == ("transformer", 1, {"2": 1}, {"text_encoder": 2})  # fmt: skip


def test_inspect_says_what_scale_was_assumed(kohya: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, header = read_tensors(kohya)
    del tensors[f"{NAME}.alpha"]
    write_tensors(tmp_path / "none.safetensors", tensors, header)
    for file, expected in ((kohya, False), (tmp_path / "none.safetensors", True)):
        assert main(["adapter", "inspect", str(file)]) == 0
        assert ("scale     not in the file for 1 modules" in capsys.readouterr().out) is expected


def test_inspect_says_what_changes_nothing(kohya: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """alpha = 0, or a file from before the first step: without it, a picture that is the base's looks like a defect."""
    tensors, header = read_tensors(kohya)
    assert main(["adapter", "inspect", str(kohya)]) == 0
    assert "zero" not in capsys.readouterr().out
    tensors[f"{NAME}.alpha"] = torch.tensor(0.0)
    write_tensors(kohya, tensors, header)
    assert main(["adapter", "inspect", str(kohya)]) == 0
    assert "zero      the update of 1 layers" in capsys.readouterr().out


def test_export_and_back(kohya: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What would be lost has to be left out knowingly; the scale goes into B; dtype as asked."""
    out = tmp_path / "out"
    assert main(["adapter", "export", str(kohya), "--style", "comfyui", "--out", str(out)]) == 2
    assert "--denoiser-only" in capsys.readouterr().err
    given = [
        "adapter",
        "export",
        str(kohya),
        "--style",
        "comfyui",
        "--denoiser-only",
        "--dtype",
        "float16",
        "--out",
        str(out),
    ]
    assert main(given) == 0
    said = capsys.readouterr()
    assert said.err == "note: no workflow beside it: ComfyUI does not know this base\n"
    (file,) = (Path(line) for line in said.out.split())
    assert {tensor.dtype for key, tensor in read_tensors(file)[0].items() if "alpha" not in key} == {torch.float16}
    down, up = load_adapter(file).pairs["transformer_blocks.0.attn.to_out.0"]
    assert torch.equal(up.float() @ down.float(), torch.ones(8, 8))
    assert main(given) == 2
    assert "exists already" in capsys.readouterr().err


def test_what_an_expansion_costs_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LoKr of two undivided factors has full rank; at rank 4 the rest is lost, and named on stderr."""
    generator = torch.Generator().manual_seed(0)
    factors = {f"{NAME}.lokr_w{k}": torch.randn(4, 4, generator=generator) for k in (1, 2)}
    write_tensors(tmp_path / "lokr.safetensors", factors, {})
    exact, cut = (load_adapter(tmp_path / "lokr.safetensors", max_rank=rank) for rank in (16, 4))
    assert (exact.approximation, exact.rank, cut.rank) == ("", 16, 4)
    given = ["adapter", "export", str(tmp_path / "lokr.safetensors"), "--style", "diffusers", "--rank", "4", "--out"]
    assert main([*given, str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert said == f"note: {cut.approximation}\n"
    assert "1 of 1 layers are cut to rank 4, relative error of their update up to 0." in said
    assert load_adapter(tmp_path / "out").rank == 4


def test_foreign_files_open_by_the_usual_way(kohya: Path) -> None:
    with pytest.raises(ValueError, match="'theirs' also changes text_encoder"):
        open_adapters([f"{kohya}@0.5"])
    ((adapter, weight),) = open_adapters([f"{kohya}@0.5"], denoiser_only=True)
    assert (adapter.dialect, weight, list(adapter.pairs)) == ("kohya", 0.5, ["transformer_blocks.0.attn.to_out.0"])


def test_folders(tmp_path: Path) -> None:
    """A run's own, PEFT's name, or the only file; two are too many."""
    pairs = {"fc": (torch.ones(2, 4), torch.ones(4, 2))}
    about = {"name": "mine", "base": "tiny", "base_id": "5" * 64}
    write_adapter(pairs, tmp_path / "run" / "adapter", about)
    assert load_adapter(tmp_path / "run").name == "mine"
    (tmp_path / "one").mkdir()
    (tmp_path / "run/adapter/pytorch_lora_weights.safetensors").rename(tmp_path / "one/style.safetensors")
    assert load_adapter(tmp_path / "one").name == "mine"
    (tmp_path / "one/other.safetensors").write_bytes((tmp_path / "one/style.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"holds 2 \.safetensors files"):
        load_adapter(tmp_path / "one")
