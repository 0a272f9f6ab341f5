"""The parts of the documentation that are made from the code: ``python -m tests.docs.generated`` renews them all.

They stand in Markdown files between ``<!-- NAME -->`` and ``<!-- /NAME -->``.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def commands() -> str:
    """Every command with how it is called and what it does, as a Markdown table."""
    from hedgelab.cli import COMMANDS

    rows = [f"| `{f'hedgelab {name} {one.usage}'.rstrip()}` | {one.summary} |" for name, one in COMMANDS.items()]
    return "\n".join(["| command | does |", "|---|---|", *rows])


def house() -> str:
    """The rooms and who imports whom, as a Mermaid diagram: an arrow from the importer, its number the importing files."""
    arrows: Counter[tuple[str, str]] = Counter()
    for file in sorted((ROOT / "hedgelab").rglob("*.py")):
        for target in {_room(name) for name in _imports(file)} - {""}:
            source = _room(".".join(file.relative_to(ROOT).with_suffix("").parts))
            if source and source != target:
                arrows[source, target] += 1
    lines = [f"    {source} -->|{count}| {target}" for (source, target), count in sorted(arrows.items())]
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```"])


def _room(module: str) -> str:
    """The folder of the package in which a module lies; small modules beside the folders belong to no room."""
    parts = module.split(".")
    inside = len(parts) > 1 and parts[0] == "hedgelab" and (ROOT / "hedgelab" / parts[1]).is_dir()
    return parts[1] if inside else ""


def _imports(file: Path) -> set[str]:
    """Modules that a file imports when it is run; those that only type checkers read are left out."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


BLOCKS: dict[str, Callable[[], str]] = {"commands": commands, "house": house}


def pages() -> list[Path]:
    """Every Markdown file of the project."""
    return sorted(p for p in ROOT.rglob("*.md") if not {".venv", "runs", "node_modules"} & set(p.relative_to(ROOT).parts[:-1]))


def renewed(text: str) -> str:
    """A page with its generated blocks as they should be."""
    for name, make in BLOCKS.items():
        parts = re.split(rf"(<!-- /?{name} -->)", text)
        if len(parts) == 5:
            parts[2] = f"\n{make()}\n"
            text = "".join(parts)
    return text


if __name__ == "__main__":
    for page in pages():
        page.write_text(renewed(page.read_text()))
