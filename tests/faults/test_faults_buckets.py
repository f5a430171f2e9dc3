"""A run on images of mixed aspect ratios through the command: killed and resumed, and two with one cache at once."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import pytest
import torch
from PIL import Image, ImageDraw

from loragraft import cli
from loragraft.adapters.checkpoint import load_adapter

if TYPE_CHECKING:
    from conftest import User

MIXED = ("data.buckets=true", "data.shuffle_tags=true", "train.steps=3", "data.resolutions=[64, 96]")
SCRIPT = """
    import os, signal
    from loragraft import cli
    from loragraft.train.run_folder import RunFolder
    append = RunFolder.append_metrics

    def dying(folder, values):
        if values["step"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        append(folder, values)

    RunFolder.append_metrics = dying
    cli.main({arguments!r})
"""


@pytest.fixture
def mixed(user: "User") -> "User":
    """Nine pictures in three shapes, with tags."""
    for number in range(9):
        picture = Image.new("RGB", [(96, 96), (160, 96), (96, 160)][number % 3], "white")
        ImageDraw.Draw(picture).ellipse((10, 10, 30 + 6 * number, 80), fill=("red", "green", "blue")[number % 4 % 3])
        picture.save(user.photos / f"{number}.png")
        (user.photos / f"{number}.txt").write_text(f"a disc number {number}, white ground, flat, plain")
    return user


def _losses(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _killed(user: "User", *options: str) -> None:
    arguments = ["train", "--recipe", "mine.yaml", "--cpu", *MIXED, *options]
    script = textwrap.dedent(SCRIPT.format(arguments=arguments))
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=user.root,
        env=dict(os.environ),
        capture_output=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def test_killed_and_resumed_is_the_uninterrupted_run(mixed: "User") -> None:
    mixed.capture.readouterr()
    assert cli.main(["train", "--recipe", "mine.yaml", "--cpu", *MIXED, "--out", "runs/whole"]) == 0
    told = mixed.capture.readouterr().out
    assert "images in 6 buckets: an epoch is" in told
    assert "    64 x 64" in told
    _killed(mixed, "--out", "runs/killed")
    assert len(_losses(mixed.root / "runs" / "killed")) == 2
    code, error = mixed.train(*MIXED, "--out", "runs/killed")
    assert code == 0, error
    assert _losses(mixed.root / "runs" / "killed") == _losses(mixed.root / "runs" / "whole")
    one, other = (load_adapter(mixed.root / "runs" / name / "adapter") for name in ("whole", "killed"))
    for path, pair in one.pairs.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, other.pairs[path], strict=True))


def test_a_corrupt_picture_in_a_bucket_names_the_file_and_mended_it_trains(mixed: "User") -> None:
    content = (mixed.photos / "4.png").read_bytes()
    (mixed.photos / "4.png").write_bytes(content[: len(content) // 2])
    code, error = mixed.train(*MIXED)
    last = error.strip().splitlines()[-1]
    assert code == 2
    assert last.startswith("error: ") and "4.png is not a readable image" in last
    assert not (mixed.run / "metrics.jsonl").exists()
    (mixed.photos / "4.png").write_bytes(content)
    assert mixed.train(*MIXED)[0] == 0


def test_a_stream_trains_and_leaves_its_held_out_images_only(mixed: "User") -> None:
    pictures = sorted(mixed.photos.glob("*.png"))
    rows = {"image": [{"bytes": p.read_bytes(), "path": None} for p in pictures], "text": [p.stem for p in pictures]}
    rows["split"] = ["train"] * 7 + ["test", "validation"]
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(mixed.root / "rows.parquet")
    source = ("data.folder=null", "data.dataset=./rows.parquet", "data.streaming=true", "data.limit=9", "train.steps=1")
    code, error = mixed.train(*source)
    assert code == 0, error
    kept = sorted(p.name for p in (mixed.root / "cache" / "streams").glob("*/*/*.png"))
    assert kept == ["000007.png", "000008.png"]
    assert len(_losses(mixed.run)) == 1
