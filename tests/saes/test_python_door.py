"""SAEs as objects of Python: printed, pickled, copied, saved and loaded, classes of one's own among them."""

import copy
import functools
import pickle

import lightning as L
import pytest
import torch

from hedgelab.data.toy import ConditionalFiring, ToyDataModule
from hedgelab.errors import UserError
from hedgelab.saes import SAE, BatchTopKSAE, FlatSAE, JumpReLUSAE, MatryoshkaSAE, TopKSAE, VanillaSAE, load_sae
from hedgelab.saes.base import CLASSES
from tests.saes.comparison import same_weights


class SoftTopKSAE(TopKSAE):
    """One's own: TopK with an argument more."""

    def __init__(self, d_in, d_sae, k, softness=0.5, **kwargs):
        super().__init__(d_in, d_sae, k, **kwargs)
        self.softness = softness


MAKERS = {
    "vanilla": lambda: VanillaSAE(8, 16, l1_coefficient=0.1),
    "topk": lambda: TopKSAE(8, 16, k=3),
    "batch_topk": lambda: BatchTopKSAE(8, 16, k=3, norm_aware_selection=True),
    "jumprelu": lambda: JumpReLUSAE(8, 16, l0_coefficient=0.1),
    "matryoshka": lambda: MatryoshkaSAE(8, BatchTopKSAE(8, 16, k=3), levels=[4, 16], beta=0.5),
    "own": lambda: SoftTopKSAE(8, 16, k=3, softness=0.25),
}


@pytest.fixture(params=MAKERS)
def sae(request):
    made = MAKERS[request.param]()
    made.after_step(made.loss(torch.randn(32, 8, generator=torch.Generator().manual_seed(0))))
    return made


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def test_copies_are_the_same_and_train(sae):
    for other in (pickle.loads(pickle.dumps(sae)), copy.deepcopy(sae)):
        assert type(other) is type(sae)
        assert same_weights(other, sae)
        assert other.steps_done == 1
        other.loss(X).total.backward()
        other.configure_optimizers().step()
        assert not same_weights(other, sae)


def test_saved_and_loaded(sae, tmp_path):
    sae.save(tmp_path)
    other = load_sae(tmp_path)
    assert type(other) is type(sae)
    assert other.config() == sae.config()
    assert same_weights(other, sae)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("vanilla", "VanillaSAE(d_in=8, d_sae=16, l1_coefficient=0.1)"),
        ("topk", "TopKSAE(d_in=8, d_sae=16, k=3)"),
        ("batch_topk", "BatchTopKSAE(d_in=8, d_sae=16, k=3, norm_aware_selection=True)"),
        ("jumprelu", "JumpReLUSAE(d_in=8, d_sae=16, l0_coefficient=0.1)"),
        ("matryoshka", "inner=BatchTopKSAE(d_in=8, d_sae=16, k=3), levels=[4, 16], beta=0.5)"),
        ("own", "SoftTopKSAE(d_in=8, d_sae=16, k=3, softness=0.25)"),
    ],
)
def test_what_is_printed(name, shown):
    assert repr(MAKERS[name]()).endswith(shown)


def test_activations_of_another_width_are_refused_in_one_line(sae):
    for call in (sae.loss, sae.encode, sae):
        with pytest.raises(UserError, match=r"\(3, 7\).*d_in = 8") as error:
            call(torch.zeros(3, 7))
        assert "\n" not in str(error.value)


def test_an_inner_sae_of_another_width_is_refused():
    with pytest.raises(UserError, match=r"model\.inner.*9.*8"):
        MatryoshkaSAE(8, TopKSAE(9, 16, k=3), levels=[4, 16])


def test_a_class_of_ones_own_is_never_imported_for_a_file(tmp_path, monkeypatch):
    MAKERS["own"]().save(tmp_path)
    name = f"{__name__}.SoftTopKSAE"
    monkeypatch.delitem(CLASSES, name)
    with pytest.raises(UserError, match=r"SoftTopKSAE' is not imported; .*load_sae\(folder, cls=") as error:
        load_sae(tmp_path)
    assert "\n" not in str(error.value)
    assert load_sae(tmp_path, cls=SoftTopKSAE).softness == 0.25


def test_a_class_must_be_what_one_asked_for(tmp_path):
    TopKSAE(8, 16, k=3).save(tmp_path)
    assert isinstance(load_sae(tmp_path, cls=FlatSAE), TopKSAE)
    with pytest.raises(UserError, match="TopKSAE, not a VanillaSAE"):
        load_sae(tmp_path, cls=VanillaSAE)


def test_an_argument_without_attribute_is_named(tmp_path):
    class Forgetful(TopKSAE):
        def __init__(self, d_in, d_sae, k, lost=1, **kwargs):
            super().__init__(d_in, d_sae, k, **kwargs)

    with pytest.raises(UserError, match="Forgetful: keeps its argument lost in no attribute"):
        Forgetful(8, 16, 3).save(tmp_path)
    assert repr(Forgetful(8, 16, 3)) == "Forgetful(d_in=8, d_sae=16, k=3)"


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of a fit, and its SAE."""

    def fit(sae):
        data = ToyDataModule(ConditionalFiring([0.3, 0.2, 0.1]), d_in=8, batch_size=32, seed=0)
        trainer = L.Trainer(max_steps=5, accelerator="cpu", logger=False, limit_val_batches=0, enable_checkpointing=False)
        trainer.fit(sae, datamodule=data)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        return tmp_path / "a.ckpt"

    return fit


@pytest.mark.parametrize("name", MAKERS)
def test_checkpoints_load_as_lightning_says(name, checkpoint):
    sae = MAKERS[name]()
    path = checkpoint(sae)
    for cls in (type(sae), SAE):
        other = cls.load_from_checkpoint(path)
        assert type(other) is type(sae)
        assert other.config() == sae.config()
        assert same_weights(other, sae)
        assert other.initialized
    other = type(sae).load_from_checkpoint(path, map_location="cpu", gradient_clip_norm=2.0) if name != "matryoshka" else sae
    assert other.gradient_clip_norm == (2.0 if name != "matryoshka" else None)
    with pytest.raises(UserError, match="not a"):
        (VanillaSAE if name != "vanilla" else TopKSAE).load_from_checkpoint(path)


def test_checkpoints_that_do_not_say_what_they_are_of_take_arguments(checkpoint):
    sae = TopKSAE(8, 16, k=3)
    path = checkpoint(sae)
    old = torch.load(path, weights_only=True)
    del old["hedgelab_saes"]
    torch.save(old, path)
    assert same_weights(TopKSAE.load_from_checkpoint(path, d_in=8, d_sae=16, k=3), sae)
    with pytest.raises(UserError, match="does not say which SAE"):
        SAE.load_from_checkpoint(path)
    with pytest.raises(UserError, match="cannot be made into"):
        TopKSAE.load_from_checkpoint(path)


def test_a_matryoshka_takes_an_sae_or_what_makes_one():
    inner = functools.partial(BatchTopKSAE, d_sae=16, k=3)
    assert MatryoshkaSAE(8, inner(8), levels=[4, 16]).config() == MatryoshkaSAE(8, inner, levels=[4, 16]).config()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind", [VanillaSAE, TopKSAE, BatchTopKSAE, JumpReLUSAE, MatryoshkaSAE])
def test_activations_of_any_shape(kind, wide):
    """Codes remember the shape of the examples; sequences, single vectors and empty batches come back as they are."""
    d_sae = 600 if wide else 16
    own = {VanillaSAE: {"l1_coefficient": 0.1}, JumpReLUSAE: {"l0_coefficient": 0.1, "threshold": 0.5}}.get(kind, {"k": 3})
    sae = BatchTopKSAE(8, d_sae, k=3) if kind is MatryoshkaSAE else kind(8, d_sae, **own)
    sae = MatryoshkaSAE(8, sae, levels=[4, d_sae]) if kind is MatryoshkaSAE else sae
    sae.after_step(sae.loss(X))
    flat = sae.encode(X.reshape(-1, 8))
    for x, shape in ((X, (2, 5)), (X[0, 0], ()), (X[:0], (0, 5)), (X.double(), (2, 5)), (X.reshape(2, 5, 1, 8), (2, 5, 1))):
        codes = sae.encode(x)
        assert codes.to_dense().shape == (*shape, d_sae)
        assert codes.active_per_example().shape == shape
        assert sae.decode(codes).shape == (*shape, 8)
        torch.testing.assert_close(sae.decode(codes.to_dense()), sae.decode(codes))
        torch.testing.assert_close(sae.decode(codes.scale(torch.ones(d_sae)).prefix(d_sae).detach()), sae(x))
    torch.testing.assert_close(sae.encode(X).to_dense().reshape(-1, d_sae), flat.to_dense())
    assert sae.decode(flat).shape == (10, 8)
    torch.testing.assert_close(sae.loss(X).total, sae.loss(X.reshape(-1, 8)).total)
