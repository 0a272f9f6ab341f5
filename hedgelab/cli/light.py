"""Options of the light commands: argparse that raises one line and knows near misses."""

from __future__ import annotations

import argparse
from typing import NoReturn

from hedgelab.config.names import nearest
from hedgelab.errors import UserError


class LightParser(argparse.ArgumentParser):
    """An argument parser whose mistakes are UserErrors."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"hedgelab {command}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def parse(self, words: list[str]) -> argparse.Namespace:
        """Parse all words; unknown options are refused with the nearest valid one."""
        parsed, unknown = self.parse_known_args(words)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            near = nearest(unknown[0].split("=")[0], options)
            self.error(
                f"unknown argument '{unknown[0]}'; "
                + (f"did you mean '{near}'?" if near else f"see '{self.prog} --help'")
            )
        return parsed

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise UserError(message)
