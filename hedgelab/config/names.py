"""The valid name that a wrong one was probably meant to be."""

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The valid name that a wrong one most resembles, whatever the case of its letters; None where none does.

    >>> nearest("TopkSAE", ["TopKSAE", "VanillaSAE"])
    'TopKSAE'
    """
    by_case = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower(), by_case, n=1)
    return by_case[near[0]] if near else None


def suggest(name: str, names: Iterable[str]) -> str:
    """What to write instead of a wrong name: the nearest valid one, else all of them."""
    known = sorted(names)
    if near := nearest(name, known):
        return f"did you mean '{near}'?"
    return f"expected one of {', '.join(known)}" if known else "nothing is accepted here"
