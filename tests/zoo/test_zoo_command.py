"""`loragraft publish` and `loragraft zoo` as a user types them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loragraft import cli
from loragraft.zoo.zoo_command import VERBS

Say = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORAGRAFT_ZOO", raising=False)


def said(capsys: Say, *arguments: str, code: int = 0) -> str:
    assert cli.main(list(arguments)) == code, capsys.readouterr()
    captured = capsys.readouterr()
    return captured.err if code == 2 else captured.out


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_every_verb_explains_itself(verb: str, capsys: Say) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["zoo", *([verb] if verb else []), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "hf://OWNER" in text
    assert f"loragraft zoo {verb or 'pull'} " in text.partition("A zoo is a place")[0]


def test_the_walk_through_of_the_help(capsys: Say, make_run: Callable[..., Path]) -> None:
    text = said(capsys, "publish", str(make_run()), "--to", "zoo")
    assert "published: marketing 1.0.0 in zoo" in text
    assert "kid_lite0: base 0.2400, adapter 0.0500 (0.0400 to 0.0600), lower is better" in text
    assert "kid_lite0 0.240 -> 0.050 (N 64)" in said(capsys, "zoo", "ls")
    assert said(capsys, "zoo", "zoo") == said(capsys, "zoo", "ls", "zoo")
    assert "adapters/marketing: every byte as published" in said(capsys, "zoo", "pull", "marketing")
    assert "it is what it says" in said(capsys, "zoo", "verify", "adapters/marketing", "--no-graft")
    assert "it is what it says" in said(capsys, "zoo", "verify", "marketing@1.0.0", "--no-graft")
    (Path("adapters") / "marketing" / "README.md").write_text("another")
    text = said(capsys, "zoo", "verify", "adapters/marketing", "--no-graft", code=1)
    assert "FAILED  files" in text
    assert "do not use it" in text


def test_info_and_json(capsys: Say, make_run: Callable[..., Path]) -> None:
    said(capsys, "publish", str(make_run()), "--to", "zoo")
    text = said(capsys, "zoo", "info", "marketing")
    for expected in (
        "ab" * 32,
        "cd" * 32,
        "ef" * 32,
        "apache-2.0",
        "loragraft-score/1",
        "seed 1",
        "versions        1.0.0",
    ):
        assert expected in text
    row = json.loads(said(capsys, "zoo", "info", "marketing", "--json"))
    assert row["entry"]["scores"][0]["n"] == 64
    index = json.loads(said(capsys, "zoo", "ls", "--json"))
    assert index["adapters"] == [row]


def test_search(capsys: Say, make_run: Callable[..., Path]) -> None:
    for name in ("marketing", "design"):
        said(capsys, "publish", str(make_run(name)), "--to", "zoo")
    assert said(capsys, "zoo", "search", "DESIGN").startswith("design")
    assert "2 adapters in zoo match" in said(
        capsys, "zoo", "search", "promo", "--base", "pocket", "--domain", "marketing"
    )
    assert "0 adapters" in said(capsys, "zoo", "search", "--base", "flux1-dev")
    assert "--base pockt: nothing in zoo is for it. Did you mean 'pocket'?" in said(
        capsys, "zoo", "search", "--base", "pockt"
    )


def test_mistakes_name_the_nearest(capsys: Say, make_run: Callable[..., Path]) -> None:
    said(capsys, "publish", str(make_run()), "--to", "zoo")
    assert "Did you mean 'marketing'" in said(capsys, "zoo", "info", "marketting", code=2)
    assert "Did you mean 'verify'" in said(capsys, "zoo", "verfy", code=2)
    assert "where to?" in said(capsys, "publish", str(make_run()), code=2)


def test_a_dry_run_publishes_nothing(capsys: Say, make_run: Callable[..., Path]) -> None:
    assert "nothing was published" in said(capsys, "publish", str(make_run()), "--to", "zoo", "--dry-run")
    assert not Path("zoo").exists()


def test_a_version_is_three_numbers(capsys: Say, make_run: Callable[..., Path]) -> None:
    for version in ("1", "1.0", "01.0.0", "1.0.0 "):
        refused = said(capsys, "publish", str(make_run()), "--to", "zoo", "--version", version, code=2)
        assert "MAJOR.MINOR.PATCH, such as 1.0.0" in refused


def test_what_it_is_called_there(capsys: Say, make_run: Callable[..., Path]) -> None:
    text = said(capsys, "publish", str(make_run("Лето")), "--to", "zoo", "--name", "summer")
    assert "published: summer 1.0.0 in zoo" in text
    said(capsys, "zoo", "pull", "summer")
    assert "it is what it says" in said(capsys, "zoo", "verify", "adapters/summer", "--no-graft")


def test_the_recipe_says_where_to(capsys: Say, make_run: Callable[..., Path]) -> None:
    run = make_run()
    (run / "recipe.yaml").write_text("extends: marketing\npublish: {to: shelf}\n")
    assert "in shelf" in said(capsys, "publish", str(run))


def test_yank_deprecate_and_take_back(capsys: Say, make_run: Callable[..., Path]) -> None:
    for version in ("1.0.0", "1.1.0"):
        said(capsys, "publish", str(make_run()), "--to", "zoo", "--version", version)
    assert "which version?" in said(capsys, "zoo", "yank", "marketing", "--because", "x", code=2)
    assert "why?" in said(capsys, "zoo", "yank", "marketing@1.1.0", code=2)
    said(capsys, "zoo", "yank", "marketing@1.1.0", "--because", "wrong data")
    assert " 1.0.0 " in said(capsys, "zoo", "ls")
    assert " 1.1.0 " not in said(capsys, "zoo", "ls")
    assert "[yanked]" in said(capsys, "zoo", "ls", "--all")
    assert "YANKED          wrong data" in said(capsys, "zoo", "info", "marketing@1.1.0")
    said(capsys, "zoo", "deprecate", "marketing@1.1.0", "--because", "take design")
    said(capsys, "zoo", "yank", "marketing@1.1.0", "--undo")
    text = said(capsys, "zoo", "info", "marketing")
    assert "DEPRECATED      take design" in text
    assert "YANKED" not in text


def test_mirror_and_index(capsys: Say, make_run: Callable[..., Path]) -> None:
    said(capsys, "publish", str(make_run()), "--to", "zoo")
    assert "1 versions in copy" in said(capsys, "zoo", "mirror", "zoo", "copy")
    Path("copy/index.json").unlink()
    assert "has no index.json" in said(capsys, "zoo", "ls", "copy", code=2)
    said(capsys, "zoo", "index", "copy")
    assert Path("copy/index.json").read_bytes() == Path("zoo/index.json").read_bytes()


def test_all_of_a_zoo_is_verified_and_the_bad_ones_are_named(capsys: Say, make_run: Callable[..., Path]) -> None:
    for name in ("design", "marketing"):
        said(capsys, "publish", str(make_run(name)), "--to", "zoo")
    assert "2 of 2 versions are what they say" in said(capsys, "zoo", "verify", "--all", "--no-graft")
    Path("zoo/design/1.0.0/README.md").write_text("another")
    text = said(capsys, "zoo", "verify", "--all", "--no-graft", code=1)
    assert "1 of 2 versions are what they say: not design@1.0.0" in text
    assert "verify what?" in said(capsys, "zoo", "verify", code=2)
    text = said(capsys, "zoo", "verify", "design", "--no-graft", code=1)
    assert "FAILED  files" in text
    assert "README.md has" in text
    assert "there is no folder adapters/desing" in said(capsys, "zoo", "verify", "adapters/desing", code=2)
    assert "name a zoo with --zoo" in said(capsys, "zoo", "info", "design", "--zoo", "nowhere", code=2)
    text = said(capsys, "zoo", "verify", "marketing", "--no-graft", "--key", "me.pub", code=1)
    assert "FAILED  signature  it is not signed" in text


def test_signed(capsys: Say, make_run: Callable[..., Path]) -> None:
    pytest.importorskip("model_signing", reason='pip install "loragraft[signing]"')
    said(capsys, "zoo", "key", "me.pem")
    assert "in zoo, signed" in said(capsys, "publish", str(make_run()), "--to", "zoo", "--key", "me.pem")
    assert "[signed]" in said(capsys, "zoo", "ls")
    said(capsys, "zoo", "pull", "marketing", "--key", "me.pem.pub")
    assert "ok      signature" in said(capsys, "zoo", "verify", "marketing", "--key", "me.pem.pub", "--no-graft")


def test_nothing_is_written_into_the_sources_of_a_checkout(capsys: Say, make_run: Callable[..., Path]) -> None:
    run = str(make_run())
    said(capsys, "publish", run, "--to", "runs/zoo")
    for folder in (Path("zoo"), Path("adapters")):
        folder.mkdir()
        (folder / "entry.py").write_text("")
    assert "zoo holds Python sources" in said(capsys, "publish", run, "--to", "zoo", code=2)
    assert "such as --to runs/zoo" in said(capsys, "publish", run, "--to", "./zoo", "--dry-run", code=2)
    assert "--out runs/adapters" in said(capsys, "zoo", "pull", "marketing", "--zoo", "runs/zoo", code=2)
    assert "such as runs/zoo" in said(capsys, "zoo", "mirror", "runs/zoo", "zoo", code=2)
    assert [path.name for folder in ("zoo", "adapters") for path in Path(folder).iterdir()] == ["entry.py"] * 2
    pulled = said(capsys, "zoo", "pull", "marketing", "--zoo", "runs/zoo", "--out", "runs/adapters")
    assert "runs/adapters/marketing: every byte as published" in pulled
