"""Kills the whole line, at random moments and around every rename, and compares its end with an uninterrupted run.

    python tests/faults/kill9.py --kills 20 --seed 0

The line is `train/lora.py` on a domain of 24 small images: draw, encode, train, checkpoint, sample, save. One process
loads the base once and forks a child for every attempt, so an attempt costs what it does and no start. Compared byte for byte:
every file of the run folder and of the cache, but for the adapter's time of creation and the seconds in summary.json.
"""

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a forked child must not meet a thread pool of its parent

import torch

from loragraft.adapters.checkpoint import load_adapter
from loragraft.backbones.load import load_backbone
from loragraft.outcome import guarded
from loragraft.quantization.tensor_file import read_tensors
from loragraft.train import lora
from loragraft.train.previews import Previews
from loragraft.train.run_folder import RunFolder

PHASES = ("starting", "drawing", "encoding", "training", "checkpoint", "sampling", "saving")
STEPS, EVERY = 4, 2
RECIPE = (
    "--recipe", "marketing", "--cpu", "data.count=24", "data.limit=12", "data.validation_fraction=0.2",
    f"train.steps={STEPS}", "train.batch_size=2", "train.threads=1", f"train.checkpoint_every={EVERY}",
    "train.validate_every=3", "adapter.rank=4", "optim.learning_rate=1e-2", "optim.warmup_steps=1", "sample.steps=1",
    "sample.guidance=1", "sample.prompts=[white heart icon]", "tracking.mode=disabled",
)  # fmt: skip
ADAPTER = "run/adapter/pytorch_lora_weights.safetensors"


class Clock:
    """Which phase a forked child is in, and how often it has entered each: memory shared with its parent."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 4 * (1 + len(PHASES)))

    def reset(self) -> None:
        self._shared[:] = bytes(len(self._shared))

    @property
    def phase(self) -> str:
        return PHASES[struct.unpack_from("i", self._shared, 0)[0]]

    def entries(self, phase: str) -> int:
        return int(struct.unpack_from("i", self._shared, 4 * (1 + PHASES.index(phase)))[0])

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            before = struct.unpack_from("i", self._shared, 0)[0]
            number = PHASES.index(phase)
            struct.pack_into("i", self._shared, 4 * (1 + number), self.entries(phase) + 1)
            struct.pack_into("i", self._shared, 0, number)
            try:
                return function(*args, **kwargs)
            finally:
                struct.pack_into("i", self._shared, 0, before)

        return inside


@dataclass(frozen=True)
class Moment:
    """A point of the line: `seconds` after phase `phase` is entered for the `entry`-th time."""

    phase: str
    entry: int
    seconds: float


@dataclass
class Attempt:
    """How one child ended."""

    code: int
    """Exit code; minus the signal's number if a signal ended it."""
    phase: str
    """Where it was when the signal was sent; "" if it ended by itself."""
    output: str


@dataclass
class Line:
    """The line in a folder of its own: <root>/cache and <root>/run."""

    root: Path
    clock: Clock
    kills: list[str] = field(default_factory=list)

    def attempt(
        self, moment: Moment | None = None, number: int = signal.SIGKILL, arm: Callable[[], None] | None = None
    ) -> Attempt:
        """Runs the line in a child; sends signal `number` at `moment`. `arm` is called in the child before it starts."""
        self.clock.reset()
        self.root.mkdir(parents=True, exist_ok=True)
        log = self.root / "log"
        child = os.fork()
        if child == 0:
            self._live(log, arm)
        phase = ""
        while moment is not None:
            if self.clock.entries(moment.phase) >= moment.entry or moment.phase == "starting":
                time.sleep(moment.seconds)
                phase = self.clock.phase
                if os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
                    os.kill(child, number)
                else:
                    phase = ""
                break
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
                break
            time.sleep(0.0005)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGKILL:
            self.kills.append(phase or self.clock.phase)
        return Attempt(code, phase, log.read_text(encoding="utf-8", errors="replace"))

    def _live(self, log: Path, arm: Callable[[], None] | None) -> None:
        """The child's life; never returns."""
        code = 70
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1), os.dup2(output, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ["LORAGRAFT_CACHE"] = str(self.root / "cache")
            if arm is not None:
                arm()
            code = guarded(lambda: lora.main([*RECIPE, "--out", str(self.root / "run")]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def snapshot(self) -> dict[str, str]:
        """Path -> sha256 of every visible file; raises AssertionError if the run folder holds scratch files."""
        files = {}
        for path in sorted(p for p in self.root.rglob("*") if p.is_file() and p.name != "log"):
            name = str(path.relative_to(self.root))
            if any(part.startswith(".") for part in path.relative_to(self.root).parts):
                assert not name.startswith("run/"), f"{name} is left over"
                continue
            files[name] = hashlib.sha256(_timeless(path, name)).hexdigest()
        return files


def _timeless(path: Path, name: str) -> bytes:
    """A file's bytes without the moments of the clock in it."""
    if name == ADAPTER:
        load_adapter(path)  # it is whole
        tensors, header = read_tensors(path)
        about = json.loads(header.pop("loragraft"))
        del about["created"]
        weights = b"".join(tensors[key].numpy().tobytes() for key in sorted(tensors))
        return json.dumps([about, header, sorted(tensors)], sort_keys=True).encode() + weights
    if name == "run/summary.json":
        return json.dumps(json.loads(path.read_text()) | {"train_seconds": 0}).encode()
    return path.read_bytes()


@contextlib.contextmanager
def harness() -> Iterator[Clock]:
    """Loads the base once and marks the phases of the line, for as long as the block runs."""
    torch.set_num_threads(1)
    clock = Clock()
    with tempfile.TemporaryDirectory() as unused:
        backbone = load_backbone("pocket", "native", "cpu", Path(unused))
    marks = [
        (lora, "load_backbone", lambda *_: backbone),
        (lora, "open_source", clock.timed("drawing", lora.open_source)),
        (lora, "encode_dataset", clock.timed("encoding", lora.encode_dataset)),
        (lora, "train", clock.timed("training", lora.train)),
        (lora, "save_adapter", clock.timed("saving", lora.save_adapter)),
        (RunFolder, "finish", clock.timed("saving", RunFolder.finish)),
        (RunFolder, "save_checkpoint", clock.timed("checkpoint", RunFolder.save_checkpoint)),
        (Previews, "render", clock.timed("sampling", Previews.render)),
    ]
    before = [(owner, name, owner.__dict__[name]) for owner, name, _ in marks]
    for owner, name, function in marks:
        setattr(owner, name, function)
    try:
        yield clock
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def measure(line: Line) -> dict[str, list[float]]:
    """One uninterrupted run: phase -> seconds of each of its entries, seen by sampling the clock every half millisecond."""
    spans: dict[str, list[float]] = {phase: [] for phase in PHASES}
    line.clock.reset()
    child = os.fork()
    if child == 0:
        line._live(line.root / "log", None)
    last, since = "starting", time.monotonic()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        phase = line.clock.phase
        if phase != last:
            spans[last].append(time.monotonic() - since)
            last, since = phase, time.monotonic()
        time.sleep(0.0005)
    assert (line.root / "run" / "summary.json").exists(), (line.root / "log").read_text()
    return spans


def reference(root: Path, clock: Clock) -> tuple[dict[str, list[float]], dict[str, str]]:
    """An uninterrupted run: seconds of every entry of every phase, and its snapshot."""
    line = Line(root / "reference", clock)
    line.root.mkdir(parents=True)
    return measure(line), line.snapshot()


def compare(line: Line, wanted: dict[str, str], what: str) -> None:
    """Raises AssertionError naming the files that differ from the uninterrupted run's."""
    found = line.snapshot()
    different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    assert not different, f"{what}: {different}"


def kill_at_every_rename(root: Path, clock: Clock, wanted: dict[str, str]) -> list[str]:
    """One run, killed right before and right after every rename and in the middle of every line of metrics.jsonl.

    Returns where it was killed, in order. Raises AssertionError as `random_kills` does.
    """
    line = Line(root / "renamed", clock)
    sites: list[str] = []

    def arm() -> None:
        metrics = line.root / "run" / "metrics.jsonl"

        def die_at(what: str, before: Callable[[], None] = lambda: None) -> None:
            number = len(metrics.read_text().splitlines()) if metrics.exists() else 0
            site = f"{what}, line {number}"
            if site not in sites:
                before()
                print(f"site: {site}", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)

        def dying(rename: Callable[..., None]) -> Callable[..., None]:
            def renaming(source: Path, target: Path) -> None:
                name = Path(target).relative_to(line.root)
                die_at(f"before {name}")
                rename(source, target)
                die_at(f"after {name}")

            return renaming

        def half_a_line() -> None:
            with metrics.open("a") as file:
                file.write('{"step": 1, "lo')

        append = RunFolder.append_metrics

        def appending(folder: RunFolder, values: dict[str, float | int]) -> None:
            die_at("within metrics.jsonl", half_a_line)
            append(folder, values)

        os.replace, os.rename = dying(os.replace), dying(os.rename)
        RunFolder.append_metrics = appending  # type: ignore[method-assign]

    while (attempt := line.attempt(arm=arm)).code == -signal.SIGKILL:
        sites.append(attempt.output.rpartition("site: ")[2].strip())
    assert attempt.code == 0, attempt.output
    compare(line, wanted, f"after kills {sites}")
    return sites


def interrupt_every_phase(root: Path, clock: Clock, wanted: dict[str, str]) -> dict[str, str]:
    """One run, stopped by ctrl-C while it draws, encodes, trains, saves and finishes; phase -> last line that it printed.

    Raises AssertionError unless every stop exits with 130, leaves no scratch file and only files that the uninterrupted
    run has too, and the end equals that run.
    """
    line = Line(root / "interrupted", clock)
    ends = {}
    stops = [
        ("drawing", "domains/"),
        ("encoding", ".json"),
        ("training", ""),
        ("saving", ".safetensors"),
        ("end", "summary"),
    ]
    for phase, name in stops:

        def arm(phase: str = phase, name: str = name) -> None:
            def interrupting(rename: Callable[..., None]) -> Callable[..., None]:
                def renaming(source: Path, target: Path) -> None:
                    if name in str(target) and (clock.phase == phase or phase == "end"):
                        os.kill(os.getpid(), signal.SIGINT)
                    rename(source, target)

                return renaming

            if name:
                os.replace, os.rename = interrupting(os.replace), interrupting(os.rename)

        attempt = line.attempt(Moment("training", 1, 0.6) if not name else None, signal.SIGINT, arm)
        assert attempt.code == 130, f"{phase}: exit code {attempt.code}\n{attempt.output}"
        assert "Traceback" not in attempt.output, attempt.output
        assert not list(line.root.rglob(".*")), f"ctrl-C while {phase} left scratch files"
        caches = {name: digest for name, digest in line.snapshot().items() if name.startswith("cache/")}
        assert caches.items() <= wanted.items(), f"ctrl-C while {phase} left half of something"
        ends[phase] = attempt.output.strip().splitlines()[-1]
    attempt = line.attempt()
    assert attempt.code == 0, attempt.output
    compare(line, wanted, "after ctrl-C in every phase")
    return ends


def random_kills(
    kills: int, seed: int, root: Path, clock: Clock, spans: dict[str, list[float]], wanted: dict[str, str]
) -> dict[str, Any]:
    """Three kills per run, at random moments of random phases, then to its end; until there were `kills` of them.

    Raises AssertionError where a run ends with another error, or with other bytes than the uninterrupted one.
    """
    rng = random.Random(seed)
    hit: Counter[str] = Counter()
    runs = 0
    while hit.total() < kills:
        line = Line(root / f"killed-{runs}", clock)
        chosen = sorted(rng.sample(range(1, len(PHASES)), 3))
        for phase in (PHASES[i] for i in chosen):
            entries = STEPS // EVERY if phase == "checkpoint" else 1
            entry = rng.randint(1, entries)
            longest = sum(spans[phase]) if phase == "training" else max(spans[phase])
            attempt = line.attempt(Moment(phase, entry, rng.uniform(0, longest)))
            assert attempt.code in (-signal.SIGKILL, 0), attempt.output
        last = line.attempt()
        assert last.code == 0, last.output
        compare(line, wanted, f"after kills in {line.kills}")
        hit.update(line.kills)
        runs += 1
        shutil.rmtree(line.root)
    return {
        "kills": hit.total(),
        "runs": runs,
        "seed": seed,
        "phases": {phase: hit[phase] for phase in PHASES},
        "files_compared": len(wanted),
    }


def main() -> int:
    """Prints the report as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill9-") as folder, harness() as clock:
        root, started = Path(folder), time.monotonic()
        spans, wanted = reference(root, clock)
        report = random_kills(args.kills, args.seed, root, clock, spans, wanted)
        report["seconds"] = round(time.monotonic() - started, 1)
        report["seconds_uninterrupted"] = {phase: round(sum(parts), 2) for phase, parts in spans.items()}
        report["renames"] = kill_at_every_rename(root, clock, wanted)
        report["interrupted"] = interrupt_every_phase(root, clock, wanted)
        report["seconds_renames_and_interrupts"] = round(time.monotonic() - started - report["seconds"], 1)
        print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
