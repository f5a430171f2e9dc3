"""The main job as a user runs it, small: the README's own folder, recipe and commands, kill -9, resume, graft, draw.

Every process runs with a guard on its sockets: after installation nothing but loopback is touched.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open

from loragraft import cli
from loragraft.adapters.checkpoint import load_adapter
from loragraft.backbones.load import load_backbone

ROOT = Path(__file__).parents[1]
STEPS = 6
SMALL = (
    f"train.steps={STEPS}", "train.batch_size=2", "train.checkpoint_every=1", "train.validate_every=3", "train.log_every=1",
    "optim.learning_rate=3e-2", "optim.warmup_steps=1", "optim.schedule=constant", "sample.steps=2",
    "data.validation_fraction=0.2", "data.test_fraction=0.2",
)  # fmt: skip


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
        """The README's command, made small."""
        launcher, script, *options = readme_command("accelerate launch train/lora.py --recipe mine.yaml").split()[1:]
        assert (launcher, script) == ("launch", "train/lora.py")
        command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / script), *options]
        return subprocess.Popen(
            [*command, "--out", f"runs/{out}", *SMALL, *overrides], cwd=self.root, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def train(self, out: str, *overrides: str) -> str:
        process = self.start(out, *overrides)
        output, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, output
        return output


def readme_command(start: str) -> str:
    """The one line of the README's shell blocks that starts with `start`."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (line,) = [line for block in blocks for line in block.splitlines() if line.startswith(start)]
    return line.partition("#")[0].strip()


def readme_recipe() -> str:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    return text


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, write_network_guard: Callable[..., None]) -> Place:
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
    write_network_guard(root / "guard")
    (root / "mine.yaml").write_text(readme_recipe())
    return Place(root)


@pytest.fixture(scope="session")
def run(place: Place) -> Path:
    """One uninterrupted run."""
    output = place.train("mine")
    assert "reference" in output, "the ledger was not printed"
    return place.root / "runs" / "mine"


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
    metrics, deadline = place.root / "runs" / "killed" / "metrics.jsonl", time.monotonic() + 1200
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 3:
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode != 0
    assert not (place.root / "runs" / "killed" / "summary.json").exists(), "finished before it was killed"
    place.train("killed")
    assert losses(place.root / "runs" / "killed") == losses(run)
    files = [
        folder / "adapter" / "pytorch_lora_weights.safetensors" for folder in (run, place.root / "runs" / "killed")
    ]
    with safe_open(files[0], "pt") as a, safe_open(files[1], "pt") as b:
        assert set(a.keys()) == set(b.keys())
        assert all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in a.keys())  # noqa: SIM118


def test_interchange_profile_trains_in_its_own_numerics(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    output = place.train("interchange", "numerics=interchange", "train.steps=2")
    assert "w4a4" in output
    assert "w4a8" not in output
    assert len(losses(place.root / "runs" / "interchange")) == 2


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


@pytest.fixture
def at_place(place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The test process itself in the user's folder, with the user's cache."""
    monkeypatch.chdir(place.root)
    monkeypatch.setenv("LORAGRAFT_CACHE", str(place.root / "cache"))
    return place


def test_generate_draws_before_and_after(run: Path, at_place: Place) -> None:
    command = shlex.split(readme_command("loragraft generate --adapter runs/mine"))
    assert cli.main([*command[1:], "--steps", "2"]) == 0
    about = json.loads(Image.open("images/0000.png").text["loragraft"])  # type: ignore[attr-defined]
    assert about["prompt"] == "in my style, a red bicycle"
    assert about["adapters"] == [{"name": "mine", "weight": 1.0}]
    assert Path("images/before_after.png").exists()
    assert cli.main(["generate", "--adapter", f"{run}@0.5", "--prompt", "a blob", "--steps", "2", "--out", "half"]) == 0
    assert json.loads(Image.open("half/0000.png").text["loragraft"])["adapters"][0]["weight"] == 0.5  # type: ignore[attr-defined]


def test_score_measures_both_sides(run: Path, at_place: Place) -> None:
    assert cli.main(["score", str(run), "--images", "0"]) == 2, "0 is no way to say the default"
    assert cli.main(["score", str(run), "--images", "4"]) == 0
    score = json.loads((run / "score.json").read_text())
    assert score["images"] == 4
    assert score["kid_lite0_base"]["value"] != score["kid_lite0_adapter"]["value"]
    assert score["same_data"] is True


def test_a_score_on_other_data_says_so_and_is_not_published(
    run: Path, at_place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    scored, caption = (run / "score.json").read_bytes(), next(Path("photos").glob("*.txt"))
    trained = caption.read_text()
    try:
        caption.write_text(f"{trained}, seen from above")
        assert cli.main(["score", str(run), "--images", "4"]) == 0
        assert "have changed since training" in capsys.readouterr().out
        assert json.loads((run / "score.json").read_text())["same_data"] is False
        assert cli.main(["publish", str(run), "--to", "elsewhere"]) == 2
        assert "data that has changed since training" in capsys.readouterr().err
        assert not list(Path("elsewhere").glob("mine*"))
    finally:
        caption.write_text(trained)
        (run / "score.json").write_bytes(scored)


def test_publish_and_list(run: Path, at_place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    command = shlex.split(readme_command("loragraft publish runs/mine"))
    assert cli.main(command[1:]) == 0
    place = Path(command[command.index("--to") + 1])
    assert "base_model_relation: adapter" in (place / "mine" / "1.0.0" / "README.md").read_text()
    assert cli.main(shlex.split(readme_command("loragraft zoo"))[1:]) == 0
    assert "mine" in capsys.readouterr().out


def test_readme_shows_a_recipe_resolved(at_place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(shlex.split(readme_command("loragraft recipe"))[1:]) == 0
    assert "rank: 32" in capsys.readouterr().out


def test_the_two_commands_are_what_the_readme_says() -> None:
    """`make marketing` expands to the commands of the section Step by step; `make test` to the checks and pytest."""
    readme_command("make marketing"), readme_command("make test")
    plan = subprocess.run(["make", "-n", "marketing"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for verb in ("accelerate launch train/lora.py --recipe marketing", "loragraft generate", "loragraft score"):
        assert verb in plan
    assert (
        "-m pytest"
        in subprocess.run(["make", "-n", "test"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    )


def test_the_trained_adapter_grafts_exactly(
    run: Path, at_place: Place, benchmark_module: Callable[[str], ModuleType]
) -> None:
    """On the layers' real inputs: float32 1e-5, bf16 5e-3, no worse than apart against float64, and every byte restored."""
    benchmark = benchmark_module("graft_proof")
    adapter = load_adapter(run / "adapter")
    backbone = load_backbone("pocket", "native", "cpu", at_place.root / "cache")
    measured = benchmark.on_real_inputs(backbone, adapter)
    assert measured["velocity_change"] >= 0.05, "the adapter hardly does anything: the bounds would mean nothing"
    assert benchmark.exact(measured), measured
    assert measured["layers"] == 72


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
