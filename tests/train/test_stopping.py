"""A stop leaves a checkpoint of the very step it names, and lets no process wait for another that has left."""

import os
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from loragraft import cli
from loragraft.recipes.load import load_recipe
from loragraft.train.forecast import Forecast
from loragraft.train.loop import _Run
from loragraft.train.measured import StepTimes
from loragraft.train.previews import Previews
from loragraft.train.stopping import Stop, stop_on_signal


def test_a_stop_while_images_are_drawn_leaves_a_checkpoint_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.new("RGB", (24, 24), (40 * i, 200, 90)).save(tmp_path / "photos" / f"thing {'abcd'[i]}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAGRAFT_CACHE", str(tmp_path / "cache"))
    Path("mine.yaml").write_text(
        "extends: _base\ndata: {folder: ./photos}\nsample: {prompts: [x], steps: 1, guidance: 1}"
    )
    render = Previews.render

    def interrupted(*given: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return render(*given, **named)

    options = ["train.steps=6", "train.batch_size=1", "train.validate_every=0", "train.checkpoint_every=0"]
    options += ["train.sample_every=2", "train.threads=1", "data.resolution=64", "tracking.mode=disabled"]
    threads = torch.get_num_threads()
    predicting = subprocess.Popen(["sleep", "60"])
    with monkeypatch.context() as patch:
        patch.setattr(Previews, "render", interrupted)
        patch.setattr(Forecast, "start", lambda *_: Forecast(predicting, None))
        patch.setattr(Forecast, "before", lambda _: "")
        assert cli.main(["train", "--recipe", "mine.yaml", "--cpu", "--out", "run", *options]) == 130
    torch.set_num_threads(threads)
    assert predicting.poll() is not None, "the prediction beside the run goes on after it"
    assert "stopped at step 3, nothing lost" in capsys.readouterr().out
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 3


class Together:
    """Two processes as two threads: a reduction waits until both are there."""

    num_processes, device, is_main_process = 2, torch.device("cpu"), False

    def __init__(self, barrier: threading.Barrier, given: list[torch.Tensor]) -> None:
        self.barrier, self.given = barrier, given

    def reduce(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
        if self.barrier.wait() == 0:
            self.given.clear()
        self.barrier.wait()
        self.given.append(value)
        self.barrier.wait()
        mean = torch.stack(self.given).mean(0)
        self.barrier.wait()
        return mean

    def clip_grad_norm_(self, *_: object) -> torch.Tensor:
        return torch.zeros(())


def run_of(accelerator: Any, stop: Stop, asked_in: int, saved: list[int]) -> _Run:
    """A run of 9 steps that do nothing; `stop` is asked while step `asked_in` is computed."""
    folder = SimpleNamespace(step=0, summary={})
    run: Any = object.__new__(_Run)
    batch: Any = (torch.zeros(1), torch.zeros(1), torch.zeros(1), {})

    def step(tensors: object, *, last: bool) -> torch.Tensor:
        stop.asked |= folder.step + 1 == asked_in
        return torch.ones(())

    step.assigns = True  # type: ignore[attr-defined]
    run.accelerator, run.folder, run.step, run.averages = accelerator, folder, step, False
    run.recipe = load_recipe("marketing", ["train.steps=9", "train.validate_every=0", "train.checkpoint_every=0"])
    run.batches, run.parameters = lambda number: [batch], [nn.Parameter(torch.zeros(1))]
    run.optimizer = SimpleNamespace(step=lambda: None, zero_grad=lambda set_to_none: None)
    run.schedule = SimpleNamespace(get_last_lr=lambda: [0.0], step=lambda: None)
    run.early, run.times = SimpleNamespace(exhausted=False), StepTimes()
    run.checkpoint = lambda: saved.append(folder.step)
    return run


def test_processes_that_are_asked_in_different_steps_leave_after_the_same() -> None:
    barrier = threading.Barrier(2, timeout=120)
    given: list[torch.Tensor] = []
    saved: list[list[int]] = [[], []]
    bar = SimpleNamespace(update=lambda: None)

    def go_on(rank: int) -> bool:
        stop = Stop(alone=False)
        run = run_of(Together(barrier, given), stop, asked_in=(3, 4)[rank], saved=saved[rank])
        return run.go_on(stop, bar)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(go_on, (0, 1))) == [True, True]
    assert saved == [[4], [4]], "asked in step 3, known to all with step 4"


def test_alone_a_stop_is_heard_in_its_own_step() -> None:
    with stop_on_signal() as stop:
        saved: list[int] = []
        accelerator = SimpleNamespace(num_processes=1, device=torch.device("cpu"), is_main_process=False)
        accelerator.clip_grad_norm_ = lambda *_: torch.zeros(())
        assert run_of(accelerator, stop, 5, saved).go_on(stop, SimpleNamespace(update=lambda: None))
        assert saved == [5]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # the second
