"""The Hub's tests once more, with the other major version of huggingface_hub: 1.x speaks httpx, 2.x httpx2."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

OTHER = os.environ.get("OTHER_HUGGINGFACE_HUB", "")


@pytest.mark.slow
@pytest.mark.skipif(
    not OTHER,
    reason='pip install --no-deps --target DIR "huggingface_hub==1.33.0" and set OTHER_HUGGINGFACE_HUB=DIR',
)
def test_the_hubs_tests_pass_with_the_other_major_version() -> None:
    path = os.pathsep.join([OTHER, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    version = [sys.executable, "-c", "import huggingface_hub; print(huggingface_hub.__version__)"]
    other = subprocess.run(version, env=environment, check=True, capture_output=True, text=True).stdout.strip()
    assert other.partition(".")[0] != huggingface_hub.__version__.partition(".")[0], f"both are {other}"
    here = Path(__file__).parent
    tests = [
        str(here / "test_hub_place.py"),
        f"{here / 'test_zoo_line.py'}::test_the_same_image_after_the_way_through_the_hub",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *tests],
        env=environment,
        cwd=here.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
