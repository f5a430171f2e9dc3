"""Figures that are read a step late are the same figures, in the same lines, and so is what was trained."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loragraft.train import lora
from loragraft.train.measured import Measured, StepTimes

LINE = (
    "--recipe", "marketing", "--cpu", "data.count=24", "data.limit=12", "data.resolution=64", "train.batch_size=1", "train.steps=7",
    "train.threads=1", "train.validate_every=4", "train.checkpoint_every=6", "adapter.rank=2", "sample.steps=1",
    "sample.guidance=1", "sample.prompts=[white heart icon]", "tracking.mode=disabled",
)  # fmt: skip


def test_a_step_reads_as_it_was() -> None:
    loss, norm = torch.tensor(0.25, requires_grad=True), torch.tensor(1.5)
    measured = Measured(3, loss, norm, 1e-3)
    assert not measured.waits
    assert measured.read() == {"loss": 0.25, "learning_rate": 1e-3, "grad_norm": 1.5}


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"the loss is nan at step 3: lower optim\.learning_rate"):
        Measured(3, torch.tensor(float("nan")), torch.tensor(1.0), 1e-3).read()


@pytest.mark.gpu
def test_on_a_gpu_a_step_keeps_its_figures_whatever_is_queued_after_it() -> None:
    loss, norm = torch.full((), 0.25, device="cuda"), torch.full((), 1.5, device="cuda")
    measured = Measured(3, loss, norm, 1e-3)
    assert measured.waits
    for _ in range(100):
        loss.add_(1.0)
    assert measured.read() == {"loss": 0.25, "learning_rate": 1e-3, "grad_norm": 1.5}


def test_reading_late_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose figures wait: over steps that validate, save, or do neither."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAGRAFT_CACHE", str(tmp_path / "cache"))
    order: list[str] = []
    read, made = Measured.read, Measured.__init__

    def noted_read(self: Measured) -> dict[str, float]:
        order.append(f"read {self.step}")
        return read(self)

    def noted_step(self: Measured, step: int, *rest: object) -> None:
        order.append(f"step {step}")
        made(self, step, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Measured, "read", noted_read)
    monkeypatch.setattr(Measured, "__init__", noted_step)
    for waits in (False, True):
        order.clear()
        monkeypatch.setattr(Measured, "waits", waits)
        assert lora.main([*LINE, "--out", f"run{waits:d}"]) == 0
    assert " ".join(order) == (
        "step 1 read 1 step 2 step 3 read 2 step 4 read 3 read 4 step 5 step 6 read 5 read 6 step 7 read 7"
    )
    runs = [tmp_path / "run0", tmp_path / "run1"]
    lines = [(run / "metrics.jsonl").read_bytes() for run in runs]
    assert lines[0] == lines[1]
    adapters = [load_file(run / "adapter" / "pytorch_lora_weights.safetensors") for run in runs]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0].keys() | adapters[1].keys())


def test_steps_are_timed_apart_from_what_seldom_follows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 and 20 s: compiling; 0.5 s a step; 30 s: a validation."""
    now = 0.0
    monkeypatch.setattr("loragraft.train.measured.time.perf_counter", lambda: now)
    times = StepTimes()
    assert times.median is None
    for seconds in (40.0, 20.0, 0.5, 0.5, 30.0, 0.5, 0.5):
        times.note()
        now += seconds
    assert times.median == 0.5
