"""`loragraft adapter`: look into a LoRA file of any dialect, or write it in another one."""

import argparse
import json
from pathlib import Path

MAX_RANK = 128
"""As `formats.factors` has it: torch is imported when there is something to do, so that --help is quick."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `loragraft adapter`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    inspect = actions.add_parser("inspect", help="dialect, base, ranks, targets and metadata of a file")
    inspect.add_argument("file", help="a .safetensors file in any dialect, an adapter folder or a run")
    inspect.add_argument("--json", action="store_true", help="as JSON")
    for action in (inspect,):
        action.add_argument(
            "--rank", type=int, default=MAX_RANK, help=f"largest rank of an expanded LoKr or LoHa (default: {MAX_RANK})"
        )


def run(args: argparse.Namespace) -> int:
    """Raises ValueError for files that are refused."""
    return _inspect(args)


def _inspect(args: argparse.Namespace) -> int:
    from loragraft.adapters.checkpoint import adapter_file, load_adapter
    from loragraft.adapters.inspecting import inspection, inspection_text
    from loragraft.quantization.tensor_file import read_header

    file = adapter_file(Path(args.file))
    found = inspection(load_adapter(file, args.rank), read_header(file)[1])
    print(json.dumps(found, indent=2) if args.json else inspection_text(found))
    return 0
