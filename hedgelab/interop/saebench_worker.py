"""``python saebench_worker.py BENCH MODEL OUTPUT NAME=FOLDER ...`` runs SAEBench or sae-probes, in a Python that has it.

The folders are SAELens's. Nothing of hedgelab is imported.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path

_EVALUATIONS = [("absorption", "AbsorptionEvalConfig"), ("sparse_probing", "SparseProbingEvalConfig")]
"""Module and config class; not scr_and_tpp, which the field has withdrawn (arXiv 2605.18229)."""
_SEEDS = (42, 43, 44)  # of sae-probes; the first is its own


def main(words: list[str]) -> None:
    """Load the SAEs and run the evaluations."""
    import torch
    from sae_lens import SAE

    bench, model, output, *pairs = words
    device = "cuda" if torch.cuda.is_available() else "cpu"
    saes = []
    for name, _, folder in (pair.partition("=") for pair in pairs):
        sae = SAE.load_from_disk(folder, device=device)
        if sae.cfg.architecture() != "topk":  # SAEBench wants decoder rows of norm 1; TopK selects by raw size
            sae.fold_W_dec_norm()
        saes.append((name, sae))
        if bench == "sae_probes":
            hook = json.loads((Path(folder) / "cfg.json").read_text())["metadata"]["hook_name"]
            for seed in _SEEDS:
                import_module("sae_probes").run_sae_evals(
                    sae=sae, model_name=model, hook_name=hook, reg_type="l1", setting="normal", ks=[1, 2, 5, 16], seed=seed,
                    results_path=f"{output}/{name}/{seed}", model_cache_path=f"{output}/activations", device=device,
                )  # fmt: skip
    if bench == "sae_probes":
        return
    Path(output).mkdir(parents=True, exist_ok=True)
    os.chdir(output)  # SAEBench keeps its artifacts in the working directory
    batch_size, dtype = (32, "float32") if device == "cpu" else (128, "bfloat16")
    settings = {"model_name": model, "llm_batch_size": batch_size, "llm_dtype": dtype}
    for package, config in _EVALUATIONS:
        module = import_module(f"sae_bench.evals.{package}.main")
        options = {} if package == "absorption" else {"clean_up_activations": True, "save_activations": False}
        module.run_eval(getattr(module, config)(**settings), saes, device, f"{output}/{package}", True, **options)


if __name__ == "__main__":
    main(sys.argv[1:])
