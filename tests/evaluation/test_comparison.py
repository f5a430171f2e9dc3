"""Rows side by side, and the comparisons that are refused."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loragraft.evaluation.comparison import Row, as_csv, columns, markdown, read_rows
from loragraft.evaluation.standard import Result

FID = Result("fid-clean", 5000, 5000, 16.61, None, None, (), {"inception-2015-12-05.pt": "a" * 64})
LPIPS = Result("lpips-alex", 5000, 0, 0.2541, 0.25, 0.26, ("a note",), {})
ROW = Row(
    model="flux1-dev",
    precision="w4a4",
    method="SVDQuant",
    device="H100",
    seconds_per_image=5.25,
    peak_gib=9.8,
    results=(FID, LPIPS),
)
PLAIN = replace(ROW, precision="bf16", method="none", seconds_per_image=None, results=(replace(FID, value=20.3),))


def test_the_table_names_metric_variant_and_n() -> None:
    head, rule, *rows, blank, note = markdown([PLAIN, ROW]).splitlines()
    assert head == (
        "| model | precision | method | FID (clean resizing, Inception-v3 2015-12-05; N = 5000 against 5000; lower is better) "
        "| LPIPS (v0.1, AlexNet; N = 5000 pairs; lower is better) | s per image | peak VRAM in GiB | device |"
    )
    assert rule.count("---") == head.count(" | ") + 1
    assert rows[0] == "| flux1-dev | bf16 | none | 20.30 | not measured | not measured | 9.80 | H100 |"
    assert rows[1] == "| flux1-dev | w4a4 | SVDQuant | 16.61 | 0.254 [0.250, 0.260] | 5.25 | 9.80 | H100 |"
    assert (blank, note) == ("", "Note: LPIPS: a note.")


@pytest.mark.parametrize("change", [{"n": 1024}, {"references": 1024}])
def test_mixed_n_is_refused(change: dict[str, int]) -> None:
    other = replace(PLAIN, results=(replace(FID, **change),))
    with pytest.raises(ValueError, match=r"(?s)1024.*5000.*different N do not compare"):
        markdown([ROW, other])
    with pytest.raises(ValueError, match="do not compare"):
        as_csv([ROW, other])


def test_other_weights_are_refused_and_other_variants_are_other_columns() -> None:
    with pytest.raises(ValueError, match="different weights"):
        columns([ROW, replace(PLAIN, results=(replace(FID, weights={"inception-2015-12-05.pt": "b" * 64}),))])
    legacy = replace(PLAIN, results=(replace(FID, metric="fid-legacy-pytorch"),))
    assert list(columns([ROW, legacy])) == ["fid-clean", "fid-legacy-pytorch", "lpips-alex"]


def test_rows_survive_files_alone_and_in_lists(tmp_path: Path) -> None:
    one, many = tmp_path / "one.json", tmp_path / "many.json"
    one.write_text(json.dumps(ROW.to_dict()))
    many.write_text(json.dumps([PLAIN.to_dict(), ROW.to_dict()]))
    assert read_rows([one, many]) == [ROW, PLAIN, ROW]


def renamed(entry: dict[str, Any]) -> None:
    entry["results"][0]["header"] = "FID (N = 30000)"


def unknown(entry: dict[str, Any]) -> None:
    entry["results"][0]["metric"] = "fid"


def another_key(entry: dict[str, Any]) -> None:
    entry["vram"] = 3


def another_field(entry: dict[str, Any]) -> None:
    entry["results"][0]["stddev"] = 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (renamed, r"says 'FID \(N = 30000\)', which is another metric"),
        (unknown, "no metric 'fid'; there are fid-clean"),
        (another_key, "a row has the keys .*found .*'vram'"),
        (another_field, "fid-clean: .*stddev"),
    ],
)
def test_rows_under_a_wrong_name_are_refused(tmp_path: Path, spoil: Any, message: str) -> None:
    entry = ROW.to_dict()
    spoil(entry)
    path = tmp_path / "row.json"
    path.write_text(json.dumps(entry))
    with pytest.raises(ValueError, match=message):
        read_rows([path])
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_rows([path])


def test_csv_has_a_line_per_row_and_metric() -> None:
    lines = list(csv.DictReader(io.StringIO(as_csv([PLAIN, ROW]))))
    assert [(line["precision"], line["metric"]) for line in lines] == [
        ("bf16", "fid-clean"),
        ("w4a4", "fid-clean"),
        ("w4a4", "lpips-alex"),
    ]
    assert lines[2]["header"] == LPIPS.header and float(lines[2]["value"]) == 0.2541
