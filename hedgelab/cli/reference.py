"""The parts of the README that are made from the code: ``python -m hedgelab.cli.reference README.md`` renews them.

They stand between ``<!-- commands -->`` and ``<!-- /commands -->``, ``<!-- metrics -->`` and ``<!-- /metrics -->``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from hedgelab.cli import COMMANDS
from hedgelab.errors import UserError
from hedgelab.tracking.glossary import GLOSSARY


def commands() -> str:
    """Every command with how it is called and what it does, as a Markdown table."""
    rows = []
    for name, command in COMMANDS.items():
        call = f"hedgelab {name} {command.usage}".rstrip()
        rows.append(f"| `{call}` | {command.summary} |")
    return "\n".join(["| command | does |", "|---|---|", *rows])


def metrics() -> str:
    """Every metric with what it means, as a Markdown table."""
    arrows = {"higher": "↑", "lower": "↓", "": ""}
    rows = [f"| `{name}` | {arrows[one.better]} | {one.meaning} |" for name, one in GLOSSARY.items()]
    return "\n".join(["| metric | better | meaning |", "|---|---|---|", *rows])


BLOCKS: dict[str, Callable[[], str]] = {"commands": commands, "metrics": metrics}


def renewed(text: str) -> str:
    """A README with its generated blocks as they should be; a block whose marks are not there is left out."""
    for name, make in BLOCKS.items():
        marks = rf"(<!-- {name} -->).*?(<!-- /{name} -->)"
        text = re.sub(marks, lambda found, make=make: f"{found[1]}\n{make()}\n{found[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def main(words: list[str]) -> int:
    """Renew the files given, or print the blocks.

    Raises:
        UserError: A file is not there.
    """
    for name in words:
        file = Path(name)
        if not file.is_file():
            raise UserError(f"no such file '{name}'")
        file.write_text(renewed(file.read_text()))
    if not words:
        print("\n\n".join(make() for make in BLOCKS.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
