"""As many CPU threads as the work is worth: one for tiny toys, whose results then do not depend on the number of cores."""

from __future__ import annotations

import os

import lightning as L
import torch

from hedgelab.errors import UserError, whole_number

PRODUCTS_A_THREAD = 2**22
"""Products a step from which a further thread saves more than it costs to wait for it (tests/benchmarks/threads.py)."""
VARIABLE = "HEDGELAB_THREADS"
_GIVEN_ELSEWHERE = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def threads_for(products: int, most: int) -> int:
    """How many threads a step is worth.

    Args:
        products: ``batch_size · d_in · d_sae``, summed over the SAEs that train.
        most: Threads that there are.

    >>> threads_for(500 * 50 * 1, most=64), threads_for(4096 * 576 * 4608, most=64)
    (1, 64)
    """
    return max(1, min(most, products // PRODUCTS_A_THREAD))


def use_threads(trainer: L.Trainer, products: int) -> int | None:
    """Set the number of threads for a fit on the CPU, unless the environment sets it.

    ``HEDGELAB_THREADS`` sets the number whatever the work; where OMP_NUM_THREADS or MKL_NUM_THREADS is set, nothing changes.

    Args:
        trainer: Says where the fit runs.
        products: As in :func:`threads_for`; 0 where it is not known.

    Returns:
        The number of before; None where nothing was changed.

    Raises:
        UserError: HEDGELAB_THREADS is no whole number of at least 1.
    """
    before = torch.get_num_threads()
    if given := os.environ.get(VARIABLE):
        try:
            wanted = whole_number(VARIABLE, int(given))
        except ValueError as error:
            raise UserError(f"{VARIABLE}: expected a whole number of at least 1, got '{given}'") from error
    elif not products or trainer.strategy.root_device.type != "cpu" or any(map(os.environ.get, _GIVEN_ELSEWHERE)):
        return None
    else:
        wanted = threads_for(products, before)
    torch.set_num_threads(wanted)
    return before
