"""Standard metrics on the command line: the options of `loragraft score`, and the verb `loragraft measure`."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loragraft.evaluation.generate_command import SHEET

if TYPE_CHECKING:
    from loragraft.evaluation.comparison import Row
    from loragraft.evaluation.standard import StandardMetrics

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
EPILOG = (
    "loragraft measure drawn/ --metrics fid,clip,psnr --weights W --references real/ --against drawn-16bit/ \\\n"
    "    --row model=flux1-dev precision=w4a8 method=lora device=H100 seconds_per_image=5.2 peak_gib=9.8 --out rows/a.json\n"
    "loragraft measure --table rows/*.json                              the rows as one table; mixed N is refused\n\n"
    "fid, kid (fid-clean, fid-legacy-pytorch, fid-legacy-tensorflow, kid-inception) need --references; psnr, ssim and lpips need\n"
    "--against, files of the same names; clip and image-reward take the prompt from our PNGs, or from --prompts. Weights are the\n"
    "published files in the folder --weights, checked by sha256; what is missing is said with its address."
)


def add_metric_options(parser: argparse.ArgumentParser) -> None:
    """`--metrics`, `--weights`, `--allow-download`."""
    parser.add_argument(
        "--metrics",
        default="",
        metavar="A,B",
        help="standard metrics: fid (fid-clean), fid-legacy-pytorch, fid-legacy-tensorflow, kid (kid-inception), clip, "
        "image-reward, lpips (lpips-alex), psnr, ssim",
    )
    parser.add_argument("--weights", metavar="DIR", help="folder of the metrics' published weights")
    parser.add_argument("--allow-download", action="store_true", help="fetch into --weights what is missing there")


def open_metrics(args: argparse.Namespace, device: str, store: Path) -> "StandardMetrics | None":
    """What `--metrics` names, its weights found and checked; None without it. Raises ValueError, FileNotFoundError."""
    from loragraft.evaluation.standard import StandardMetrics
    from loragraft.evaluation.weight_files import WeightFolder

    if not args.metrics:
        if args.weights or args.allow_download:
            raise ValueError("--weights and --allow-download serve --metrics, which is not given")
        return None
    folder = WeightFolder(Path(args.weights), args.allow_download) if args.weights else None
    return StandardMetrics(args.metrics, folder, device, store)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Everything behind `loragraft measure`."""
    parser.add_argument("images", nargs="?", help="folder of generated images")
    add_metric_options(parser)
    parser.add_argument("--references", metavar="DIR", help="real images")
    parser.add_argument(
        "--against", metavar="DIR", help="images of the same names to compare with, such as the 16-bit base's"
    )
    parser.add_argument("--prompts", metavar="FILE", help="JSON lines with `name` (the image's file stem) and `prompt`")
    parser.add_argument("--row", nargs="+", default=[], metavar="KEY=VALUE", help="what was run, for the table")
    parser.add_argument("--out", metavar="FILE", help="write the row as JSON")
    parser.add_argument("--table", nargs="+", default=[], metavar="FILE", help="print these rows as one table instead")
    parser.add_argument("--csv", metavar="FILE", help="with --table: also write its numbers as CSV")


def run(args: argparse.Namespace, device: str) -> int:
    """Measures one folder of images, or prints rows as a table. Raises ValueError."""
    from loragraft.disk import write_atomic
    from loragraft.evaluation.comparison import as_csv, markdown, read_rows

    if bool(args.table) == bool(args.images):
        raise ValueError("give a folder of images to measure, or --table with rows to show")
    if args.table:
        given = [args.metrics, args.weights, args.references, args.against, args.prompts, args.row, args.out]
        if any(given):
            raise ValueError("--table shows rows that were measured; of the other options it takes --csv alone")
        rows = read_rows([Path(name) for name in args.table])
        print(markdown(rows))
        if args.csv:
            write_atomic(Path(args.csv), as_csv(rows).encode())
        return 0
    if args.csv:
        raise ValueError("--csv goes with --table; --out writes the row that is measured")
    row = measured_row(args, device)
    print(markdown([row]))
    if args.out:
        target = Path(args.out)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, (json.dumps(row.to_dict(), indent=1) + "\n").encode())
    return 0


def measured_row(args: argparse.Namespace, device: str) -> "Row":
    """The row of one folder. Raises ValueError for a metric whose other side is not given, a side that no metric reads, and as
    `open_metrics` does."""
    from loragraft.data.cache import default_cache_root
    from loragraft.evaluation.comparison import Row
    from loragraft.evaluation.measure import read_image

    about = row_fields(args.row)  # mistakes first, before minutes of arithmetic
    metrics = open_metrics(args, device, default_cache_root() / "metrics")
    if metrics is None:
        raise ValueError("nothing to measure: give --metrics, such as --metrics fid,clip --weights DIR")
    images = images_of(Path(args.images))
    for kind, name, option in (("references", "references", args.references), ("pairs", "against", args.against)):
        needing = [metric.key for metric in metrics.metrics if metric.kind == kind]
        if needing and not option:
            raise ValueError(f"{', '.join(needing)}: give --{name} DIR")
        _check_used(name, option, needing, kind)
    wants_prompts = bool(asked := [metric.key for metric in metrics.metrics if metric.kind == "prompts"])
    _check_used("prompts", args.prompts, asked, "prompts")
    prompts = prompts_of(images, Path(args.prompts) if args.prompts else None) if wants_prompts else []
    results = []
    if args.references:
        results += metrics.against_references(images, images_of(Path(args.references)), read_image, "as it is")
    if wants_prompts:
        results += metrics.with_prompts(images, prompts)
    if args.against:
        results += metrics.paired(*same_names(images, images_of(Path(args.against))))
    return Row(**about, results=tuple(results))


def _check_used(name: str, value: str | None, needing: Sequence[str], kind: str) -> None:
    """Refuses an option that none of the chosen metrics reads."""
    from loragraft.evaluation.standard import METRICS

    if value and not needing:
        readers = ", ".join(metric.key for metric in METRICS.values() if metric.kind == kind)
        raise ValueError(f"--{name} {value}: none of the chosen metrics reads it; {readers} do")


def row_fields(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` -> the fields of a row; what is not said is empty or None. Raises ValueError."""
    from loragraft.evaluation.comparison import NUMBERS, TEXT

    fields: dict[str, Any] = {**dict.fromkeys(TEXT, "not stated"), **dict.fromkeys(NUMBERS)}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in fields or not value:
            raise ValueError(f"--row {pair!r}: write KEY=VALUE with KEY one of {', '.join(fields)}")
        try:
            fields[key] = float(value) if key in NUMBERS else value
        except ValueError as error:
            raise ValueError(f"--row {pair!r}: {key} is a number") from error
    return fields


def images_of(folder: Path) -> list[Path]:
    """The folder's images by name, without the sheet that `generate --compare` writes. Raises ValueError where there is none."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give one that holds images ({', '.join(SUFFIXES)})")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.name != SHEET)
    if not found:
        raise ValueError(f"{folder} holds no image ({', '.join(SUFFIXES)})")
    return found


def same_names(images: Sequence[Path], others: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Two lists in one order. Raises ValueError naming what only one of them has, and names that come twice."""
    one, other = _by_stem(images), _by_stem(others)
    alone = sorted(one.keys() ^ other.keys())
    if alone:
        raise ValueError(f"{len(alone)} images are in one of the two folders only: {', '.join(alone[:3])}")
    return [one[stem] for stem in one], [other[stem] for stem in one]


def prompts_of(images: Sequence[Path], table: Path | None) -> list[str]:
    """What each image was asked for: from `table` by name, else from what our PNGs say of themselves. Raises ValueError naming
    the line, or the images that have no prompt."""
    if table is None:
        return [_own_prompt(path) for path in images]
    known: dict[str, str] = {}
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            known[str(entry["name"])] = str(entry["prompt"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{table}:{number} must be an object with `name` and `prompt` ({error!r})") from error
    missing = [stem for stem in _by_stem(images) if stem not in known]
    if missing:
        raise ValueError(f"{table} has no prompt for {len(missing)} images: {', '.join(missing[:3])}")
    return [known[path.stem] for path in images]


def _own_prompt(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        about: Mapping[str, Any] = json.loads(image.info.get("loragraft", "{}"))
    if "prompt" not in about:
        raise ValueError(f"{path} does not say what it was asked for: give --prompts FILE")
    return str(about["prompt"])


def _by_stem(paths: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            raise ValueError(f"{found[path.stem]} and {path} have one name")
        found[path.stem] = path
    return found
