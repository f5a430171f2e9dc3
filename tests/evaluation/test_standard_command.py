"""`loragraft measure`, `loragraft prompts --from` and the options of `loragraft score`, as a user types them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from loragraft.cli import main
from loragraft.evaluation.standard_command import images_of, prompts_of, row_fields, same_names


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAGRAFT_CACHE", str(tmp_path / "cache"))


def pictures(folder: Path, shift: int) -> Path:
    """Three images that say what they were asked for."""
    folder.mkdir()
    for number in range(3):
        info = PngInfo()
        info.add_text("loragraft", json.dumps({"prompt": f"thing {number}"}))
        pixels = np.full((16, 16, 3), 100 + shift, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png", pnginfo=info)
    return folder


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def test_a_row_is_measured_written_and_tabled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pictures(tmp_path / "a", 0), pictures(tmp_path / "b", 51)
    rows = []
    for precision in ("w4a8", "w4a4"):
        rows.append(str(tmp_path / "rows" / f"{precision}.json"))
        about = ["model=pocket", f"precision={precision}", "method=lora", "seconds_per_image=0.5"]
        assert (
            main(["measure", str(a), "--metrics", "psnr", "--against", str(b), "--row", *about, "--out", rows[-1]]) == 0
        )
    capsys.readouterr()
    assert main(["measure", "--table", *rows, "--csv", str(tmp_path / "rows.csv")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert "PSNR in dB (mean of images, range 1; N = 3 pairs; higher is better)" in table[0]
    assert table[2].startswith("| pocket | w4a8 | lora | 13.98 [13.98, 13.98] | 0.50 | not measured | not stated |")
    assert (tmp_path / "rows.csv").read_text().count("\n") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give a folder of images to measure, or --table"),
        (["IMAGES"], "nothing to measure: give --metrics"),
        (["IMAGES", "--weights", "w"], "serve --metrics, which is not given"),
        (["IMAGES", "--metrics", "fid"], "no weights for fid-clean"),
        (["IMAGES", "--metrics", "fid", "--weights", "nowhere"], r"inception-2015-12-05.pt is missing"),
        (["IMAGES", "--metrics", "psnr"], "psnr: give --against DIR"),
        (
            ["IMAGES", "--metrics", "psnr", "--against", "IMAGES", "--references", "r"],
            "--references r: none of the chosen",
        ),
        (["IMAGES", "--metrics", "psnr", "--against", "IMAGES", "--prompts", "p"], "--prompts p: none of the chosen"),
        (["IMAGES", "--metrics", "psnr", "--against", "IMAGES", "--csv", "t.csv"], "--csv goes with --table"),
        (["--table", "a.json", "--metrics", "psnr"], "it takes --csv alone"),
        (["IMAGES", "--metrics", "ssimm"], "no metric 'ssimm'; did you mean ssim?"),
        (["IMAGES", "--metrics", "psnr", "--row", "vram=3"], "KEY one of model, precision"),
        (["IMAGES", "--metrics", "psnr", "--row", "peak_gib=much"], "peak_gib is a number"),
    ],
)
def test_mistakes_are_sentences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    folder = str(pictures(tmp_path / "a", 0))
    assert main(["measure", *(folder if option == "IMAGES" else option for option in options)]) == 2
    assert message in said(capsys)


def test_a_score_says_what_weights_are_missing_before_it_opens_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", str(tmp_path / "no-run"), "--metrics", "clip", "--weights", str(tmp_path)]) == 2
    error = said(capsys)
    assert "clip-vit-large-patch14/model.safetensors is missing" in error
    assert "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb" in error


def test_prompts_come_from_the_images_or_from_a_table_by_name(tmp_path: Path) -> None:
    images = images_of(pictures(tmp_path / "a", 0))
    assert prompts_of(images, None) == ["thing 0", "thing 1", "thing 2"]
    table = tmp_path / "prompts.jsonl"
    lines = [{"name": f"{i:04d}", "prompt": f"other {i}"} for i in (2, 1, 0)]
    table.write_text("\n".join(map(json.dumps, lines)))
    assert prompts_of(images, table) == ["other 0", "other 1", "other 2"]
    table.write_text(json.dumps(lines[0]))
    with pytest.raises(ValueError, match="no prompt for 2 images: 0000, 0001"):
        prompts_of(images, table)
    table.write_text('{"long": "x"}')
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1 must be an object"):
        prompts_of(images, table)
    Image.new("RGB", (8, 8)).save(images[0])
    with pytest.raises(ValueError, match=r"0000\.png does not say what it was asked for"):
        prompts_of(images, None)


def test_pairs_go_by_name(tmp_path: Path) -> None:
    one, other = images_of(pictures(tmp_path / "a", 0)), images_of(pictures(tmp_path / "b", 0))
    a, b = same_names(one, other[::-1])
    assert [path.stem for path in a] == [path.stem for path in b]
    with pytest.raises(ValueError, match="1 images are in one of the two folders only: 0002"):
        same_names(one, other[:2])
    with pytest.raises(ValueError, match="have one name"):
        same_names([*one, other[0]], other)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        images_of(tmp_path / "empty")


def test_what_a_row_does_not_say_is_stated_as_such() -> None:
    fields = row_fields(["model=pocket", "peak_gib=1.5"])
    assert (fields["model"], fields["precision"], fields["peak_gib"], fields["seconds_per_image"]) == (
        "pocket",
        "not stated",
        1.5,
        None,
    )


def test_a_published_set_is_listed_with_svdquants_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = {name: {"category": "logo", "prompt": f"a {name}"} for name in ("ab", "cd", "ef")}
    (tmp_path / "meta_data.json").write_text(json.dumps(table))
    assert main(["prompts", "mjhq", "--from", str(tmp_path), "--count", "3"]) == 0
    out, error = capsys.readouterr()
    first = json.loads(out.splitlines()[0])
    assert (first["name"], first["prompt"], first["seed"], first["image"]) == ("ab", "a ab", 3105, None)
    assert "3 of 3 prompts of MJHQ-30K (Playground v2.5 Community License)" in error
    assert main(["prompts", "mjhq", "--from", str(tmp_path)]) == 2
    assert "5000 prompts were asked for, and the set has 3" in said(capsys)
    assert main(["prompts", "marketing", "--training-folder", str(tmp_path / "x")]) == 2
    assert "--from" in said(capsys)


def test_the_sheet_of_a_comparison_is_no_image_to_measure(tmp_path: Path) -> None:
    drawn = pictures(tmp_path / "drawn", 0)
    Image.new("RGB", (64, 64)).save(drawn / "before_after.png")
    assert [path.name for path in images_of(drawn)] == ["0000.png", "0001.png", "0002.png"]
