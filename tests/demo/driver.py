"""The demo as a process, and a headless Chromium in front of it. Used by the browser test and by screenshots.py."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from loragraft.adapters.checkpoint import write_adapter
from loragraft.quantization.checkpoint import quantized_layers

SIZE = (1280, 800)
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def missing() -> str | None:
    """What the browser test lacks here, in words."""
    from importlib.util import find_spec

    for package in ("gradio", "selenium"):
        if find_spec(package) is None:
            return f"{package} is not installed"
    if not any(map(shutil.which, CHROMIUM)):
        return "there is no Chromium on PATH (Debian: apt-get install chromium chromium-driver)"
    return None if shutil.which("chromedriver") else "there is no chromedriver on PATH"


def write_random_adapter(
    transformer: torch.nn.Module, folder: Path, base_id: str, *, name: str, seed: int = 0, strength: float = 0.25
) -> Path:
    """An adapter on every quantized layer, of rank 4, with a random B: it teaches nothing and changes every picture."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for path, layer in quantized_layers(transformer).items():
        down = torch.randn(4, layer.in_features, generator=generator) / layer.in_features**0.5
        pairs[path] = (down, strength * torch.randn(layer.out_features, 4, generator=generator) / 2)
    about = {"base": "pocket", "base_id": base_id, "name": name, "rank": 4, "profile": "native", "steps": 0}
    return write_adapter(
        pairs,
        folder,
        {**about, "recipe_hash": "none", "data_fingerprint": "none", "recipe": {"sample": {"prompts": []}}},
    )


@contextmanager
def running_demo(arguments: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[str]:
    """`loragraft demo` on a free port until the block ends; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "loragraft.cli", "demo", "--port", str(port), *arguments]
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        until(
            lambda: "loragraft demo: http" in log.read_text() or process.poll() is not None,
            120,
            "the demo did not start",
        )
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()  # not SIGINT: a job started in the background of a shell ignores it, and so do its children
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def until(true: Callable[[], Any], seconds: float, otherwise: str) -> Any:
    """Waits for something true and gives it; AssertionError with `otherwise` when the time is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := true():
            return found
        time.sleep(0.1)
    raise AssertionError(otherwise)


class Browser:
    """Chromium on one page, by what a person sees: the prompt, the buttons, the pictures, the status line."""

    def __init__(self, url: str) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        self._by: ModuleType = __import__("selenium.webdriver.common.by", fromlist=["By"])
        options = webdriver.ChromeOptions()
        options.binary_location = next(filter(None, map(shutil.which, CHROMIUM)))
        for switch in (
            "headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars", "disable-dev-shm-usage", "no-first-run",
            "disable-background-networking", "disable-component-update", "disable-sync", "lang=en",
        ):  # fmt: skip
            options.add_argument(f"--{switch}")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        os.environ["SE_OFFLINE"] = "true"  # selenium must not look for a driver on the network
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.resize(*SIZE)
        self.url = url
        self.open()

    def open(self) -> None:
        """Loads the page anew."""
        self.driver.get(self.url)
        until(lambda: self.find("#model"), 60, "the page did not load")

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def find(self, selector: str) -> Any:
        """The first match that is shown, or None."""
        matches = self.driver.find_elements(self._by.By.CSS_SELECTOR, selector)
        return next((match for match in matches if match.is_displayed()), None)

    def text(self, selector: str) -> str:
        element = self.find(selector)
        return element.text if element else ""

    def click(self, selector: str) -> None:
        element = until(lambda: self.find(selector), 10, f"nothing at {selector}")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def fill(self, selector: str, value: str) -> None:
        """Types into a field, over what is there."""
        from selenium.webdriver.common.keys import Keys

        field = until(lambda: self.find(selector), 10, f"no field at {selector}")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.DELETE, value)
        field.send_keys(Keys.TAB)

    def pick_adapter(self, name: str) -> None:
        self.choose("#adapters", name)
        until(lambda: self.find("#weight-0"), 10, "no slider for its weight")

    def choose(self, selector: str, name: str) -> None:
        """One entry of a drop-down list, by how it begins."""
        self.click(f"{selector} input")
        until(lambda: self._option(name), 10, f"no {name} in the list {selector}").click()
        self.driver.execute_script("document.activeElement.blur()")
        self.click("header")

    def upload(self, selector: str, file: Path) -> None:
        """A start picture; opens its panel first."""
        if not self.find(selector):
            self.click("#start-panel button")
            until(lambda: self.find(selector), 10, f"{selector} did not open")
        self.driver.find_element(self._by.By.CSS_SELECTOR, f"{selector} input[type=file]").send_keys(str(file))
        until(lambda: self.find("#strength"), 20, "the picture was not taken")

    def _option(self, name: str) -> Any:
        options = self.driver.find_elements(self._by.By.CSS_SELECTOR, "ul[role=listbox] li")
        return next((option for option in options if option.text.strip("✓ \n").startswith(name)), None)

    def generate(self, seconds: float = 120) -> str:
        """Presses the button and waits for the end; gives the status line."""
        self.driver.execute_script("document.querySelector('#status .status').dataset.old = 'yes'")
        self.click("#generate")
        until(lambda: self.find("#status .status:not([data-old])"), 30, "the status line did not change")
        return self.wait(seconds)

    def wait(self, seconds: float = 120) -> str:
        """Until no bar moves and the button can be pressed again; gives the status line."""
        ended = "button#generate:not([disabled])"
        until(lambda: self.find(ended) and not self.find("#status .bar"), seconds, "the order did not end")
        return self.text("#status")

    def picture(self, selector: str) -> dict[str, Any]:
        """Edge in pixels and the spread of the drawn values, read from the image that the page shows."""
        script = """
            const image = document.querySelector(arguments[0] + ' img');
            if (!image || !image.complete || !image.naturalWidth) return null;
            const canvas = document.createElement('canvas');
            canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            const values = Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data);
            return {width: image.naturalWidth, height: image.naturalHeight, values: values};
        """
        return until(lambda: self.driver.execute_script(script, selector), 20, f"no picture in {selector}")

    def requests(self) -> set[str]:
        """Addresses that the page has asked for since the last call."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}

    def save(self, file: Path) -> None:
        """What the window shows, as a PNG with a palette: a page has few colours and git keeps every version."""
        from io import BytesIO

        from PIL import Image

        time.sleep(0.6)  # transitions
        file.parent.mkdir(parents=True, exist_ok=True)
        shot = Image.open(BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
        shot.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(file, optimize=True)

    def close(self) -> None:
        self.driver.quit()
