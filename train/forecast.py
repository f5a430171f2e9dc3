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
PATIENCE = 10.0
"""Seconds that a first step waits for a prediction that is not done."""
LATE = "preflight: not ready yet; its prediction follows at the end"
LACKING = re.compile(r"ModuleNotFoundError: No module named '([^']+)'")


class Forecast:
    """A prediction that is being made."""

    def __init__(
        self, process: "subprocess.Popen[bytes] | None", folder: "tempfile.TemporaryDirectory[str] | None"
    ) -> None:
        self._process, self._folder = process, folder
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
        command = [
            sys.executable, "-m", "loragraft.cli", "preflight", recipe, *overrides, "--no-data", "--processes", str(accelerator.num_processes),
            "--card", torch.cuda.get_device_name(device), "--json", str(Path(folder.name) / REPORT),
        ]  # fmt: skip
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with (Path(folder.name) / ERRORS).open("w") as errors:
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        return cls(process, folder)

    def before(self, patience: float = PATIENCE) -> str:
        """What the run will take, as a line to print; "" on a CPU."""
        if self._process is None:
            return ""
        if (failure := self._collect(patience)) is not None:
            return f"{failure}\n"
        assert self._found is not None
        stages = self._found["stages"]
        largest = max(stages, key=lambda name: stages[name])
        times = [f", {machine['seconds_per_step']:.2f} s a step" for machine in self._found["machines"]]
        return (
            f"preflight: {stages['train'] / GIB:.1f} GiB to train, {stages[largest] / GIB:.1f} GiB at most (to {largest})"
            f"{times[0] if times else ''}; needs a card of {self._found['needed'] / GIB:.1f} GiB\n"
        )

    def after(self, measured: int | None = None) -> str:
        """Predicted and measured peak (`torch.cuda.max_memory_allocated`) as a line; "" on a CPU. Ends the prediction.

        A failure that `before` has told is not told again.
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
        return f"memory: predicted {predicted / GIB:.1f} GiB, measured {measured / GIB:.1f} GiB ({off:+.0f} %)\n"

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
        deadline = time.monotonic() + patience
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if self._process.poll() is None:
            return late
        if self._process.returncode:
            assert self._folder is not None
            self._failed = True
            said = (Path(self._folder.name) / ERRORS).read_text().strip().splitlines()
            why = said[-1] if said else f"exit code {self._process.returncode}"
            lacking = LACKING.match(why)
            remedy = f"; {how_to_install(lacking[1])} brings it" if lacking else ""
            return f"preflight failed, training goes on: {why}{remedy}"
        assert self._folder is not None
        self._found = json.loads((Path(self._folder.name) / REPORT).read_text())
        return None
