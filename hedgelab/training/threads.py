"""As many CPU threads as the work is worth: one for tiny toys, whose results then do not depend on the number of cores."""

from __future__ import annotations

import os

import lightning as L
import torch

from hedgelab.errors import whole_number

PRODUCTS_A_THREAD = 2**22
"""Products a step from which a further thread saves more than it costs to wait for it (tests/benchmarks/threads.py)."""
_GIVEN_ELSEWHERE = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def use_threads(trainer: L.Trainer, products: int) -> int | None:
    """Set the number of threads for a fit on the CPU; the number of before, or None where nothing was changed.

    ``HEDGELAB_THREADS`` sets the number whatever the work; where OMP_NUM_THREADS or MKL_NUM_THREADS is set, nothing changes.

    The products of a step are ``batch_size · d_in · d_sae``, summed over the SAEs that train; 0 where that is not known.
    """
    before = torch.get_num_threads()
    if given := os.environ.get("HEDGELAB_THREADS"):
        wanted = whole_number("HEDGELAB_THREADS", int(given) if given.isdecimal() else given)
    elif not products or trainer.strategy.root_device.type != "cpu" or any(map(os.environ.get, _GIVEN_ELSEWHERE)):
        return None
    else:
        wanted = max(1, min(before, products // PRODUCTS_A_THREAD))
    torch.set_num_threads(wanted)
    return before
