"""``hedgelab evaluate``: what trained SAEs are worth, by suites of scores."""

from collections.abc import Callable, Collection
from itertools import takewhile
from pathlib import Path
from typing import Any

from hedgelab.config.names import suggest
from hedgelab.config.tree import Tree, compose, options_of, with_bare_flags
from hedgelab.errors import UserError

_HELP = """\
usage: hedgelab evaluate SAE ... [--config FILE] [--suite NAME,NAME] [--KEY VALUE ...]

Score trained SAEs; scores, tables and figures go to the SAE's own run. SAE is a run's name or id, 'last', models:/ID,
a folder with an SAE, a run whose parts have SAEs (a sweep), or a sweep's config, which is then trained first as far as needed.

  --suite    {suites}, all (the default), saebench or sae_probes; or a class path
  --config   labelled text and settings of the suites, such as configs/llm/evaluate_brown.yaml
  --x        what several SAEs are drawn against: a parameter in which they differ; by itself the first numeric one
  --class    class of the SAE in a folder, where it is one of your own: my_package.MySAE
  --controls further SAEs whose scores stand beside; those trained in the same sweep with a frozen part do so anyway, and on
             toys the oracle, whose latents are the features. Nothing is trained for that.
  --truth    leave planted features in the activations, and compare with them (suite truth; toys are always known)
  --data.*   what the SAE reads, where it does not say itself or you say otherwise, such as --data.cache_dir or --data.layer

A suite that was run on an SAE before with the same settings is not run again. Activations are kept under the data's cache_dir.
There is no tpp and no scr any more: the field has withdrawn them (arXiv 2605.18229, they disagree with the truth).
"""
_OWN = ("data", "x", "class", "truth", "suite", "suites", "controls")


def run(command: str, words: list[str]) -> int:
    """Evaluate the SAEs that the first words name, with the options that follow."""
    from hedgelab.protocols.evaluation.suite import option_parser, suite_classes

    if not words or {"-h", "--help"} & set(words):
        classes = suite_classes()
        options = option_parser(classes)[0].format_help().partition("\n\n")[2]
        print(_HELP.format(suites=", ".join(classes)) + options, end="")
        return 0
    named = list(takewhile(lambda word: not word.startswith("-"), words))
    if not named:
        raise UserError("evaluate: name a run, a folder with an SAE, or the config file of a sweep, before the options")
    rest = with_bare_flags(words[len(named) :], ["truth"])
    if (tree := compose(rest)).get("suite") in ("saebench", "sae_probes"):
        from hedgelab.interop.saebench import run_bench
        from hedgelab.tracking.runs import resolve_sae

        return run_bench([resolve_sae(word) for word in named], tree["suite"])

    from hedgelab.cli.studies import conduct
    from hedgelab.protocols.evaluation.evaluate import Evaluate
    from hedgelab.protocols.study import Bench

    print("\n".join(conduct(evaluation_of(named, rest, tree, Evaluate), Bench(), "")))
    return 0


def evaluation_of(named: list[str], words: list[str], tree: Tree, make: Callable[..., Any], own: Collection[str] = ()) -> Any:
    """What ``make`` makes of SAEs and options, as words and as a tree; ``own`` ones are the caller's; sweeps are trained."""
    from hedgelab.protocols.evaluation.suite import option_parser, suite_classes

    data, x, class_path, truth, suite, suites, controls = (tree.pop(key, None) for key in _OWN)
    names = str(suite).split(",") if suite is not None else [str(one) for one in suites or ["all"]]
    known = {"config", *_OWN, *own, *option_parser(suite_classes(names))[1]}
    of_cells: dict[str, list[str]] = {}  # options that are no suite's, and those of the data, by their first part
    for key, text in options_of(words):
        if (section := key.split(".")[0]) == "data" or section not in known:
            of_cells.setdefault(section, []).append(f"--{key}" if text is None else f"--{key}={text}")
    tree = {key: value for key, value in tree.items() if key not in of_cells}
    beside = [] if controls is None else str(controls).split(",")
    evaluation = make(named, names, tree, data, None if x is None else str(x), class_path, bool(truth), beside)
    of_sweeps = [word for word in named if Path(word).suffix in (".yaml", ".yml")]
    unknown = [section for section in of_cells if section != "data"]
    if unknown and not of_sweeps:
        raise UserError(f"evaluate: unknown option {of_cells[unknown[0]][0]}; {suggest(unknown[0], known)}")
    cell_words = [word for some in of_cells.values() for word in some]
    evaluation.saes = [_swept(word, cell_words) if word in of_sweeps else word for word in named]
    return evaluation


def _swept(file: str, words: list[str]) -> str:
    """Train what a sweep's config lists; the id of its run."""
    from hedgelab.cli.sweep import sweep
    from hedgelab.protocols.evaluation.evaluate import say

    study = sweep(["--config", file, *words])
    if study.failures:
        say("some cells failed; evaluating the others")
    return str(study.run_id)
