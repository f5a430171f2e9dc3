"""`adapter.init=loftq` through the command: nearer to the 16-bit base, resumable, for its own base alone until it is exported."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from loragraft import cli
from loragraft.adapters.checkpoint import Adapter, load_adapter
from loragraft.adapters.formats.contract import START_HASH, contract_of, start_hash
from loragraft.adapters.graft import graft, ungraft
from loragraft.adapters.opening import open_run
from loragraft.backbones.flow import predict_velocity
from loragraft.backbones.load import find_spec, load_16bit, load_backbone
from loragraft.backbones.spec import Backbone
from loragraft.train.run_folder import RunFolder

RECIPE = """\
extends: _base
data: {folder: ./photos, caption: a disc}
adapter: {rank: 16, alpha: 32, init: loftq}
train: {steps: 2, batch_size: 2, threads: 1}
optim: {warmup_steps: 0}
sample: {steps: 1, guidance: 1, prompts: [a disc]}
tracking: {mode: disabled}
"""


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    threads = torch.get_num_threads()
    (tmp_path / "photos").mkdir()
    for number, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "mine.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAGRAFT_CACHE", str(tmp_path / "cache"))
    yield lambda out, *more: cli.main(["train", "--recipe", "mine.yaml", "--cpu", "--out", out, *more])
    torch.set_num_threads(threads)


def same(a: Adapter, b: Adapter) -> bool:
    return all(torch.equal(x, y) for path in a.pairs for x, y in zip(a.pairs[path], b.pairs[path], strict=True))


def export(file: str, out: str, *more: str) -> int:
    return cli.main(["adapter", "export", file, "--out", out, *more])


def test_it_trains_resumes_and_becomes_portable(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("whole") == 0
    assert "LoftQ start, rank 16 on 72 layers" in capsys.readouterr().out
    trained, _ = open_run(Path("whole"))
    start_file = Path("whole/adapter/start.safetensors")
    assert contract_of(trained.metadata) == "compensating"
    assert trained.metadata[START_HASH] == start_hash(start_file)

    append = RunFolder.append_metrics
    with monkeypatch.context() as patch:  # ctrl-C in the first step
        patch.setattr(RunFolder, "append_metrics", lambda *given: (append(*given), os.kill(os.getpid(), signal.SIGINT)))
        assert train("parted") == 130
    with pytest.raises(ValueError, match="is not finished"):
        open_run(Path("parted"))
    kept = Path("parted/adapter/start.safetensors")
    begun = kept.read_bytes()
    kept.unlink()
    assert train("parted") == 2
    assert "cannot be made portable without it: put it back, or start over with --fresh" in capsys.readouterr().err
    kept.write_bytes(begun.replace(trained.base_id.encode(), b"0" * 64))
    assert train("parted") == 2
    assert "is a start on base 0000" in capsys.readouterr().err
    kept.write_bytes(begun)
    assert train("parted") == 0
    assert kept.read_bytes() == begun
    assert same(open_run(Path("parted"))[0], trained)

    assert export("whole", "portable", "--portable", "--style", "diffusers") == 0
    assert export("whole", "portable.safetensors", "--portable", "--style", "comfyui") == 0
    start = load_adapter(start_file)
    for file in ("portable", "portable.safetensors"):
        portable = load_adapter(Path(file))
        assert portable.rank == 32
        for path, (down, up) in portable.pairs.items():
            (A, B), (A0, B0) = trained.pairs[path], start.pairs[path]
            exact = B.double() @ A.double() - B0.double() @ A0.double()
            assert (up @ down - exact).norm() <= 1e-6 * ((B @ A).norm() + (B0 @ A0).norm()), path
    alphas = [value for name, value in load_file("portable.safetensors").items() if name.endswith(".alpha")]
    assert len(alphas) == 72 and all(alpha == 32 for alpha in alphas)
    _on_16_bits(trained, load_adapter(Path("portable")))
    _nearer_to_16_bits(start, tmp_path)

    start_file.write_bytes(Path("portable/pytorch_lora_weights.safetensors").read_bytes())
    assert export("whole", "other", "--portable", "--style", "diffusers") == 2
    assert "is not the start that the adapter was trained from" in capsys.readouterr().err


def _on_16_bits(trained: Adapter, portable: Adapter) -> None:
    """The 16-bit base refuses the one with its remedy and takes the other, in diffusers as W + B A."""
    model = load_16bit(find_spec("pocket"))
    with pytest.raises(ValueError, match=r"is compensating.*loragraft adapter export FILE --portable"):
        graft(model, trained, any_base=True)
    graft(model, portable, any_base=True)
    ungraft(model, portable.name)
    path = "transformer_blocks.0.attn.to_q"
    model.load_lora_adapter(Path("portable"), prefix="transformer", weight_name="pytorch_lora_weights.safetensors")
    layer = model.get_submodule(path)
    down, up = portable.pairs[path]
    torch.testing.assert_close(
        layer.get_delta_weight(next(iter(layer.lora_A))).float(), up @ down, rtol=2e-2, atol=2e-3
    )


def _nearer_to_16_bits(start: Adapter, cache: Path) -> None:
    """The predicted velocity of the base with the start alone."""
    backbone, exact = (load_backbone("pocket", kind, "cpu", cache) for kind in ("native", "16bit"))
    text = exact.encoders.encode_text(["a disc", "a red bicycle"])
    noise = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def velocity(of: Backbone) -> torch.Tensor:
        return predict_velocity(of.transformer, noise, torch.tensor([0.3, 0.7]), text)

    wanted, before = velocity(exact), velocity(backbone)
    graft(backbone.transformer, start)
    assert (velocity(backbone) - wanted).norm() < 0.97 * (before - wanted).norm()


def test_where_there_is_nothing_to_make_up_for(train: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert train("run", "numerics=16bit") == 2
    assert "adapter.init=loftq makes up for an error of quantization" in capsys.readouterr().err
