"""``hedgelab export``: an SAE of a run, for other libraries."""

from __future__ import annotations

from pathlib import Path

from hedgelab.cli.light import LightParser
from hedgelab.errors import UserError


def run(command: str, words: list[str]) -> int:
    """Write an SAE into a folder that SAELens loads, and upload it if asked to.

    Args:
        command: ``export``.
        words: Its options.

    Raises:
        UserError: There is no such SAE, the folder is taken, or the hub refuses.
    """
    parser = LightParser(command, "Write an SAE of a run, or of a folder, for other libraries.")
    parser.add_argument("run", metavar="RUN", help="a run's id, its name, 'last', or a folder that holds an SAE")
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write; must not exist, or be empty")
    parser.add_argument("--format", choices=("saelens",), default="saelens", help="whose files to write")
    parser.add_argument(
        "--hooks",
        choices=("transformers", "transformer_lens"),
        default="transformers",
        help="whose name of the hook goes into the metadata; TransformerLens knows fewer models",
    )
    parser.add_argument("--push", metavar="USER/REPO", help="upload to the Hugging Face hub as well")
    options = parser.parse(words)
    folder = empty_folder(options.to)

    from hedgelab.data.source import ActivationSource
    from hedgelab.interop.hub import push
    from hedgelab.interop.saelens import export_saelens
    from hedgelab.saes import load_sae
    from hedgelab.tracking.runs import resolve_sae

    found = resolve_sae(options.run)
    sae, source = load_sae(found.folder), ActivationSource.load(found.folder)
    config = export_saelens(sae, folder, source, options.hooks)
    origin = f"run {found.run.run_id} ({found.run.name})" if found.run else str(found.folder)
    print(f"{type(sae).__name__} of {origin} → {folder}: {config['architecture']}, {sae.d_in} × {sae.d_sae}")
    if source is None:
        print("no model and hook are known of it, and no normalisation was folded in")
    print(f'load it: sae_lens.SAE.load_from_disk("{folder}")')
    if options.push:
        print(f"uploaded: {push(folder, options.push)}")
    return 0


def empty_folder(name: str) -> Path:
    """A folder to write into, which does not exist yet or is empty.

    Raises:
        UserError: Something is there.
    """
    folder = Path(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to: {folder} is there already and nothing is overwritten; give another folder")
    return folder
