"""``hedgelab sweep``: a grid of fits or hedging degrees, packed onto shared activations, in one run tree."""

import sys
from typing import Any

from hedgelab.cli.startup import defer_torchmetrics

_HELP = """\
usage: hedgelab sweep --config FILE [--list] [--KEY VALUE ...]

Train every cell of a grid, and draw a metric against an axis. FILE is a config of `hedgelab fit` or `hedgelab hedge` with a
section `sweep`:

  sweep:
    command: hedge                         # or fit (the default)
    base: other.yaml                       # config, or list of them, that this file lies over; beside this file
    lines:                                 # one curve each; may be left out
      vanilla: {set: {model: {class_path: VanillaSAE, ...}}, axes: {model.l1_coefficient: [1, 2]}}
    axes:                                  # every combination is a cell; layers share a model's forward pass
      model.d_sae: [64, 256, 1024]
      seed: [0, 1, 2]                      # of the weights; such cells share their activations
      pair: {zip: {model.k: [8, 16], model.optimizer.lr: [1e-3, 5e-4]}}
      text: {brown: {data.text: {...}}, python: {data.text: {...}}}
    pack: null                             # most cells that are trained together; null for all that share a stream
    only: null                             # a regular expression: no cells but those in whose names it is found
    figure: {x: model.d_sae, y: [hedging/degree, control/explained_variance]}
    executor: {class_path: LocalProcesses, init_args: {at_once: 2}}      # or InProcess (the default), or Slurm

--list shows the cells, which share a stream and which are finished, and trains nothing. Any other option overrides the
config of every cell, or the section itself (--sweep.pack 4). Finished cells are not trained again, unless something has changed
that decides their numbers (a key, the code of a class, the content of a file); --retrain trains all. Where fits are validated
more than once (trainer.val_check_interval), curves.png shows the figure's metrics over the samples trained on. Exit code 1:
cells failed.
"""


def run(command: str, words: list[str]) -> int:
    """Run a sweep."""
    if {"-h", "--help"} & set(words):
        print(_HELP, end="")
        return 0
    defer_torchmetrics()
    return 1 if sweep(words).failures else 0


def sweep(words: list[str]) -> Any:
    """Run the sweep that the words describe, and say what came of it; the study."""
    from hedgelab.cli.cells import parse_cell
    from hedgelab.cli.studies import conduct
    from hedgelab.protocols.study import Bench
    from hedgelab.protocols.sweep.run import Sweep

    study = Sweep(words, parse_cell)
    print("\n".join(conduct(study, Bench(), study.grid.text)))
    for name, reason in study.failures.items():
        sys.stderr.write(f"hedgelab: cell '{name}' failed: {reason}\n")
    return study
