"""Runs SAEBench in whatever Python has it; called as a script, imports nothing of hedgelab.

Usage: ``python saebench_worker.py MODEL EVALUATIONS OUTPUT NAME=FOLDER ...`` with evaluations separated by
commas and folders in SAELens' format. Writes SAEBench's own result files below OUTPUT.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def main(words: list[str]) -> None:
    """Load the SAEs and run the evaluations."""
    import torch
    from sae_lens import SAE

    model, evaluations, output, *pairs = words
    device = "cuda" if torch.cuda.is_available() else "cpu"
    saes = []
    for pair in pairs:
        name, _, folder = pair.partition("=")
        sae = SAE.load_from_disk(folder, device=device)
        if (
            sae.cfg.architecture() != "topk"
        ):  # SAEBench takes decoder rows of norm 1 for granted; TopK selects by raw size
            sae.fold_W_dec_norm()
        saes.append((name, sae))
    Path(output).mkdir(parents=True, exist_ok=True)
    os.chdir(output)  # SAEBench keeps its artifacts in the working directory
    for evaluation in evaluations.split(","):
        run(evaluation, model, saes, device, output)


def run(evaluation: str, model: str, saes: list[tuple[str, Any]], device: str, output: str) -> None:
    """Run one of SAEBench's evaluations with its defaults."""
    batch_size, dtype = (32, "float32") if device == "cpu" else (128, "bfloat16")
    settings = {"model_name": model, "llm_batch_size": batch_size, "llm_dtype": dtype}
    if evaluation in ("scr", "tpp"):
        module = import_module("sae_bench.evals.scr_and_tpp.main")
        config = module.ScrAndTppEvalConfig(**settings, perform_scr=evaluation == "scr")
        module.run_eval(config, saes, device, output, True, clean_up_activations=True, save_activations=False)
    elif evaluation == "absorption":
        module = import_module("sae_bench.evals.absorption.main")
        module.run_eval(module.AbsorptionEvalConfig(**settings), saes, device, f"{output}/absorption", True)
    elif evaluation == "sparse_probing":
        module = import_module("sae_bench.evals.sparse_probing.main")
        config = module.SparseProbingEvalConfig(**settings)
        folder = f"{output}/sparse_probing"
        module.run_eval(config, saes, device, folder, True, clean_up_activations=True, save_activations=False)
    else:
        raise SystemExit(f"unknown evaluation {evaluation}")


if __name__ == "__main__":
    main(sys.argv[1:])
