"""One seed, many independent streams: every random number comes from a generator made for its purpose."""

import hashlib
import os

import torch


def resolve_seed(seed: int | None) -> int:
    """The given seed, else the run's (Lightning's ``seed_everything`` leaves it in the environment), else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed


def generator(seed: int, *purpose: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator that depends on the seed and the purpose alone, whatever was drawn elsewhere before.

    >>> a, b = generator(0, "init"), generator(0, "init")
    >>> bool((torch.rand(3, generator=a) == torch.rand(3, generator=b)).all())
    True
    """
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
