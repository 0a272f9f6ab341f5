"""The commands that train nothing: their options as one table, and what they do with tracked runs and saved SAEs."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from hedgelab.config.names import suggest
from hedgelab.errors import UserError


def at_least_one(text: str) -> int:
    """A number of things to be listed."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def new_place(text: str) -> Path:
    """A file to write, or a folder, which must be empty."""
    path = Path(text)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise argparse.ArgumentTypeError(f"{path} is there already and nothing is overwritten; name another one")
    return path


_FOLDER = {"required": True, "metavar": "DIR", "type": new_place, "help": "folder to write; must not exist, or be empty"}
_LIMIT = {"type": at_least_one, "metavar": "N"}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "runs": {
        "--last": {"action": "store_true", "help": "only the newest run"},
        "--json": {"action": "store_true", "help": "a JSON array: name, status, params, tags, final metrics"},
        "--experiment": {"metavar": "NAME", "help": "only runs of this experiment"},
        "--limit": {"default": 20, "help": "most runs listed, newest first", **_LIMIT},
    },
    "compare": {
        "runs": {"nargs": "+", "metavar": "RUN", "help": "a run's id, its name, or 'last'"},
        "--metrics": {"nargs": "+", "metavar": "NAME", "help": "metrics to show; the best known by default"},
        "--to": {"metavar": "FILE", "type": new_place, "help": "figure to write; runs/comparisons/<ids>.png by default"},
    },
    "report": {
        "--experiment": {"default": "hedgelab", "metavar": "NAME", "help": "the experiment"},
        "--to": {"metavar": "FILE", "type": new_place, "help": "file to write; runs/reports/<experiment>.html by default"},
        "--limit": {"default": 100, "help": "most runs, the newest", **_LIMIT},
        "--ui": {"metavar": "ADDRESS", "help": "where the MLflow UI answers, for links to runs"},
    },
    "sync": {},
    "ui": {
        "run": {"nargs": "?", "default": "last", "metavar": "RUN", "help": "open on this run: its id, its name, or 'last'"},
        "--port": {"type": int, "default": 5000, "help": "port to listen on"},
        "--host": {"default": "127.0.0.1", "help": "address to listen on; others than loopback let others in"},
    },
    "export": {
        "run": {"metavar": "SAE", "help": "a run's id, its name, 'last', a folder with an SAE, or a .ckpt file"},
        "--to": _FOLDER,
        "--format": {"choices": ("saelens", "hedgelab"), "default": "saelens", "help": "whose files to write"},
        "--hooks": {"choices": ("transformers", "transformer_lens"), "default": "transformers", "help": "whose hook name"},
        "--class": {"metavar": "PATH", "dest": "class_path", "help": "class of the SAE in a folder, if it is your own"},
        "--member": {"metavar": "NAME", "help": "which SAE of a checkpoint of several"},
        "--push": {"metavar": "USER/REPO", "help": "upload to the Hugging Face hub as well"},
    },
    "import": {
        "source": {"metavar": "SOURCE", "help": "a folder, user/repository[/folder] on the hub, or saelens:RELEASE/ID"},
        "--to": _FOLDER,
        "--format": {"choices": ("saelens", "sparsify", "dictionary_learning"), "help": "whose files; found out by default"},
    },
}  # fmt: skip


class LightParser(argparse.ArgumentParser):
    """The options of a light command; its mistakes are UserErrors."""

    def __init__(self, command: str) -> None:
        from hedgelab.cli import COMMANDS

        super().__init__(
            prog=f"hedgelab {command}", description=f"{COMMANDS[command].summary}.".capitalize(),
            allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )  # fmt: skip
        for name, settings in OPTIONS[command].items():
            self.add_argument(name, **settings)

    def parse(self, words: list[str]) -> argparse.Namespace:
        """Parse all words; unknown options are refused with the nearest valid one."""
        parsed, unknown = self.parse_known_args(words)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown argument '{unknown[0]}'; {suggest(unknown[0].split('=')[0], options)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise UserError(message.removeprefix("argument "))


def run(command: str, words: list[str]) -> int:
    """Run a command."""
    options = LightParser(command).parse(words)
    do = {"runs": _runs, "compare": _compare, "report": _report, "sync": _sync, "export": _export, "import": _import}
    do[command](options)
    return 0


def _runs(options: argparse.Namespace) -> None:
    from hedgelab.tracking.listing import as_json, format_table
    from hedgelab.tracking.runs import list_runs

    found = list_runs(experiment=options.experiment, last=options.last, limit=options.limit)
    print(as_json(found) if options.json else format_table(found))


def _compare(options: argparse.Namespace) -> None:
    from hedgelab.glossary import title
    from hedgelab.tracking.listing import as_text, compare, curve_metrics, curves
    from hedgelab.tracking.runs import resolve_run
    from hedgelab.tracking.store import runs_dir, tracking_uri

    runs = list({one.run_id: one for one in map(resolve_run, options.runs)}.values())
    known = {key for one in runs for key in one.metrics}
    for name in options.metrics or []:
        if name not in known:
            raise UserError(f"--metrics: none of the runs has '{name}'; they have {', '.join(sorted(known)[:12])} ...")
    print(as_text(compare(runs, options.metrics)))
    drawn = curves(runs, options.metrics or curve_metrics(runs))
    if drawn:
        from hedgelab.plots.training import overlaid_curves

        ids = "-".join(one.run_id[:8] for one in runs[:6])
        file = options.to or runs_dir(tracking_uri()) / "comparisons" / f"{ids}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        overlaid_curves(drawn, {key: title(key) for key in drawn}, f"{len(runs)} runs over training").savefig(file)
        print(f"\ncurves: {file}")


def _report(options: argparse.Namespace) -> None:
    """Build the report, write it, and log it to the experiment's one run of reports, which is made if missing."""
    from hedgelab.reports.report import build
    from hedgelab.tracking.runs import REPORT_TAG, open_runs
    from hedgelab.tracking.store import runs_dir, tracking_uri, without_credentials

    uri = tracking_uri()
    address = options.ui or (without_credentials(uri) if uri.startswith("http") else "http://127.0.0.1:5000")
    text = build(options.experiment, options.limit, address)
    file = options.to or runs_dir(uri) / "reports" / f"{options.experiment.replace('/', '_')}.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    client, experiments = open_runs()
    (number,) = [key for key, name in experiments.items() if name == options.experiment]
    found = client.search_runs([number], filter_string=f"tags.`{REPORT_TAG}` = 'true'", max_results=1)
    note = "The report of this experiment: open the artifact report.html. Each `hedgelab report` renews it."
    tags = {REPORT_TAG: "true", "mlflow.note.content": note}
    run_id = (found[0] if found else client.create_run(number, run_name="report", tags=tags)).info.run_id
    client.log_text(run_id, text, "report.html")
    client.set_terminated(run_id)
    print(f"report: {file} ({len(text) / 1e6:.1f} MB), and report.html in run {run_id}")


def _sync(options: argparse.Namespace) -> None:
    from hedgelab.tracking.sync import sync

    sent = sync(announce=lambda line: print(f"sync: {line}", flush=True))
    if sent.left:
        raise UserError(f"sync: {len(sent.left)} left: {'; '.join(sent.left)}")
    runs = len(sent.runs)
    print(f"sync: sent what waited of {runs} run{'s' * (runs != 1)}" if runs else "sync: nothing waits")


def _export(options: argparse.Namespace) -> None:
    from hedgelab.data.source import ActivationSource
    from hedgelab.interop.formats import push
    from hedgelab.interop.saelens import WRITTEN_FOR, export_saelens
    from hedgelab.saes import sae_from_checkpoint, save_sae
    from hedgelab.tracking.runs import import_class, resolve_sae

    source: ActivationSource | None = None
    if (checkpoint := Path(options.run)).is_file():
        import_class(options.class_path)
        sae, origin = sae_from_checkpoint(checkpoint, options.member), options.run
    else:
        found = resolve_sae(options.run)
        sae, source = found.load(options.class_path), ActivationSource.load(found.folder)
        origin = f"run {found.run.run_id} ({found.run.name})" if found.run else str(found.folder)
    if options.format == "hedgelab":
        save_sae(sae, options.to)
        if source is not None:
            source.save(options.to)
        print(f"{type(sae).__name__} of {origin} → {options.to}: {sae.d_in} × {sae.d_sae}")
        print(f'load it: hedgelab.saes.load_sae("{options.to}")')
    else:
        config = export_saelens(sae, options.to, source, options.hooks)
        print(f"{type(sae).__name__} of {origin} → {options.to}: {config['architecture']}, {sae.d_in} × {sae.d_sae}")
        if source is None:
            print("no model and hook are known of it, and no normalisation was folded in")
        print(f'load it with SAELens 6 (tried with {WRITTEN_FOR}): sae_lens.SAE.load_from_disk("{options.to}")')
    if options.push:
        print(f"uploaded: {push(options.to, options.push)}")


def _import(options: argparse.Namespace) -> None:
    from hedgelab.interop.formats import config_lines, fetch, import_folder
    from hedgelab.interop.saelens import import_pretrained
    from hedgelab.saes import save_sae

    path, pretrained = Path(options.source), options.source.removeprefix("saelens:")
    if pretrained != options.source:
        sae, source, library = *import_pretrained(pretrained), "saelens"
    else:
        sae, source, library = import_folder(path if path.exists() else fetch(options.source), options.format)
    save_sae(sae, options.to)
    source.save(options.to)
    print(f"{library} → {type(sae).__name__}, {sae.d_in} × {sae.d_sae}, in {options.to}")
    if sae.trainable:
        print("\n".join(["train on with this config:", *config_lines(sae, source, options.to)]))
    else:
        print(f"it cannot be trained on; measure it: hedgelab evaluate {options.to}")
