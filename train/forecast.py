"""Preflight beside a run on a GPU: what it will take is printed before the first step, and compared with what it took after it.

The prediction is a process of its own, on the CPU, while weights are read and images encoded: it delays nothing, and takes no
GPU memory. On a CPU, where memory is not counted like this, there is no prediction.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from loragraft.versions import how_to_install

GIB = 2**30
ERRORS, REPORT = "errors.txt", "report.json"
PATIENCE, REMEDY_PATIENCE = 10.0, 120.0
"""Seconds that a first step waits for a prediction that is not done, and for what would make a run fit that does not."""
LATE = "preflight: not ready yet; its prediction follows at the end"
LACKING = re.compile(r"ModuleNotFoundError: No module named '([^']+)'")


class Forecast:
    """A prediction that is being made."""

    def __init__(
        self,
        process: "subprocess.Popen[bytes] | None",
        folder: "tempfile.TemporaryDirectory[str] | None",
        card: int | None = None,
    ) -> None:
        """card: bytes of the GPU."""
        self._process, self._folder, self._card = process, folder, card
        self._found: dict[str, Any] | None = None
        self._failed = False
        """Whether a failure was told."""

    @classmethod
    def start(cls, recipe: str, overrides: Sequence[str], accelerator: Accelerator) -> "Forecast":
        """Begins to predict the run of `recipe`; on a CPU and beside the main process nothing happens, here and below."""
        device = accelerator.device
        if device.type != "cuda" or not accelerator.is_main_process:
            return cls(None, None)
        folder = tempfile.TemporaryDirectory()
        card = torch.cuda.get_device_properties(device).total_memory
        command = [
            sys.executable, "-m", "loragraft.cli", "preflight", recipe, *overrides, "--no-data", "--processes", str(accelerator.num_processes),
            "--fit", f"{card >> 20}MiB", "--card", torch.cuda.get_device_name(device), "--json", str(Path(folder.name) / REPORT),
        ]  # fmt: skip
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with (Path(folder.name) / ERRORS).open("w") as errors:
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        return cls(process, folder, card)

    def before(self, patience: float = PATIENCE, remedy_patience: float = REMEDY_PATIENCE) -> str:
        """What the run will take, and what would make it fit a GPU that is too small, as lines to print; "" on a CPU."""
        if self._process is None:
            return ""
        if (failure := self._collect(patience)) is not None:
            return f"{failure}\n"
        assert self._found is not None and self._process is not None
        if not self._fits and "fit" not in self._found:
            self._read_later(remedy_patience)
        if self._process.poll() is None:  # nobody will ask what it searches for
            self._process.terminate()
            self._process.wait()
        stages = self._found["stages"]
        largest = max(stages, key=lambda name: stages[name])
        times = [f", {machine['seconds_per_step']:.2f} s a step" for machine in self._found["machines"]]
        return (
            f"preflight: {stages['train'] / GIB:.1f} GiB to train, {stages[largest] / GIB:.1f} GiB at most (to {largest})"
            f"{times[0] if times else ''}; needs a card of {self._found['needed'] / GIB:.1f} GiB\n{self._remedy()}"
        )

    @property
    def _fits(self) -> bool:
        assert self._found is not None
        return self._card is None or self._found["needed"] <= self._card

    def _remedy(self) -> str:
        """A line where the run needs more than the GPU has."""
        assert self._found is not None
        if self._fits or self._card is None:
            return ""
        told = f"preflight: this GPU has {self._card / GIB:.1f} GiB, so the run may end for lack of memory"
        if "fit" not in self._found:
            return f"{told}; stop it and ask `loragraft preflight` what would make it fit\n"
        fit = self._found["fit"]
        if fit["overrides"] is None:
            return f"{told}; nothing that a recipe can change would make it fit\n"
        return f"{told}; it fits ({fit['needed'] / GIB:.1f} GiB) with {fit['overrides']}\n"

    def after(self, measured: int | None = None, step_seconds: float | None = None) -> str:
        """Predicted and measured peak (`torch.cuda.max_memory_allocated`), and seconds of a step, as lines; "" on a CPU. Ends
        the prediction.

        step_seconds: as measured. A failure that `before` has told is not told again.
        """
        if self._process is None:
            return ""
        told = self._failed
        measured = torch.cuda.max_memory_allocated() if measured is None else measured
        try:
            failure = self._collect(0.0, "preflight: not ready when training was, and ended")
        finally:
            self.close()
        if failure is not None:
            return "" if told else f"{failure}\n"
        assert self._found is not None
        predicted = self._found["peak"]
        off = 100 * (predicted / measured - 1)
        memory = f"memory: predicted {predicted / GIB:.1f} GiB, measured {measured / GIB:.1f} GiB ({off:+.0f} %)\n"
        return memory + self._time(step_seconds)

    def _time(self, measured: float | None) -> str:
        assert self._found is not None
        if measured is None or not self._found["machines"]:
            return ""
        predicted = self._found["machines"][0]["seconds_per_step"]
        off = 100 * (predicted / measured - 1)
        return f"time: predicted {predicted:.3g} s a step, measured {measured:.3g} s ({off:+.0f} %)\n"

    def close(self) -> None:
        """Ends the process, if it runs still, and removes its file."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _collect(self, patience: float, late: str = LATE) -> str | None:
        """None once the prediction is there, else why it is not; `late` where it is still being made."""
        assert self._process is not None
        if self._found is not None:
            return None
        self._read_later(patience)
        if self._found is not None:
            return None
        if self._process.poll() is None:
            return late
        assert self._folder is not None
        self._failed = True
        said = (Path(self._folder.name) / ERRORS).read_text().strip().splitlines()
        why = said[-1] if said else f"exit code {self._process.returncode}"
        lacking = LACKING.match(why)
        remedy = f"; {how_to_install(lacking[1])} brings it" if lacking else ""
        return f"preflight failed, training goes on: {why}{remedy}"

    def _read_later(self, patience: float) -> None:
        """Waits for the process to end, `patience` seconds at most, and reads what it has written by then: the prediction, and
        if the run does not fit the GPU, a while later, what would make it. It ends with 1 where nothing would."""
        assert self._process is not None and self._folder is not None
        deadline = time.monotonic() + patience
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        report = Path(self._folder.name) / REPORT
        if report.is_file():
            self._found = json.loads(report.read_text())
