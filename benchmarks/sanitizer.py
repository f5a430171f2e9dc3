"""Whether the GPU kernels read and write only what is theirs: every op of kernels/ under NVIDIA's compute-sanitizer.

    python benchmarks/sanitizer.py all --out benchmarks/results/sanitizer.json --commit $(git rev-parse HEAD)
    python benchmarks/sanitizer.py all --cases w4a8-branch conv --tools memcheck racecheck --jobs 4
    python benchmarks/sanitizer.py case w4a8-branch

all   Each case (`sanitizer_cases.py`: an op, forward and backward, at small ragged shapes, compared with its float64 reference)
      runs once by itself, which compiles its kernels, and then once under each tool, --jobs processes at a time. Every tensor
      is a cudaMalloc of its own (PYTORCH_NO_CUDA_MEMORY_CACHING=1) with 2 KiB of nobody's memory behind it, so that memcheck
      sees an access past its end. Verdicts: clean; errors; failed (a wrong result, an exception, no kernel launched on a GPU, no
      summary of the tool); not finished (--timeout).
      The case `planted` writes past the end of its tensor: if memcheck does not find that, no verdict of it is worth anything.
case  One case without a sanitizer; the last line of its output is what it checked and launched, in JSON.

The report passes, exit code 0, if every verdict is clean, the planted error is found, and every kernel of kernels/ was
launched under every tool (Hopper's only on sm_90). With --cases it lists what those left out and does not require it.
racecheck and initcheck are slow and not run unless asked for. racecheck knows little of shared memory that TMA writes and
an mbarrier orders, as in Hopper's kernels: read a hazard of those before believing it.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import triton
from sanitizer_cases import CASES, PLANTED, run_case

KERNELS = Path(__file__).parents[1] / "kernels"
TOOLS = ("memcheck", "synccheck", "racecheck", "initcheck")
COMMAND = "python benchmarks/sanitizer.py all --out OUT --commit COMMIT"
ALONE = "alone"
"""The run without a tool."""
FOUND = 9
"""Exit code of compute-sanitizer if it found something."""
RESULT = "RESULT "
"""Begins a case's last line."""
OPTIONS = (
    "--error-exitcode", str(FOUND), "--print-limit", "20", "--launch-timeout", "120", "--target-processes", "application-only",
    "--report-api-errors", "no", "--show-backtrace", "device",
)  # fmt: skip
"""API errors are no accesses of kernels, and libraries probe for what a driver has by making some."""


def our_kernels() -> set[str]:
    """Names of what kernels/ launches: jitted functions whose names end in _kernel."""
    pattern = re.compile(r"^@(?:triton|gluon)\.jit.*\ndef (\w+_kernel)\(", re.MULTILINE)
    return {name for file in KERNELS.glob("*.py") for name in pattern.findall(file.read_text(encoding="utf-8"))}


def command_of(name: str, tool: str, extra: Sequence[str] = ()) -> list[str]:
    """A case under a tool, or `ALONE`."""
    case = [sys.executable, str(Path(__file__).resolve()), "case", name]
    if tool == ALONE:
        return case
    padding = ["--padding", "2048"] if tool == "memcheck" else []
    return ["compute-sanitizer", "--tool", tool, *OPTIONS, *padding, *extra, *case]


def run(command: list[str], timeout: float) -> tuple[int | None, str]:
    """(exit code, output) of a command, None as the code if it was killed after `timeout` seconds, with all its children."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+", errors="replace") as output:  # a pipe would stay open while any child lives
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        code: int | None = None
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return code, output.read()


def judge(tool: str, code: int | None, output: str) -> dict[str, Any]:
    """What a run shows: verdict, errors that the tool counts, the lines that tell why, the case's own result."""
    lines = output.splitlines()
    result = next((json.loads(line[len(RESULT) :]) for line in reversed(lines) if line.startswith(RESULT)), None)
    summary = re.search(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+)", output, re.MULTILINE)
    count = int(summary[1]) if summary else None
    said = [line.strip("= ") for line in lines if line.startswith("=====")]
    said = [line for line in said if line and not line.startswith(("COMPUTE-SANITIZER", "Host Frame", "Saved host"))]
    if code is None:
        verdict, why = "not finished", lines[-3:]
    elif count or code == FOUND:
        verdict, why = "errors", said[:12]
    elif result is None or code != 0 or result["wrong"]:
        verdict, why = "failed", result["wrong"] if result and result["wrong"] else lines[-12:]
    elif not result["kernels"]:
        verdict, why = "failed", ["no kernel was launched on a GPU"]
    elif tool != ALONE and count is None:
        verdict, why = "failed", ["the tool printed no summary", *lines[-6:]]
    else:
        verdict, why = "clean", []
    return {"verdict": verdict, "errors": count, "why": why, "result": result}


def in_parallel(
    tools: Mapping[str, Sequence[str]], work: Callable[[str, str], dict[str, Any]], jobs: int,
    done: Callable[[str, str, dict[str, Any]], None],
) -> None:  # fmt: skip
    """`work` on each case by itself, then on it under its tools, `jobs` at a time; `done` as they end."""
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(work, name, ALONE): (name, ALONE) for name in tools}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, tool = running.pop(future)
                done(name, tool, future.result())
                if tool == ALONE:
                    running |= {pool.submit(work, name, tool): (name, tool) for tool in tools[name]}


def summarize(runs: Mapping[str, Mapping[str, Any]], tools: Sequence[str], whole: bool) -> dict[str, Any]:
    """What a report concludes from {case: {tool: run}}; whole: every kernel must have been launched under every tool."""
    planted = runs.get(PLANTED, {}).get("memcheck")
    found = planted is not None and planted["verdict"] == "errors" and any("planted" in why for why in planted["why"])
    others = {case: of for case, of in runs.items() if case != PLANTED}
    complete = all(tool in of for of in others.values() for tool in (ALONE, *tools))
    dirty = [f"{case}, {tool}: {one['verdict']}" for case, of in others.items() for tool, one in of.items()
             if one["verdict"] != "clean"]  # fmt: skip
    told = [one["result"] for of in runs.values() for one in of.values() if one["result"]]
    hopper = any(result["capability"] == [9, 0] for result in told)
    wanted = {name for name in our_kernels() if hopper or not name.startswith("hopper_")}
    unlaunched = {}
    for tool in tools:
        results = [of[tool]["result"] for of in others.values() if tool in of and of[tool]["verdict"] == "clean"]
        unlaunched[tool] = sorted(wanted - {kernel for result in results for kernel in result["kernels"]})
    passed = complete and found and not dirty and not (whole and any(unlaunched.values()))
    device = {key: told[0][key] for key in ("device", "torch", "triton")} if told else {}
    return {
        "passed": passed, "planted_found": found, "not_clean": dirty, "kernels": len(wanted), "not_launched": unlaunched, **device
    }  # fmt: skip


def run_all(args: argparse.Namespace) -> int:
    """The report, written anew whenever a process ends. 1 if it does not pass."""
    if shutil.which("compute-sanitizer") is None:
        sys.exit(
            "sanitizer.py: no compute-sanitizer on PATH; it is part of the CUDA toolkit (cuda-sanitizer), in its bin/"
        )
    began = time.perf_counter()
    version = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True, check=True).stdout
    names = list(args.cases or (name for name in CASES if name != PLANTED))
    runs: dict[str, dict[str, Any]] = {name: {} for name in (PLANTED, *names)}
    report: dict[str, Any] = {"commit": args.commit, "command": COMMAND, "tools": args.tools}
    report["sanitizer"] = version.strip().splitlines()[-1]

    def work(name: str, tool: str) -> dict[str, Any]:
        start = time.perf_counter()
        code, output = run(command_of(name, tool, args.options.split()), args.timeout)
        return {**judge(tool, code, output), "seconds": round(time.perf_counter() - start, 1)}

    def done(name: str, tool: str, one: dict[str, Any]) -> None:
        runs[name][tool] = one
        report.update(
            summarize(runs, args.tools, whole=not args.cases), seconds=round(time.perf_counter() - began, 1), cases=runs
        )
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"{report['seconds']:6.1f} s  {name:20} {tool:10} {one['verdict']}", flush=True)
        for line in one["why"]:
            print(f"          {line}", flush=True)

    in_parallel({PLANTED: ["memcheck"], **dict.fromkeys(names, args.tools)}, work, args.jobs, done)
    print(json.dumps({key: report[key] for key in ("passed", "planted_found", "not_clean", "not_launched")}))
    return 0 if report["passed"] else 1


def run_one(args: argparse.Namespace) -> int:
    """A case and its last line. 1 if something is wrong or a GPU was asked for and launched nothing."""
    on_gpu = args.device != "cpu"
    about: dict[str, Any] = {"device": "cpu", "capability": None}
    if on_gpu:  # asked before the case, whose errors would fail every later call
        about = {"device": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
    result = run_case(args.name, args.device)
    print(
        RESULT + json.dumps({**result, **about, "torch": torch.__version__, "triton": triton.__version__}), flush=True
    )
    return 1 if result["wrong"] or (on_gpu and not result["kernels"]) else 0


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    every = parts.add_parser("all", help="every case under every tool")
    every.add_argument("--out", type=Path, help="JSON to write")
    every.add_argument("--commit", default="", help="what the report says was measured")
    every.add_argument(
        "--cases", nargs="+", choices=[n for n in CASES if n != PLANTED], metavar="NAME", help=", ".join(CASES)
    )
    every.add_argument("--tools", nargs="+", choices=TOOLS, default=["memcheck", "synccheck"])
    every.add_argument("--jobs", type=int, default=8, help="processes at a time; a case has one thread")
    every.add_argument("--timeout", type=float, default=120, help="seconds of one process")
    every.add_argument("--options", default="", help="further options of compute-sanitizer, in one string")
    every.set_defaults(part=run_all)
    one = parts.add_parser("case", help="one case without a sanitizer")
    one.add_argument("name", choices=CASES, metavar="NAME", help=", ".join(CASES))
    one.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: torch's path, or TRITON_INTERPRET=1"
    )
    one.set_defaults(part=run_one)
    args = parser.parse_args(words)
    return int(args.part(args))


if __name__ == "__main__":
    sys.exit(main())
