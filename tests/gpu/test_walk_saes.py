"""Every SAE, argument, mitigation and way in and out of a file on a GPU without one (``tests/second_device.py``).

What is walked is found in the packages: a part that this file does not know how to make fails until it is told.
"""

import contextlib
import copy
import inspect
import itertools

import pytest
import torch

import hedgelab.saes.mitigations as mitigation_package
from hedgelab.batch import Batch
from hedgelab.errors import UserError
from hedgelab.interop.saelens import export_saelens
from hedgelab.saes import AbsTopKSAE, FlatSAE, InferenceSAE, MatryoshkaSAE, duplicate, fresh, load_sae, save_sae, widen
from hedgelab.saes.base import CLASSES
from hedgelab.saes.described import init_arguments
from hedgelab.saes.topk import KSparseSAE
from tests.saes.comparison import same_weights

D_IN, D_SAE, ROWS = 8, 24, 32
NEEDED = {"k": 3, "l1_coefficient": 0.05, "l0_coefficient": 0.02, "levels": [4, 12, D_SAE]}
"""Arguments that a class must be given, or that it is nothing without."""
OTHERWISE = {
    "normalize_decoder": {}, "norm_aware_selection": {}, "dead_after_steps": {"dead_after_steps": 1},
    "auxiliary_coefficient": {"auxiliary_coefficient": 0.0}, "k_start": {"k_start": 6, "k_steps": 2},
    "target_l0": {"target_l0": 3.0}, "l0_control": {"l0_control": "penalty", "target_l0": 3.0},
    "l0_warmup_steps": {"l0_warmup_steps": 2}, "l1_warmup_steps": {"l1_warmup_steps": 2}, "beta": {"beta": 0.5},
    "detached": {}, "auxiliary_per_level": {}, "credit": {"credit": 0.5}, "adaptive": {"adaptive": True},
    "gradient_clip_norm": {"gradient_clip_norm": 0.1},
}  # fmt: skip
"""Arguments that change what is computed, each with a value besides its default; by itself: True."""
NO_MATTER = {
    "d_in", "d_sae", "init", "optimizer", "lr_scheduler", "mitigations", "inner", "k_steps", "threshold", "bandwidth",
    "l1_warmup_start", "credit_start",
}  # fmt: skip
"""Arguments that are other numbers in the same places, or that other tests below are of."""
WAITS = {
    "saes/dead.py:look aten._to_copy.default": "which latents may die is looked up every hundred steps at most",
    "kernels/ops.py:_many_fire aten._local_scalar_dense.default": "a sample of rows decides which products are fastest",
    "kernels/selection.py:_flatnonzero aten.nonzero.default": "how many latents of a ReLU or JumpReLU SAE fire has no bound",
}
"""What a training step may wait for, and why."""

SAES = {
    name: cls for name, cls in CLASSES.items()
    if cls.__module__.startswith("hedgelab.") and not inspect.isabstract(cls) and cls not in (FlatSAE, KSparseSAE)
    and cls.trainable
}  # fmt: skip
MITIGATIONS = {
    name: cls for name, cls in vars(mitigation_package).items()
    if inspect.isclass(cls) and cls is not mitigation_package.Mitigation
}  # fmt: skip


def variants():
    for name, cls in SAES.items():
        known = init_arguments(cls)
        yield name, ""
        yield from ((name, other) for other in OTHERWISE if other in known)


def make(name: str, **options):
    """An SAE with the arguments it needs; matryoshka SAEs hold a BatchTopK SAE some of whose latents are dead soon."""
    torch.manual_seed(0)
    cls = SAES[name]
    known = {key: value for key, value in NEEDED.items() if key in init_arguments(cls)}
    if {"target_l0"} & options.keys():
        known = {key: value for key, value in known.items() if not key.endswith("_coefficient")}
    if issubclass(cls, MatryoshkaSAE):
        inner = SAES["BatchTopKSAE"]
        return cls(D_IN, lambda d_in: inner(d_in, D_SAE, k=3, dead_after_steps=2), **{**known, **options})
    return cls(D_IN, D_SAE, **{**known, **options})


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(seed))


def steps(sae, device, narrow: bool = False, weighted: bool = False, count: int = 4) -> list[float]:
    """Losses of some training steps, kept where they are until the end, as training does."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
    kept = []
    for step in range(count):
        x = rows(step).to(device)
        weight = torch.full((ROWS,), 1 / ROWS, device=device) if weighted else None
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=narrow):
            terms = sae.loss(Batch(x, None, weight))
        terms.total.backward()
        sae.before_optimizer_step()
        optimizer.step()
        optimizer.zero_grad()
        sae.after_step(terms)
        kept.append(terms.total.detach())
    return kept


def both(gpu, sae, narrow=False, weighted=False):
    """Train an SAE here and a copy of it there: the same losses, and nothing that is not known is waited for."""
    other = duplicate(sae).to(gpu.DEVICE)
    assert all(value.is_cuda for value in other.state_dict().values())
    expected = steps(sae, "cpu", weighted=weighted)
    gpu.waits.clear()
    found = steps(other, gpu.DEVICE, narrow, weighted)
    unknown = [wait for wait in gpu.waits if not wait.startswith(tuple(WAITS))]
    assert set(unknown) == set()
    tolerance = {"rtol": 0.1, "atol": 0.05} if narrow else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.stack(found).cpu(), torch.stack(expected), **tolerance)
    assert all(p.dtype == torch.float32 for p in other.parameters())
    assert all(b.dtype != torch.bfloat16 for b in other.buffers())
    return other


def test_every_argument_is_known():
    every = {argument for cls in SAES.values() for argument in init_arguments(cls)}
    assert every - NO_MATTER - OTHERWISE.keys() - NEEDED.keys() == set()


@pytest.mark.parametrize("narrow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "other"), variants())
def test_saes_train(gpu, name, other, narrow):
    options = OTHERWISE.get(other, {}) if other else {}
    both(gpu, make(name, **(options or ({other: True} if other else {}))), narrow)


@pytest.mark.parametrize("how", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("options", [{}, {"k": 2}, {"d_out": 5, "skip": True}], ids=str)
def test_saes_for_inference(gpu, how, options):
    sae, rng = InferenceSAE(D_IN, D_SAE, how, **options), torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=rng))
    expected, other = (sae.encode(rows()), sae(rows())), copy.deepcopy(sae).to(gpu.DEVICE)
    codes, x_hat = other.encode(rows().to(gpu.DEVICE)), other(rows().to(gpu.DEVICE))
    torch.testing.assert_close(codes.on_raw().to_dense().cpu(), expected[0].on_raw().to_dense())
    torch.testing.assert_close(x_hat.cpu(), expected[1])


@pytest.mark.parametrize("backend", ["dense", "sparse"])
@pytest.mark.parametrize("name", SAES)
def test_both_paths_of_the_kernels(gpu, name, backend):
    from hedgelab.kernels import ops

    with ops.backend(backend):
        other = both(gpu, make(name))
        both(gpu, make(name), weighted=True)
        codes = other.encode(rows().to(gpu.DEVICE))
        assert other.decode(codes).is_cuda


def mitigated():
    """The pairs of mitigation and SAE that are not refused."""
    for mitigation, name in itertools.product(MITIGATIONS, SAES):
        with contextlib.suppress(UserError):
            make(name, mitigations=[MITIGATIONS[mitigation]()])
            yield mitigation, name


@pytest.mark.parametrize(("mitigation", "name"), mitigated())
def test_mitigations_train(gpu, mitigation, name):
    both(gpu, make(name, mitigations=[MITIGATIONS[mitigation]()]))


@pytest.mark.parametrize("name", SAES)
def test_out_of_a_file_and_into_one(gpu, name, tmp_path):
    sae = both(gpu, make(name))
    save_sae(sae, tmp_path / "sae")
    loaded = load_sae(tmp_path / "sae")
    assert same_weights(loaded.to(gpu.DEVICE), sae)
    x = rows(9).to(gpu.DEVICE)
    torch.testing.assert_close(loaded(x).cpu(), sae(x).cpu())
    wide, new = widen(sae, 3), fresh(sae, 1)
    assert all(p.is_cuda for one in (wide, new) for p in one.parameters())
    steps(wide, gpu.DEVICE, count=1)
    if not isinstance(sae, AbsTopKSAE):  # SAELens has no such SAE
        export_saelens(sae, tmp_path / "out")
