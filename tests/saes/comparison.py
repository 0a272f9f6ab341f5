"""What tests compare SAEs by."""

import torch


def same_weights(a, b):
    """Whether two SAEs hold bit-identical weights and buffers; a threshold that is not set yet (NaN) equals another."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(value.nan_to_num(), second[name].nan_to_num()) and torch.equal(value.isnan(), second[name].isnan())
        for name, value in first.items()
    )
