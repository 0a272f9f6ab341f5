"""``hedgelab export`` and ``hedgelab import``: SAEs for other libraries, and theirs for hedgelab."""

from __future__ import annotations

import argparse
from pathlib import Path

from hedgelab.cli.light import LightParser


def run(command: str, words: list[str]) -> int:
    """Write an SAE into a folder, or read one of another library."""
    options = LightParser(command).parse(words)
    _export(options) if command == "export" else _import(options)
    return 0


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
    from hedgelab.saes import save_sae

    path = Path(options.source)
    sae, source, library = import_folder(path if path.exists() else fetch(options.source), options.format)
    save_sae(sae, options.to)
    source.save(options.to)
    print(f"{library} → {type(sae).__name__}, {sae.d_in} × {sae.d_sae}, in {options.to}")
    print("\n".join(["train on with this config:", *config_lines(sae, source, options.to)]))
