"""The main job as a user runs it, small: own folder, five-line recipe, `accelerate launch`, kill -9, resume, graft, draw.

Every process runs with a guard on its sockets: after installation nothing but loopback is touched.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open

from loragraft import cli

ROOT = Path(__file__).parents[1]
STEPS = 6

GUARD = """
import os, socket
_connect, _getaddrinfo = socket.socket.connect, socket.getaddrinfo
def _refuse(what):
    with open(os.environ["NETWORK_LOG"], "a") as log:
        log.write(f"{what}\\n")
    raise OSError(f"network use: {what}")
def connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(("127.", "::1", "localhost")):
        _refuse(address)
    return _connect(self, address)
def getaddrinfo(host, *args, **kwargs):
    if host not in (None, "", "localhost", "127.0.0.1", "::1", socket.gethostname()):
        _refuse(host)
    return _getaddrinfo(host, *args, **kwargs)
socket.socket.connect, socket.getaddrinfo = connect, getaddrinfo
"""


@dataclass(frozen=True)
class Place:
    """A user's folder: images, recipe, and the environment that the commands run in."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "mine.yaml"

    @property
    def environment(self) -> dict[str, str]:
        guard = self.root / "guard"
        path = os.pathsep.join(filter(None, [str(guard), os.environ.get("PYTHONPATH", "")]))
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "TRITON_INTERPRET"))},
            "PYTHONPATH": path,
            "NETWORK_LOG": str(self.root / "network.log"),
            "LORAGRAFT_CACHE": str(self.root / "cache"),
        }

    def start(self, out: str, *overrides: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "train" / "lora.py")]
        options = ["--recipe", str(self.recipe), "--out", str(self.root / out), *overrides]
        return subprocess.Popen(
            [*command, *options], cwd=self.root, env=self.environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def train(self, out: str, *overrides: str) -> str:
        process = self.start(out, *overrides)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return output


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("user")
    photos = root / "photos"
    photos.mkdir()
    colours = ["red", "green", "blue", "orange"]
    for i in range(24):
        picture = Image.new("RGB", (160, 140), "white")
        ImageDraw.Draw(picture).ellipse((20, 20, 60 + 3 * i, 120), fill=colours[i % 4])
        picture.save(photos / f"{i:02d}.png")
        (photos / f"{i:02d}.txt").write_text(f"a {colours[i % 4]} blob number {i}")
    (root / "guard").mkdir()
    (root / "guard" / "sitecustomize.py").write_text(GUARD)
    (root / "mine.yaml").write_text(
        "extends: _base\n"
        "data: {folder: ./photos, validation_fraction: 0.2, test_fraction: 0.2}\n"
        f"train: {{steps: {STEPS}, batch_size: 2, checkpoint_every: 1, validate_every: 3, log_every: 1}}\n"
        "optim: {learning_rate: 3e-2, warmup_steps: 1, schedule: constant}\n"
        "sample: {prompts: ['a red blob'], steps: 2}\n"
    )
    return Place(root)


@pytest.fixture(scope="session")
def run(place: Place) -> Path:
    """One uninterrupted run."""
    output = place.train("whole")
    assert "reference" in output, "the ledger was not printed"
    return place.root / "whole"


def losses(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_that_a_reader_needs(run: Path) -> None:
    assert [line["step"] for line in losses(run)] == list(range(1, STEPS + 1))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["validation_loss_end"] == losses(run)[-1]["validation_loss"]
    assert (run / "samples" / f"step_{STEPS:06d}.png").exists()
    assert (run / "recipe.yaml").exists()
    assert not (run / "checkpoint.pt").exists()


def test_adapter_file_says_what_it_is_and_nothing_local(run: Path, place: Place) -> None:
    with safe_open(run / "adapter" / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = file.metadata()
        keys = set(file.keys())
    about = json.loads(metadata["loragraft"])
    assert about["base"] == "pocket"
    assert len(about["base_id"]) == 64
    assert about["steps"] == STEPS
    assert str(place.root) not in json.dumps(metadata)
    assert "transformer.single_transformer_blocks.0.proj_out.lora_A.weight" in keys


def test_killed_with_9_and_resumed_equals_uninterrupted(place: Place, run: Path) -> None:
    """Bit for bit: every loss, gradient norm and validation loss, and the adapter."""
    process = place.start("killed")
    metrics, deadline = place.root / "killed" / "metrics.jsonl", time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 3:
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode != 0
    assert not (place.root / "killed" / "summary.json").exists(), "finished before it was killed"
    place.train("killed")
    assert losses(place.root / "killed") == losses(run)
    files = [folder / "adapter" / "pytorch_lora_weights.safetensors" for folder in (run, place.root / "killed")]
    with safe_open(files[0], "pt") as a, safe_open(files[1], "pt") as b:
        assert set(a.keys()) == set(b.keys())
        assert all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in a.keys())  # noqa: SIM118


def test_interchange_profile_trains_in_its_own_numerics(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    output = place.train("interchange", "numerics=interchange", "train.steps=2")
    assert "w4a4" in output
    assert "w4a8" not in output
    assert len(losses(place.root / "interchange")) == 2


def test_the_offline_wandb_run_reads_back(run: Path) -> None:
    """With W&B's own reader: config, curves, images and the adapter as an artifact."""
    (folder,) = (run / "wandb").glob("offline-run-*")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    summary = json.loads(
        subprocess.run([*inspect, "--summary", str(folder)], check=True, capture_output=True, text=True).stdout
    )
    text = json.dumps(summary)
    for expected in ("recipe_hash", "base_id", "ledger", "train/loss", "train/validation_loss", "samples"):
        assert expected in text, f"{expected} is not in the W&B run"
    records = subprocess.run([*inspect, str(folder)], check=True, capture_output=True, text=True).stdout.splitlines()
    kinds = {json.loads(line).get("type") for line in records if line.startswith("{")}
    assert "artifact" in kinds or any("mine-adapter" in line for line in records)


def test_generate_draws_before_and_after(run: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAGRAFT_CACHE", str(place.root / "cache"))
    out = place.root / "images"
    command = [
        "generate",
        "--adapter",
        f"{run}@0.9",
        "--prompt",
        "a blue blob",
        "--steps",
        "3",
        "--compare",
        "--out",
        str(out),
    ]
    assert cli.main(command) == 0
    about = json.loads(Image.open(out / "0000.png").text["loragraft"])  # type: ignore[attr-defined]
    assert about["prompt"] == "a blue blob"
    assert about["adapters"] == [{"name": "mine", "weight": 0.9}]
    assert (out / "before_after.png").exists()


def test_score_measures_both_sides(run: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAGRAFT_CACHE", str(place.root / "cache"))
    assert cli.main(["score", str(run), "--images", "4"]) == 0
    score = json.loads((run / "score.json").read_text())
    assert score["images"] == 4
    assert score["kid_lite0_base"]["value"] != score["kid_lite0_adapter"]["value"]


def test_no_network_but_loopback(place: Place, run: Path) -> None:
    """The guard was in place (it can refuse) and had nothing to write."""
    probe = "import socket; socket.create_connection(('192.0.2.1', 9), timeout=1)"
    log = place.root / "probe.log"
    result = subprocess.run(
        [sys.executable, "-c", probe], env={**place.environment, "NETWORK_LOG": str(log)}, capture_output=True
    )
    assert result.returncode != 0
    assert "192.0.2.1" in log.read_text()
    assert not (place.root / "network.log").exists(), (place.root / "network.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "marketting"], "marketing"),
        (["--recipe", "marketing", "train.step=5"], "train.steps"),
        (["--recipe", "marketing", "train.steps=many"], "train.steps"),
        (["--recipe", "marketing", "base=poket"], "pocket"),
    ],
)
def test_a_typo_is_one_sentence_with_the_nearest_name(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
