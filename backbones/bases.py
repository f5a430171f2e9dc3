"""The bases by name, without importing any."""

from pathlib import Path


def list_bases() -> list[str]:
    """Names of the bases: the files in this folder that export a `SPEC`, with `-` for `_`."""
    here = Path(__file__).parent
    return sorted(f.stem.replace("_", "-") for f in here.glob("*.py") if "\nSPEC = " in f.read_text(encoding="utf-8"))
