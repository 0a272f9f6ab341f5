"""``hedgelab evaluate``: what trained SAEs are worth, by suites of scores."""

from __future__ import annotations

_HELP = """\
usage: hedgelab evaluate RUN ... [--config FILE] [--suite NAME,NAME] [--KEY VALUE ...]

Score trained SAEs; scores, tables and figures go to the SAE's own run. RUN is a run's name or id, 'last', a folder with an SAE,
a run whose parts have SAEs (a sweep), or the config file of a sweep, which is then trained first as far as it is not.

  --suite    density, geometry, probing, absorption, loss_recovered, tpp, scr, all (the default), or saebench
  --config   labelled text and settings of the suites, such as configs/llm/evaluate_brown.yaml
  --x        what several SAEs are drawn against: a parameter in which they differ; by itself the first numeric one
  --data.*   overrides what the run's config says about its data, such as --data.cache_dir; needed for a folder whose data
             is not known

A suite that was run on an SAE before with the same settings is not run again. Activations are kept under the data's cache_dir.
"""


def run(command: str, words: list[str]) -> int:
    """Evaluate SAEs.

    Args:
        command: ``evaluate``.
        words: The runs, then options.

    Raises:
        UserError: Anything the user can mend.
    """
    if not words or any(word in ("-h", "--help") for word in words):
        print(_HELP, end="")
        return 0
    from hedgelab.cli.evaluating import run_evaluate

    return run_evaluate(words)
