"""A zoo on the Hub, through a server on this machine: what is said to whom, and the old state or the new one after every fault."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from loragraft.zoo.contents import collect
from loragraft.zoo.entry import ENTRY, Status, ZooError
from loragraft.zoo.hub_place import HubPlace
from loragraft.zoo.places import choose, open_place
from loragraft.zoo.publish import publish
from loragraft.zoo.pull import mirror, pull

WEIGHTS = "pytorch_lora_weights.safetensors"
REPO = "alice/marketing"


def quiet(_: str) -> None:
    """Nothing is said."""


def weights_of(run: Path) -> bytes:
    return (run / "adapter" / WEIGHTS).read_bytes()


def state(hub: Any) -> Any:
    """What a reader sees: commits, files, tags."""
    repo = hub.repos.get(REPO)
    return None if repo is None or len(repo.commits) == 1 else (repo.head.sha, dict(repo.head.files), dict(repo.tags))


def test_published_listed_pulled(hub: Any, make_run: Callable[..., Path], tmp_path: Path) -> None:
    run, place = make_run(), open_place("hf://alice")
    assert publish(run, place).changed
    repo = hub.repos[REPO]
    assert repo.private
    assert len(repo.commits) == 2  # the Hub's own and ours: one publication is one commit
    assert repo.tags == {"v1.0.0": repo.head.sha}
    files = {row.path for row in huggingface_hub.HfApi(endpoint=hub.url).list_repo_tree(REPO)}
    assert files == {
        ".gitattributes",
        "README.md",
        WEIGHTS,
        ENTRY,
        "score.json",
        "images/0000.png",
        "images/samples.png",
    }
    fresh = open_place("hf://alice")
    assert [item.entry.name for item in fresh.listed()] == ["marketing"]
    folder = pull(fresh, "marketing", tmp_path / "out", say=quiet)
    assert (folder / WEIGHTS).read_bytes() == weights_of(run)
    assert not list(folder.glob(".*"))


def test_the_same_again_is_no_commit_and_no_upload(hub: Any, make_run: Callable[..., Path]) -> None:
    run = make_run()
    publish(run, open_place("hf://alice"))
    before, uploads = state(hub), hub.count("PUT", "/objects/")
    assert not publish(run, open_place("hf://alice")).changed
    assert state(hub) == before
    assert hub.count("PUT", "/objects/") == uploads


def test_versions_are_tags_and_never_change(hub: Any, make_run: Callable[..., Path], tmp_path: Path) -> None:
    one, two = make_run(), make_run(seed=1, score=False)
    place = open_place("hf://alice")
    publish(one, place)
    with pytest.raises(ZooError, match=r"--version 1\.0\.1"):
        publish(two, place)
    publish(two, place, version="1.1.0")
    assert "score.json" not in hub.repos[REPO].head.files  # of the version before
    assert [item.entry.version for item in place.versions("marketing")] == ["1.0.0", "1.1.0"]
    folder = pull(place, "marketing@1.0.0", tmp_path / "old", say=quiet)
    assert (folder / WEIGHTS).read_bytes() == weights_of(one)
    assert (pull(place, "marketing", tmp_path / "new", say=quiet) / WEIGHTS).read_bytes() == weights_of(two)


def test_yanked(hub: Any, make_run: Callable[..., Path]) -> None:
    place = open_place("hf://alice")
    publish(make_run(), place)
    publish(make_run(seed=1), place, version="1.1.0")
    place.set_status("marketing", "1.1.0", Status(yanked="wrong data"))
    assert choose(place, "marketing").entry.version == "1.0.0"
    assert choose(place, "marketing@1.1.0").status.yanked == "wrong data"
    publish(make_run(seed=2), place, version="1.2.0")  # keeps what was said
    assert choose(place, "marketing@1.1.0").status.yanked == "wrong data"


def test_public_only_if_asked(hub: Any, make_run: Callable[..., Path]) -> None:
    publish(make_run(), open_place("hf://alice", public=True))
    assert not hub.repos[REPO].private


def test_a_misspelt_name(hub: Any, make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    publish(make_run(), open_place("hf://alice", public=True))
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(ZooError, match="Did you mean 'marketing'"):
        choose(open_place("hf://alice"), "marketting")
    assert choose(open_place("hf://alice/marketing"), "marketing").entry.name == "marketing"
    with pytest.raises(ZooError, match="or they are private"):
        choose(open_place("hf://carol"), "marketing")


def test_a_repository_that_is_no_zoos(
    hub: Any, loopback_module: Any, make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    publish(make_run(), open_place("hf://alice"))
    hub.repos["alice/plain"] = loopback_module.Repo(private=False)
    hub.repos["alice/plain"].add("files", {WEIGHTS: b"x", "README.md": b"---\ntags:\n- loragraft\n---\n"})
    with pytest.raises(ZooError, match=r"has no loragraft\.json"):
        choose(open_place("hf://alice"), "plain")
    capsys.readouterr()
    assert [item.entry.name for item in open_place("hf://alice").listed()] == ["marketing"]
    assert "note: alice/plain has no loragraft.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("token", "to", "said"),
    [
        ("hf_unknown", "hf://alice", "hf auth login"),
        ("hf_reader", "hf://bob", "role `write`"),
        ("hf_alice", "hf://carol", "role `write`"),
    ],
)
def test_who_may_not_publish_is_told_why(
    hub: Any, make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, token: str, to: str, said: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ZooError, match=said):
        publish(make_run(), open_place(to))
    assert hub.repos == {}


@pytest.mark.parametrize("where", ["hf://alice", "hf://"])
def test_who_is_not_logged_in_is_told_how(
    hub: Any, make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    with pytest.raises(ZooError, match=rf"{where}: you are not logged in to the Hub: `hf auth login`"):
        publish(make_run(), open_place(where))


def test_a_gated_repository(hub: Any, make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    publish(make_run(), open_place("hf://alice", public=True))
    hub.repos[REPO].gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(ZooError, match="access to a gated repository"):
        choose(open_place("hf://alice/marketing"), "marketing")


def test_offline_the_hub_is_not_asked_and_a_mirror_serves(
    hub: Any, make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish(make_run(), open_place("hf://alice"))
    mirror(open_place("hf://alice"), tmp_path / "copy", say=quiet)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.log)
    with pytest.raises(ZooError, match="HF_HUB_OFFLINE is set"):
        open_place("hf://alice").listed()
    assert pull(open_place(str(tmp_path / "copy")), "marketing", tmp_path / "out", say=quiet).is_dir()
    assert len(hub.log) == asked


FAULTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "401 at the commit": (lambda hub: hub.fail("POST", "/commit/", status=401), "hf auth login"),
    "403 at the commit": (lambda hub: hub.fail("POST", "/commit/", status=403), "role `write`"),
    "409 at the commit": (lambda hub: hub.fail("POST", "/commit/", status=409), "somebody else is changing it"),
    "429 at the commit": (
        lambda hub: hub.fail("POST", "/commit/", status=429, headers={"Retry-After": "7"}),
        "pause of 7 s",
    ),
    "500 at the commit": (lambda hub: hub.fail("POST", "/commit/", status=500), "answers 500"),
    "429 at the upload, for good": (lambda hub: hub.fail("PUT", "/objects/", status=429, times=99), "asks for a pause"),
    "cut in mid-upload, for good": (lambda hub: hub.cut("PUT", "/objects/", after=1000, times=99), "connection .* broke"),
    "cut at the second file": (lambda hub: hub.cut("PUT", "/objects/", after=10, times=99, skip=1), "connection .* broke"),
    "cut at the commit": (lambda hub: hub.cut("POST", "/commit/"), "connection .* broke"),
    "cut at the creation": (lambda hub: hub.cut("POST", "/repos/create"), "connection .* broke"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("published", [False, True], ids=["first", "second version"])
def test_a_fault_leaves_the_old_state_and_the_same_command_goes_on(
    hub: Any, make_run: Callable[..., Path], tmp_path: Path, name: str, published: bool
) -> None:
    fault, said = FAULTS[name]
    if published:
        publish(make_run(), open_place("hf://alice"))
    run, before = make_run(seed=1), state(hub)
    fault(hub)
    done = name == "cut at the commit"  # only the answer was lost, which no client can tell from the other case
    with pytest.raises(ZooError, match=said):
        publish(run, open_place("hf://alice"), version="1.1.0")
    if not done:
        assert state(hub) == before
    hub.faults.clear()
    uploaded = len(hub.objects)
    sent = hub.count("PUT", "/objects/")
    assert publish(run, open_place("hf://alice"), version="1.1.0").changed is not done
    assert hub.count("PUT", "/objects/") - sent == len(hub.objects) - uploaded, "what was there was sent again"
    folder = pull(open_place("hf://alice"), "marketing@1.1.0", tmp_path / "out", say=quiet)
    assert (folder / WEIGHTS).read_bytes() == weights_of(run)
    assert set(hub.repos[REPO].tags) == ({"v1.0.0", "v1.1.0"} if published else {"v1.1.0"})


def test_a_passing_fault_is_gone_through(hub: Any, make_run: Callable[..., Path], tmp_path: Path) -> None:
    """huggingface_hub's own retries: a 429 with a pause, and lines cut in mid-upload and mid-download, which goes on where it broke."""
    run = make_run(width=40_000)
    hub.fail("PUT", "/objects/", status=429, headers={"Retry-After": "1"})
    hub.cut("PUT", "/objects/", after=1000, times=2)
    place = open_place("hf://alice")
    assert publish(run, place).changed
    hub.cut("GET", f"/resolve/.*/{WEIGHTS}", after=500_000)
    folder = pull(place, "marketing", tmp_path / "out", say=quiet)
    assert (folder / WEIGHTS).read_bytes() == weights_of(run)
    assert hub.count("GET", f"/resolve/.*/{WEIGHTS}") == 2


def test_a_download_cut_for_good_leaves_no_folder(hub: Any, make_run: Callable[..., Path], tmp_path: Path) -> None:
    run, place = make_run(), open_place("hf://alice")
    publish(run, place)
    item = choose(place, "marketing")
    hub.cut("GET", f"/resolve/.*/{WEIGHTS}", after=100, times=99)
    with pytest.raises(ZooError, match="broke"):
        pull(place, f"marketing@{item.entry.version}", tmp_path / "out", say=quiet)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_commit_whose_answer_is_lost_is_found_done(hub: Any, make_run: Callable[..., Path]) -> None:
    run = make_run()
    hub.lose_answer("POST", "/commit/")
    with pytest.raises(ZooError, match="old or its new state"):
        publish(run, open_place("hf://alice"))
    repo = hub.repos[REPO]
    assert (len(repo.commits), repo.tags) == (2, {})
    assert not publish(run, open_place("hf://alice")).changed
    assert (len(repo.commits), repo.tags) == (2, {"v1.0.0": repo.head.sha})


def test_somebody_elses_commit_in_between_is_not_mixed_with_ours(hub: Any, make_run: Callable[..., Path]) -> None:
    publish(make_run(), open_place("hf://alice"))
    repo, handler = hub.repos[REPO], hub.fault_for

    def meanwhile(method: str, path: str) -> Any:
        if "/preupload/" in path and len(repo.commits) == 2:
            repo.add("by hand", {**repo.head.files, "notes.md": b"mine"})
        return handler(method, path)

    hub.fault_for = meanwhile
    with pytest.raises(ZooError, match="somebody else published"):
        publish(make_run(seed=1), open_place("hf://alice"), version="1.1.0")
    assert repo.head.message == "by hand"


def test_a_hub_that_promises_less_than_it_sends(hub: Any, make_run: Callable[..., Path], tmp_path: Path) -> None:
    publish(make_run(), open_place("hf://alice"))
    repo = hub.repos[REPO]
    swapped = repo.add("swapped", {**repo.head.files, WEIGHTS: b"x" * 100_000})
    repo.tags["v1.0.0"] = swapped.sha
    place = open_place("hf://alice")
    with pytest.raises(ZooError, match="has 100000 bytes, not"):
        pull(place, "marketing", tmp_path / "out", say=quiet)
    assert hub.count("GET", f"/resolve/.*/{WEIGHTS}") == 0
    same_size = bytes(len(weights_of(tmp_path / "run-marketing-0")))
    repo.tags["v1.0.0"] = repo.add("swapped again", {**repo.head.files, WEIGHTS: same_size}).sha
    with pytest.raises(ZooError, match="sha256"):
        pull(open_place("hf://alice"), "marketing", tmp_path / "out", say=quiet)


def test_a_place_that_is_none(hub: Any) -> None:
    with pytest.raises(ZooError, match="hf://OWNER/NAME"):
        HubPlace("a/b/c")
    with pytest.raises(ZooError, match="is for an adapter 'poster'"):
        HubPlace("alice/poster")._repository_for(type("E", (), {"name": "marketing"})())  # type: ignore[arg-type]
    assert HubPlace("").owner == "alice"


PUBLISHER = """
import sys
from pathlib import Path
from loragraft.zoo.entry import ENTRY, entry_from_bytes
from loragraft.zoo.hub_place import HubPlace
folder = Path(sys.argv[1])
HubPlace("alice").publish(entry_from_bytes((folder / ENTRY).read_bytes(), ENTRY), folder)
"""


@pytest.mark.parametrize("where", ["/objects/", "/commit/", "/tag/"])
def test_killed_with_9_at_every_stage(hub: Any, make_run: Callable[..., Path], tmp_path: Path, where: str) -> None:
    """The process dies while the Hub holds its request; what it asked for is done after its death."""
    new, folder = make_run(seed=1), tmp_path / "staged"
    publish(make_run(), open_place("hf://alice"))
    folder.mkdir()
    collect(new, folder, version="1.1.0")
    before = state(hub)
    hub.hold("PUT" if where == "/objects/" else "POST", where)
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    process = subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, str(folder)],
        env={**environment, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert hub.held.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    held = state(hub)
    assert (held == before) is (where != "/tag/"), "before its commit a publication is nobody's"
    hub.released.set()
    publish(new, open_place("hf://alice"), version="1.1.0")
    pulled = pull(open_place("hf://alice"), "marketing@1.1.0", tmp_path / "out", say=quiet)
    assert (pulled / WEIGHTS).read_bytes() == weights_of(new)
    assert set(hub.repos[REPO].tags) == {"v1.0.0", "v1.1.0"}
