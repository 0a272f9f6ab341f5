"""``hedgelab export`` and ``hedgelab import``: SAEs for other libraries, and theirs for hedgelab."""

from __future__ import annotations

from pathlib import Path

from hedgelab.cli.light import LightParser
from hedgelab.errors import UserError


def run(command: str, words: list[str]) -> int:
    """Write an SAE into a folder, or read one of another library.

    Args:
        command: ``export`` or ``import``.
        words: Its options.

    Raises:
        UserError: There is no such SAE, it cannot be written or read, the folder is taken, or the hub refuses.
    """
    return _export(words) if command == "export" else _import(words)


def _export(words: list[str]) -> int:
    parser = LightParser(
        "export", "Write an SAE of a run, a folder or a checkpoint, for other libraries or as hedgelab's own."
    )
    parser.add_argument(
        "run", metavar="SAE", help="a run's id, its name, 'last', a folder with an SAE, or a .ckpt file"
    )
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write; must not exist, or be empty")
    parser.add_argument("--format", choices=("saelens", "hedgelab"), default="saelens", help="whose files to write")
    parser.add_argument(
        "--hooks",
        choices=("transformers", "transformer_lens"),
        default="transformers",
        help="whose name of the hook goes into the metadata; TransformerLens knows fewer models",
    )
    parser.add_argument(
        "--class", dest="class_path", metavar="PATH", help="class of the SAE in a folder, where it is one of your own"
    )
    parser.add_argument("--member", metavar="NAME", help="which SAE of a checkpoint of several")
    parser.add_argument("--push", metavar="USER/REPO", help="upload to the Hugging Face hub as well")
    options = parser.parse(words)
    folder = _empty_folder(options.to)

    from hedgelab.data.source import ActivationSource
    from hedgelab.interop.hub import push
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
        save_sae(sae, folder)
        if source is not None:
            source.save(folder)
        print(f"{type(sae).__name__} of {origin} → {folder}: {sae.d_in} × {sae.d_sae}")
        print(f'load it: hedgelab.saes.load_sae("{folder}")')
    else:
        config = export_saelens(sae, folder, source, options.hooks)
        print(f"{type(sae).__name__} of {origin} → {folder}: {config['architecture']}, {sae.d_in} × {sae.d_sae}")
        if source is None:
            print("no model and hook are known of it, and no normalisation was folded in")
        print(f'load it with SAELens 6 (tried with {WRITTEN_FOR}): sae_lens.SAE.load_from_disk("{folder}")')
    if options.push:
        print(f"uploaded: {push(folder, options.push)}")
    return 0


def _import(words: list[str]) -> int:
    parser = LightParser("import", "Turn an SAE of another library into one of hedgelab's.")
    parser.add_argument("source", metavar="DIR|HUB_ID", help="a folder, or user/repository[/folder] on the hub")
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write; must not exist, or be empty")
    libraries = ("saelens", "sparsify", "dictionary_learning")
    parser.add_argument("--format", choices=libraries, help="whose files they are; found out by default")
    options = parser.parse(words)
    target = _empty_folder(options.to)

    from hedgelab.interop.formats import config_lines, import_folder
    from hedgelab.interop.hub import fetch
    from hedgelab.saes import save_sae

    path = Path(options.source)
    sae, source, library = import_folder(path if path.exists() else fetch(options.source), options.format)
    save_sae(sae, target)
    source.save(target)
    print(f"{library} → {type(sae).__name__}, {sae.d_in} × {sae.d_sae}, in {target}")
    print("\n".join(["train on with this config:", *config_lines(sae, source, target)]))
    return 0


def _empty_folder(name: str) -> Path:
    """A folder to write into, which does not exist yet or is empty.

    Raises:
        UserError: Something is there.
    """
    folder = Path(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to: {folder} is there already and nothing is overwritten; give another folder")
    return folder
