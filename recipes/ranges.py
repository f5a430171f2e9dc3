"""What every block of a recipe checks its values with."""

import math
import re

LARGEST_SEED = 2**63 - 1
"""What torch takes, with room for the images that count on from it."""
PLAIN_NAME = re.compile(r"\w[\w .+()@-]{0,99}")


class RecipeError(ValueError):
    """A recipe that cannot be used; `keys` are the dotted keys at fault: several where they contradict each other, none where
    it is no key's fault."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys


def is_plain_name(name: str) -> bool:
    """Whether a name is fit for a folder and a file everywhere: letters of any script, digits and ' .+()@-_', 100 at most, no '..'."""
    return PLAIN_NAME.fullmatch(name) is not None and ".." not in name


def check_range(
    key: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False
) -> None:
    """Raise RecipeError unless low <= value <= high (low < value where `open_low`, value < high where `open_high`)."""
    above = low < value if open_low else low <= value
    below = value < high if open_high else value <= high
    if not (above and below):  # NaN is neither
        lower = f"{'greater than' if open_low else 'at least'} {_digits(low)}"
        upper = "" if high == math.inf else f" and {'below' if open_high else 'at most'} {_digits(high)}"
        raise RecipeError(f"{key} must be {lower}{upper}, not {_digits(value)}", key)


def _digits(value: float) -> str:
    """All digits of it, which tell 1,000,001 from a bound of 1,000,000."""
    return f"{value:,}" if isinstance(value, int) else f"{value!r}"
