"""SAEs in a training loop of one's own: no trainer, the same result."""

import functools

import lightning as L
import pytest
import torch

from hedgelab.batch import Batch
from hedgelab.data.toy import ConditionalFiring, ToyDataModule
from hedgelab.errors import UserError
from hedgelab.saes import (
    SAE,
    BatchTopKSAE,
    Initialization,
    JumpReLUSAE,
    MatryoshkaSAE,
    TopKSAE,
    VanillaSAE,
    duplicate,
    load_sae,
    save_sae,
)
from tests.saes.comparison import same_weights

FEATURES = [0.3, {"f0": 0.3, "not f0": 0.1}, 0.2, {"f2": 0.4, "otherwise": 0}]
STEPS = 40
INIT = Initialization(seed=0, b_dec="mean")
MAKERS = {
    "vanilla": functools.partial(VanillaSAE, d_sae=6, l1_coefficient=0.01, l1_warmup_steps=30, init=INIT),
    "normalized": functools.partial(VanillaSAE, d_sae=6, l1_coefficient=0.1, normalize_decoder=True, init=INIT),
    "topk": functools.partial(TopKSAE, d_sae=12, k=1, dead_after_steps=5, init=INIT),
    "batch_topk": functools.partial(BatchTopKSAE, d_sae=12, k=1, dead_after_steps=5, init=INIT),
    "jumprelu": functools.partial(JumpReLUSAE, d_sae=6, l0_coefficient=0.01, l0_warmup_steps=30, init=INIT),
    "wide": functools.partial(TopKSAE, d_sae=600, k=2, dead_after_steps=5, init=INIT),
    "matryoshka": lambda d_in: MatryoshkaSAE(d_in, MAKERS["batch_topk"], [4, 12], beta=0.5, auxiliary_per_level=True),
    "adaptive": lambda d_in: MatryoshkaSAE(d_in, MAKERS["vanilla"], [2, 6], beta=0.5, adaptive=True),
}


def data():
    return ToyDataModule(ConditionalFiring(FEATURES), d_in=10, batch_size=32, seed=0, val_batches=1)


@pytest.fixture(params=MAKERS)
def kind(request):
    return request.param


@pytest.mark.parametrize("optimizer", ["configured", "own"])
def test_a_plain_loop_trains_as_a_trainer_does(kind, optimizer):
    if (kind, optimizer) == ("jumprelu", "own"):
        pytest.skip("its thresholds have a learning rate of their own, which configure_optimizers gives them")
    fitted, own, source = MAKERS[kind](10), MAKERS[kind](10), data()
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(max_steps=STEPS, accelerator="cpu", limit_val_batches=0, enable_model_summary=False, **settings).fit(
        fitted, datamodule=source
    )
    adam = own.configure_optimizers() if optimizer == "configured" else torch.optim.Adam(own.parameters(), lr=3e-4, fused=True)
    own.initialize(source.batch("train", 0), None)
    for step in range(STEPS):
        terms = own.loss(source.batch("train", step).x)
        terms.total.backward()
        adam.step()
        adam.zero_grad()
        own.after_step(terms)
    assert same_weights(fitted, own)
    assert own.steps_done == STEPS
    assert not torch.equal(own.W_enc, MAKERS[kind](10).W_enc)


def test_optimisers_get_contiguous_parameters_and_gradients(kind):
    """Fused optimisers then copy nothing."""
    sae = MAKERS[kind](10)
    sae.loss(data().batch("train", 0)).total.backward()
    for name, parameter in sae.named_parameters():
        assert parameter.is_contiguous(), name
        assert parameter.grad.is_contiguous(), name
    assert sae.W_enc.shape == (10, sae.d_sae)
    adam = sae.configure_optimizers()
    assert all(group["fused"] for group in adam.param_groups)


def test_states_hold_the_encoder_under_its_name_and_shape(kind):
    sae = MAKERS[kind](10)
    (name,) = [name for name in sae.state_dict() if name.endswith("W_enc")]
    assert torch.equal(sae.state_dict()[name], sae.W_enc)
    other = MAKERS[kind](10)
    with torch.no_grad():
        other.W_enc.add_(1)
    assert not same_weights(sae, other)
    other.load_state_dict({name: value.contiguous() for name, value in sae.state_dict().items()})
    assert same_weights(sae, other)
    missing = {key: value for key, value in sae.state_dict().items() if key != name}
    assert other.load_state_dict(missing, strict=False).missing_keys == [name]


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_what_accumulates_keeps_single_precision(kind, narrow):
    sae = MAKERS[kind](10).to(narrow)
    exact = [
        v
        for name, v in sae.state_dict().items()
        if name.endswith(("threshold", "theta", "log_factors", "mean_l0")) and v.is_floating_point()
    ]
    assert all(value.dtype == torch.float32 for value in exact)
    assert sae.W_enc.dtype == narrow
    assert all(v.dtype == torch.float64 for v in sae.double().state_dict().values() if v.is_floating_point())


def test_a_threshold_moves_in_bf16():
    """Its steps of 1 % are below half a unit of rounding there."""
    sae = BatchTopKSAE(4, 8, k=1).bfloat16()
    sae.threshold.fill_(1.0)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(1.35)
    terms = sae.loss(torch.zeros(16, 4, dtype=torch.bfloat16))
    for _ in range(1000):
        sae.after_step(terms)
    assert float(sae.threshold) == pytest.approx(float(torch.tensor(1.35).bfloat16()), abs=1e-4)


def test_a_jumprelu_threshold_moves_in_bf16():
    """Adam's steps are below a unit of rounding there."""
    sae = JumpReLUSAE(4, 8, l0_coefficient=1.0, threshold=0.5, bandwidth=2.0, init=INIT).bfloat16()
    adam, before = sae.configure_optimizers(), sae.theta.detach().clone()
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    for _ in range(10):
        sae.loss(x).total.backward()
        adam.step()
        adam.zero_grad()
    moved = (sae.theta.detach() - before).abs()
    assert (moved > 2e-3).all()


@pytest.mark.parametrize("k_sparse", ["topk", "batch_topk"])
def test_dead_latents_are_revived_at_once_in_a_continuation(k_sparse, tmp_path):
    sae = MAKERS[k_sparse](10)
    sae.steps_since_fired[3] = sae.dead_after_steps
    save_sae(sae, tmp_path)
    assert "auxiliary" in load_sae(tmp_path).loss(data().batch("train", 0)).terms


@pytest.mark.parametrize("nested", [False, True])
def test_the_auxiliary_loss_moves_dead_latents_only(nested):
    flat = TopKSAE(8, 16, k=2)
    sae = MatryoshkaSAE(8, lambda d_in: flat, [4, 16], auxiliary_per_level=True) if nested else flat
    flat.steps_since_fired[7] = flat.dead_after_steps
    terms = sae.loss(torch.randn(64, 8, generator=torch.Generator().manual_seed(0))).terms
    sum(term for name, term in terms.items() if name.startswith("auxiliary")).backward()
    assert flat.b_dec.grad is None or not flat.b_dec.grad.any()
    for parameter in (flat.W_enc_rows, flat.b_enc, flat.W_dec):
        assert parameter.grad.reshape(16, -1).any(dim=1).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float64,) * 2])
def test_types_of_activations_and_probabilities_need_not_be_those_of_the_weights(kind, dtypes):
    sae, rng = MAKERS[kind](10), torch.Generator().manual_seed(0)
    x, weight = torch.randn(20, 10, generator=rng), torch.rand(20, generator=rng).softmax(0)
    expected = sae.loss(Batch(x, None, weight))
    found = sae.loss(Batch(x.to(dtypes[0]), None, weight.to(dtypes[1])))
    torch.testing.assert_close(found.total.float(), expected.total)
    found.total.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "k"), [(500, 3), (128, 5), (1000, 7), (3, 1)])
def test_a_population_keeps_k_on_average_to_the_last_entry(batch, k, dtype):
    sae, rng = BatchTopKSAE(16, 32, k=k), torch.Generator().manual_seed(0)
    weight = torch.full((batch,), 1 / batch, dtype=dtype)
    codes = sae.loss(Batch(torch.randn(batch, 16, generator=rng), None, weight)).codes
    assert int(codes.active_per_example().sum()) == k * batch


WHOLE = {
    "k": (lambda v: TopKSAE(8, 16, k=v), 3),
    "d_sae": (lambda v: TopKSAE(8, v, k=1), 16),
    "d_in": (lambda v: VanillaSAE(v, 4, 0.1), 8),
    "dead_after_steps": (lambda v: BatchTopKSAE(8, 16, k=2, dead_after_steps=v), 5),
    "l1_warmup_steps": (lambda v: VanillaSAE(8, 4, 0.1, l1_warmup_steps=v), 5),
    "l0_warmup_steps": (lambda v: JumpReLUSAE(8, 4, 0.1, l0_warmup_steps=v), 5),
    "levels": (lambda v: MatryoshkaSAE(8, functools.partial(TopKSAE, d_sae=16, k=2), [v, 16]), 4),
    "init.seed": (lambda v: Initialization(seed=v), 4),
}


@pytest.mark.parametrize("value", [True, 2.0, "2", torch.tensor(True)])
@pytest.mark.parametrize("key", WHOLE)
def test_only_whole_numbers_are_whole_numbers(key, value):
    make, good = WHOLE[key]
    make(good)
    with pytest.raises(UserError, match=key) as error:
        make(value)
    assert "\n" not in str(error.value)


def test_double_precision_survives_saving_and_copying(kind, tmp_path):
    sae = MAKERS[kind](10).double()
    with torch.no_grad():
        sae.W_dec.mul_(1 + 1e-12)
    save_sae(sae, tmp_path)
    for copy in (load_sae(tmp_path), duplicate(sae), SAE.from_state(sae.config(), sae.state_dict())):
        assert same_weights(copy, sae)
        assert copy.W_dec.dtype == torch.float64
