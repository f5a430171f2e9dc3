"""`loragraft zoo` and `loragraft publish`: options, and what is printed."""

import argparse
import contextlib
import json
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loragraft.parser import Parser
from loragraft.zoo.entry import Entry, Listed, NotAsPublishedError, Status, ZooError, index_to_bytes
from loragraft.zoo.places import DEFAULT, HUB, VARIABLE, Place, check_no_source, choose, did_you_mean, open_place
from loragraft.zoo.printing import describe, print_table

if TYPE_CHECKING:
    from loragraft.backbones.spec import Backbone

PLACES = f"""A zoo is a place that holds published adapters:

  a folder          zoo, /data/zoo
  an fsspec URL     s3://bucket/zoo, sftp://host/zoo; https://host/zoo to read (some need a package that fsspec names)
  the Hub           hf://OWNER, one repository per adapter; hf://OWNER/NAME, one of them. Log in with `hf auth login`

--zoo names it; without it ${VARIABLE}, and without that the folder `{DEFAULT}`. In a checkout `zoo` and `adapters` are
sources, into which nothing is written: publish --to runs/zoo, pull --zoo runs/zoo --out runs/adapters."""
WALKTHROUGH = """
  loragraft publish runs/marketing --to runs/zoo                      1. publish
  loragraft zoo ls runs/zoo                                           2. what is there
  loragraft zoo pull marketing --zoo runs/zoo --out runs/adapters     3. fetch it, every byte checked
  loragraft zoo verify runs/adapters/marketing                        4. is it what it says? Grafts it onto its base
  loragraft generate --adapter runs/adapters/marketing --prompt "..."
"""


def publish_options(parser: argparse.ArgumentParser) -> None:
    """Options of `loragraft publish`."""
    parser.add_argument("run", type=Path, help="the run folder that training wrote")
    parser.add_argument(
        "--to", metavar="PLACE", help="a folder, a URL or hf://OWNER (default: the recipe's publish.to)"
    )
    parser.add_argument("--name", help="what it is called there (default: the recipe's name)")
    parser.add_argument("--version", default="1.0.0", help="MAJOR.MINOR.PATCH; a published version never changes")
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="pictures by `loragraft generate` (default: RUN/images)"
    )
    parser.add_argument("--licence", metavar="ID", help="only where the base's own is not known here")
    parser.add_argument("--key", type=Path, metavar="FILE", help="sign with this private key (loragraft zoo key FILE)")
    parser.add_argument(
        "--public", action="store_true", help="new repositories on the Hub are public (default: private)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, say what would be published, and stop"
    )


def run_publish(args: argparse.Namespace) -> int:
    """Raises ZooError."""
    from loragraft.zoo.publish import publish

    to = args.to or _recipe_place(args.run)
    check_no_source(to, "--to ")
    place = None if args.dry_run else open_place(to, public=args.public)
    done = publish(
        args.run, place, name=args.name, version=args.version, licence=args.licence, pictures=args.images, key=args.key
    )  # fmt: skip
    print(describe(done.entry))
    if args.dry_run:
        print(f"\nnothing was published; without --dry-run this goes to {to}")
    elif done.changed:
        print(f"\npublished: {done.entry.name} {done.entry.version} in {to}{', signed' if done.signed else ''}")
    else:
        later = " A signature can only come with a new version." if args.key else ""
        print(f"\n{to} has this very version already; nothing changed.{later}")
    return 0


def _recipe_place(run: Path) -> str:
    from loragraft.recipes.load import load_recipe

    recipe = run / "recipe.yaml"
    to = load_recipe(str(recipe)).publish.to if recipe.is_file() else ""
    if not to:
        raise ZooError(
            f"where to? --to runs/zoo (a folder), --to s3://bucket/zoo, --to {HUB}OWNER, or publish.to in the recipe"
        )
    return to


def main(arguments: Sequence[str]) -> int:
    """`loragraft zoo ...`. `loragraft zoo PLACE` is short for `loragraft zoo ls PLACE`."""
    first = arguments[0] if arguments else ""
    if first and first not in VERBS and not first.startswith("-"):
        if "://" not in first and not Path(first).is_dir():
            raise ZooError(f"`loragraft zoo {first}`: no such verb. {did_you_mean(first, list(VERBS))}")
        arguments = ["ls", *arguments]
    args = build_parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = args.run_verb
    return run(args)


def _ls(args: argparse.Namespace) -> int:
    place = open_place(args.place or args.zoo)
    items = place.listed()
    if args.json:
        print(index_to_bytes(items).decode(), end="")
        return 0
    print_table(items, every=args.all)
    print(f"{len({item.entry.name for item in items})} adapters in {place.url}")
    return 0


def _search(args: argparse.Namespace) -> int:
    from loragraft.zoo.search import matches

    place = open_place(args.zoo)
    items = place.listed()
    found = [item for item in items if matches(item.entry, args.words, args.base, args.domain)]
    print_table(found, every=args.all)
    for option, wanted, known in (
        ("--base", args.base, {name for item in items for name in (item.entry.base.name, item.entry.base.repository)}),
        ("--domain", args.domain, {item.entry.domain for item in items}),
    ):
        if wanted and wanted not in known:
            print(
                f"{option} {wanted}: nothing in {place.url} is for it. {did_you_mean(wanted, sorted(filter(None, known)))}"
            )
    print(f"{len({item.entry.name for item in found})} adapters in {place.url} match")
    return 0


def _info(args: argparse.Namespace) -> int:
    place = open_place(args.zoo)
    item = choose(place, args.name)
    if args.json:
        print(json.dumps(json.loads(index_to_bytes([item]))["adapters"][0], indent=1))
        return 0
    print(describe(item.entry))
    print(f"  signed          {'yes' if item.signed else 'no'}")
    for word, text in item.status.to_dict().items():
        print(f"  {word.upper():15s} {text}")
    others = [
        other.entry.version + (" (yanked)" if other.status.yanked else "") for other in place.versions(item.entry.name)
    ]
    print(f"  versions        {', '.join(others)}")
    return 0


def _pull(args: argparse.Namespace) -> int:
    from loragraft.zoo.pull import pull

    check_no_source(args.out, "--out ")
    folder = pull(open_place(args.zoo), args.name, args.out, key=args.key)
    print(f'{folder}: every byte as published. loragraft generate --adapter {folder} --prompt "..."')
    return 0


@contextlib.contextmanager
def _pulled(name: str, args: argparse.Namespace, key: Path | None = None) -> Iterator[Path]:
    """The folder that is named, or a temporary copy of the adapter that is: a run may lie here under the adapter's name."""
    from loragraft.zoo.entry import ENTRY
    from loragraft.zoo.pull import pull

    folder = Path(name)
    if (folder / ENTRY).is_file() or (folder.is_dir() and "/" in name):
        yield folder
        return
    if "/" in name:
        raise ZooError(
            f"there is no folder {name}: give one that `loragraft zoo pull` wrote, or an adapter's name and --zoo"
        )
    with tempfile.TemporaryDirectory(prefix="loragraft-zoo-") as temporary:
        yield pull(open_place(args.zoo), name, Path(temporary), key=key)


def _verify(args: argparse.Namespace) -> int:
    if args.all == (args.name is not None):
        raise ZooError("verify what? A name, a pulled folder, or --all")
    names = [args.name]
    if args.all:
        names = [f"{item.entry.name}@{item.entry.version}" for item in open_place(args.zoo).listed()]
    opened: dict[tuple[str, str], Backbone] = {}

    def backbone(entry: Entry) -> "Backbone":
        key = entry.base.name, entry.base.profile
        if key not in opened:
            opened.clear()  # one at a time in memory
            opened[key] = _backbone(entry, args)
        return opened[key]

    bad = [name for name in names if not _verify_one(name, args, None if args.no_graft else backbone)]
    if args.all:
        print(
            f"{len(names) - len(bad)} of {len(names)} versions are what they say{': not ' * bool(bad)}{', '.join(bad)}"
        )
    return 1 if bad else 0


def _verify_one(name: str, args: argparse.Namespace, backbone: "Callable[[Entry], Backbone] | None") -> bool:
    from loragraft.zoo.verify import verify_folder

    failed = False
    try:
        with _pulled(name, args) as folder:
            for finding in verify_folder(folder, key=args.key, backbone=backbone):
                word = {True: "ok", False: "FAILED", None: "-"}[finding.passed]
                print(f"{word:7s} {finding.question:10s} {finding.text}", flush=True)
                failed |= finding.passed is False
    except ZooError as error:
        if not args.all and not isinstance(error, NotAsPublishedError):
            raise
        print(f"FAILED  files      {error}")
        failed = True
    print(f"{name}: {'do not use it' if failed else 'it is what it says'}\n")
    return not failed


def _bench(args: argparse.Namespace) -> int:
    from loragraft.data.cache import default_cache_root
    from loragraft.zoo.bench import bench, table
    from loragraft.zoo.entry import ENTRY, entry_from_bytes
    from loragraft.zoo.pull import check_records

    with _pulled(args.name, args, args.key) as folder:
        if not (folder / ENTRY).is_file():
            raise ZooError(
                f"{folder} has no {ENTRY}: give a folder that `loragraft zoo pull` wrote, or a name and --zoo"
            )
        entry = entry_from_bytes((folder / ENTRY).read_bytes(), str(folder / ENTRY))
        check_records(folder, entry.files)
        root = args.out / f"{entry.name}-{entry.version}"
        found = bench(
            folder,
            entry,
            root,
            lambda recipe: _backbone(entry, args),
            default_cache_root(),
            images=args.images,
            data=args.data,
        )
    print("\n".join(table(found)))
    print(f"written: {root / 'bench.json'}; images beside it")
    return 1 if any(comparison.agrees is False for comparison in found) else 0


def _backbone(entry: Entry, args: argparse.Namespace) -> "Backbone":
    import torch

    from loragraft.backbones.load import load_backbone
    from loragraft.data.cache import default_cache_root
    from loragraft.evaluation.generate_command import parse_profile
    from loragraft.recipes.schema import WeightsConfig

    weights = WeightsConfig(path=args.weights, encoders=args.encoders or "") if args.weights else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_backbone(entry.base.name, parse_profile(entry.base.profile), device, default_cache_root(), weights)


def _status(args: argparse.Namespace) -> int:
    """`yank` and `deprecate`."""
    place = open_place(args.zoo)
    if "@" not in args.name and len(place.versions(args.name)) > 1:
        raise ZooError(
            f"which version? {', '.join(f'{args.name}@{i.entry.version}' for i in place.versions(args.name))}"
        )
    name, _, version = args.name.partition("@")
    item = choose(place, args.name) if version else _only(place, name)
    text = "" if args.undo else args.because
    if not text and not args.undo:
        raise ZooError(f"why? --because '...': whoever pulls {name} reads it")
    status = Status(**{**item.status.to_dict(), args.field: text})
    place.set_status(item.entry.name, item.entry.version, status)
    print(
        f"{item.entry.name} {item.entry.version}: {', '.join(f'{k}: {v}' for k, v in status.to_dict().items()) or 'as published'}"
    )
    return 0


def _only(place: Place, name: str) -> Listed:
    """The single version of `name`, yanked or not."""
    found = place.versions(name)
    return found[0] if found else choose(place, name)


def _mirror(args: argparse.Namespace) -> int:
    from loragraft.zoo.pull import mirror

    check_no_source(args.folder, "")
    copy = mirror(open_place(args.source), args.folder, key=args.key)
    print(f"{len(copy.listed())} versions in {args.folder}; offline: loragraft zoo ls {args.folder}")
    return 0


def _index(args: argparse.Namespace) -> int:
    from loragraft.zoo.file_place import FilePlace

    place = open_place(args.place or args.zoo)
    if not isinstance(place, FilePlace):
        raise ZooError(f"{place.url} has no index file: the Hub lists its repositories itself")
    place.write_index()
    print(f"{len(place.listed())} versions in the index of {place.url}")
    return 0


def _key(args: argparse.Namespace) -> int:
    from loragraft.zoo.signing import make_keys

    public = make_keys(args.file)
    print(
        f"{args.file}: sign with it (loragraft publish --key), show it to nobody\n{public}: publish it; readers give it to --key"
    )
    return 0


VERBS: dict[str, tuple[Callable[[argparse.Namespace], int], str, str]] = {
    "ls": (_ls, "what a zoo holds", "loragraft zoo ls; loragraft zoo ls hf://OWNER; loragraft zoo ls zoo --all"),
    "search": (
        _search,
        "adapters by words, base or domain",
        "loragraft zoo search icon blue; loragraft zoo search --base flux1-dev\n\nEvery word must occur in the name, the domain, the trigger, the base or the licence.",
    ),
    "info": (_info, "all that is said about one adapter", "loragraft zoo info marketing; loragraft zoo info marketing@1.0.0"),
    "pull": (
        _pull,
        "fetch an adapter, checked, into a folder",
        "loragraft zoo pull marketing --zoo hf://OWNER\n\nThe folder appears whole and as published, or not at all. A folder that is there already is checked.",
    ),
    "verify": (
        _verify,
        "is an adapter what it says it is? Exit code 1 if not",
        "loragraft zoo verify adapters/marketing --key alice.pub; loragraft zoo verify --all --no-graft\n\n"
        "Checks sha256 of every file, the signature, the weights, the base's id, and grafts it onto its base.",
    ),
    "bench": (
        _bench,
        "measure an adapter's score here and hold it against the published one. Exit code 1 if they differ",
        "loragraft zoo bench marketing --images 64\n\n"
        "Draws and measures as `loragraft score` does, with the published seeds and settings. What is drawn already is not drawn again.",
    ),
    "mirror": (_mirror, "copy a whole zoo to a folder, to use without a network", "loragraft zoo mirror hf://OWNER copy"),
    "yank": (
        _status,
        "take a version out of use; it stays for who asks for it by version",
        "loragraft zoo yank marketing@1.0.0 --because 'trained on the wrong data'      --undo takes it back",
    ),
    "deprecate": (
        _status,
        "say what to take instead of a version",
        "loragraft zoo deprecate marketing@1.0.0 --because 'take poster instead'      --undo takes it back",
    ),
    "index": (_index, "write the index of a zoo of files anew", "loragraft zoo index zoo"),
    "key": (_key, "make a pair of keys to sign with", "loragraft zoo key ~/.config/loragraft/me.pem"),
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """Of `loragraft zoo`."""
    parser = Parser(
        prog="loragraft zoo", description=f"Published adapters: find, fetch and prove them.\n{WALKTHROUGH}\n{PLACES}"
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    sub = {}
    for name, (run, text, details) in VERBS.items():
        sub[name] = verbs.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.\n\n{textwrap.indent(details, '  ')}\n\n{PLACES}",
        )
        sub[name].set_defaults(run_verb=run)
        if name not in ("key", "mirror"):
            sub[name].add_argument(
                "--zoo", metavar="PLACE", help=f"the zoo (default: ${VARIABLE}, else the folder {DEFAULT!r})"
            )
    for name in ("ls", "index"):
        sub[name].add_argument("place", nargs="?", metavar="PLACE", help="the same as --zoo PLACE")
    for name in ("ls", "search"):
        sub[name].add_argument("--all", action="store_true", help="older and yanked versions too")
    for name in ("ls", "info"):
        sub[name].add_argument("--json", action="store_true", help="as the index has it")
    for name in ("info", "pull", "verify", "bench", "yank", "deprecate"):
        folder = ", or a pulled folder" if name in ("verify", "bench") else ""
        count = "?" if name == "verify" else None
        sub[name].add_argument("name", nargs=count, metavar="NAME[@VERSION]", help=f"an adapter{folder}")
    sub["verify"].add_argument("--all", action="store_true", help="every version of the zoo")
    for name in ("pull", "verify", "bench", "mirror"):
        sub[name].add_argument(
            "--key", type=Path, metavar="PUBLIC_KEY", help="demand a signature made with this key's private half"
        )
    for name, field in (("yank", "yanked"), ("deprecate", "deprecated")):
        sub[name].add_argument("--because", default="", metavar="WHY", help="what whoever meets it reads")
        sub[name].add_argument("--undo", action="store_true", help="take it back")
        sub[name].set_defaults(field=field)
    sub["search"].add_argument("words", nargs="*", metavar="WORD", help="all must occur; without any, every adapter")
    sub["search"].add_argument("--base", help="only adapters for this base")
    sub["search"].add_argument("--domain", help="only adapters of this domain")
    sub["pull"].add_argument("--out", type=Path, default=Path("adapters"), metavar="FOLDER", help="default: adapters")
    sub["verify"].add_argument("--no-graft", action="store_true", help="do not load the base")
    for name in ("verify", "bench"):
        sub[name].add_argument("--weights", metavar="PATH", help="of a base that does not travel with the package")
        sub[name].add_argument("--encoders", metavar="PATH", help="the pipeline with its encoders")
    sub["bench"].add_argument("--images", type=int, metavar="N", help="per set (default: the published N)")
    sub["bench"].add_argument(
        "--data", type=Path, metavar="FOLDER", help="the images, unless the recipe generates them"
    )
    sub["bench"].add_argument("--out", type=Path, default=Path("bench"), metavar="FOLDER", help="default: bench")
    sub["mirror"].add_argument("source", metavar="PLACE", help="the zoo to copy")
    sub["mirror"].add_argument("folder", type=Path, metavar="FOLDER", help="where the copy goes")
    sub["key"].add_argument("file", type=Path, metavar="FILE", help="the private key's file; the public one gets .pub")
    return parser
