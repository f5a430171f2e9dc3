"""`loragraft preflight RECIPE [key=value ...]`: what a run will take, before it starts.

    loragraft preflight marketing
    loragraft preflight marketing base=flux1-dev --random-weights train.batch_size=1
    loragraft preflight marketing base=flux1-dev --random-weights --fit 12GiB         the cheapest setting for that card
    loragraft preflight --calibrate                              on the machine that will train, once

The real step runs on fake tensors on one CPU core: nothing is loaded that a FLUX.1 would need, and no GPU. The data set is looked
through as well. Times are measured figures of this machine's GPU where `--calibrate` ran, else the usual ones of known cards.
"""

import argparse
import difflib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from loragraft.backbones.load import find_spec
from loragraft.data.buckets import BucketReport, Sizes
from loragraft.data.cache import default_cache_root
from loragraft.data.held_out import few_held_out
from loragraft.data.sample import Sample
from loragraft.data.scan import Scan, scan_samples
from loragraft.data.sources import LeftOut, check_source, open_source
from loragraft.disk import write_atomic
from loragraft.parser import Parser
from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import Recipe
from loragraft.train.dry_run import KINDS
from loragraft.train.fit import what_fits
from loragraft.train.machine_calibration import calibrate
from loragraft.train.preflight import CARDS_GIB, GIB, Preflight, preflight
from loragraft.train.roofline import CARDS, Host, Machine, card_names, machine_for, run_seconds, save_machine, seconds

MAKERS = 6
"""Ops that are named as makers of what the forward pass keeps."""
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:(gib|gb|g)|(mib|mb|m))?", re.IGNORECASE)


def run(arguments: list[str]) -> int:
    """The command. Returns 0, or 1 where nothing makes the run fit the card or training would refuse the weights or
    the data."""
    args = _parse(arguments)
    cache_root = default_cache_root()
    if args.calibrate:
        machine = calibrate(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        print(f"{machine.name}: {save_machine(machine, cache_root)}")
        print("\n".join(_machine_lines(machine)))
        if args.recipe is None:
            return 0
    if args.recipe is None:
        raise ValueError("name a recipe (`loragraft recipe` lists them), or give --calibrate alone")
    overrides = [*args.overrides, *(["weights.random=true"] if args.random_weights else [])]
    recipe = as_stored(load_recipe(args.recipe, overrides))
    if reason := find_spec(recipe.base).refuses_training:
        raise ValueError(reason)
    if not args.no_data:
        check_source(recipe.data)
    started = time.perf_counter()
    machines = known_machines(cache_root, args.card)
    if args.card is not None and not machines:
        print(f"{unknown_card(args.card, cache_root)}\n", flush=True)  # before the half minute that memory takes
    found = preflight(recipe, cache_root, processes=args.processes)
    print("\n".join(report_lines(recipe, found, machines, time.perf_counter() - started)))
    if lacking := lacking_weights(recipe):
        print(f"\n{lacking}")
    if args.json:
        _write(args.json, to_dict(found, machines))
    lines, refused = ([], False) if args.no_data else look_at_data(recipe, found.resolution, cache_root, args.processes)
    print("\n".join(lines), end="\n" if lines else "")
    card = args.fit if args.fit is not None else _too_small(found)
    refused |= lacking is not None
    if card is None:
        return int(refused)
    fitting = _fit(recipe, found, card, cache_root, args.processes)
    if args.json:
        _write(args.json, {**to_dict(found, machines), "fit": fit_dict(card, fitting)})
    return max(int(fitting is None), int(refused))


def as_stored(recipe: Recipe) -> Recipe:
    """The recipe in the numerics of its ready-made INT4 weights, which it runs in."""
    spec = find_spec(recipe.base)
    if spec.external is None or not recipe.weights.path:
        return recipe
    from loragraft.backbones.external import stated_profile  # the Hub's client and the readers of foreign files

    stated = stated_profile(spec, recipe.weights)
    return recipe if stated is None else replace(recipe, numerics=stated)


def lacking_weights(recipe: Recipe) -> str | None:
    """A sentence where `weights.path` is given and training would not find what it needs there; what may be fetched is not looked
    for, and a base without any is predicted all the same."""
    spec, weights = find_spec(recipe.base), recipe.weights
    if spec.external is None or not weights.path or weights.allow_download:
        return None
    from loragraft.backbones.external import locate

    try:
        locate(spec, spec.external, weights)
    except ValueError as error:
        return f"training refuses the weights until this is mended: {error}"
    return None


def _write(path: Path, figures: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(figures, indent=1) + "\n").encode())


def _too_small(found: Preflight) -> int | None:
    """Bytes of the GPU that is here, where the run does not fit it."""
    if not torch.cuda.is_available():
        return None
    card = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return None if found.fits(card) else card


def _fit(recipe: Recipe, found: Preflight, card: int, cache_root: Path, processes: int) -> tuple[str, Preflight] | None:
    print(f"\nto fit {card / GIB:.3g} GiB:")
    fitting = what_fits(recipe, found, card, cache_root, lambda line: print(f"  tried {line}", flush=True), processes)
    if fitting is None:
        print("  nothing that a recipe can change is enough; the weights alone need a larger card")
    elif not fitting[0]:
        print(f"  it fits as it is: {fitting[1].needed / GIB:.1f} GiB needed")
    else:
        print(f"  add: {fitting[0]}\n  {fitting[1].needed / GIB:.1f} GiB needed")
    return fitting


def fit_dict(card: int, fitting: tuple[str, Preflight] | None) -> dict[str, object]:
    """JSON-able: what makes the run fit `card` bytes; "overrides" is null where nothing does."""
    overrides, needed = (None, None) if fitting is None else (fitting[0], fitting[1].needed)
    return {"card": card, "overrides": overrides, "needed": needed}


def known_machines(cache_root: Path, card: str | None = None) -> list[Machine]:
    """The card asked for or the GPU that is here, if its rates are known; without either every known card."""
    if card is None and torch.cuda.is_available():
        card = torch.cuda.get_device_name()
    if card is None:
        return [machine_for(known.name, cache_root) or known for known in CARDS]
    found = machine_for(card, cache_root)
    return [] if found is None else [found]


def unknown_card(card: str, cache_root: Path) -> str:
    """No times for `card`: which name is the nearest, and which there are."""
    names = card_names(cache_root)
    folded = {name.lower(): name for name in names}
    near = difflib.get_close_matches(card.lower(), folded, n=1)
    meant = f" Did you mean {folded[near[0]]!r}?" if near else ""
    return (
        f"no times: the rates of --card {card!r} are not known.{meant} Known: {', '.join(names)}; any other after "
        "`loragraft preflight --calibrate` on it. Memory does not depend on the card:"
    )


def report_lines(recipe: Recipe, found: Preflight, machines: list[Machine], took: float) -> list[str]:
    """The report as text."""
    config = recipe.train
    batch = f"{config.batch_size}" + (f" x {config.accumulation}" if config.accumulation > 1 else "")
    lines = [
        f"{recipe.name} on {recipe.base} ({recipe.numerics}): {found.resolution} px, batch {batch}, checkpointing "
        f"{config.checkpointing}, rank {recipe.adapter.rank} ({found.adapter_parameters:,} parameters), {recipe.optim.name}",
        "",
        "stage              peak GiB",
    ]
    largest = max(found.stages, key=lambda stage: stage.peak)
    lines += [
        f"{stage.name:18s} {stage.peak / GIB:8.2f}{'   decides' if stage is largest else ''}" for stage in found.stages
    ]
    lines += ["", "at the peak of a training step"]
    lines += [f"  {kind:16s} {found.train.at_peak[kind] / GIB:8.3f}" for kind in KINDS]
    makers = list(found.train.saved_by.items())[:MAKERS]
    kept = ", ".join(f"{name.rpartition('::')[2]} {size / GIB:.2f}" for name, size in makers)
    lines += [f"  kept by the forward pass {found.train.saved / GIB:.2f} GiB, as made by: {kept}"]
    fits = [card for card in CARDS_GIB if found.fits(card * GIB)]
    cards = f"fits cards of {fits[0]} GiB and more" if fits else f"fits no card of up to {CARDS_GIB[-1]} GiB"
    if smaller := [card for card in CARDS_GIB if card not in fits]:
        cards += f"; --fit {smaller[-1]}GiB finds what would make it fit that card"
    lines += ["", f"needed {found.needed / GIB:.1f} GiB with CUDA's own: {cards}"]
    for name in found.unknown:
        lines.append(f"not modelled: time and workspace of {name}")
    lines += ["", f"{'':24s}s/step  s/image ({found.passes} passes, {found.images} at a time)"]
    for machine in machines:
        step, image = step_seconds(found, machine), image_seconds(found, machine)
        mark = "" if machine.calibrated else "  not calibrated"
        lines.append(f"  {machine.name:20s} {step:8.3f} {image:8.2f}{mark}")
    if not machines:
        lines.append("  this card is not known: run `loragraft preflight --calibrate` on it once for its times")
    return [*lines, f"predicted in {took:.0f} s"]


def step_seconds(found: Preflight, machine: Machine) -> float:
    """Of a training step."""
    return run_seconds(found.train, machine, host=not found.captured, compiled=found.compiled)


def image_seconds(found: Preflight, machine: Machine) -> float:
    """Of a picture, whose passes are replayed from CUDA graphs."""
    return seconds(found.image_ops(), machine, host=False, trains=False)


def look_at_data(recipe: Recipe, resolution: int, cache_root: Path, processes: int = 1) -> tuple[list[str], bool]:
    """(the data set, looked through, as text; whether training would refuse it). A generated one is not drawn for that."""
    config = recipe.data
    if config.domain is not None:
        drawn = f"data: {config.count} images of the domain {config.domain!r}, drawn at {resolution} px when training starts"
        return ["", drawn], False
    if config.streaming:
        return ["", f"data: the first {config.limit} rows of a stream, read and encoded when training starts"], False
    left_out = LeftOut()
    samples = open_source(config, resolution, cache_root, left_out)
    per_step = recipe.train.batch_size * recipe.train.accumulation * processes
    smallest = min(config.edges(resolution))
    scan = scan_samples(
        samples, smallest, cache_root, readable=_readable(recipe), per_step=per_step, left_out=left_out, config=config
    )
    if few := few_held_out(samples, config, recipe.eval):
        scan = replace(scan, noted=(*scan.noted, few))
    return [*scan_lines(scan), *bucket_lines(recipe, samples, resolution, processes)], bool(scan.refused)


def bucket_lines(recipe: Recipe, samples: Sequence[Sample], resolution: int, processes: int) -> list[str]:
    """Images and batches of every size, where a recipe asks for buckets or several resolutions."""
    sizes = Sizes.asked(recipe.data, resolution, find_spec(recipe.base).grain)
    if sizes is None or not (recipe.data.buckets or recipe.data.resolutions):
        return []
    try:
        shapes = [shape for sample in samples if sample.split == "train" for shape in sizes.of(sample)]
    except ValueError as error:
        return [f"  buckets: not counted, {error}"]
    report = BucketReport.of(shapes, recipe.train.batch_size, recipe.train.accumulation, processes)
    return ["", *report.table().splitlines()]


def _readable(recipe: Recipe) -> Callable[[str], str] | None:
    """How far the base's tokenizer reads, where its files are on this machine."""
    spec, cpu = find_spec(recipe.base), torch.device("cpu")
    if spec.load_encoders is not None:
        return spec.load_encoders(cpu, torch.float32).readable
    pipeline = Path(recipe.weights.encoders or recipe.weights.path or "-")
    if spec.external is None or not (pipeline / "model_index.json").is_file():
        return None
    return spec.external.open_encoders(pipeline, cpu, torch.bfloat16).readable


def scan_lines(scan: Scan) -> list[str]:
    """The findings as text."""
    splits = ", ".join(f"{count} {split}" for split, count in scan.splits.items()) or "nothing that can be used"
    sizes = ", ".join(f"{count} of {size}" for size, count in list(scan.sizes.items())[:4]) or "none"
    more = f" and {len(scan.sizes) - 4} other sizes" if len(scan.sizes) > 4 else ""
    lines = ["", f"data: {splits}; images {sizes}{more}"]
    if scan.refused:
        lines += ["  training refuses this until it is mended:", *(f"    {line}" for line in scan.refused)]
    return [*lines, *(f"  {line}" for line in scan.noted or (() if scan.refused else ("nothing amiss",)))]


def to_dict(found: Preflight, machines: list[Machine]) -> dict[str, object]:
    """JSON-able figures."""
    return {
        "peak": found.peak,
        "stages": {stage.name: stage.peak for stage in found.stages},
        "needed": found.needed,
        "train": {"peak": found.train.peak, "reserved": found.train.reserved, "at_peak": found.train.at_peak},
        "machines": [
            {
                "name": machine.name,
                "calibrated": machine.calibrated,
                "seconds_per_step": step_seconds(found, machine),
                "seconds_per_image": image_seconds(found, machine),
            }
            for machine in machines
        ],
    }


def _machine_lines(machine: Machine) -> list[str]:
    figures = asdict(machine)
    rates = [f"  {unit:20s} {rate / 1e12:8.1f} T/s" for unit, rate in figures["rates"].items()]
    return [
        *rates,
        f"  {'memory':20s} {machine.bandwidth / 1e9:8.0f} GB/s",
        _host_line("a step", machine.host),
        _host_line("a pass without gradients", machine.host_infer),
        f"  beside its roofline an op takes {machine.gpu_op * 1e6:.1f} us, one of ours {machine.gpu_forward * 1e6:.1f} us forward and "
        f"{machine.gpu_gradient * 1e6:.1f} us backward; a block takes {machine.correction:.2f} of its roofline",
    ]


def _host_line(what: str, host: Host) -> str:
    return (
        f"  Python launches {what}: {host.op * 1e6:.1f} us an op, {host.launch * 1e6:.1f} us a small kernel of ours beside it, "
        f"{host.fixed * 1e3:.1f} ms once"
    )


def _size(text: str) -> int:
    """`12GiB`, `12GB`, `12` or `11000MiB` -> bytes; GB on a card's box means GiB."""
    matched = SIZE.fullmatch(text.strip())
    if matched is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 12GiB")
    return round(float(matched[1]) * (2**20 if matched[3] else GIB))


def _processes(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GPUs: 1 is one GPU alone, 2 train together")
    return int(text)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="loragraft preflight", description=__doc__)
    parser.add_argument("recipe", nargs="?", help="a shipped recipe's name or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides")
    parser.add_argument(
        "--fit",
        type=_size,
        metavar="SIZE",
        help="a card, such as 12GiB: find overrides that fit it (default: this machine's GPU, where the run does not fit it)",
    )
    parser.add_argument(
        "--calibrate", action="store_true", help="measure this machine's GPU first, and keep the figures"
    )
    parser.add_argument(
        "--random-weights", action="store_true", help="weights.random=true: a base's true shapes without its files"
    )
    parser.add_argument("--no-data", action="store_true", help="leave the data set alone")
    parser.add_argument("--processes", type=_processes, default=1, help="GPUs that will train together (default 1)")
    parser.add_argument("--card", metavar="NAME", help="times for this card alone, by the name that torch reports")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return parser.parse_intermixed_args(arguments)
