"""The command teaches through --help and answers mistakes in one sentence."""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from loragraft import cli
from loragraft.data.sample import Sample
from loragraft.recipes.load import load_recipe
from loragraft.train.lora import _parse as train_options
from loragraft.verbs import VERBS, build_parser
from loragraft.zoo.zoo_command import build_parser as zoo_parser


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [verb for verb in VERBS if not re.search(rf"\n +{verb}\b", text)] == []
    assert "accelerate launch train/lora.py --recipe marketing" in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) >= 4


def test_every_verb_does_something() -> None:
    assert {*cli.RUN, *cli.OWN_PARSER} == set(VERBS)
    assert not {*cli.RUN} & {*cli.OWN_PARSER}


@pytest.mark.parametrize("parser", [build_parser(), zoo_parser()], ids=["loragraft", "zoo"])
def test_every_option_says_what_it_is(parser: argparse.ArgumentParser) -> None:
    waiting, silent = [parser], []
    while waiting:
        shown = waiting.pop()
        for action in shown._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()
            elif not action.help:
                silent.append(f"{shown.prog} {action.metavar or action.dest}")
    assert silent == []


def test_nothing_given_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "loragraft VERB --help" in capsys.readouterr().out


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipe"]) == 0
    listed = capsys.readouterr().out
    assert "marketing" in listed.split()
    assert {"pocket", "flux1-dev", "sd15", "sdxl-turbo"} <= set(
        listed.rpartition("# bases (base=NAME): ")[2].strip().split(", ")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "."], "no run folder"),
        (["score", ".", "--full", "--control", "nowhere"], "no run folder"),
        (["publish", ".", "--to", "zoo"], "no finished adapter"),
        (["zoo", "ls", "nowhere"], "is no folder"),
        (["zoo", "pul"], "Did you mean 'pull'"),
        (["generate", "--adapter", "runs/mine@strong"], "what follows @ is the adapter's weight"),
        (["generat"], "no such verb. Did you mean 'generate'?"),
        (["fly"], "no such verb. There are: recipe, prompts, train"),
        (["recipe", "marketing", "base=flux-dev"], "Did you mean 'flux1-dev'"),
        (["generate", "--adapter", "runs/none"], "there is no runs/none: give a run folder"),
        (["generate", "--base", "pocet", "--prompt", "x"], "Did you mean 'pocket'"),
        (["generate", "--prompt", "x", "--steps", "0"], "--steps 0: it is at least 1"),
        (["generate", "--prompt", "x", "--per-prompt", "0"], "--per-prompt 0: it is at least 1"),
        (["generate", "--prompt", "x", "--resolution", "100"], "multiples of 16, such as 96"),
        (["generate", "--prompt", "x", "--out", "file"], "--out file is a file: name a folder"),
        (["prompts", "mjhq"], "say where it lies with --from"),
        (["prompts", "mjhq", "data.seed=1", "--from", "."], "data.seed=1: overrides change a recipe"),
        (["prompts", "marketing", "--count", "1", "data.sed=1"], "data.sed"),
        (["prompts", "marketing", "--count", "1", "word"], "'word' is not of the form key=value"),
        (["quantize", "pocet", "--out", "int4"], "There is no file or folder pocet either"),
        (["quantize", "./FLUX/transformer", "--out", "int4"], "there is no file or folder ./FLUX/transformer"),
        (
            ["recipe", "marketing", "base=/models/svdq.safetensors"],
            "base=flux1-dev weights.path=/models/svdq.safetensors",
        ),
        (["measure", "nowhere", "--metrics", "psnr", "--against", "."], "there is no folder nowhere"),
        (["measure", ".", "--metrics", "fid"], "put the published files into a folder"),
        (["generate"], 'give --prompt "..."'),
        (["quantize", "pocket", "--out", "."], "exists already"),
        (["convert", "nowhere.safetensors", "."], "exists; name another place"),
        (["convert", "nowhere.safetensors", "int4"], "no file or folder nowhere.safetensors"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.startswith("error: ")
    assert "\n" not in error


@pytest.mark.parametrize("words", [["data.seed=3", "--count", "1"], ["--count", "1", "data.seed=3"]])
def test_overrides_stand_on_either_side_of_options(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prompts", "marketing", *words]) == 0
    assert "5e7052875800" in capsys.readouterr().err, "the prompt of seed 3"


def test_a_mistyped_option_is_no_other_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", "--prompt", "x", "--weight", "0.5"])  # --weights is where a base lies
    assert "unrecognized arguments: --weight 0.5; did you mean --weights?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--recipe", "marketing", "--outt", "x"], "--outt x; did you mean --out?"),
        (["preflight", "marketing", "--car", "x"], "--car x; did you mean --card?"),
        (["zoo", "ls", "--zo"], "--zo; did you mean --zoo?"),
        (["adapter", "inspect", "x", "--ran=3"], "--ran=3; did you mean --rank?"),
    ],
)
def test_every_verb_names_the_nearest_option(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert f"unrecognized arguments: {said}" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["prompts", "marketing", "--count", "1", "--cuont"], ["demo", "word"]])
def test_what_no_verb_knows_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert f"unrecognized arguments: {arguments[-1]}" in capsys.readouterr().err


def test_training_takes_overrides_on_either_side_of_options() -> None:
    args = train_options(["train.steps=1", "--recipe", "marketing", "train.seed=2", "--out", "x", "adapter.rank=4"])
    assert args.overrides == ["train.steps=1", "train.seed=2", "adapter.rank=4"]


def test_score_draws_or_measures_but_not_neither(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["score", "run", "--render-only", "--measure-only"])
    assert stop.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


def test_preflight_counts_what_a_run_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORAGRAFT_CACHE", str(tmp_path))
    assert cli.main(["preflight", "marketing", "data.count=12"]) == 0
    text = capsys.readouterr().out
    assert "at the peak of a training step" in text
    assert "rank 16 (1,044,480 parameters), adamw" in text
    assert "data: 12 images of the domain 'marketing'" in text


def test_demo_without_gradio_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == (
        'error: the browser page needs gradio, which is not installed: pip install "loragraft[demo]"\n'
    )


def test_demo_on_a_misspelt_base_ends_before_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    assert cli.main(["demo", "--base", "poket"]) == 2
    assert "Did you mean 'pocket'" in capsys.readouterr().err


def test_the_options_of_all_verbs_need_no_package_of_the_zoo() -> None:
    """Where jsonschema is missing, preflight beside a run is not what fails."""
    code = "import sys; sys.modules['jsonschema'] = None; from loragraft import cli; cli.build_parser()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options_and_overrides_of_training_come_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--recipe", "marketing", "train.steps=3", "--cpu", "train.stpes=4"]) == 2
    assert "did you mean train.steps?" in capsys.readouterr().err


def test_a_run_among_the_images_that_it_trains_on_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["train", "--recipe", "marketing", "data.domain=null", "data.folder=."]
    for out in ([], ["--out", "."], ["--out", "images/run"]):
        assert cli.main([*given, *out]) == 2
        assert "lies in data.folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_tracking_online_without_a_login_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr("loragraft.train.lora.load_backbone", lambda *_: pytest.fail("loaded"))
    assert cli.main(["train", "--recipe", "marketing", "--cpu", "tracking.mode=online"]) == 2
    assert "no login is stored here; `wandb login` stores one" in capsys.readouterr().err


def test_a_value_that_the_shell_cut_at_a_space_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipe", "marketing", "data.caption=a", "photo"]) == 2
    assert (
        "'photo' is not of the form key=value, such as train.steps=500; a value with spaces" in capsys.readouterr().err
    )


def test_no_images_are_not_the_default_number_of_a_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe("marketing", ["data.count=300"])
    samples = [Sample(tmp_path / f"{i}.png", f"thing {i}", "test", f"thing {i}", "CC0-1.0") for i in range(8)]
    monkeypatch.setattr("loragraft.adapters.opening.open_run", lambda run: (None, recipe))
    monkeypatch.setattr(
        "loragraft.backbones.load.load_backbone", lambda *_: SimpleNamespace(spec=SimpleNamespace(resolution=128))
    )
    monkeypatch.setattr("loragraft.data.sources.open_source", lambda *_: samples)
    assert cli.main(["score", str(tmp_path), "--images", "0"]) == 2
    assert "a score needs at least 4 images per set, not 0; see --images" in capsys.readouterr().err
