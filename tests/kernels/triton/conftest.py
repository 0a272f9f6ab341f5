"""Keeps the cases out of the ordinary collection: ``test_triton.py`` runs them in a process of their own, where Triton is."""

collect_ignore = ["triton_cases.py"]
