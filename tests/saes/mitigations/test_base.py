"""Mitigations as parts of an SAE: their hooks are called, they are named in YAML, saved, loaded and refused in one line."""

import copy
import json

import pytest
import torch

from hedgelab.batch import Batch
from hedgelab.errors import UserError
from hedgelab.saes import BatchTopKSAE, MatryoshkaSAE, SAEGroup, TopKSAE, load_sae
from hedgelab.saes.ensemble import EnsembleSAE
from hedgelab.saes.mitigations import Mitigation
from hedgelab.saes.widen import duplicate, widen
from tests.saes.comparison import same_weights

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


class Everything(Mitigation):
    """Uses every hook: doubles what is encoded, halves the target, pays for b_dec, counts steps, freezes the decoder's bias."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def check(self, sae):
        sae.b_dec.requires_grad_(False)

    def encoded(self, sae, x, selection):
        return self.factor * x

    def target(self, sae, target):
        return target._replace(x=target.x / self.factor)

    def terms(self, sae, codes, decoder, target, errors):
        return {"bias": decoder.b_dec.sum() + len(list(errors))}

    def after_step(self, sae, result):
        self.count += 1 / 3

    def numbers(self):
        return {"count": float(self.count)}


class Nothing(Mitigation):
    """Uses no hook."""


class ForLevels(Mitigation):
    """Does nothing, for matryoshka SAEs."""

    needs_levels = True


def flat(**more):
    return TopKSAE(8, 16, k=3, **more)


def matryoshka(**more):
    return MatryoshkaSAE(8, flat(), levels=[4, 16], **more)


@pytest.mark.parametrize(("make", "levels"), [(flat, 1), (matryoshka, 2)])
def test_hooks(make, levels):
    plain, sae = make(), make(mitigations=[Everything()])
    result = sae.loss(X)
    codes = plain.encode(2 * X)
    assert torch.equal(sae.encode(X).to_dense(), codes.to_dense())
    assert torch.equal(result.codes.to_dense(), codes.to_dense())
    torch.testing.assert_close(result.error, plain.decode(codes) - X / 2)
    assert result.terms["bias"] == levels
    sae.after_step(result)
    assert sae.training_numbers()["count"] == pytest.approx(1 / 3)
    assert not sae.b_dec.requires_grad


def test_inner_mitigations_encode_and_add_terms():
    class Encodes(Mitigation):
        def encoded(self, sae, x, selection):
            return 2 * x

        def terms(self, sae, codes, decoder, target, errors):
            return {"errors": torch.tensor(float(len(list(errors)))), "levels": torch.tensor(float(len(target.levels)))}

    sae = MatryoshkaSAE(8, flat(mitigations=[Encodes()]), levels=[4, 16])
    assert torch.equal(sae.encode(X).to_dense(), flat().encode(2 * X).to_dense())
    assert {sae.loss(X).terms[name].item() for name in ("errors", "levels")} == {1}
    with pytest.raises(UserError, match=r"^model\.inner\.mitigations: Everything concerns levels; move it to"):
        MatryoshkaSAE(8, flat(mitigations=[Everything()]), levels=[4, 16])


@pytest.mark.parametrize("make", [flat, matryoshka])
def test_saved_loaded_copied_and_widened(make, tmp_path):
    sae = make(mitigations=[Everything(factor=3.0), Nothing()])
    sae.after_step(sae.loss(X))
    sae.save(tmp_path)
    written = json.loads((tmp_path / "sae.json").read_text())
    assert [one.get("factor") for one in written["mitigations"]] == [3.0, None]
    for other in (load_sae(tmp_path), duplicate(sae), copy.deepcopy(sae), widen(sae, 4)):
        first, _ = other.mitigations
        assert (type(first), first.factor, float(first.count)) == (Everything, 3.0, float(sae.mitigations[0].count))
        assert first is not sae.mitigations[0]
    assert same_weights(load_sae(tmp_path), sae)
    assert "mitigations=[Everything(), Nothing()]" in repr(sae)
    assert "mitigations" not in make().config()
    assert "mitigations" not in repr(make())


def test_buffers_keep_their_type():
    sae = flat(mitigations=[Everything()])
    assert sae.to(torch.bfloat16).mitigations[0].count.dtype == torch.float64
    assert sae.to("meta").mitigations[0].count.is_meta


def test_groups_give_each_member_what_it_were_alone():
    group = SAEGroup({"a": flat(mitigations=[Everything()]), "b": flat()})
    assert group.saes()["a"].loss(Batch(X)).total != group.saes()["b"].loss(Batch(X)).total


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: flat(mitigations=[ForLevels()]), r"^model\.mitigations: ForLevels needs levels; give it to a Matr"),
        (
            lambda: EnsembleSAE([flat(auxiliary_coefficient=0.0, mitigations=[ForLevels.__base__()])]),
            r"model\.mitigations: can",
        ),
        (
            lambda: EnsembleSAE([MatryoshkaSAE(8, flat(auxiliary_coefficient=0.0), [16], mitigations=[ForLevels()])]),
            r"^model\.mitigations: cannot be used in an ensemble",
        ),
        (lambda: BatchTopKSAE.from_config({**flat().config(), "class": "BatchTopKSAE", "mitigations": [{}]}), "sae.json: miti"),
        (
            lambda: TopKSAE.from_config({**flat().config(), "mitigations": [{"class": "Evil"}]}),
            r"^sae\.json: mitigations: 'Evil' is no mitigation of hedgelab",
        ),
    ],
)
def test_mistakes(make, said):
    with pytest.raises(UserError, match=said):
        make()
