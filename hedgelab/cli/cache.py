"""``hedgelab cache``: activations of a language model to disk, once for all later runs."""

from __future__ import annotations

_HELP = """\
usage: hedgelab cache --config FILE [--verify] [--data.KEY VALUE ...]

Run the language model of a config's section `data` over its text, and write the activations to the folder data.cache. Every
later fit, hedge or sweep with the same section reads them instead of running the model; batches are the same. All else in
the config is ignored.

An interrupted or failed run goes on where it was. Several processes, also on several machines that see the folder, share the
work: run the same command as often as you like (srun, torchrun, or another terminal); each uses the GPU of its local rank.
What is written is raw: batch_size, seed, contexts_per_block, skip_first, max_norm_ratio, normalisation and held_out may differ
between the runs that read it. A cache of more contexts (data.max_contexts) than a run needs is fine.

  --verify   read what is there, compare all checksums, and write anew what is damaged
"""


def run(command: str, words: list[str]) -> int:
    """Write an activation cache.

    Args:
        command: ``cache``.
        words: Its options.

    Raises:
        UserError: Anything the user can mend.
    """
    if any(word in ("-h", "--help") for word in words):
        print(_HELP, end="")
        return 0
    from hedgelab.cli.caching import run_cache

    return run_cache(words)
