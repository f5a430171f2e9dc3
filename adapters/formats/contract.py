"""What an adapter promises about its base, and how one promise becomes the other.

    portable       trained from B = 0: an update of W, valid on the 16-bit base and on any quantization of it
    compensating   trained from factors A0, B0 that make up for one INT4 base's own error (LoftQ, arXiv:2310.08659): B A holds the
                   correction too, which is wrong on every other base

A compensating adapter less its start is portable: B A - B0 A0 = [B, -B0] [A; A0], rank 2r. `adapters.loftq` makes such starts
(`adapter.init=loftq`); a run keeps its own as adapter/start.safetensors.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PORTABLE, COMPENSATING = "portable", "compensating"
CONTRACTS = (PORTABLE, COMPENSATING)
START_NAME = "start.safetensors"
"""The factors that training started from, beside a compensating adapter."""
START_HASH = "start_sha256"
"""sha256 of that file, in the metadata of the adapter that was trained from it."""
Pairs = Mapping[str, tuple[Tensor, Tensor]]


def contract_of(metadata: Mapping[str, Any]) -> str:
    """The contract in an adapter's metadata; files that state none started from B = 0, as every trainer's do by default.

    Raises ValueError for another word.
    """
    contract = metadata.get("contract", PORTABLE)
    if contract not in CONTRACTS:
        raise ValueError(f"contract {contract!r} of the adapter is not one of {', '.join(CONTRACTS)}")
    return str(contract)


def start_hash(file: Path) -> str:
    """What `START_HASH` states."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_start(metadata: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError where an adapter's metadata state another start than `file`."""
    stated = metadata.get(START_HASH)
    if stated and stated != start_hash(file):
        raise ValueError(
            f"{file} is not the start that the adapter was trained from (sha256 {stated[:16]}): give the start.safetensors "
            "that training wrote beside it"
        )


def check_together(adapters: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Raises ValueError where two of the adapters (name, metadata) that a base is to carry at once are compensating."""
    both = [name for name, metadata in adapters if contract_of(metadata) == COMPENSATING]
    if len(both) > 1:
        raise ValueError(
            f"adapters {both[0]!r} and {both[1]!r} are both compensating: together they would make up for the base's error twice; "
            "make one of them portable: loragraft adapter export FILE --portable --style diffusers --out FOLDER"
        )


def less_start(pairs: Pairs, start: Pairs) -> dict[str, tuple[Tensor, Tensor]]:
    """[A; A0], [B, -B0] at every path, in the adapter's dtype. Raises ValueError where the two do not belong together."""
    if pairs.keys() != start.keys():
        odd = sorted(pairs.keys() ^ start.keys())
        raise ValueError(f"the start is another adapter's: only one of the two has {odd[0]!r}")
    found = {}
    for path, (down, up) in pairs.items():
        down0, up0 = (factor.to(down.dtype) for factor in start[path])
        if down0.shape[1:] != down.shape[1:] or up0.shape[0] != up.shape[0]:
            raise ValueError(f"the start is another adapter's: at {path!r} it has other shapes")
        found[path] = torch.cat([down, down0]), torch.cat([up, -up0], dim=1)
    return found
