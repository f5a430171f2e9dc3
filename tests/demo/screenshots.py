"""The README's pictures of the demo, taken in a headless Chromium.

    python tests/demo/screenshots.py --adapter runs/marketing

writes docs/images/demo.png (a prompt on the base alone) and docs/images/demo_before_after.png (the adapter beside it).
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from driver import Browser, missing, running_demo

ROOT = Path(__file__).parents[2]
LARGEST = 300_000
"""Bytes of one picture."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="a run or an adapter folder")
    parser.add_argument("--name", help="what the adapter is called (default: the folder's name)")
    parser.add_argument("--base-prompt", default="white star on a blue background")
    parser.add_argument("--prompt", default="white heart icon on a pink to red gradient background, badge")
    parser.add_argument("--weight", default="1")
    parser.add_argument("--guidance", default="4")
    parser.add_argument("--seed", default="4")
    parser.add_argument("--steps", default="20")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()
    if lacking := missing():
        print(f"error: {lacking}", file=sys.stderr)
        return 2
    log = Path(tempfile.gettempdir()) / "loragraft-demo-screenshots.log"
    with running_demo(["--adapters", str(args.adapter)], dict(os.environ), log) as url:
        browser = Browser(url)
        try:
            for field in ("steps", "guidance", "seed"):
                browser.fill(f"#{field} input", getattr(args, field))
            browser.fill("#prompt textarea", args.base_prompt)
            take(browser, args.out / "demo.png")
            browser.fill("#prompt textarea", args.prompt)
            browser.pick_adapter(args.name or args.adapter.resolve().name)
            browser.fill("#weight-0 input[type=number]", args.weight)
            take(browser, args.out / "demo_before_after.png")
        finally:
            browser.close()
    return 0


def take(browser: Browser, file: Path) -> None:
    status = browser.generate(600)
    if not status.startswith("Done"):
        raise SystemExit(f"error: the page says: {status}")
    browser.driver.execute_script("window.scrollTo(0, 0); document.activeElement.blur()")
    browser.save(file)
    print(f"{file}: {file.stat().st_size} bytes; {status}")
    if file.stat().st_size > LARGEST:
        raise SystemExit(f"error: {file} is larger than {LARGEST} bytes")


if __name__ == "__main__":
    sys.exit(main())
