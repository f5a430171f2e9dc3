"""The Triton source itself, on the CPU: this folder's tests again in a process whose Triton interprets its kernels.

Triton decides when a kernel is decorated, so one process is either interpreted or not.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.not_interpreted
def test_triton_source_passes_the_same_tests():
    command = [sys.executable, "-m", "pytest", str(Path(__file__).parent), "-q", "-x", "-p", "no:cacheprovider"]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
