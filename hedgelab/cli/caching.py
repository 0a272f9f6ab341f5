"""The work of ``hedgelab cache``: the section ``data`` of a config made, its activations written."""

from __future__ import annotations

import os
from typing import Any

from jsonargparse import ArgumentParser
from omegaconf.errors import OmegaConfBaseException

from hedgelab.cli.compose import Tree, compose, without_configs
from hedgelab.cli.diagnose import Walk
from hedgelab.cli.errors import one_line, user_error
from hedgelab.cli.explain import explain_construction, explain_parsing, resolve
from hedgelab.cli.nearest import nearest
from hedgelab.cli.signatures import Parameter
from hedgelab.cli.writing import check_folders
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.llm import LLMDataModule
from hedgelab.data.llm.cache_writing import Written, write_cache
from hedgelab.errors import UserError

_OWN = "verify"


def run_cache(words: list[str]) -> int:
    """Parse, write, say what there is."""
    verify = f"--{_OWN}" in words
    words = [word for word in words if word != f"--{_OWN}"]
    tree = compose(words)
    _check_words(words)
    check_folders(resolve(tree), compose(without_configs(words)), also=frozenset({"data.cache"}))
    data = _make(tree)
    if data.cache is None:
        raise UserError("data.cache: names no folder to write; add it to the config, or give --data.cache DIR")
    try:
        written = write_cache(data, data.cache, verify)
    finally:
        data.teardown("fit")
    print("\n".join(_lines(written)))
    return 0


def _make(tree: Tree) -> LLMDataModule:
    """The DataModule of a config.

    Raises:
        UserError: A wrong key or value, or activations of no language model.
    """
    section = resolve(tree).get("data")
    if section is None:
        raise UserError("data: is required: the config of an LLMDataModule")
    walk = Walk({"data": section}, {"data": Parameter(ActivationDataModule)})
    parser = ArgumentParser(exit_on_error=False, parser_mode="omegaconf+")
    parser.add_subclass_arguments(ActivationDataModule, "data", required=True)
    try:
        parsed = parser.parse_object({"data": section})
    except (Exception, OmegaConfBaseException) as error:
        raise UserError(explain_parsing(error, tree, walk)) from error
    try:
        data: Any = parser.instantiate(parsed).data
    except Exception as error:
        mistake = user_error(error)
        text = explain_construction(mistake, walk) if isinstance(mistake, UserError) else one_line(str(error))
        raise UserError(text) from error
    if not isinstance(data, LLMDataModule):
        raise UserError(f"data: {type(data).__name__} needs no cache; only activations of language models are cached")
    _take_own_gpu(data)
    return data


def _take_own_gpu(data: LLMDataModule) -> None:
    """Of several processes on a machine, each runs the model on the GPU of its number."""
    import torch

    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    if local is not None and str(data.device) == "cuda":
        data.device = torch.device("cuda", int(local) % torch.cuda.device_count())


def _check_words(words: list[str]) -> None:
    """Refuse options at the top that look like ours and are not."""
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and "." not in name and name not in ("--config", "--data", f"--{_OWN}"):
            near = nearest(name, ["--config", "--data", f"--{_OWN}"])
            hint = f"did you mean '{near}'?" if near else "see 'hedgelab cache --help'"
            raise UserError(f"unknown argument '{word}'; {hint}")


def _lines(written: Written) -> list[str]:
    cache = written.cache
    length, d_in = cache.shape
    size = sum(cache.bytes_of(shard) for shard in cache.shards()) / 1e9
    lines = [
        f"cache {cache.folder}: {cache.contexts} contexts of {length} tokens, {d_in} wide, {cache.storage_dtype}, {size:.2f} GB"
    ]
    if written.repeatable is None:
        return [*lines, "nothing was left to write"]
    lines.append(f"this process ran {written.tokens} tokens, {written.tokens / written.seconds:.0f} a second")
    if not written.repeatable:
        lines.append(
            "here the model's last bits depend on what shares a forward pass: runs from the cache equal one another to the "
            "bit, and live runs to rounding"
        )
    return lines
