"""Draws scenes: which icon, where, how large, in which colours - and says all of it in the caption.

A scene is one int32 row (``FIELDS``); ``composite.py`` paints it. Everything that is drawn away from the default (a full
colour icon, large, centred, on white) is written into the caption, so that colours, places and sizes can be asked for.
"""

import random

import numpy as np
from fillers import OPENINGS, REMARKS, WORDS, with_filler
from icons import SIZES, Icon, Stats

CANVAS = 128
FIELDS = (
    "icon size top left background a_red a_green a_blue b_red b_green b_blue tint tint_red tint_green tint_blue".split()
)
SOLID, VERTICAL, HORIZONTAL, DIAGONAL = range(4)  # background
ORIGINAL, SILHOUETTE, LIGHT_OPAQUE, DARK_OPAQUE = range(4)  # tint
DIRECTIONS = {VERTICAL: "vertical", HORIZONTAL: "horizontal", DIAGONAL: "diagonal"}
COLOURS = {
    "red": (220, 40, 45),
    "orange": (245, 130, 35),
    "yellow": (250, 205, 45),
    "green": (50, 165, 75),
    "teal": (20, 155, 150),
    "blue": (40, 110, 230),
    "navy": (25, 40, 95),
    "purple": (125, 60, 200),
    "pink": (240, 105, 170),
    "black": (20, 20, 22),
    "gray": (135, 138, 142),
    "white": (255, 255, 255),
    "brown": (120, 75, 45),
}
CHROMATIC = tuple(name for name in COLOURS if name not in ("black", "gray", "white"))
SYNONYMS = {
    "bullhorn": ("megaphone", "loudspeaker"),
    "loudspeaker": ("megaphone",),
    "megaphone": ("bullhorn", "loudspeaker"),
    "cart": ("shopping cart", "trolley"),
    "basket": ("shopping basket",),
    "magnify": ("magnifying glass", "search"),
    "email": ("envelope", "mail"),
    "mail": ("envelope", "email"),
    "envelope": ("mail", "email", "letter"),
    "store": ("shop",),
    "storefront": ("shop", "store"),
    "gift": ("gift box", "present"),
    "wrapped gift": ("gift", "gift box", "present"),
    "cellphone": ("mobile phone", "smartphone"),
    "account": ("person", "user"),
    "label": ("price tag", "tag"),
    "tag": ("price tag", "label"),
    "lightbulb": ("light bulb", "idea"),
    "light bulb": ("lightbulb", "idea"),
    "bullseye": ("target",),
    "target": ("bullseye",),
    "cash": ("money", "banknote"),
    "trash can": ("bin", "garbage can"),
    "earth": ("globe", "world"),
    "web": ("globe",),
    "cog": ("gear", "settings"),
    "home": ("house",),
    "house": ("home",),
    "percent": ("percentage", "discount"),
    "sale": ("discount", "percent badge"),
    "car": ("automobile",),
    "automobile": ("car",),
    "red heart": ("heart",),
    "truck": ("delivery truck", "lorry"),
    "thumb up": ("thumbs up", "like"),
    "chart bar": ("bar chart", "graph"),
    "chart line": ("line chart", "graph"),
    "chart pie": ("pie chart",),
    "package": ("box", "parcel"),
    "diamond": ("gem",),
    "gem stone": ("diamond", "gem"),
    "message": ("comment", "speech bubble"),
    "comment": ("speech bubble", "message"),
    "chat": ("speech bubbles", "conversation"),
}
Colour = tuple[int, int, int]


def luminance(colour: Colour) -> float:
    """Rec. 601 luma in [0, 1]."""
    return (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]) / 255


def shade(name: str, rng: random.Random) -> tuple[str, Colour]:
    """A jittered colour of that name; chromatic ones are sometimes mixed with white and called "light ..."."""
    base = COLOURS[name]
    if name in CHROMATIC and name != "navy" and rng.random() < 0.15:
        mix = rng.uniform(0.5, 0.7)
        return f"light {name}", tuple(round(c + (255 - c) * mix) for c in base)  # type: ignore[return-value]
    spread = 0 if name == "white" else 8 if name in ("black", "navy") else 14
    jittered = tuple(min(255, max(0, c + rng.randint(-spread, spread))) for c in base)
    return name, jittered  # type: ignore[return-value]


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def subject_of(icon: Icon, rng: random.Random) -> str:
    """The object in words: its name, a synonym, or its name or nothing followed by tags; at most seven words."""
    name = icon.words
    roll = rng.random()
    if name in SYNONYMS and roll < 0.45:
        name = rng.choice(SYNONYMS[name])
    elif roll < 0.35:
        words = name.split()
        swappable = [i for i, word in enumerate(words) if word in SYNONYMS]
        if swappable:
            place = rng.choice(swappable)
            words[place] = rng.choice(SYNONYMS[words[place]])
            name = " ".join(words)
    if icon.tags and rng.random() < 0.2:
        tags = rng.sample(icon.tags, min(len(icon.tags), rng.randint(1, 2)))
        name = ", ".join(tags if rng.random() < 0.2 else [name, *tags])
    return " ".join(name.split()[:7])


def draw_background(rng: random.Random) -> tuple[int, Colour, Colour, str | None]:
    """-> (kind, colour a, colour b, words or None for the unsaid white). Half white, 30 % solid, 20 % gradients."""
    roll = rng.random()
    if roll < 0.5:
        return SOLID, COLOURS["white"], COLOURS["white"], ("white" if rng.random() < 0.3 else None)
    if roll < 0.8:
        words, a = shade(rng.choice([name for name in COLOURS if name != "white"]), rng)
        return SOLID, a, a, words
    kind = rng.choice((VERTICAL, HORIZONTAL, DIAGONAL))
    direction = f"{DIRECTIONS[kind]} " if rng.random() < 0.3 else ""
    if rng.random() < 0.25:  # one hue, light to dark
        name = rng.choice(CHROMATIC)
        a = tuple(min(255, round(c * 0.75 + 80)) for c in COLOURS[name])
        b = tuple(round(c * 0.65) for c in COLOURS[name])
        return kind, a, b, f"{direction}{name} gradient"  # type: ignore[return-value]
    first, second = rng.sample(list(COLOURS if rng.random() < 0.2 else CHROMATIC), 2)
    (first, a), (second, b) = shade(first, rng), shade(second, rng)
    return kind, a, b, f"{direction}{first} to {second} gradient"


def draw_tint(icon: Icon, stats: Stats, ground: float, rng: random.Random) -> tuple[int, Colour, str | None]:
    """-> (mode, colour, words). Single-colour drawings are always tinted, others in one case of three.

    A filled drawing keeps its inner structure through opacity (light parts opaque if the tint is lighter than the
    ground, dark parts if darker); only drawings with open shapes become plain silhouettes.
    """
    if not icon.glyph and rng.random() > 0.35:
        return ORIGINAL, (0, 0, 0), None
    favourite = "white" if ground < 0.75 else "black"
    names = [favourite] if rng.random() < 0.45 else [name for name in COLOURS if name != "gray"]
    for _ in range(8):
        words, colour = shade(rng.choice(names), rng)
        if abs(luminance(colour) - ground) > 0.25:
            break
    else:
        words, colour = shade(favourite, rng)
    if icon.glyph or stats.solid < 0.45:
        return SILHOUETTE, colour, words
    return (LIGHT_OPAQUE if luminance(colour) > ground else DARK_OPAQUE), colour, words


def draw_place(rng: random.Random) -> tuple[int, int, int, list[str]]:
    """-> (size index, top, left, words): 112 px always centred, 88 and 64 px also off centre, and then said so."""
    index = rng.choices((0, 1, 2), (0.5, 0.28, 0.22))[0]
    slack = CANVAS - SIZES[index]
    words = ["small"] if index == 2 and rng.random() < 0.8 else []
    if index == 0 or rng.random() < 0.6:
        words += ["large"] if index == 0 and rng.random() < 0.1 else []
        return index, slack // 2, slack // 2, words
    rows, columns = rng.choice(((0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)))
    margin = slack // 2 - 2
    vertical, horizontal = ("top", "", "bottom")[rows + 1], ("left", "", "right")[columns + 1]
    words.append("at the " + " ".join(part for part in (vertical, horizontal) if part))
    return index, slack // 2 + rows * margin, slack // 2 + columns * margin, words


def phrase(icon: Icon, subject: str, tint: str | None, rng: random.Random) -> str:
    """What is drawn and in which colour or style, in one of several word orders."""
    noun = rng.choice(("icon", "icon", "icon", "symbol", "silhouette", "glyph"))
    if tint is not None:
        outline = "outline " if icon.glyph and "outline" in icon.style else ""
        options = (
            f"{tint} {subject} {outline}{noun}",
            f"{tint} {subject} {outline}{noun}",
            f"{article(tint)} {outline}{noun} of {article(subject)}",
            f"{subject}, {tint} {outline}{noun}",
            f"{article(tint)} {subject}",
            f"{outline}{subject} in {tint}",
        )
        return rng.choice(options)
    options = (subject, f"{subject} icon", article(subject), f"{subject}, {icon.style}", f"{subject}, {icon.style}")
    return rng.choice((*options, f"{article(icon.style)} of {article(subject)}"))


def draw_scene(index: int, icon: Icon, stats: Stats, rng: random.Random) -> tuple[list[int], str]:
    """-> (row of ``FIELDS``, caption) for the icon at ``index``; the same ``rng`` state gives the same scene."""
    while True:
        background, a, b, ground_words = draw_background(rng)
        ground = (luminance(a) + luminance(b)) / 2
        tint, colour, tint_words = draw_tint(icon, stats, ground, rng)
        if tint != ORIGINAL or ground_words in (None, "white") or abs(stats.luminance - ground) > 0.15:
            break
    size, top, left, place_words = draw_place(rng)
    caption = phrase(icon, subject_of(icon, rng), tint_words, rng)
    if place_words and place_words[0] in ("small", "large"):
        head = caption.removeprefix("an ").removeprefix("a ")
        caption = f"{place_words[0]} {head}" if rng.random() < 0.6 else f"{caption}, {place_words[0]}"
    if place_words and place_words[-1].startswith("at "):
        caption = f"{caption} {place_words[-1]}"
    if ground_words is not None:
        ground_caption = f"{ground_words} background"
        options = (f"{caption} on {article(ground_caption)}",) * 3
        caption = rng.choice((*options, f"{caption}, {ground_caption}", f"{ground_caption}, {caption}"))
    return [index, size, top, left, background, *a, *b, tint, *colour], with_filler(caption, rng)


def draw_scenes(
    icons: list[Icon], stats: list[Stats], weights: list[float], indices: list[int], count: int, seed: int
) -> tuple[np.ndarray, list[str]]:
    """``count`` scenes of the icons at ``indices``, drawn by ``weights`` -> (int32 [count, 15], captions)."""
    rng = random.Random(seed)
    chosen = rng.choices(indices, [weights[i] for i in indices], k=count)
    scenes = [draw_scene(i, icons[i], stats[i], rng) for i in chosen]
    return np.array([row for row, _ in scenes], np.int32).reshape(count, len(FIELDS)), [text for _, text in scenes]


def vocabulary() -> set[str]:
    """Every text that ``draw_scene`` may add to an icon's own words, for ``minilm.reduce_encoder``."""
    fixed = "a an of on in at the top left right bottom small large light gradient background to icon symbol silhouette"
    synonyms = {text for texts in SYNONYMS.values() for text in texts}
    return {
        *fixed.split(),
        "glyph",
        "outline",
        ", .",
        *DIRECTIONS.values(),
        *COLOURS,
        *SYNONYMS,
        *synonyms,
        *OPENINGS,
        *WORDS,
        *REMARKS,
    }
