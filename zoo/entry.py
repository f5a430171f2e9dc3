"""What a zoo says about one published version of an adapter, as JSON that is checked wherever it comes from.

    loragraft.json   `Entry`: base, recipe, data, licence, scores, and the sha256 of every file beside it. Never changes.
    status.json      version -> `Status`: yanked or deprecated. It may change, so no signature covers it.
    index.json       every `Listed`: entry, its own sha256, whether it is signed, status. Generated from the other two.

The three schemas lie beside this file. A name in `files` is relative, has no `..`, and one of a few suffixes: weights come as
safetensors or not at all.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

SCHEMA = 1
ENTRY, STATUS, INDEX, SIGNATURE = "loragraft.json", "status.json", "index.json", "model.sig"
SIZE_LIMIT = {ENTRY: 1 << 20, STATUS: 1 << 20, INDEX: 1 << 26, SIGNATURE: 1 << 20}
"""Bytes; a larger one is refused unread."""


class ZooError(ValueError):
    """What a zoo holds, or was given, cannot be trusted or done; the message says which and how to go on."""


class NotAsPublishedError(ZooError):
    """A file is missing, foreign, or not the bytes that its entry or index says."""


@dataclass(frozen=True, kw_only=True)
class BaseRef:
    """The base that an adapter was trained on."""

    name: str
    id: str
    """sha256 over the tensors of the quantized checkpoint."""
    profile: str
    repository: str | None
    """The 16-bit weights on the Hub; None where they are not published there."""


@dataclass(frozen=True, kw_only=True)
class Licence:
    """As the Hub's cards give it: `other` needs a name and a link."""

    id: str
    name: str = ""
    link: str = ""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One figure and everything that it depends on."""

    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    base: float
    """The same metric of the base without the adapter."""
    better: str
    """`lower` or `higher`."""
    protocol: str
    n: int
    """Images per set."""
    references: int
    """Held-out images that they were compared with."""
    split: str
    seed: int
    steps: int
    guidance: float
    hardware: str


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What a file must be."""

    sha256: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One published version; see `entry.schema.json`."""

    name: str
    version: str
    created: str
    base: BaseRef
    rank: int
    parameters: int
    contract: str = "portable"
    recipe_hash: str
    data_fingerprint: str
    domain: str = ""
    trigger: str = ""
    licence: Licence
    scores: tuple[Score, ...] = ()
    files: Mapping[str, FileRecord]
    versions: Mapping[str, str]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files.values())

    def to_bytes(self) -> bytes:
        """The one spelling of `loragraft.json`: equal entries have equal bytes."""
        return canonical({"schema": SCHEMA, **asdict(self)})

    @property
    def sha256(self) -> str:
        """Of `to_bytes`."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Status:
    """What became of a version; an empty text means that it did not."""

    yanked: str = ""
    deprecated: str = ""

    def to_dict(self) -> dict[str, str]:
        return {key: text for key, text in asdict(self).items() if text}


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A line of an index."""

    entry: Entry
    entry_sha256: str
    """Of the bytes of its `loragraft.json`, as they lie there."""
    signed: bool
    status: Status = field(default_factory=Status)

    @classmethod
    def read(cls, content: bytes, where: str, *, signed: bool, statuses: Mapping[str, Status]) -> "Listed":
        """From the bytes of a `loragraft.json`; raises ZooError as `entry_from_bytes`. statuses: of its versions."""
        entry = entry_from_bytes(content, where)
        status = statuses.get(entry.version, Status())
        return cls(entry=entry, entry_sha256=hashlib.sha256(content).hexdigest(), signed=signed, status=status)

    @property
    def order(self) -> tuple[str, tuple[int, ...]]:
        """By name, then by version as numbers."""
        return self.entry.name.casefold(), version_numbers(self.entry.version)

    @property
    def files(self) -> list[str]:
        """All that a copy of it consists of; what `entry` promises first."""
        return [*sorted(self.entry.files), *([SIGNATURE] if self.signed else []), ENTRY]


VERSION = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}")


def another(where: str, entry: Entry, taken: Iterable[str]) -> ZooError:
    """`where` holds other files under the name and version of `entry`, which may not be replaced. taken: versions of that name."""
    numbers = [version_numbers(version) for version in {*taken, entry.version} if VERSION.fullmatch(version)]
    major, minor, _ = version_numbers(entry.version)
    patch = max(number[2] for number in numbers if number[:2] == (major, minor))
    return ZooError(
        f"{where} holds another {entry.name} {entry.version}, and a version never changes: publish this one with "
        f"--version {major}.{minor}.{patch + 1}, or give the recipe another name"
    )


def version_numbers(version: str) -> tuple[int, ...]:
    """ "1.10.0" -> (1, 10, 0)."""
    return tuple(map(int, version.split(".")))


def canonical(value: Any) -> bytes:
    """JSON with sorted keys; NaN is refused."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def parse_json(content: bytes, kind: str, where: str) -> Any:
    """`content` of a file of `kind` (`ENTRY`, `STATUS` or `INDEX`) after its schema. Raises ZooError saying what is wrong, where."""
    if len(content) > SIZE_LIMIT[kind]:
        raise ZooError(f"{where} has {len(content)} bytes; no {kind} is larger than {SIZE_LIMIT[kind]}")
    try:
        value = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ZooError(f"{where} is not the JSON that a zoo writes: {error}") from error
    check(value, kind, where)
    return value


def check(value: Any, kind: str, where: str) -> None:
    """Raises ZooError naming the key of `value` that its schema refuses."""
    from jsonschema.exceptions import best_match  # here and below: other commands import this module for its options

    error = best_match(_validator(kind).iter_errors(value))
    if error is None:
        return
    found = value.get("schema") if isinstance(value, dict) else None
    if isinstance(found, int) and found > SCHEMA:
        raise ZooError(f"{where} is of schema {found}, this version of Loragraft reads {SCHEMA}: update Loragraft")
    key = ".".join(map(str, error.absolute_path)) or "its top"
    meant = error.schema.get("description") if error.validator == "pattern" else None
    said = f"{error.instance[:100]!r} is not {meant}" if meant else error.message[:300]
    raise ZooError(f"{where}: {key}: {said}")


def entry_from_bytes(content: bytes, where: str) -> Entry:
    """Raises ZooError unless `content` is a complete `loragraft.json`."""
    return entry_from_dict(parse_json(content, ENTRY, where))


def entry_from_dict(value: Mapping[str, Any]) -> Entry:
    """Of a dictionary that has passed its schema."""
    plain = {key: part for key, part in value.items() if key != "schema"}
    return Entry(
        **{
            **plain,
            "base": BaseRef(**value["base"]),
            "licence": Licence(**value["licence"]),
            "scores": tuple(Score(**score) for score in value["scores"]),
            "files": {name: FileRecord(**record) for name, record in value["files"].items()},
        }
    )


def statuses_from_bytes(content: bytes, where: str) -> dict[str, Status]:
    """Version -> status. Raises ZooError unless `content` is a `status.json`."""
    value = parse_json(content, STATUS, where)
    return {version: Status(**status) for version, status in value["versions"].items()}


def statuses_to_bytes(statuses: Mapping[str, Status]) -> bytes:
    """`status.json`; versions of which nothing became are left out."""
    told = {version: status.to_dict() for version, status in statuses.items() if status != Status()}
    return canonical({"schema": SCHEMA, "versions": told})


def index_to_bytes(listed: list[Listed]) -> bytes:
    """`index.json`, sorted: equal contents have equal bytes."""
    rows = [
        {
            "entry": json.loads(item.entry.to_bytes()),
            "entry_sha256": item.entry_sha256,
            "signed": item.signed,
            "status": item.status.to_dict(),
        }
        for item in sorted(listed, key=lambda item: item.order)
    ]
    return canonical({"schema": SCHEMA, "adapters": rows})


def index_from_bytes(content: bytes, where: str) -> list[Listed]:
    """Raises ZooError unless `content` is an `index.json` whose entries are entries."""
    rows = parse_json(content, INDEX, where)["adapters"]
    found = []
    for row in rows:
        check(row["entry"], ENTRY, where)
        found.append(
            Listed(
                entry=entry_from_dict(row["entry"]),
                entry_sha256=row["entry_sha256"],
                signed=row["signed"],
                status=Status(**row["status"]),
            )
        )
    return found


def sha256_file(path: Path) -> str:
    """Hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


@cache
def _validator(kind: str) -> "Draft202012Validator":
    from jsonschema import Draft202012Validator

    path = Path(__file__).resolve().with_name(kind.replace("loragraft", "entry").replace(".json", ".schema.json"))
    return Draft202012Validator(json.loads(path.read_text(encoding="utf-8")))
