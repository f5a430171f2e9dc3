"""Words that change nothing: people write more than what is to be drawn.

A caption that is "white heart icon on a red background" plus words the base was never trained to ignore moves both the
token states and the sentence vector, and a known thing is lost. So a share of the captions gets an opening, a few words
that name no thing, colour, size or place, or a remark behind; the picture stays as it is.
"""

import random

OPENINGS = (
    "a picture of", "an image of", "a drawing of", "an illustration of", "a graphic of", "artwork of", "a design with",
    "clipart of", "a logo with", "a poster with", "a banner with", "a card with", "a sticker with", "an advert with",
    "a flyer with", "a post with", "a cover with", "a slide with", "a label with", "a badge with", "a tile with",
    "a sign showing", "draw", "show", "i want", "please draw", "make", "we need", "create",
)  # fmt: skip
WORDS = (
    "modern minimal simple clean bold fresh elegant premium luxury vintage retro classic playful friendly professional "
    "corporate creative digital online local global daily weekly summer winter spring autumn holiday weekend seasonal "
    "special limited edition exclusive official original popular trending viral best great nice good beautiful pretty "
    "perfect awesome amazing high quality resolution detailed stylish matte vivid muted warm cool moody airy style design "
    "layout template concept theme mood campaign brand branding marketing advertising advertisement promotion promo "
    "tile banner poster flyer brochure leaflet cover page story feed thumbnail wallpaper sticker badge ribbon label "
    "stamp coupon voucher button call action headline title slogan text caption lettering typography print product "
    "service startup agency studio client customer audience team project portfolio website interface dashboard social "
    "media newsletter blog presentation event conference workshop company business finance health travel fashion beauty "
    "nature science technology innovation strategy growth success deal offer bargain launch opening welcome thanks "
    "greeting invitation announcement reminder update version series set collection pack bundle asset vector raster "
    "flat material geometric abstract organic handmade blueprint sketchy hipster urban nordic tropical cosmic festive "
    "romantic dramatic cheerful calm quiet loud fast slow easy free hot now today tomorrow here soon only more less "
    "centered balanced symmetric isolated trimmed framed printed stacked layered shadow outline pattern texture grid"
).split()
REMARKS = (
    "no text", "with text", "high quality", "best quality", "vector art", "for a website", "for my presentation",
    "for social media", "for print", "for an app", "for kids", "for our customers", "in the middle of nothing",
    "sale", "new", "free", "hot", "50 % off", "- 20 %", "buy now", "shop now", "only today", "limited offer", "4k",
    "trending on the web", "made with love", "as a poster", "as a badge", "as a tile", "as a card", "as an app icon",
)  # fmt: skip
SHARE = 0.4


def _words(rng: random.Random, most: int) -> str:
    return " ".join(rng.sample(WORDS, rng.randint(1, most)))


def with_filler(caption: str, rng: random.Random) -> str:
    """The caption, in ``SHARE`` of the cases with words around it that mean nothing to the picture."""
    if rng.random() >= SHARE:
        return caption
    roll = rng.random()
    if roll < 0.2:
        return f"{rng.choice(OPENINGS)} {caption}"
    if roll < 0.3:
        return f"{_words(rng, 3)}{rng.choice((':', ',', ' -'))} {caption}"
    if roll < 0.65:
        return f"{caption}, {_words(rng, 4)}"
    if roll < 0.75:
        return f"{caption}, {_words(rng, 2)}, {_words(rng, 2)}"
    if roll < 0.85:
        return f"{caption}, {rng.choice(REMARKS)}, {_words(rng, 3)}"
    if roll < 0.92:
        return f"{rng.choice(OPENINGS)} {caption}, {_words(rng, 3)}"
    return f"{caption}, {rng.choice(REMARKS)}"
