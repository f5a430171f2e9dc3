"""Mistakes in recipe and data through the command: one sentence with the file and the remedy, and nothing is touched.

What each loader says of its own faults: tests/recipes/test_load.py, tests/data/test_sources.py, tests/data/test_encode.py.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from loragraft.adapters.checkpoint import write_adapter
from loragraft.backbones.spec import Backbone
from loragraft.data.encode import encode_dataset
from loragraft.data.sources import open_source
from loragraft.recipes.load import load_recipe
from loragraft.train.run_folder import RunFolder

if TYPE_CHECKING:
    from conftest import User


def half_done(user: "User", base_id: str) -> None:
    """A run of the user's recipe with a checkpoint after one step."""
    folder = RunFolder.open(user.run, load_recipe(user.root / "mine.yaml"), base_id)
    folder.append_metrics({"step": 1, "loss": 0.5})
    folder.step = 1
    folder.save_checkpoint({"parameters": [torch.ones(2)], "summary": {}})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--recipe", "markting"], "did you mean marketing?"),
        (["--recipe", "mien.yaml"], "did you mean mine.yaml?"),
        (["--recipe", "mine.yaml", "train.stpes=3"], "did you mean train.steps?"),
        (["--recipe", "mine.yaml", "train.steps=many"], "train.steps must be an integer, not 'many' (text)"),
        (["--recipe", "mine.yaml", "base=poket"], "Did you mean 'pocket'?"),
        (["--recipe", "mine.yaml", "train.steps=9"], "train.steps (2 there, 9 here). Give another folder with --out"),
    ],
)
def test_a_mistake_in_the_recipe_touches_nothing(
    user: "User", pocket: Backbone, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    half_done(user, pocket.base_id)
    before = user.tree()
    code, error = user.command("train", "--cpu", *arguments, "--out", "runs/mine")
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("error: ")
    assert sentence in error
    assert user.tree() == before


def empty_folder(user: "User") -> None:
    shutil.rmtree(user.photos)
    user.photos.mkdir()


def no_folder(user: "User") -> None:
    user.photos.rename(user.root / "photo")


def no_caption(user: "User") -> None:
    (user.photos / "3.txt").unlink()


def blank_caption(user: "User") -> None:
    (user.photos / "3.txt").write_text(" \n")


def truncated(user: "User") -> None:
    content = (user.photos / "3.png").read_bytes()
    (user.photos / "3.png").write_bytes(content[: len(content) // 2])


def no_image(user: "User") -> None:
    (user.photos / "3.png").write_text("not an image")


def long_caption(user: "User") -> None:
    (user.photos / "3.txt").write_text(" ".join(f"word{i}" for i in range(20)))


DATA_FAULTS: "dict[Callable[[User], None], tuple[str, ...]]" = {
    empty_folder: ("photos holds no image", ".png"),
    no_folder: ("photos does not exist", "did you mean", "/photo?"),
    no_caption: ("1 do not: 3.png", "write the missing ones"),
    blank_caption: ("no caption: 3.png", "put a .txt beside each image"),
    truncated: ("3.png is not a readable image", "repair it, or take it out"),
    no_image: ("3.png is not a readable image", "repair it, or take it out"),
    long_caption: ("1 of 6 captions", "3.png", "'word15 word16 word17 word18 word19'", "data.long_captions=cut"),
}


@pytest.mark.parametrize("fault", DATA_FAULTS, ids=lambda fault: fault.__name__)
def test_a_mistake_in_the_data_names_the_file_and_touches_nothing(
    user: "User", loaded: Backbone, fault: "Callable[[User], None]"
) -> None:
    half_done(user, loaded.base_id)
    fault(user)
    before = user.tree("runs", "photos")
    code, error = user.train()
    last = error.strip().splitlines()[-1]
    assert code == 2
    assert last.startswith("error: ")
    assert [part for part in DATA_FAULTS[fault] if part not in last] == []
    assert "Traceback" not in error
    assert user.tree("runs", "photos") == before


def test_a_sample_prompt_that_is_too_long_is_refused_before_training(user: "User", loaded: Backbone) -> None:
    code, error = user.train(f"sample.prompts=[{' '.join(['castle'] * 40)}]")
    assert code == 2
    assert "sample prompt 'castle" in error
    assert "would be lost. Shorten it" in error


def test_a_checkpoint_of_another_base_is_refused(user: "User", loaded: Backbone) -> None:
    half_done(user, "c" * 64)
    before = user.tree()
    code, error = user.train()
    assert code == 2
    assert "checkpoint.pt was trained on base cccc" in error
    assert loaded.base_id[:16] in error
    assert "--out, or start over with --fresh" in error
    assert user.tree() == before


def test_after_mending_the_same_command_goes_on(user: "User", caplog: pytest.LogCaptureFixture) -> None:
    """A truncated image stops the run at encoding; mended, with a cut caption accepted, it trains in the same folder."""
    truncated(user)
    assert user.train()[0] == 2
    user.draw(3)
    long_caption(user)
    with caplog.at_level(logging.WARNING):
        code, error = user.train("data.long_captions=cut", "train.steps=1")
    assert code == 0, error
    assert "1 of 6 captions are longer" in caplog.text
    assert "3.png" in caplog.text
    assert (user.run / "summary.json").exists()


def test_a_cache_of_another_base_is_neither_used_nor_harmed(user: "User", caplog: pytest.LogCaptureFixture) -> None:
    assert user.train("--out", "runs/clean")[0] == 0
    (ours,) = (user.root / "cache" / "encoded").iterdir()
    shutil.rmtree(user.root / "cache")

    def text(prompts: list[str]) -> dict[str, Tensor]:
        return {
            "prompt_embeds": torch.ones(len(prompts), 32, 384),
            "pooled_prompt_embeds": torch.ones(len(prompts), 384),
        }

    samples = open_source(load_recipe(user.root / "mine.yaml").data, 128, user.root / "cache")
    encode_dataset(
        samples,
        lambda p: torch.ones(len(p), 16, 16, 16),
        text,
        "another base",
        128,
        user.root / "cache",
        progress=False,
    )
    (theirs,) = (user.root / "cache" / "encoded").iterdir()
    shutil.copytree(theirs, ours)  # someone mixes the two up
    before = user.tree(str(theirs.relative_to(user.root)))
    with caplog.at_level(logging.WARNING):
        assert user.train("--out", "runs/mixed")[0] == 0
    assert "belongs to another encoder or format; its samples will be encoded again" in caplog.text
    assert user.tree(str(theirs.relative_to(user.root))) == before
    losses = [(user.root / "runs" / name / "metrics.jsonl").read_text() for name in ("clean", "mixed")]
    assert losses[0] == losses[1]


def test_an_adapter_of_another_base_is_refused_with_both_ids(user: "User", pocket: Backbone) -> None:
    layer = next(n for n, m in pocket.transformer.named_modules() if n.endswith("attn.to_q"))
    module = pocket.transformer.get_submodule(layer)
    pair = (torch.zeros(2, module.in_features), torch.zeros(module.out_features, 2))
    recipe = {"sample": {"prompts": ["a red disc"], "steps": 1}}
    metadata = {"base": "pocket", "base_id": "5" * 64, "recipe": recipe}
    write_adapter({layer: pair}, user.root / "theirs", metadata)
    before = user.tree()
    code, error = user.command("generate", "--adapter", "theirs", "--guidance", "1")
    assert code == 2
    assert "5" * 64 in error
    assert pocket.base_id in error
    assert "--any-base" in error
    assert user.tree() == before
    assert not Path("images").exists()
    code, error = user.command("generate", "--adapter", "theirs", "--guidance", "1", "--any-base")
    assert code == 0, error
    assert [p.name for p in Path("images").iterdir()] == ["0000.png"]
