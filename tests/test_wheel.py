"""What a user installs: one top-level name, the recipes and pocket's weights inside."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_wheel_has_one_top_level_name_and_its_data(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"loragraft"}
    for needed in (
        "loragraft/py.typed",
        "loragraft/cli.py",
        "loragraft/recipes/_base.yaml",
        "loragraft/recipes/marketing.yaml",
        "loragraft/train/lora.py",
        "loragraft/kernels/w4a8_linear.py",
        "loragraft/demo/page.py",
        "loragraft/demo/page.css",
        "loragraft/zoo/entry.schema.json",
        "loragraft/zoo/index.schema.json",
        "loragraft/zoo/status.schema.json",
        "loragraft/backbones/weights/pocket/transformer-int4/config.json",
        "loragraft/backbones/weights/pocket/vae/config.json",
        "loragraft/evaluation/weights/retrieval.safetensors",
    ):
        assert needed in names, f"{needed} is not in the wheel"
