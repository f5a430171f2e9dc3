"""``pretrain/`` holds scripts, not a package: its folder goes on the path, as running a script there does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "pretrain"))
