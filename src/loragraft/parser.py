"""The parser of every command: help as it is written, options by their whole names, and the nearest one for a mistyped one."""

import argparse
import difflib
from typing import Any


class Parser(argparse.ArgumentParser):
    """`--weight` is not taken for `--weights`, but refused with it as the nearest option. Parsers of verbs below it are of this class too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse does, but for options that no verb knows: these are an error here, where the nearest is known."""
        found, rest = super().parse_known_args(args, namespace)
        first = next((i for i, word in enumerate(rest) if word.startswith("-")), None)
        if first is not None:
            near = difflib.get_close_matches(rest[first].partition("=")[0], self._option_string_actions, n=1)
            self.error(f"unrecognized arguments: {' '.join(rest[first:])}{f'; did you mean {near[0]}?' if near else ''}")
        return found, rest
