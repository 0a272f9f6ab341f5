"""Makes ``hedgelab/metrics/README.md`` from the metrics' docstrings: ``python -m hedgelab.metrics.readme``."""

import ast
import re
from itertools import groupby
from pathlib import Path

from hedgelab import glossary
from hedgelab.glossary import declarations

FILE = Path(__file__).with_name("README.md")
_INTRODUCTION = """# Metrics

What hedgelab measures, by the names under which it is logged (`val/l0`, `test/l0`, …); ↑ marks numbers of which more is better,
↓ those of which less is. This page is made from the docstrings: `python -m hedgelab.metrics.readme` renews it.

- `hedgelab.metrics` holds torchmetrics classes, which add up over batches and ranks; `hedgelab.metrics.functional` the
  functions behind them. Both take latents as codes or as dense tensors and decoders of any norms, and fold inside.
- `hedging(W_dec, features)`, `residual_hedging(x, sae)` and `hedging_degree(control, extended)` of `hedgelab.metrics` measure
  an SAE of any library that has `encode`, `decode` and `W_dec`.
- Withdrawn: targeted probe perturbation (TPP), which falls as training goes on, and spurious correlation removal (SCR), which
  goes against the truth on synthetic SAEs (Chanin, *Are SAE Benchmarks Reliable?*, arXiv 2605.18229). Release 0.2 had them.
- A score that cannot be computed is NaN with a warning, or an error.
- *A metric of your own* is one file, [shown in full](../README.md#-metric).
"""


def page() -> str:
    """The page: for every module that declares metrics its docstring with the formulas, then what each function declares."""
    arrows = {"higher": " ↑", "lower": " ↓", "": ""}
    parts = [_INTRODUCTION]
    entries = (one for one in declarations() if one.file != Path(glossary.__file__))
    for file, of_file in groupby(entries, lambda one: one.file):
        title, _, rest = (ast.get_docstring(ast.parse(file.read_text())) or file.stem).partition("\n")
        parts += [f"## {_markdown(title.rstrip('.'))}", *filter(None, [_markdown(rest.strip())])]
        for entry in of_file:
            description = re.split(r"\n\n(?:(?:Args|Returns|Raises):|>>> )", entry.text)[0]
            table = ["| logged as | short | meaning |", "|---|---|---|"]
            table += [f"| `{name}` | {t.title}{arrows[t.better]} | {t.meaning} |" for name, t in entry.terms.items()]
            parts += [f"**`{entry.name}`**: {_markdown(description)}", "\n".join(table)]
    return "\n\n".join(parts) + "\n"


def _markdown(text: str) -> str:
    """A docstring's markup as Markdown's."""
    return re.sub(r":\w+:`[~.]?(?:[\w.]*\.)?(\w+)`", r"`\1`", text.replace("``", "`")).replace("::\n", ":\n")


if __name__ == "__main__":
    FILE.write_text(page())
