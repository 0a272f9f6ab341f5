"""``hedgelab import``: an SAE of another library, to measure or to train on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hedgelab.cli.export import empty_folder
from hedgelab.cli.light import LightParser

if TYPE_CHECKING:
    from hedgelab.data.source import ActivationSource
    from hedgelab.saes import SAE

_LIBRARIES = ("saelens", "sparsify", "dictionary_learning")


def run(command: str, words: list[str]) -> int:
    """Turn a folder, or a folder of the hub, into an SAE of hedgelab.

    Args:
        command: ``import``.
        words: Its options.

    Raises:
        UserError: It is no SAE that hedgelab can read, or the folder to write is taken.
    """
    parser = LightParser(command, "Turn an SAE of another library into one of hedgelab's.")
    parser.add_argument("source", metavar="DIR|HUB_ID", help="a folder, or user/repository[/folder] on the hub")
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write; must not exist, or be empty")
    parser.add_argument("--format", choices=_LIBRARIES, help="whose files they are; found out by default")
    options = parser.parse(words)
    target = empty_folder(options.to)

    from hedgelab.interop.formats import import_folder
    from hedgelab.interop.hub import fetch
    from hedgelab.saes import save_sae

    folder = Path(options.source)
    sae, source, library = import_folder(folder if folder.exists() else fetch(options.source), options.format)
    save_sae(sae, target)
    source.save(target)
    print(f"{library} → {type(sae).__name__}, {sae.d_in} × {sae.d_sae}, in {target}")
    print("\n".join(["train on with this config:", *config_lines(sae, source, target)]))
    return 0


def config_lines(sae: SAE, source: ActivationSource, folder: Path) -> list[str]:
    """A config of ``hedgelab fit`` that goes on from the imported SAE, as far as its folder told what it reads."""
    import yaml

    architecture = {key: value for key, value in sae.config().items() if key not in ("class", "d_in", "inner")}
    start = {"weights": str(folder)}
    if "inner" in (whole := sae.config()):
        inner = {key: value for key, value in whole["inner"].items() if key not in ("class", "d_in")}
        architecture["inner"] = {"class_path": whole["inner"]["class"], "init_args": {**inner, "init": start}}
    else:
        architecture["init"] = start
    hook = {"layer": source.layer} if source.layer is not None else {"hook": source.hook}
    reads = {"model": source.model, **hook, "context_length": source.context_length, "normalisation": "none"}
    config = {
        "trainer": {"max_steps": 1000},
        "data": {
            "class_path": "LLMDataModule",
            "init_args": {key: value for key, value in reads.items() if value is not None},
        },
        "model": {"class_path": type(sae).__name__, "init_args": architecture},
    }
    return yaml.safe_dump(config, sort_keys=False, default_flow_style=None).rstrip().splitlines()
