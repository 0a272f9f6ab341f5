"""The hedging degree from training to number: phases, seeds, continuations, what is recorded of them."""

import functools

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from hedgelab.data.toy import CopulaFiring, LowRankCorrelation, ToyDataModule, Zipf
from hedgelab.errors import UserError
from hedgelab.metrics.functional import hedging_degree
from hedgelab.protocols.hedge import (
    Continuations,
    Hedge,
    HedgeOptions,
    continuation,
    measure_together,
    outcome_of,
    train_together,
)
from hedgelab.protocols.phase_data import PhaseData
from hedgelab.protocols.study import Bench
from hedgelab.protocols.training_phases import Phase, PhaseRunner, PhaseTrainer
from hedgelab.saes import BatchTopKSAE, Initialization, JumpReLUSAE, MatryoshkaSAE, TopKSAE, VanillaSAE, fresh
from hedgelab.tracking import MLflowTracker
from tests.saes.comparison import same_weights

D_IN, D_SAE, STEPS = 12, 6, 15
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
BATCH_TOPK = functools.partial(BatchTopKSAE, d_sae=D_SAE, k=2, dead_after_steps=5, init=Initialization(b_dec="mean"))
MAKERS = {
    "vanilla": functools.partial(VanillaSAE, d_sae=D_SAE, l1_coefficient=1e-2, l1_warmup_steps=5),
    "topk": functools.partial(TopKSAE, d_sae=D_SAE, k=2),
    "batch_topk": BATCH_TOPK,
    "jumprelu": functools.partial(JumpReLUSAE, d_sae=D_SAE, l0_coefficient=1e-3),
    "matryoshka": lambda d_in: MatryoshkaSAE(d_in, BATCH_TOPK, [2, D_SAE]),
}


@pytest.fixture(autouse=True)
def one_thread_and_seed(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def toy():
    return ToyDataModule(
        CopulaFiring(12, Zipf(), LowRankCorrelation(2, strength=0.6)), d_in=D_IN, batch_size=32, val_batches=4, seed=0
    )


def protocol(model, label="", **options):
    trainer = PhaseTrainer(max_steps=STEPS, **QUIET)
    return Hedge(model, toy(), trainer, HedgeOptions(n_new=2, new_norm=1.0, **options), label=label)


def train(made):
    return train_together([made], PhaseRunner(made.trainer))[0]


@pytest.mark.parametrize("kind", MAKERS)
def test_every_phase_is_what_it_would_be_alone(kind):
    model = MAKERS[kind](D_IN)
    trained = train(protocol(model, lr=1e-2))[0]

    def alone(sae, start, **reordered):
        trainer = L.Trainer(max_steps=STEPS, enable_checkpointing=False, **QUIET)
        trainer.fit(sae, datamodule=PhaseData(toy(), start, STEPS, **reordered))
        return sae

    initial = alone(fresh(model, 0), 0)
    options = HedgeOptions(n_new=2, new_norm=1.0, lr=1e-2)
    assert same_weights(trained.control, alone(continuation(initial, "control", 0, options, STEPS), STEPS))
    assert same_weights(trained.extended, alone(continuation(initial, "extended", 0, options, STEPS), STEPS))
    assert not same_weights(trained.control, trained.reordered)


def test_names_with_dots_see_their_own_order_too():
    """A module's name has no dots, so members that are called by values such as lr=0.1 go by other names in training."""
    plain, dotted = (train(protocol(TopKSAE(D_IN, D_SAE, k=2), label))[0] for label in ("", "lr=0.1/"))
    assert all(same_weights(one, other) for one, other in zip(plain, dotted, strict=True))


def test_scores_are_those_of_the_decoders_with_all_controls():
    made = protocol(BATCH_TOPK(D_IN), seeds=2)
    trained = train(made)
    (scores,) = measure_together([made], [trained])
    assert set(scores) == {0, 1}
    control, extended, reordered = (sae.W_dec for sae in trained[0])
    expected = hedging_degree(control, extended, reordered=reordered, foreign=[trained[1].extended.W_dec[D_SAE:]])
    for name in ("degree", "projection", "baseline", "foreign_baseline", "noise_floor", "delta_norm"):
        assert float(getattr(scores[0], name)) == pytest.approx(float(getattr(expected, name)), abs=1e-12)
    assert scores[0].covariance_baseline > 0
    assert scores[0].live_new_latents == 2


def test_a_study_measures_and_repeats_itself_without_a_store():
    def measure():
        trainer = PhaseTrainer(max_steps=STEPS, **QUIET)
        return Hedge(TopKSAE(D_IN, D_SAE, k=2), toy(), trainer, HedgeOptions(n_new=2, new_norm=1.0)).run(Bench())

    first, second = measure(), measure()
    assert first.tables == second.tables
    assert first.metrics == second.metrics
    assert 0 < first.metrics["hedging/projection"] < 1
    assert first.metrics["hedging/residual_hedging"] == first.metrics["hedging/residual_hedging"]  # not NaN
    assert first.failure is None


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = torch.device("cuda", 0)


def test_saes_are_measured_on_the_device_of_the_activations(monkeypatch):
    """A language model's activations may be on a GPU, while SAEs are on the CPU again when their training has ended."""
    made = protocol(TopKSAE(D_IN, D_SAE, k=2))
    saes = {0: Continuations(*(TopKSAE(D_IN, width, k=2) for width in (D_SAE, D_SAE + 2, D_SAE)))}
    where, seen, encode, batch = {}, [], TopKSAE.encode, made.data.batch

    def to(module, device):
        where[module] = torch.device(device).type
        return module

    def encoding(sae, x):
        seen.append((where.get(sae, "cpu"), x.device.type))
        return encode(sae, x)

    def on_gpu(stage, index):
        rows = batch(stage, index)
        return rows._replace(x=rows.x.as_subclass(OnGPU))

    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(TopKSAE, "encode", encoding)
    monkeypatch.setattr(made.data, "batch", on_gpu)
    measure_together([made], [saes])
    assert len(seen) >= 2 * made.data.val_batches
    assert set(seen) == {("cuda", "cuda")}
    assert {where[sae] for sae in saes[0]} == {"cpu"}


def test_trainers_of_phases_log_to_the_runs_of_the_phases_alone():
    parent, phase, own = MLflowTracker(), MLflowTracker(), CSVLogger("logs")
    trainer = PhaseTrainer(**{**QUIET, "logger": [parent, own]})
    first, second = trainer.another([phase], [], checkpoints=False).loggers
    assert first is phase
    assert isinstance(second, CSVLogger)
    assert trainer.one_at_a_time


def test_phases_need_a_number_of_steps():
    with pytest.raises(UserError, match=r"trainer\.max_steps"):
        Hedge(TopKSAE(D_IN, D_SAE, k=2), toy(), PhaseTrainer(**QUIET), HedgeOptions(n_new=2))


def test_continued_l1_warms_up_from_where_the_spec_says():
    def again(sae):
        return continuation(sae, "control", 0, HedgeOptions(), STEPS)

    def start(coefficient):
        return again(VanillaSAE(D_IN, D_SAE, coefficient, l1_warmup_steps=9)).l1_warmup_start

    assert [start(0.5), start(10.0), start(40.0)] == [0.5, 10.0, 10.0]
    assert again(JumpReLUSAE(D_IN, D_SAE, 1.0, l0_warmup_steps=9)).l0_warmup_steps == 0
    assert again(TopKSAE(D_IN, D_SAE, k=2, k_start=5, k_steps=9)).current_k() == 2


def test_continuations_may_have_a_learning_rate_of_their_own_that_decays():
    sae = continuation(TopKSAE(D_IN, D_SAE, k=2), "control", 0, HedgeOptions(lr=0.5, lr_decay=True), 4)
    made = sae.configure_optimizers()
    rates = []
    for _ in range(5):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([0.5, 0.375, 0.25, 0.125, 0.0])


def test_phase_ids_depend_on_what_determines_the_outcome():
    def ids(**options):
        made = protocol(TopKSAE(D_IN, D_SAE, k=2), **options)
        phases = {one.name: one for one in made.continuation_phases({"initial/seed0": TopKSAE(D_IN, D_SAE, k=2)})}
        return [phases[f"{role}/seed0"].id for role in ("control", "extended")]

    assert ids() == ids()
    assert ids()[0] != ids(lr=1e-3)[0]
    assert Phase("a", {"x": 1, "y": 2}, lambda: None).id == Phase("b", {"y": 2, "x": 1}, lambda: None).id
    assert Phase("a", {"x": 1}, lambda: None).id != Phase("a", {"x": 2}, lambda: None).id


def fake_scores(live_new, n_new=4):
    rng = torch.Generator().manual_seed(0)
    control, extended = torch.randn(5, D_IN, generator=rng), torch.randn(5 + n_new, D_IN, generator=rng)
    return hedging_degree(control, extended, live_new=torch.arange(n_new) < live_new)


def outcome(*scores):
    """What is made of the scores of some seeds."""
    trainer = PhaseTrainer(max_steps=STEPS, **QUIET)
    return outcome_of(Hedge(TopKSAE(D_IN, 5, k=2), toy(), trainer, HedgeOptions(n_new=4)), {}, dict(enumerate(scores)))


def test_dead_new_latents_are_said():
    assert outcome(fake_scores(2)).failure is None
    with pytest.warns(UserWarning, match="only 1 of 4"):
        assert outcome(fake_scores(1)).failure is None
    assert outcome(fake_scores(2), fake_scores(0)).failure.startswith("hedge.new_norm: none of the 4 new latents")


def test_numbers_have_means_and_spreads_over_seeds():
    alone = outcome(fake_scores(2)).metrics
    assert alone["hedging/live_new_latents"] == 2
    assert not any("seed" in name for name in alone)
    both = outcome(fake_scores(2), fake_scores(4)).metrics
    assert both["hedging/live_new_latents"] == 3
    assert both["hedging/live_new_latents_seed_std"] == pytest.approx(2**0.5)
    assert both["hedging/seed1/live_new_latents"] == 4


def test_every_latent_is_a_line_of_the_table():
    one = fake_scores(2)
    rows = outcome(one, fake_scores(4)).tables["hedging/latents.csv"]
    assert list(rows[0]) == ["seed", "latent", "projection", "delta_norm", "cosine", "live"]
    assert len(rows) == 2 * 5
    assert rows[0]["projection"] == float(one.projections[0])


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"n_new": 0}, "hedge.n_new"),
        ({"new_norm": 0.0}, "hedge.new_norm"),
        ({"seeds": 0}, "hedge.seeds"),
        ({"lr": -1.0}, "hedge.lr"),
        ({"l1_restart": -1.0}, "hedge.l1_restart"),
        ({"draws": 1}, "hedge.draws"),
    ],
)
def test_impossible_options_name_their_key(wrong, key):
    with pytest.raises(UserError, match=key):
        HedgeOptions(**wrong)


def test_too_many_new_latents_are_refused_before_training():
    with pytest.raises(UserError, match=r"hedge\.n_new: must be below d_in = 12"):
        Hedge(TopKSAE(D_IN, D_SAE, k=2), toy(), PhaseTrainer(max_steps=1, **QUIET), HedgeOptions(n_new=D_IN))
