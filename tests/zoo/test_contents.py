"""What is published of a run: weights, card, pictures, score; twice the same bytes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from loragraft.adapters.checkpoint import load_adapter, write_adapter
from loragraft.adapters.formats.contract import START_HASH, START_NAME, start_hash
from loragraft.evaluation.image_sets import adapter_hash
from loragraft.zoo.contents import collect
from loragraft.zoo.entry import ENTRY, ZooError
from loragraft.zoo.licences import licence_for


def staged(tmp_path: Path, name: str = "staged") -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name


def header(folder: Path) -> dict[str, object]:
    _, text, _ = (folder / "README.md").read_text().split("---\n", 2)
    found: dict[str, object] = yaml.safe_load(text)
    return found


def test_twice_the_same_run_is_twice_the_same_bytes(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run, one, two = make_run(), staged(tmp_path, "one"), staged(tmp_path, "two")
    assert collect(run, one) == collect(run, two)
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert [(one / name).read_bytes() for name in files] == [(two / name).read_bytes() for name in files]
    assert {str(name) for name in files} == {
        "README.md",
        "images/0000.png",
        "images/samples.png",
        ENTRY,
        "pytorch_lora_weights.safetensors",
        "score.json",
    }


def test_the_card_says_what_the_hub_reads(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = staged(tmp_path)
    entry = collect(make_run(), folder)
    card = header(folder)
    assert card["base_model_relation"] == "adapter"
    assert card["license"] == "apache-2.0"
    assert {"template:sd-lora", "lora", "loragraft", "marketing"} <= set(card["tags"])  # type: ignore[call-overload]
    assert card["widget"] == [{"text": "promo tile: rocket", "output": {"url": "images/0000.png"}}]
    assert card["instance_prompt"] == "promo tile"
    assert card["loragraft"]["base_id"] == entry.base.id  # type: ignore[index]
    result = card["model-index"][0]["results"][0]  # type: ignore[index]
    assert [metric["type"] for metric in result["metrics"]] == ["kid_lite0", "fd_lite0"]
    assert result["metrics"][0]["args"]["n"] == 64
    assert "![samples](images/samples.png)" in (folder / "README.md").read_text()
    assert str(tmp_path) not in (folder / "README.md").read_text()
    assert "--adapter . --prompt" in (folder / "README.md").read_text()
    assert "--out ../" in (folder / "README.md").read_text()  # images/ is published: drawing there would change it


def test_a_compensating_adapter_travels_with_its_start(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """The card says how to make it portable; without its start, or with another's, it is not published."""
    run, folder = make_run(score=False), staged(tmp_path)
    adapter = load_adapter(run / "adapter")
    start = run / "adapter" / START_NAME
    write_adapter(adapter.pairs, start.parent, {**adapter.metadata, "name": "start"}, file_name=START_NAME)
    about = {**adapter.metadata, "contract": "compensating", START_HASH: start_hash(start)}
    write_adapter(adapter.pairs, run / "adapter", about)
    entry = collect(run, folder)
    assert entry.contract == "compensating"
    assert entry.files[START_NAME].sha256 == about[START_HASH]
    assert "export . --portable" in (folder / "README.md").read_text()
    write_adapter(adapter.pairs, run / "adapter", {**about, START_HASH: "0" * 64})
    with pytest.raises(ValueError, match="is not the start that the adapter was trained from"):
        collect(run, staged(tmp_path, "foreign"))
    start.unlink()
    with pytest.raises(ZooError, match="is gone: without it nobody could make"):
        collect(run, staged(tmp_path, "gone"))


def test_scores_carry_protocol_n_seed_and_hardware(make_run: Callable[..., Path], tmp_path: Path) -> None:
    kid, fd = collect(make_run(), staged(tmp_path)).scores
    assert (kid.metric, kid.value, kid.low, kid.base, kid.better) == ("kid_lite0", 0.05, 0.04, 0.24, "lower")
    assert (kid.protocol, kid.n, kid.references, kid.seed) == ("loragraft-score/1", 64, 32, 1)
    assert "cpu, x86_64" in kid.hardware
    assert (fd.metric, fd.low) == ("fd_lite0", None)


def test_an_unscored_run_without_pictures_is_published_too(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(score=False)
    for picture in (run / "images").iterdir():
        picture.unlink()
    entry = collect(run, staged(tmp_path))
    assert entry.scores == ()
    assert "model-index" not in header(tmp_path / "staged")


def test_the_folder_of_the_weights_names_the_run(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    with pytest.raises(ZooError, match=rf"give the folder that training wrote, {run}, after it ended"):
        collect(run / "adapter", staged(tmp_path))


def test_a_stale_score_is_refused(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run, other = make_run(), make_run(seed=1)
    (run / "score.json").write_text((other / "score.json").read_text())
    with pytest.raises(ZooError, match="measured on another adapter"):
        collect(run, staged(tmp_path))


def test_a_score_on_other_data_is_refused(make_run: Callable[..., Path], tmp_path: Path) -> None:
    file = make_run() / "score.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"same_data": False}))
    with pytest.raises(ZooError, match="data that has changed since training"):
        collect(file.parent, staged(tmp_path))


def test_pictures_that_were_asked_for_must_be_of_this_adapter(make_run: Callable[..., Path], tmp_path: Path) -> None:
    other = make_run("design")
    with pytest.raises(ZooError, match="holds no picture"):
        collect(make_run(), staged(tmp_path), pictures=other / "images")


@pytest.mark.parametrize("name", ["..", "a b", "a+b", "-x", "é"])
def test_a_name_that_no_zoo_can_have_is_refused(make_run: Callable[..., Path], tmp_path: Path, name: str) -> None:
    run = make_run(score=False)
    file = run / "adapter" / "pytorch_lora_weights.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + length])
    head["__metadata__"]["loragraft"] = json.dumps(json.loads(head["__metadata__"]["loragraft"]) | {"name": name})
    renamed = json.dumps(head).encode()
    file.write_bytes(len(renamed).to_bytes(8, "little") + renamed + content[8 + length :])
    with pytest.raises(ValueError, match="name") as caught:
        collect(run, staged(tmp_path))
    assert "letters, digits" in str(caught.value) and "[A-Za-z" not in str(caught.value)  # a sentence, no pattern


def test_another_name_changes_nothing_but_the_name(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run, own, other = make_run("Лето (2026)"), staged(tmp_path, "own"), staged(tmp_path, "other")
    with pytest.raises(ZooError, match="--name"):
        collect(run, own)
    entry = collect(run, other, name="summer")
    here, there = load_adapter(run / "adapter"), load_adapter(other / "pytorch_lora_weights.safetensors")
    assert (entry.name, there.name) == ("summer", "summer")
    assert there.metadata == {**here.metadata, "name": "summer"}
    assert adapter_hash(there) == adapter_hash(here)
    assert {"score.json", "images/0000.png"} <= set(entry.files)  # measured and drawn under the first name
    assert "# summer 1.0.0" in (other / "README.md").read_text()


def test_a_derivative_is_under_its_bases_licence() -> None:
    dev = licence_for("flux1-dev", None)
    assert (dev.id, dev.name) == ("other", "flux-1-dev-non-commercial-license")
    assert dev.link.startswith("https://")
    assert licence_for("flux1-schnell", None).id == "apache-2.0"
    assert licence_for("flux1-dev", "flux-1-dev-non-commercial-license") == dev
    with pytest.raises(ZooError, match="leave the option out"):
        licence_for("flux1-dev", "mit")
    assert licence_for("pocket", "cc-by-4.0").id == "cc-by-4.0"


def test_a_base_of_unknown_licence_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loragraft.zoo.licences.OF_REPOSITORY", {})
    with pytest.raises(ZooError, match="--licence ID"):
        licence_for("flux1-dev", None)
    assert licence_for("flux1-dev", "openrail++").id == "openrail++"


def test_an_adapter_for_flux_names_the_16_bit_base_and_its_licence(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run(score=False)
    adapter = load_adapter(run / "adapter")
    write_adapter(adapter.pairs, run / "adapter", {**adapter.metadata, "base": "flux1-dev"})
    entry = collect(run, staged(tmp_path))
    assert entry.base.repository == "black-forest-labs/FLUX.1-dev"
    card = header(tmp_path / "staged")
    assert card["base_model"] == "black-forest-labs/FLUX.1-dev"
    assert (card["license"], card["license_name"]) == ("other", "flux-1-dev-non-commercial-license")
    assert "FLUX.1-dev/blob/main/LICENSE.md" in str(card["license_link"])
    assert card["loragraft"]["base_id"] == entry.base.id  # type: ignore[index]
