"""The page in a real Chromium: what a person types, presses and sees. The server and the page may touch loopback only."""

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

pytestmark = [pytest.mark.browser, pytest.mark.slow]

PROMPT = "white star on a blue background"
TWO_STEPS = 2


@dataclass(frozen=True)
class Shown:
    """The browser, and where the server's guard writes."""

    browser: Any
    network: Path
    requests: set[str]


@pytest.fixture(scope="module")
def shown(
    driver: ModuleType, runs: Any, tmp_path_factory: pytest.TempPathFactory, write_network_guard: Callable[..., None]
) -> Iterator[Shown]:
    if lacking := driver.missing():
        pytest.skip(f"no browser test: {lacking}")
    place = tmp_path_factory.mktemp("demo")
    write_network_guard(place, b"127.0.0.1")
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("GRADIO_")},
        "PYTHONPATH": os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH", "")])),
        "NETWORK_LOG": str(place / "network.log"),
        "LORAGRAFT_CACHE": str(place / "cache"),
    }
    with driver.running_demo(["--adapters", str(runs.folder)], environment, place / "server.log") as url:
        browser = driver.Browser(url)
        try:
            yield Shown(browser, place / "network.log", set())
        finally:
            browser.close()


@pytest.fixture
def page(shown: Shown) -> Any:
    """A freshly loaded page with two steps."""
    shown.requests.update(shown.browser.requests())
    shown.browser.open()
    shown.browser.fill("#steps input", str(TWO_STEPS))
    return shown.browser


def values(picture: dict[str, Any]) -> np.ndarray:
    return np.array(picture["values"], dtype=np.float64).reshape(picture["height"], picture["width"], 4)[..., :3]


def seconds(page: Any) -> dict[str, list[float]]:
    """The table of figures: part -> seconds per picture."""
    lines = [re.split(r"\s{1,}(?=[\d.]+|shared)", line) for line in page.text("#seconds tbody").splitlines()]
    return {name: [float(cell) for cell in cells if re.fullmatch(r"[\d.]+", cell)] for name, *cells in lines}


def test_the_empty_page_says_what_to_do(page: Any) -> None:
    assert "Write a prompt or pick an example" in page.text("#status")
    assert "MiB in INT4" in page.text("#model")
    assert "w4a8" in page.text("#model")
    assert not page.find("#after"), "the second picture is shown before an adapter is picked"
    assert not page.find("#strength"), "strength is shown without a picture"
    assert not page.find("#weight-0"), "a weight is shown without an adapter"
    assert page.driver.title == "Loragraft"


def test_type_generate_see_the_picture_and_the_figures(page: Any) -> None:
    page.fill("#prompt textarea", PROMPT)
    assert page.generate().startswith("Done in ")
    picture = page.picture("#before")
    assert (picture["width"], picture["height"]) == (128, 128)
    assert values(picture).std() > 10, "the picture is uniform"
    shown = seconds(page)
    assert shown["Transformer"][0] > 0 and shown["Text encoding"][0] > 0 and shown["Decoding"][0] > 0
    assert "2 × 2 passes" in page.text("#seconds")
    assert re.search(r"\d+ MiB, peak \d+", page.text("#model"))


def test_before_and_after_with_an_adapter_at_a_weight(page: Any) -> None:
    page.click("#examples button")
    page.pick_adapter("ours")
    assert "Weight of ours" in page.text("#weight-0")
    assert page.generate().startswith("Done in ")
    before, after = values(page.picture("#before")), values(page.picture("#after"))
    full = np.abs(before - after).mean()
    assert full > 3
    assert len(seconds(page)["Transformer"]) == 2
    page.fill("#weight-0 input[type=number]", "0")
    page.generate()
    assert np.abs(values(page.picture("#before")) - before).mean() < 1, "the same seed drew another base picture"
    assert np.abs(values(page.picture("#after")) - before).mean() < 1, "weight 0 still changes the picture"


def test_mistakes_are_said_on_the_page(page: Any, runs: Any) -> None:
    page.generate()
    assert "The prompt is empty" in page.text("#status .error")
    page.fill("#prompt textarea", "a small red star " * 20)
    page.generate()
    assert "than pocket reads: shorten it" in page.text("#status .error")
    page.fill("#prompt textarea", PROMPT)
    page.pick_adapter("foreign")
    page.generate()
    error = page.text("#status .error")
    assert runs.other_base in error and runs.base_id in error


def test_a_picture_to_start_from(page: Any, tmp_path: Path) -> None:
    file = tmp_path / "start.png"
    picture = Image.new("RGB", (160, 160), (30, 160, 60))
    ImageDraw.Draw(picture).ellipse((40, 40, 120, 120), fill="white")
    picture.save(file)
    page.upload("#start", file)
    page.fill("#prompt textarea", "white circle on a green background")
    page.fill("#steps input", "10")
    page.fill("#strength input[type=number]", "0.2")
    assert page.generate().startswith("Done in ")
    drawn = values(page.picture("#before"))
    assert np.abs(drawn - np.asarray(picture.resize((128, 128)), dtype=np.float64)).mean() < 30
    assert "Start picture" in seconds(page)
    assert "2 × 2 passes" in page.text("#seconds"), "strength 0.2 of 10 steps is 2"


def test_a_file_that_is_no_picture(page: Any, tmp_path: Path) -> None:
    file = tmp_path / "notes.png"
    file.write_text("not a picture")
    page.upload("#start", file)
    page.fill("#prompt textarea", PROMPT)
    page.generate()
    assert "The start picture notes.png is not a readable image" in page.text("#status .error")


def test_stop_ends_it_within_a_step(page: Any, driver: ModuleType) -> None:
    page.fill("#prompt textarea", PROMPT)
    page.fill("#steps input", "200")
    page.click("#generate")
    driver.until(lambda: "step " in page.text("#status"), 30, "no step was told")
    began = time.monotonic()
    page.click("#stop")
    assert re.match(r"Stopped after step \d+ of 200", page.wait(30))
    assert time.monotonic() - began < 15


def test_another_precision(page: Any) -> None:
    page.fill("#prompt textarea", PROMPT)
    page.choose("#precision", "16-bit")
    assert page.generate().startswith("Done in ")
    assert "pocket, 16-bit" in page.text("#model")
    page.choose("#precision", "INT4, native")
    page.generate()
    assert "pocket, INT4, native" in page.text("#model")


def test_nothing_but_loopback_was_asked_for(shown: Shown) -> None:
    """By the server (the guard was in place, and wrote nothing) and by the page."""
    assert shown.network.with_name("network.log.armed").exists()
    assert not shown.network.exists(), shown.network.read_text()
    asked = shown.requests | shown.browser.requests()
    assert any(url.startswith(shown.browser.url) for url in asked)
    outside = {url for url in asked if not url.startswith((shown.browser.url, "data:", "blob:"))}
    assert outside == set()


def test_it_fits_a_small_window(shown: Shown) -> None:
    """1280 x 800: both buttons and the status are in sight, and nothing makes the page scroll sideways."""
    script = "return [document.documentElement.scrollWidth, document.querySelector('#status').getBoundingClientRect().bottom]"
    width, bottom = shown.browser.driver.execute_script(script)
    assert width <= 1280
    assert bottom < 800
