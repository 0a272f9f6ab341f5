"""The front door: the first word picks a command, whose module is imported only then; help and version need no torch."""

import contextvars
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import NamedTuple

from hedgelab.cli.errors import guarded
from hedgelab.config.names import suggest
from hedgelab.errors import UserError
from hedgelab.version import __version__

GROUP = "hedgelab.studies"


class Command(NamedTuple):
    """Where a command lives (``place.run(command, words)`` gives an exit code, or a study's class), and what help says."""

    place: str
    summary: str
    usage: str = "--config F"


COMMANDS = {
    "fit": Command("fit", "train an SAE as a config says, and track the run"),
    "validate": Command("fit", "measure an SAE on the validation batches (--ckpt_path)", "--config F --ckpt_path C"),
    "test": Command("fit", "measure an SAE on the test batches (--ckpt_path)", "--config F --ckpt_path C"),
    "phase": Command("protocols.phase.Phase", "map hedging of toy SAEs over two axes, beside the closed forms"),
    "balance": Command(
        "protocols.balance.BalanceStudy", "find the weighting of matryoshka levels that leaves a hierarchy's parent clean"
    ),
    "hedge": Command("fit", "measure how much an SAE hedges: train, widen, train on, compare"),
    "sweep": Command("sweep", "run a grid of fits or hedging degrees, packed onto shared activations"),
    "cache": Command("protocols.cache.Cache", "write a language model's activations to disk, for all later runs"),
    "trial": Command("protocols.trial.Trial", "judge measures of hedging on toys that know the truth"),
    "plant": Command("protocols.planting.trial.Plant", "plant features in activations by lot, and see how SAEs hedge on them"),
    "l0": Command("protocols.right_l0.RightL0", "find the L0 at which latents mix least"),
    "evaluate": Command("evaluate", "score trained SAEs: probing, absorption, loss recovered and more", "RUN"),
    "leaderboard": Command("leaderboard", "score a list of SAEs, and rank them on a page beside their controls"),
    "figures": Command("protocols.figures.PaperFigures", "redraw the paper's toy and theory figures, without sampling noise"),
    "export": Command("light", "write a run's SAE for other libraries (SAELens), or to the hub", "RUN --to DIR"),
    "import": Command("light", "read an SAE of SAELens, sparsify or dictionary_learning", "SOURCE --to DIR"),
    "compare": Command("light", "set runs side by side: what differs, metrics, curves", "RUN RUN"),
    "report": Command("light", "build one HTML file about an experiment: tables, figures, configs", "--experiment NAME"),
    "runs": Command("light", "list tracked runs with their key numbers", "[--last] [--json]"),
    "sync": Command("light", "send to the tracking store what an outage kept from it", ""),
    "ui": Command("ui", "open the MLflow UI on the tracked runs", ""),
}
"""All commands but those of other packages' studies; places are in ``hedgelab.cli``, those of studies in ``hedgelab``."""

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
    name, *rest = words or ["--help"]
    if name in ("-h", "--help", "help"):
        print(OVERVIEW.format(commands="\n".join(f"  {name:<11}  {one.summary}" for name, one in COMMANDS.items())))
        return 0
    if name in ("-V", "--version"):
        print(f"hedgelab {__version__}")
        return 0
    place = COMMANDS[name].place if name in COMMANDS else registered().get(name, name)
    if "." not in place and name not in COMMANDS:
        raise UserError(f"unknown command '{name}'; {suggest(name, [*COMMANDS, *registered()])}")
    run: Callable[[str, list[str]], int] = import_module(f"hedgelab.cli.{'studies' if '.' in place else place}").run
    return run(name, rest)


def registered() -> dict[str, str]:
    """Class paths of the studies that installed packages register, by command."""
    return {point.name: point.value.replace(":", ".") for point in entry_points(group=GROUP)}
