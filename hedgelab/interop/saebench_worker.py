"""``python saebench_worker.py MODEL OUTPUT NAME=FOLDER ...`` runs SAEBench in whatever Python has it, on SAELens' folders.

Nothing of hedgelab is imported.
"""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

_EVALUATIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("absorption", "AbsorptionEvalConfig", {}),
    ("sparse_probing", "SparseProbingEvalConfig", {}),
    ("scr_and_tpp", "ScrAndTppEvalConfig", {"perform_scr": True}),
    ("scr_and_tpp", "ScrAndTppEvalConfig", {"perform_scr": False}),
]
"""Module, config class, and its arguments besides the defaults."""


def main(words: list[str]) -> None:
    """Load the SAEs and run the evaluations."""
    import torch
    from sae_lens import SAE

    model, output, *pairs = words
    device = "cuda" if torch.cuda.is_available() else "cpu"
    saes = []
    for name, _, folder in (pair.partition("=") for pair in pairs):
        sae = SAE.load_from_disk(folder, device=device)
        if sae.cfg.architecture() != "topk":  # SAEBench wants decoder rows of norm 1; TopK selects by raw size
            sae.fold_W_dec_norm()
        saes.append((name, sae))
    Path(output).mkdir(parents=True, exist_ok=True)
    os.chdir(output)  # SAEBench keeps its artifacts in the working directory
    batch_size, dtype = (32, "float32") if device == "cpu" else (128, "bfloat16")
    settings = {"model_name": model, "llm_batch_size": batch_size, "llm_dtype": dtype}
    for package, config, arguments in _EVALUATIONS:
        module = import_module(f"sae_bench.evals.{package}.main")
        options = {} if package == "absorption" else {"clean_up_activations": True, "save_activations": False}
        folder = output if package == "scr_and_tpp" else f"{output}/{package}"  # which makes folders of its own
        module.run_eval(getattr(module, config)(**settings, **arguments), saes, device, folder, True, **options)


if __name__ == "__main__":
    main(sys.argv[1:])
