"""A zoo of files, on this disk and in fsspec's memory: the old state or the new one after a stop at every single write."""

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from loragraft.zoo import file_place
from loragraft.zoo.entry import ENTRY, Listed, NotAsPublishedError, Status, ZooError
from loragraft.zoo.file_place import FilePlace, open_files
from loragraft.zoo.places import choose, open_place
from loragraft.zoo.publish import publish
from loragraft.zoo.pull import mirror, pull


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FilePlace]:
    if request.param == "folder":
        yield open_files(str(tmp_path / "zoo"))
        return
    name = uuid.uuid4().hex
    yield open_files(f"memory://{name}/zoo")
    fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


def quiet(_: str) -> None:
    """Nothing is said."""


def test_published_listed_pulled(place: FilePlace, make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    assert publish(run, place).changed
    (item,) = place.listed()
    assert (item.entry.name, item.entry.version, item.signed) == ("marketing", "1.0.0", False)
    folder = pull(place, "marketing", tmp_path / "out", say=quiet)
    weights = "pytorch_lora_weights.safetensors"
    assert (folder / weights).read_bytes() == (run / "adapter" / weights).read_bytes()
    assert pull(place, "marketing", tmp_path / "out", say=quiet) == folder  # again: checked, not fetched
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["marketing"]


def test_the_same_again_changes_nothing(place: FilePlace, make_run: Callable[..., Path]) -> None:
    run = make_run()
    publish(run, place)
    before = place._read(f"{place.root}/index.json", "index.json")
    assert not publish(run, place).changed
    assert place._read(f"{place.root}/index.json", "index.json") == before


def test_a_version_never_changes_and_a_higher_one_is_chosen(place: FilePlace, make_run: Callable[..., Path]) -> None:
    publish(make_run(), place, version="1.9.0")
    with pytest.raises(ZooError, match=r"--version 1\.9\.1"):
        publish(make_run(seed=1), place, version="1.9.0")
    publish(make_run(seed=1), place, version="1.9.1")
    with pytest.raises(ZooError, match=r"--version 1\.9\.2"):  # one that is free
        publish(make_run(seed=2), place, version="1.9.0")
    publish(make_run(seed=1), place, version="1.10.0")
    assert choose(place, "marketing").entry.version == "1.10.0"
    assert choose(place, "marketing@1.9.0").entry.version == "1.9.0"
    with pytest.raises(ZooError, match=r"but 1\.9\.0, 1\.9\.1, 1\.10\.0"):
        choose(place, "marketing@2.0.0")


class Killed(BaseException):
    """What nothing catches."""


def writes(place: FilePlace, work: Callable[[FilePlace], object], stop_before: int | None) -> int:
    """Does `work` on a copy of `place` that dies before write number `stop_before`; returns how many there were."""
    count = 0

    def counted(do: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            nonlocal count
            if count == stop_before:
                raise Killed
            count += 1
            do(*arguments)

        return run

    try:
        work(FilePlace(place.url, place.fs, place.root, counted(place.put), counted(place.write)))
    except Killed:
        assert stop_before is not None
    return count


def test_a_publisher_killed_before_any_write_leaves_the_old_or_the_new_state(
    place: FilePlace, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    old, new = make_run(), make_run(seed=1)
    publish(old, place)

    def work(to: FilePlace) -> object:
        return publish(new, to, version="1.0.1")

    states = set()
    for stop in range(7):  # five files, the entry, the index
        assert writes(place, work, stop) == stop
        seen = [item.entry.version for item in place.listed()]
        states.add(tuple(seen))
        for version in seen:
            shutil.rmtree(pull(place, f"marketing@{version}", tmp_path / "out", say=quiet))
    assert states == {("1.0.0",)}
    assert writes(place, work, None) == 1  # all but the index was there
    assert [item.entry.version for item in place.listed()] == ["1.0.0", "1.0.1"]
    pull(place, "marketing@1.0.1", tmp_path / "out", say=quiet)


def test_two_publishers_at_once_are_both_in_the_index(place: FilePlace, make_run: Callable[..., Path]) -> None:
    """The other one finishes between our look at the folder and our writing of the index."""
    other, done = make_run("design"), []

    def write(content: bytes, path: str) -> None:
        if path.endswith("index.json") and not done:
            done.append(publish(other, place))
        place.write(content, path)

    publish(make_run(), FilePlace(place.url, place.fs, place.root, place.put, write))
    assert place.names() == ["design", "marketing"]


def test_yanked_and_deprecated(place: FilePlace, make_run: Callable[..., Path], tmp_path: Path) -> None:
    publish(make_run(), place)
    publish(make_run(seed=1), place, version="1.0.1")
    place.set_status("marketing", "1.0.1", Status(yanked="trained on the wrong data"))
    assert choose(place, "marketing").entry.version == "1.0.0"
    said: list[str] = []
    pull(place, "marketing@1.0.1", tmp_path / "out", say=said.append)
    assert said == ["note: marketing 1.0.1 is yanked: trained on the wrong data"]
    place.set_status("marketing", "1.0.0", Status(yanked="too", deprecated="take poster"))
    with pytest.raises(ZooError, match="every version of 'marketing' was yanked"):
        choose(place, "marketing")
    place.set_status("marketing", "1.0.0", Status())
    assert choose(place, "marketing").status == Status()


def test_a_mirror_is_the_same_zoo_and_is_brought_up_to_date(
    place: FilePlace, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run()
    publish(run, place)
    said: list[str] = []
    copy = mirror(place, tmp_path / "copy", say=said.append)
    publish(make_run("design"), place)
    place.set_status("marketing", "1.0.0", Status(deprecated="take design"))
    mirror(place, tmp_path / "copy", say=said.append)
    assert said == ["fetched marketing 1.0.0", "fetched design 1.0.0"]
    assert copy.listed() == place.listed()
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {"design", "index.json", "marketing"}
    assert not publish(run, open_place(str(tmp_path / "copy"))).changed  # a mirror is a zoo


def tamper(place: FilePlace, name: str, content: bytes) -> None:
    place.write(content, f"{place.root}/marketing/1.0.0/{name}")


@pytest.mark.parametrize("grow", [-1, 0, 1])
def test_a_file_that_is_not_as_published_is_never_left_behind(
    place: FilePlace, make_run: Callable[..., Path], tmp_path: Path, grow: int
) -> None:
    publish(make_run(), place)
    (item,) = place.listed()
    size = item.entry.files["score.json"].size
    tamper(place, "score.json", b"x" * (size + grow))
    with pytest.raises(ZooError, match="sha256" if grow == 0 else "bytes, not"):
        pull(place, "marketing", tmp_path / "out", say=quiet)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("grow", [None, -1, 0])
def test_publishing_again_mends_what_was_lost_or_damaged(
    place: FilePlace, make_run: Callable[..., Path], tmp_path: Path, grow: int | None
) -> None:
    """As the message of whoever misses it says."""
    run = make_run()
    publish(run, place)
    file = f"{place.root}/marketing/1.0.0/score.json"
    whole = place.fs.cat_file(file)
    if grow is None:
        place.fs.rm(file)
    else:
        tamper(place, "score.json", b"x" * (len(whole) + grow))
    with pytest.raises(NotAsPublishedError) as caught:
        pull(place, "marketing", tmp_path / "out", say=quiet)
    assert ".writing" not in str(caught.value)  # a scratch copy is nothing that anybody could look at
    assert publish(run, place).changed
    assert place.fs.cat_file(file) == whole
    assert not publish(run, place).changed


def test_no_more_reaches_the_disk_than_was_promised(
    place: FilePlace, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    publish(make_run(), place)
    (item,) = place.listed()
    tamper(place, "README.md", bytes(3 << 20))  # the first to be fetched
    with pytest.raises(ZooError, match="more than"):
        place.fetch(item, tmp_path / "fetched")
    assert (tmp_path / "fetched" / "README.md").stat().st_size == item.entry.files["README.md"].size + 1


def test_an_entry_swapped_behind_the_index_is_refused(
    place: FilePlace, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    publish(make_run(), place)
    entry = json.loads(place._read(f"{place.root}/marketing/1.0.0/{ENTRY}", ENTRY))
    tamper(place, ENTRY, json.dumps(entry | {"rank": 5}).encode())
    with pytest.raises(ZooError, match="not the entry that the index names"):
        pull(place, "marketing", tmp_path / "out", say=quiet)


def test_a_file_that_vanished_is_named(place: FilePlace, make_run: Callable[..., Path], tmp_path: Path) -> None:
    publish(make_run(), place)
    place.fs.rm(f"{place.root}/marketing/1.0.0/score.json")
    with pytest.raises(ZooError, match=r"score\.json is not there"):
        pull(place, "marketing", tmp_path / "out", say=quiet)


def test_pull_never_overwrites(place: FilePlace, make_run: Callable[..., Path], tmp_path: Path) -> None:
    publish(make_run(), place)
    (tmp_path / "out" / "marketing").mkdir(parents=True)
    (tmp_path / "out" / "marketing" / "mine.txt").write_text("mine")
    with pytest.raises(ZooError, match="holds something that is no pulled adapter"):
        pull(place, "marketing", tmp_path / "out", say=quiet)
    assert (tmp_path / "out" / "marketing" / "mine.txt").read_text() == "mine"


def test_pull_does_not_replace_another_version(place: FilePlace, make_run: Callable[..., Path], tmp_path: Path) -> None:
    publish(make_run(), place)
    folder = pull(place, "marketing", tmp_path / "out", say=quiet)
    before = (folder / ENTRY).read_bytes()
    publish(make_run(seed=1), place, version="1.0.1")
    with pytest.raises(ZooError, match=r"holds marketing 1\.0\.0, not 1\.0\.1"):
        pull(place, "marketing", tmp_path / "out", say=quiet)
    assert (folder / ENTRY).read_bytes() == before


def test_a_folder_moved_to_another_name_is_refused(place: FilePlace, make_run: Callable[..., Path]) -> None:
    publish(make_run(), place)
    place.fs.mv(f"{place.root}/marketing", f"{place.root}/poster", recursive=True)
    with pytest.raises(ZooError, match=r"says that it is marketing 1\.0\.0"):
        place.write_index()


def test_a_place_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZooError, match="is no folder"):
        open_place(str(tmp_path / "nowhere")).listed()
    with pytest.raises(ZooError, match=r"has no index\.json"):
        open_place(str(tmp_path)).listed()
    with pytest.raises(ZooError, match="is no folder"):
        mirror(open_place(str(tmp_path / "nowhere")), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    with pytest.raises(ZooError, match="cannot be opened"):
        open_place("gopher://zoo")
    monkeypatch.setenv("LORAGRAFT_ZOO", str(tmp_path / "mine"))
    assert open_place().url == str(tmp_path / "mine")
    monkeypatch.delenv("LORAGRAFT_ZOO")
    assert open_place().url == "zoo"


def test_a_url_that_does_not_answer_is_not_called_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's HTTP says FileNotFoundError of a host that is down, and of a file that is not there."""
    place = open_files(f"memory://{uuid.uuid4().hex}/zoo")

    def unreachable(*_: object) -> None:
        raise FileNotFoundError("https://host/zoo/index.json") from ConnectionRefusedError("connect call failed")

    monkeypatch.setattr(place.fs, "open", unreachable)
    with pytest.raises(ZooError, match=r"cannot be read \(connect call failed\)"):
        place.listed()

    class AnswerError(Exception):
        status = 404

    def absent(*_: object) -> None:
        raise FileNotFoundError("https://host/zoo/index.json") from AnswerError("File not found")

    monkeypatch.setattr(place.fs, "open", absent)
    with pytest.raises(ZooError, match="is no folder"):
        place.listed()


def test_a_web_server_can_only_be_read(make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Web(MemoryFileSystem):  # type: ignore[misc]  # fsspec is untyped
        protocol = ("http", "https")
        store: ClassVar[dict[str, Any]] = {}

    monkeypatch.setattr("fsspec.core.url_to_fs", lambda _: (Web(skip_instance_cache=True), "/host/zoo"))
    with pytest.raises(ZooError, match="can only be read: publish to a folder"):
        publish(make_run(), open_files("https://host/zoo"))
    assert Web.store == {}


def test_unknown_names_meet_the_nearest(place: FilePlace, make_run: Callable[..., Path]) -> None:
    publish(make_run(), place)
    with pytest.raises(ZooError, match="Did you mean 'marketing'"):
        choose(place, "marketting")
    with pytest.raises(ZooError, match="It has: marketing"):
        choose(place, "zzz")
    assert file_place.ATTEMPTS > 1
    assert all(isinstance(item, Listed) for item in place.listed())
