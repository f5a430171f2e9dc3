"""The run folder: refuses what is not its run, resumes what is, never holds half a file."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from loragraft.recipes.load import load_recipe
from loragraft.train.run_folder import RunError, RunFolder

BASE = "b" * 64


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.open(tmp_path / "run", load_recipe("marketing"), BASE)


def checkpoint_at(run: RunFolder, step: int) -> None:
    for number in range(1, step + 3):  # two steps beyond the checkpoint, lost on resume
        run.append_metrics({"step": number, "loss": 1 / number})
    run.step = step
    run.save_checkpoint({"parameters": [torch.arange(3.0)], "summary": {"a": 1}})


def test_resumes_after_the_checkpoint_and_drops_later_lines(run: RunFolder) -> None:
    checkpoint_at(run, 5)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # what kill -9 leaves
    again = RunFolder.open(run.path, load_recipe("marketing"), BASE)
    assert again.step == 5
    assert again.checkpoint is not None
    assert torch.equal(again.checkpoint["parameters"][0], torch.arange(3.0))
    steps = [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


def test_a_run_given_up_before_its_first_step_leaves_the_folder_free(run: RunFolder) -> None:
    """A mistake in the data is found after the folder is made: the mended recipe must not meet a refusal."""
    again = RunFolder.open(run.path, load_recipe("marketing", ["train.steps=7"]), BASE)
    assert again.step == 0
    assert yaml.safe_load((run.path / "recipe.yaml").read_text())["train"]["steps"] == 7


def test_killed_before_the_first_checkpoint_starts_the_trace_again(run: RunFolder) -> None:
    run.append_metrics({"step": 1, "loss": 1.0})
    again = RunFolder.open(run.path, load_recipe("marketing"), BASE)
    assert (again.step, again.checkpoint) == (0, None)
    assert (run.path / "metrics.jsonl").read_text() == ""


def test_what_a_killed_process_left_half_written_is_swept(run: RunFolder) -> None:
    (run.path / ".checkpoint.pt.0a1b2c3d.writing").write_bytes(b"half")
    RunFolder.open(run.path, load_recipe("marketing"), BASE)
    assert [path.name for path in run.path.iterdir()] == ["recipe.yaml"]


def test_two_processes_never_train_in_one_folder(tmp_path: Path) -> None:
    recipe = load_recipe("marketing")
    first = RunFolder.open(tmp_path / "run", recipe, BASE, exclusive=True)
    checkpoint_at(first, 1)
    before = (first.path / "metrics.jsonl").read_text()
    for fresh in (False, True):
        with pytest.raises(RunError, match=r"another process is training in .*run: wait .*--out"):
            RunFolder.open(tmp_path / "run", recipe, BASE, exclusive=True, fresh=fresh)
    assert (first.path / "metrics.jsonl").read_text() == before
    del first
    assert RunFolder.open(tmp_path / "run", recipe, BASE, exclusive=True).step == 1


def test_work_without_its_recipe_is_not_touched(run: RunFolder) -> None:
    checkpoint_at(run, 2)
    (run.path / "recipe.yaml").unlink()
    with pytest.raises(RunError, match=r"no recipe\.yaml.*--fresh"):
        RunFolder.open(run.path, load_recipe("marketing"), BASE)


@pytest.mark.parametrize("text", ["extends: _base\n", "a note", "a: [", ""])
def test_a_recipe_that_no_run_wrote_is_not_overwritten(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RunError, match=r"recipe.yaml is not the resolved recipe of a run and would be overwritten"):
        RunFolder.open(tmp_path, load_recipe("marketing"), BASE)
    assert (tmp_path / "recipe.yaml").read_text() == text
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(RunError, match="holds a run of another recipe"):
        RunFolder.open(tmp_path, load_recipe("marketing"), BASE)


def test_an_adapter_whose_run_is_gone_is_not_overwritten(run: RunFolder) -> None:
    run.adapter_folder.mkdir()
    run.adapter_file.write_bytes(b"weeks of work")
    with pytest.raises(RunError, match=r"of a run that is not here, and would be overwritten. .*--fresh"):
        RunFolder.open(run.path, load_recipe("marketing"), BASE)


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file is a file: give a folder"):
        RunFolder.open(tmp_path / "file", load_recipe("marketing"), BASE, fresh=True)


def test_refuses_another_recipe_and_names_the_key(run: RunFolder) -> None:
    checkpoint_at(run, 2)
    with pytest.raises(RunError, match=r"train\.steps \(\d+ there, 7 here\).*--fresh"):
        RunFolder.open(run.path, load_recipe("marketing", ["train.steps=7"]), BASE)


def test_refuses_a_checkpoint_of_another_base(run: RunFolder) -> None:
    checkpoint_at(run, 2)
    with pytest.raises(RunError, match=r"trained on base bbbb.*base here is cccc"):
        RunFolder.open(run.path, load_recipe("marketing"), "c" * 64)


def test_refuses_to_go_on_with_other_data(run: RunFolder) -> None:
    run.check_data("one")
    checkpoint_at(run, 2)
    RunFolder.open(run.path, load_recipe("marketing"), BASE).check_data("one")
    with pytest.raises(RunError, match=r"was trained to step 2 on other data: .*Put back what was there"):
        RunFolder.open(run.path, load_recipe("marketing"), BASE).check_data("other")


def test_refuses_a_truncated_checkpoint(run: RunFolder) -> None:
    checkpoint_at(run, 2)
    file = run.path / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RunError, match=r"checkpoint\.pt cannot be read"):
        RunFolder.open(run.path, load_recipe("marketing"), BASE)


def test_fresh_moves_the_old_run_aside(run: RunFolder) -> None:
    checkpoint_at(run, 2)
    again = RunFolder.open(run.path, load_recipe("marketing", ["train.steps=7"]), BASE, fresh=True)
    assert again.step == 0
    (aside,) = run.path.parent.glob("run.*")
    assert (aside / "checkpoint.pt").exists()


def test_a_finished_run_stays_finished(run: RunFolder) -> None:
    checkpoint_at(run, 4)
    run.summary = {"steps": 4}
    run.finish()
    again = RunFolder.open(run.path, load_recipe("marketing"), BASE)
    assert again.finished
    assert again.step == 4
    assert not (run.path / "checkpoint.pt").exists()


def test_the_resolved_recipe_loads_back(run: RunFolder) -> None:
    """`score` and `generate` read the recipe from the run folder."""
    stored = load_recipe(str(run.path / "recipe.yaml"))
    assert stored.data == load_recipe("marketing").data
    assert yaml.safe_load((run.path / "recipe.yaml").read_text())["base"] == "pocket"
