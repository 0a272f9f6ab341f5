"""Run by an interpreter that has the other libraries: ``python peer.py jobs.json``; knows nothing of hedgelab.

Each job names what to do, a folder, a file of activations ``x`` and a file for the answer: activations of the latents and
reconstructions, as the library itself gives them.
"""

import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file, save_file


def answer(job, encode, decode, **others):
    x = inputs(job)
    with torch.no_grad():
        acts = encode(x)
        found = {"acts": acts, "x_hat": decode(acts).reshape(len(x), -1)}
        found |= {name: forward(x) for name, forward in others.items()}
        save_file({name: value.contiguous() for name, value in found.items()}, job["answer"])


def inputs(job):
    """Activations; those of attention heads as TransformerLens has them, ``[batch, heads, d_head]``."""
    x = load_file(job["x"])["x"]
    return x.unflatten(1, (job["heads"], -1)) if "heads" in job else x


def load_saelens(job):
    from sae_lens import SAE

    sae = SAE.load_from_disk(job["folder"])
    answer(job, sae.encode, sae.decode)
    metadata = sae.cfg.metadata
    told = {"architecture": sae.cfg.architecture(), **{key: metadata[key] for key in job.get("metadata", [])}}
    Path(job["answer"]).with_suffix(".json").write_text(json.dumps(told))


def list_saelens(job):
    """What SAELens's registry has."""
    import sae_lens.registry as registry

    found = {"inference": sorted(registry.SAE_CLASS_REGISTRY), "training": sorted(registry.SAE_TRAINING_CLASS_REGISTRY)}
    Path(job["answer"]).with_suffix(".json").write_text(json.dumps(found))
    save_file({"count": torch.tensor(sum(map(len, found.values())))}, job["answer"])


def make_saelens(job):
    """A random SAE, saved, and what hedgelab makes of the object itself if this interpreter finds what hedgelab needs."""
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class, get_sae_training_class

    getter = get_sae_training_class if job["training"] else get_sae_class
    sae_class, config_class = getter(job["architecture"])
    sae = sae_class(config_class(d_in=job["d_in"], d_sae=job["d_sae"], **job["arguments"]))
    randomise(sae)
    sae.save_model(job["folder"])
    if "scaling_factor" in job:  # a checkpoint from the middle of training: the factor lies beside the weights
        from sae_lens.training.activation_scaler import ActivationScaler

        ActivationScaler(job["scaling_factor"]).save(job["folder"] + "/activation_scaler.json")
        sae.fold_activation_norm_scaling_factor(job["scaling_factor"])
    ours = from_object(sae, job)
    if job.get("refused"):
        save_file({"nothing": torch.zeros(1)}, job["answer"])
        return
    if job["training"]:  # what inference makes of it
        sae.save_inference_model(job["folder"] + "_inference")
        sae = SAE.load_from_disk(job["folder"] + "_inference")
    if sae.dtype == torch.bfloat16:
        sae = sae.to(torch.float32)  # its numbers, computed with as hedgelab does
    answer(job, sae.encode, sae.decode, forward=lambda x: sae(x).reshape(len(x), -1), **ours)


def from_object(sae, job):
    """Activations, reconstructions and the outputs of ``hedgelab.from_saelens(sae)``; the line where it refuses."""
    sys.path += [place for place in job["hedgelab"] if place not in sys.path]
    try:
        from hedgelab import UserError, from_saelens
    except ImportError:
        return {}
    sae.use_error_term = not job["training"] and "transcoder" not in job["architecture"] and "heads" not in job
    try:
        theirs, source = from_saelens(sae)
    except UserError as refused:
        Path(job["answer"]).with_suffix(".json").write_text(json.dumps({"refused": str(refused)}))
        return {}
    finally:
        sae.use_error_term = False
    Path(job["answer"]).with_suffix(".json").write_text(json.dumps({"hook": source.hook, "layer": source.layer}))
    x = load_file(job["x"])["x"]
    codes = theirs.encode(x)
    return {
        "our_acts": lambda _: codes.to_dense(),
        "our_x_hat": lambda _: theirs.decode(codes),
        "our_forward": lambda _: theirs(x),
    }


def import_release(job):
    """``saelens:user/repository/ID`` by the real ``SAE.from_pretrained``, whose downloads lie beside the job's folder."""
    sys.path += [place for place in job["hedgelab"] if place not in sys.path]
    from huggingface_hub.utils import LocalEntryNotFoundError
    from sae_lens.loading import pretrained_sae_loaders

    from hedgelab.interop.saelens import import_pretrained

    def download(repo_id, filename, **options):
        path = Path(job["folder"]).parent / filename
        if not path.exists():
            raise LocalEntryNotFoundError(filename)
        return str(path)

    pretrained_sae_loaders.hf_hub_download = download
    sae, _ = import_pretrained(f"user/repository/{job['id']}")
    answer(job, lambda x: sae.encode(x).to_dense(), sae.decode)


def make_sparsify(job):
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    coder = SparseCoder(job["d_in"], SparseCoderConfig(num_latents=job["d_sae"], **job["arguments"]))
    randomise(coder)
    coder.save_to_disk(job["folder"])
    coder = SparseCoder.load_from_disk(job["folder"])

    def encode(x):
        top, latents, _ = coder.encode(x)
        return torch.zeros(len(x), job["d_sae"]).scatter(1, latents, top)

    answer(job, encode, lambda acts: acts @ coder.W_dec + coder.b_dec)
    x = load_file(job["x"])["x"]
    torch.testing.assert_close(load_file(job["answer"])["x_hat"], coder(x).sae_out)


def make_dictionary_learning(job):
    # The package imports, for its buffers, libraries whose dependencies it does not declare; its SAEs need none of them.
    for name in ("nnsight", "datasets", "zstandard"):
        sys.modules.setdefault(name, MagicMock())
    import dictionary_learning.dictionary as dictionaries
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    own = {cls.__name__: cls for cls in (BatchTopKSAE, MatryoshkaBatchTopKSAE, AutoEncoderTopK)}
    cls = own.get(job["dict_class"]) or getattr(dictionaries, job["dict_class"])
    sae = cls(job["d_in"], job["d_sae"], **job["arguments"])
    randomise(sae)
    folder = Path(job["folder"])
    folder.mkdir(parents=True)
    torch.save(sae.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": job["dict_class"], "lm_name": "some/model", "layer": 3, **job["arguments"]}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    if job["dict_class"] == "AutoEncoder":
        sae = cls.from_pretrained(folder / "ae.pt")
    answer(job, sae.encode, sae.decode)


def list_model_aliases(job):
    """TransformerLens's own table of what else its models are called."""
    from transformer_lens.supported_models import MODEL_ALIASES

    Path(job["answer"]).with_suffix(".json").write_text(json.dumps(MODEL_ALIASES))
    save_file({"count": torch.tensor(len(MODEL_ALIASES))}, job["answer"])


def run_language_model(job):
    """SAELens's own way from the metadata of a folder to a model, its hook, and the loss with the reconstruction put in."""
    from sae_lens import SAE
    from sae_lens.load_model import load_model

    sae = SAE.load_from_disk(job["folder"])
    metadata = sae.cfg.metadata
    model = load_model(metadata.model_class_name, job["model"], "cpu", hook_names=[metadata.hook_name])
    tokens = load_file(job["tokens"])["tokens"].long()
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=[metadata.hook_name])
        x = cache[metadata.hook_name][:, metadata.seqpos_slice[0] :].flatten(0, 1).float()
        acts = sae.encode(x)
        x_hat = sae.decode(acts)
    save_file({"x": x.contiguous(), "acts": acts.contiguous(), "x_hat": x_hat.contiguous()}, job["answer"])


def score_synthetic(job):
    """SynthSAEBench's scores of latents on known features, by SAELens's own calculators, over batches."""
    from sae_lens.evals import ExplainedVarianceCalculator
    from sae_lens.synthetic import evals

    given = load_file(job["x"])
    W_dec, directions = given["W_dec"], given["directions"]
    l0, dead = evals.L0Calculator(), evals.DeadLatentsCalculator(len(W_dec))
    norms, variance = evals.ShrinkageCalculator(), ExplainedVarianceCalculator()
    detection = evals.ClassificationMetricsCalculator(W_dec, directions)
    for x, x_hat, latents, features in zip(
        *(given[name].split(job["batch_size"]) for name in ("x", "x_hat", "latents", "features")), strict=True
    ):
        l0.add_batch(latents)
        dead.add_batch(latents)
        norms.add_batch(x_hat, x)
        variance.add_batch(x_hat, x)
        detection.add_batch(latents, features)
    found = detection.compute()
    scores = {
        "l0": l0.compute(),
        "dead_latents": dead.compute(),
        "norm_ratio": norms.compute(),
        "explained_variance": variance.compute(),
        "mcc": evals.mean_correlation_coefficient(W_dec, directions),
        "uniqueness": evals.feature_uniqueness(W_dec, directions),
        "nearest_precision": found.precision,
        "nearest_recall": found.recall,
        "nearest_f1": found.f1_score,
    }
    save_file({name: torch.tensor(float(score), dtype=torch.float64) for name, score in scores.items()}, job["answer"])


def randomise(module):
    """Weights that hide nothing: biases away from zero, decoder rows of different norms, thresholds that matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not value.is_floating_point():
                continue
            size = 0.3 if value.dim() == 2 else 0.2
            noise = size * torch.randn(value.shape, generator=generator)
            value.copy_(noise.abs() if "threshold" in name else noise)


def main():
    results = {}
    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            globals()[job["do"]](job)
            results[job["name"]] = "done"
        except ImportError as error:
            results[job["name"]] = f"missing: {error}"
    sys.stdout.write("RESULTS " + json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
