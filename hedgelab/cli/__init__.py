"""The front door: the first word picks a command, whose module is imported only then; help and version need no torch."""

from __future__ import annotations

import contextvars
import sys
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from hedgelab import __version__
from hedgelab.cli.errors import guarded
from hedgelab.config.names import nearest
from hedgelab.errors import UserError


class Command(NamedTuple):
    """Where a command lives (``module.run(command, words) -> exit code``), what it does, in a line, and how it is called."""

    module: str
    summary: str
    usage: str = ""


COMMANDS = {
    "fit": Command("fit", "train an SAE as a config says, and track the run", "--config F"),
    "validate": Command("fit", "measure an SAE on the validation batches (--ckpt_path)", "--config F --ckpt_path C"),
    "test": Command("fit", "measure an SAE on the test batches (--ckpt_path)", "--config F --ckpt_path C"),
    "phase": Command("studies", "map hedging of toy SAEs over two axes, beside the closed forms", "--config F"),
    "balance": Command(
        "studies", "find the weighting of matryoshka levels that leaves a hierarchy's parent clean", "--config F"
    ),
    "hedge": Command("fit", "measure how much an SAE hedges: train, widen, train on, compare", "--config F"),
    "sweep": Command("sweep", "run a grid of fits or hedging degrees, packed onto shared activations", "--config F"),
    "cache": Command("studies", "write a language model's activations to disk, for all later runs", "--config F"),
    "trial": Command("studies", "judge measures of hedging on toys that know the truth", "--config F"),
    "evaluate": Command("evaluate", "score trained SAEs: probing, absorption, loss recovered and more", "RUN"),
    "figures": Command("studies", "redraw the paper's toy and theory figures, without sampling noise", "--config F"),
    "export": Command("exchange", "write a run's SAE for other libraries (SAELens), or to the hub", "RUN --to DIR"),
    "import": Command("exchange", "read an SAE of SAELens, sparsify or dictionary_learning", "DIR --to DIR"),
    "compare": Command("light", "set runs side by side: what differs, metrics, curves", "RUN RUN"),
    "report": Command(
        "light", "build one HTML file about an experiment: tables, figures, configs", "--experiment NAME"
    ),
    "runs": Command("light", "list tracked runs with their key numbers", "[--last] [--json]"),
    "sync": Command("light", "send to the tracking store what an outage kept from it"),
    "ui": Command("ui", "open the MLflow UI on the tracked runs"),
}


OVERVIEW = """\
usage: hedgelab COMMAND [options]

Find, measure and fix feature hedging in sparse autoencoders.

commands:
{commands}

start here:
  hedgelab fit --config configs/toy/hierarchical.yaml
  hedgelab ui

'hedgelab COMMAND --help' lists a command's options; HEDGELAB_DEBUG=1 shows tracebacks of user errors."""


def main(args: list[str] | None = None) -> int:
    """Run one command line and return its exit code: 0 done, 2 the user's mistake, 130 interrupted, 1 a bug."""
    words = sys.argv[1:] if args is None else list(args)
    # A context of its own: jsonargparse leaves context variables behind when parsing fails.
    return contextvars.copy_context().run(guarded, lambda: dispatch(words))


def dispatch(words: list[str]) -> int:
    """Import the command that the first word names, and run it on the other words."""
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("-h", "--help", "help"):
        print(OVERVIEW.format(commands="\n".join(f"  {name:<8}  {one.summary}" for name, one in COMMANDS.items())))
        return 0
    if name in ("-V", "--version"):
        print(f"hedgelab {__version__}")
        return 0
    module = COMMANDS[name].module if name in COMMANDS else _module_of_foreign_study(name)
    run: Callable[[str, list[str]], int] = import_module(f"hedgelab.cli.{module}").run
    return run(name, rest)


def _module_of_foreign_study(name: str) -> str:
    """The runner's module, if a name is the class path of a study or one that an installed package registers."""
    from hedgelab.cli import studies

    known = [*COMMANDS, *studies.registered()]
    if name in known or "." in name:
        return "studies"
    near = nearest(name, known)
    hint = f"did you mean '{near}'?" if near else "see 'hedgelab --help'"
    raise UserError(f"unknown command '{name}': expected one of {', '.join(known)}; {hint}")
