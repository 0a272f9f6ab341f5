"""The hedging protocol on a language model's activations: phases share the stream; what latents mean."""

import torch

from hedgelab.protocols.case_study import LLMProbe, page
from hedgelab.protocols.hedge import Hedge, HedgeOptions, measure_together, train_together
from hedgelab.protocols.training_phases import PhaseRunner, PhaseTrainer
from hedgelab.saes import TopKSAE

STEPS = 12
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def test_protocol_runs_the_model_once_for_all_continuations_and_shows_what_moved(make_data, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    data = make_data(normalisation="centred", val_batches=2)
    trainer = PhaseTrainer(max_steps=STEPS, **QUIET)
    options = HedgeOptions(n_new=1, new_norm=1.0, seeds=2)
    study = Hedge(TopKSAE(data.d_in, 12, k=4), data, trainer, options)
    (trained,) = train_together([study], PhaseRunner(trainer))
    stream = data.stream("train")
    blocks = -(-2 * STEPS // stream.batches_per_block)
    harvested = data.tokens_read - 20 * 16 * -(-2 // data.stream("val").batches_per_block)
    assert harvested <= 20 * 16 * (blocks + 2)  # the one at the seam again, and one that was prefetched
    (scores,) = measure_together([study], [trained])
    assert all(0 <= result.degree < 1 for result in scores.values())
    text = page(trained[0].control, trained[0].extended, LLMProbe(data))
    assert text.count("promotes") == 1 + 2 * 8
    data.teardown("fit")


def test_probe_finds_the_strongest_places_and_promoted_tokens(make_data):
    data = make_data()
    data.setup("fit")
    probe = LLMProbe(data)
    sae = TopKSAE(data.d_in, 6, k=6)
    (found,) = probe.contexts(sae, [2]).values()
    assert [snippet.activation for snippet in found] == sorted((s.activation for s in found), reverse=True)
    x = data.harvester.rows(data.contexts.tokens, data.contexts.usable(data.skip_first))
    assert found[0].activation <= sae.encode(x).to_dense()[:, 2].max() + 1e-5
    assert found[0].activation > 0
    assert found[0].token.strip()
    unembedding = data.files.causal_lm("float32", "sdpa").get_output_embeddings().weight.detach()
    best = int((unembedding @ torch.ones(data.d_in)).argmax())
    assert probe.promoted(torch.ones(data.d_in))[0] == data.files.tokenizer().decode([best])
    data.teardown("fit")
