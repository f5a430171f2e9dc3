"""What every block of a recipe checks its values with."""

import math


class RecipeError(ValueError):
    """A recipe that cannot be used; `keys` are the dotted keys at fault: several where they contradict each other, none where
    it is no key's fault."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys


def check_range(key: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Raise RecipeError unless low <= value <= high (low < value where `open_low`)."""
    if not (low < value if open_low else low <= value) or not value <= high or math.isnan(value):
        lower = f"greater than {low:g}" if open_low else f"at least {low:g}"
        upper = "" if high == math.inf else f" and at most {high:g}"
        raise RecipeError(f"{key} must be {lower}{upper}, not {value:g}", key)
