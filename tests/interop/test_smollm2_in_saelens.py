"""SAEs trained on a real language model, in the real SAELens, which finds model and hook by the metadata alone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hedgelab.cli import main
from hedgelab.data.llm import LLMDataModule
from hedgelab.data.source import ActivationSource
from hedgelab.saes import load_sae
from hedgelab.tracking.runs import resolve_sae

pytestmark = [pytest.mark.llm, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SHORT = ["--trainer.max_steps", "24", "--data.init_args.batch_size", "256", "--data.init_args.contexts_per_block", "8"]
SHORT += ["--data.init_args.val_batches", "2", "--trainer.enable_checkpointing", "false"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of a BatchTopK and a matryoshka SAE in a store of their own."""
    store = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
        patch.chdir(ROOT)
        for name in ("smollm2", "smollm2_matryoshka"):
            assert main(["fit", "--config", f"configs/llm/{name}.yaml", *SHORT]) == 0
            assert main(["export", name, "--to", str(store / name)]) == 0
        yield store


def test_equal_activations_and_loss(trained, run_peer):
    data = LLMDataModule(cache_dir=str(ROOT / "runs" / "cache"))
    tokens = data.contexts.tokens[:4]
    save_file({"tokens": tokens.contiguous()}, trained / "tokens.safetensors")
    names = ("smollm2", "smollm2_matryoshka")
    jobs = [
        {"name": name, "do": "run_language_model", "folder": str(trained / name), "model": data.files.location}
        | {"tokens": str(trained / "tokens.safetensors"), "answer": str(trained / f"{name}.safetensors")}
        for name in names
    ]
    answers, missing = run_peer(jobs, trained)
    assert not missing
    for name in names:
        found = resolve_sae(name)
        sae, theirs = load_sae(found.folder), answers[name]
        everywhere = torch.ones_like(tokens, dtype=torch.bool)
        everywhere[:, 0] = False
        ours = data.harvester.rows(tokens, everywhere).float()
        torch.testing.assert_close(ours, theirs["x"], atol=2e-3, rtol=1e-4)  # two versions of transformers
        scale = ActivationSource.load(found.folder).scale
        with torch.no_grad():
            codes = sae.encode(theirs["x"] * scale)
            x_hat = sae.decode(codes) / scale
        # One latent may stand within rounding of its threshold.
        differing = ~torch.isclose(codes.to_dense(), theirs["acts"], atol=1e-4, rtol=1e-3)
        assert differing.sum() <= 2
        assert 1 < codes.active_per_example().float().mean() < 200
        loss = ((x_hat - theirs["x"]) ** 2).sum(1).mean()
        their_loss = ((theirs["x_hat"] - theirs["x"]) ** 2).sum(1).mean()
        torch.testing.assert_close(their_loss, loss, atol=0, rtol=1e-4)
        assert loss < (theirs["x"] - theirs["x"].mean(0)).square().sum(1).mean()  # it has learned something
