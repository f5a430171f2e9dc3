"""`loragraft adapter`: look into a LoRA file of any dialect, or write it in another one."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loragraft.adapters.checkpoint import Adapter

MAX_RANK = 128
STYLES = ("diffusers", "kohya", "comfyui")
DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}
"""As `formats.factors` and `formats.writing` have them: torch is imported when there is something to do, so that --help is quick."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `loragraft adapter`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    inspect = actions.add_parser(
        "inspect",
        help="dialect, base, ranks, targets and metadata of a file",
        description="Whose naming, which base, ranks, what would be lost, and what the file's header says.\n\n"
        "loragraft adapter inspect downloaded.safetensors",
    )
    inspect.add_argument("--json", action="store_true", help="as JSON")
    export = actions.add_parser(
        "export",
        help="write it as diffusers, kohya or ComfyUI name it",
        description="Write an adapter as other programs name it, the scale in its tensors.\n\n"
        "loragraft adapter export runs/marketing --style comfyui --out marketing.safetensors\n\n"
        "comfyui adds marketing.workflow.json where ComfyUI knows the base (pocket it does not).",
    )
    export.add_argument("--style", choices=STYLES, required=True, help="whose names the tensors get")
    export.add_argument("--out", required=True, help="a .safetensors file, or a folder for it; must not exist")
    export.add_argument("--dtype", choices=tuple(DTYPES), help="of the factors (default: as they are)")
    export.add_argument(
        "--denoiser-only", action="store_true", help="leave out text encoders, embeddings, norms, biases"
    )
    contract = export.add_mutually_exclusive_group()
    contract.add_argument(
        "--portable",
        action="store_true",
        help="take off what a compensating adapter (adapter.init=loftq) started from, which makes it right on every base, at twice "
        "the rank; the default",
    )
    contract.add_argument(
        "--keep-contract", action="store_true", help="leave a compensating adapter as it is, for its own INT4 base only"
    )
    export.add_argument(
        "--start", metavar="FILE", help="the factors that it started from (default: start.safetensors beside it)"
    )
    for action in (inspect, export):
        action.add_argument("file", help="a .safetensors file in any dialect, an adapter folder or a run")
        action.add_argument(
            "--rank", type=int, default=MAX_RANK, help=f"largest rank of an expanded LoKr or LoHa (default: {MAX_RANK})"
        )


def run(args: argparse.Namespace) -> int:
    """Raises ValueError for files that are refused and exports that have no meaning."""
    return _inspect(args) if args.action == "inspect" else _export(args)


def _inspect(args: argparse.Namespace) -> int:
    from loragraft.adapters.checkpoint import adapter_file, load_adapter
    from loragraft.adapters.inspecting import inspection, inspection_text
    from loragraft.quantization.tensor_file import read_header

    file = adapter_file(Path(args.file))
    found = inspection(load_adapter(file, args.rank), read_header(file)[1])
    print(json.dumps(found, indent=2) if args.json else inspection_text(found))
    return 0


def _export(args: argparse.Namespace) -> int:
    import torch

    from loragraft.adapters.checkpoint import adapter_file, load_adapter
    from loragraft.adapters.formats.writing import export_adapter

    file = adapter_file(Path(args.file))
    adapter = load_adapter(file, args.rank)
    if args.denoiser_only:
        adapter = adapter.denoiser_only()
    adapter = adapter if args.keep_contract else _portable(adapter, file, args.start)
    if adapter.approximation:
        print(f"note: {adapter.approximation}", file=sys.stderr)
    dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else None
    written = export_adapter(adapter, args.style, Path(args.out), dtype)
    for path in written:
        print(path)
    if args.style == "comfyui" and len(written) == 1:
        base = adapter.metadata.get("base", "this base")
        print(f"note: no workflow beside it: ComfyUI does not know {base}", file=sys.stderr)
    return 0


def _portable(adapter: "Adapter", file: Path, given: str | None) -> "Adapter":
    """The adapter itself, or a compensating one less its start."""
    from loragraft.adapters.checkpoint import load_adapter
    from loragraft.adapters.formats.contract import COMPENSATING, START_NAME, check_start, contract_of

    if contract_of(adapter.metadata) != COMPENSATING:
        if given:
            raise ValueError(f"{file} is portable already; --start is for compensating adapters")
        return adapter
    start = Path(given) if given else file.with_name(START_NAME)
    if not start.is_file():
        raise ValueError(
            f"{file} is compensating: it makes up for its own INT4 base's error and is wrong on any other. {start} is not there: "
            "give --start FILE, the factors it was trained from, to make it portable, or --keep-contract for use on that base"
        )
    check_start(adapter.metadata, start)
    return adapter.less(load_adapter(start))
