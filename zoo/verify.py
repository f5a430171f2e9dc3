"""Is a published adapter what it says it is? One line per question, in the order of what an answer costs.

files       exactly those of the entry, byte for byte
signature   made with the key that was given, over these files
weights     readable safetensors: finite factors that fit together, rank and size as the entry says
claims      the entry says what the weights' own header says: name, base, contract, recipe, data
base        the base here has the id that the adapter was trained on
graft       every factor meets its layer, the branch grows by the adapter's rank, and taking it off restores every byte
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from loragraft.adapters.checkpoint import Adapter, load_adapter
from loragraft.adapters.formats.contract import contract_of
from loragraft.backbones.spec import Backbone
from loragraft.disk import readable_bytes
from loragraft.zoo.contents import WEIGHTS, parameters
from loragraft.zoo.entry import ENTRY, SIGNATURE, Entry, ZooError, entry_from_bytes
from loragraft.zoo.pull import check_records


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The answer to one question."""

    question: str
    passed: bool | None
    """None: not asked."""
    text: str


def verify_folder(
    folder: Path, *, key: Path | None = None, backbone: Callable[[Entry], Backbone] | None = None
) -> Iterator[Finding]:
    """Findings about a pulled folder; the first that fails is the last. `backbone` opens the base of an entry; None: not asked.

    Raises ZooError if `folder` is no copy of a published adapter.
    """
    if not (folder / ENTRY).is_file():
        raise ZooError(f"{folder} has no {ENTRY}: give a folder that `loragraft zoo pull` wrote, or a name and --zoo")
    entry = entry_from_bytes((folder / ENTRY).read_bytes(), str(folder / ENTRY))
    adapter: list[Adapter] = []

    def weights() -> str:
        adapter.append(load_adapter(folder / WEIGHTS))
        count = parameters(adapter[0].pairs.values())
        if (adapter[0].rank, count) != (entry.rank, entry.parameters):
            raise ZooError(
                f"rank {adapter[0].rank} and {count} parameters, the entry says {entry.rank} and {entry.parameters}"
            )
        return f"{len(adapter[0].pairs)} layers, rank {entry.rank}, {count:,} parameters, all finite"

    questions: dict[str, Callable[[], str] | str] = {
        "files": lambda: _files(folder, entry),
        "signature": _signature_question(folder, key),
        "weights": weights,
        "claims": lambda: _claims(adapter[0], entry),
        "base": "not asked (--no-graft)",
    }
    if backbone is not None:
        opened: list[Backbone] = []

        def base() -> str:
            opened.append(backbone(entry))
            adapter[0].check_base(opened[0].base_id)
            return f"{entry.base.name} ({entry.base.profile}), id {entry.base.id[:12]}"

        questions |= {"base": base, "graft": lambda: _graft(opened[0], adapter[0])}
    for question, answer in questions.items():
        if isinstance(answer, str):
            yield Finding(question=question, passed=None, text=answer)
            continue
        try:
            text = answer()
        except ValueError as error:
            yield Finding(question=question, passed=False, text=str(error))
            return
        yield Finding(question=question, passed=True, text=text)


def _files(folder: Path, entry: Entry) -> str:
    check_records(folder, entry.files)
    return f"{len(entry.files)} files, {readable_bytes(entry.size)}, sha256 as in the entry"


def _signature_question(folder: Path, key: Path | None) -> Callable[[], str] | str:
    if key is None:
        signed = (folder / SIGNATURE).is_file()
        return "there is one; --key PUBLIC_KEY checks it" if signed else "none"
    public = key

    def answer() -> str:
        from loragraft.zoo.signing import verify_signature

        if not (folder / SIGNATURE).is_file():
            raise ZooError("it is not signed, and --key asks for a signature")
        verify_signature(folder, public)
        return f"by {public}"

    return answer


def _claims(adapter: Adapter, entry: Entry) -> str:
    about = adapter.metadata
    claimed = {
        "name": (adapter.name, entry.name),
        "base": (about.get("base"), entry.base.name),
        "base_id": (adapter.base_id, entry.base.id),
        "profile": (about.get("profile", ""), entry.base.profile),
        "contract": (contract_of(about), entry.contract),
        "recipe_hash": (str(about.get("recipe_hash", "")), entry.recipe_hash),
        "data_fingerprint": (str(about.get("data_fingerprint", "")), entry.data_fingerprint),
    }
    for what, (weights, told) in claimed.items():
        if weights != told:
            raise ZooError(f"{what} is {told!r} in the entry and {weights!r} in the weights")
    return "name, base, recipe and data are those of the weights' own header"


def _graft(backbone: Backbone, adapter: Adapter) -> str:
    from loragraft.adapters.graft import graft, ungraft

    before = backbone.fingerprint()
    graft(backbone.transformer, adapter)
    moved = backbone.fingerprint() != before
    ungraft(backbone.transformer, adapter.name)
    if backbone.fingerprint() != before:
        raise ZooError("taking the adapter off again did not restore the base")
    if not moved:
        raise ZooError("the adapter changes nothing in the base")
    return f"on {len(adapter.pairs)} layers of {backbone.spec.name}; taken off again, every byte as before"
