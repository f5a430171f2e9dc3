"""The bases by name, without importing any."""

import difflib
from pathlib import Path


def list_bases() -> list[str]:
    """Names of the bases: the files in this folder that export a `SPEC`, with `-` for `_`."""
    here = Path(__file__).parent
    return sorted(f.stem.replace("_", "-") for f in here.glob("*.py") if "\nSPEC = " in f.read_text(encoding="utf-8"))


def known_base(name: str) -> str:
    """The name as `list_bases` has it. Raises ValueError naming the nearest base, and for weights the key that takes them."""
    wanted, known = name.replace("_", "-"), list_bases()
    if wanted not in known:
        if "/" in name or name.endswith(".safetensors"):
            raise ValueError(
                f"base={name} names weights: base says which model they are of ({', '.join(known)}), and weights.path where they "
                f"lie, such as base=flux1-dev weights.path={name}"
            )
        near = difflib.get_close_matches(wanted, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown base {name!r}.{hint} Known bases: {', '.join(known)}")
    return wanted
