"""Every function and class of :mod:`hedgelab.metrics` on a GPU without one: the numbers of the CPU, nothing mixed.

Arguments are known by their names: a new function that takes what others take is walked without being named here.
"""

import functools
import inspect

import pytest
import torch
from torchmetrics import Metric

from hedgelab import metrics
from hedgelab.batch import Batch
from hedgelab.kernels.codes import Codes
from hedgelab.metrics import functional
from hedgelab.metrics.functional.loss_recovered import LOSSES
from hedgelab.saes import TopKSAE, duplicate, widen

D_IN, D_SAE, N, ROWS = 8, 12, 5, 64


@functools.cache
def values():
    """What each argument is called everywhere, by name; all on the CPU."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=rng)

    x, features = draw(ROWS, D_IN), (torch.rand(ROWS, N, generator=rng) < 0.4).float()
    directions = torch.linalg.qr(draw(D_IN, N))[0].T.contiguous()
    W_dec = torch.cat([directions, 0.3 * draw(D_SAE - N, D_IN)])
    dense = (x @ W_dec.T - 0.5).relu()
    labels = features[:, :3] > 0
    cosines = functional.decoder_cosines(W_dec, directions)
    probe = functional.linear_probes(x, labels)
    counts = functional.co_firing(dense, features)
    tracked = functional.tracked_features(cosines)
    torch.manual_seed(0)
    sae = TopKSAE(D_IN, D_SAE, k=3)
    extended = torch.cat([W_dec + 0.05 * draw(D_SAE, D_IN), draw(2, D_IN)])
    return {
        "x": x, "x_hat": x / 2, "error": x - dense @ W_dec, "codes": dense, "latents": dense, "train": dense, "test": dense,
        "features": features, "weight": torch.full((ROWS,), 1 / ROWS), "W_dec": W_dec, "W_enc": W_dec.T.contiguous(),
        "b_dec": draw(D_IN), "feature_directions": directions, "directions": directions, "null": draw(4, D_IN),
        "null_directions": draw(4, D_IN), "cosines": cosines, "coordinates": cosines, "counts": counts,
        "encoder_coordinates": cosines.T.contiguous(), "latent": tracked.latent, "feature": tracked.feature,
        "parents": torch.tensor([-1, 0, 0, -1, 3]), "tracked": tracked, "live": torch.ones(D_SAE, dtype=torch.bool),
        "labels": labels, "train_labels": labels, "test_labels": labels, "test_x": x, "probe": probe,
        "scores": x[:, 0], "label": labels[:, 0], "spurious": labels[:, 1], "predicted": labels[:, 0], "k": 2, "n": N,
        "control": W_dec, "extended": extended, "reordered": W_dec + 0.01, "foreign": [draw(2, D_IN)], "d_in": D_IN,
        "d_sae": D_SAE, "sums": functional.regression_update(dense, features), "both": counts.both, "rates": dense.mean(0),
        "along": x[:, 0], "beside": x[:, 1], "between": x[:, 2] / 9, "direction": x[0], "activations": dense[0],
        "main": torch.tensor([0, 1]), "sae": sae, "batch": Batch(x, features), "live_new": torch.ones(2) > 0,
        "covariance": x.T @ x, "tokens": torch.arange(ROWS).view(4, 16) % 7, "keep": torch.ones(4, 16) > 0,
        "clean": draw(4, 16, 7), "matching": tracked, "reconstruction": x / 2, "wide": widen(sae, 2),
    }  # fmt: skip


def otherwise():
    """Where a name means something else: by function, what its arguments are then."""
    known = values()
    half, spliced = torch.arange(ROWS) % 2 > 0, torch.ones(4, 16, 7).cumsum(2)
    return {
        "recovered_loss": {"sums": dict.fromkeys(LOSSES, torch.tensor(2.0)), "count": torch.tensor(3.0)},
        "roc_auc": {"labels": half}, "f1_score": {"labels": half}, "logistic_regression": {"labels": half},
        "infer_parents": {"both": known["features"].T @ known["features"], "weight": torch.tensor(float(ROWS))},
        "LossRecovered.update": {"sae": torch.zeros(4, 16, 7), "ablations": [spliced, torch.zeros(4, 16, 7)]},
        "orthonormal_basis": {"rows": known["directions"]}, "k_sparse_probing": {"ks": (1,)},
        "word_absorption": {"activations": known["codes"]},
        "metrics.hedging": {"features": known["feature_directions"], "activations": known["features"]},
        "metrics.hedging_degree": {"control": known["sae"], "extended": known["wide"], "reordered": known["sae"]},
        "HedgingDegree.update": {"control": known["codes"], "extended": torch.ones(ROWS, D_SAE + 2)},
    }  # fmt: skip


def there(value, device):
    """The same on a device, whatever holds the tensors."""
    if isinstance(value, (torch.Tensor, Codes)):
        return value.to(device)
    if isinstance(value, TopKSAE):
        return duplicate(value).to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(there(one, device) for one in value))
    if isinstance(value, (list, tuple)):
        return type(value)(there(one, device) for one in value)
    return {key: there(one, device) for key, one in value.items()} if isinstance(value, dict) else value


def arguments(name, parameters, optional=True):
    others = otherwise()
    known, found = {**values(), **others.get(name.removeprefix("functional."), {})}, []
    for parameter in parameters:
        given = parameter.name in known
        assert given or parameter.default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD, (
            f"{name}: what is its argument {parameter.name}? say it in values()"
        )
        if given and (optional or parameter.default is parameter.empty):
            found.append((parameter, known[parameter.name]))
    return found


def call(function, given, device):
    placed = [(parameter, there(value, device)) for parameter, value in given]
    return function(
        *(v for p, v in placed if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty),
        *(one for p, v in placed if p.kind is p.VAR_POSITIONAL for one in v),
        **{p.name: v for p, v in placed if p.default is not p.empty},
    )


def same(found, expected):
    found, expected = (torch.utils._pytree.tree_leaves(there(one, "cpu")) for one in (found, expected))
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, Codes):
            one, other = one.to_dense(), other.to_dense()
        if isinstance(one, (torch.Tensor, float)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


FUNCTIONS = {
    f"{place.__name__.rpartition('.')[2]}.{name}": function
    for place in (functional, metrics)
    for name, function in vars(place).items()
    if inspect.isfunction(function)
}
CLASSES = {name: cls for name, cls in vars(metrics).items() if inspect.isclass(cls) and cls is not metrics.ValidationMetric}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(gpu, name):
    """With the arguments it needs and with all, latents dense and sparse."""
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    for optional in (False, True):
        given = arguments(name, parameters, optional)
        expected = call(FUNCTIONS[name], given, "cpu")
        same(call(FUNCTIONS[name], given, gpu.DEVICE), expected)
        latents = [p.name for p, v in given if p.name in ("codes", "latents", "train", "test") and isinstance(v, torch.Tensor)]
        if latents:
            given = [(p, as_csr(v) if p.name in latents else v) for p, v in given]
            same(call(FUNCTIONS[name], given, gpu.DEVICE), expected)


def as_csr(dense):
    return Codes.from_csr(*Codes.from_dense(dense).csr(), dense.shape[1])


@pytest.mark.parametrize("name", CLASSES)
def test_classes(gpu, name):
    cls = CLASSES[name]
    made = arguments(name, inspect.signature(cls).parameters.values())
    results = []
    for device in ("cpu", gpu.DEVICE):
        metric = call(cls, made, device).to(device)
        sums_of = getattr(metric, "sums_of", None)
        takes = arguments(
            f"{name}.update", inspect.signature(sums_of or metric.update).parameters.values(), name != "SAEMetrics"
        )
        for _ in range(2):
            gpu.waits.clear()
            call(metric.update, takes, device)
        final = arguments(name, inspect.signature(metric.compute).parameters.values()) if name == "SAEMetrics" else []
        results.append(call(metric.compute, final, device))
        assert all(state.is_cuda == (device != "cpu") for state in states(metric))
    same(results[1], results[0])


def states(metric):
    parts = [one for one in metric.modules() if isinstance(one, Metric)]
    return [value for one in parts for value in (getattr(one, key) for key in one._defaults) if isinstance(value, torch.Tensor)]


def test_devices_do_not_mix(gpu):
    """What a mistake looks like, and a wait."""
    x = torch.ones(3, device=gpu.DEVICE)
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        torch.ones(3)[x.long()]
    with pytest.raises((TypeError, RuntimeError)):
        x.numpy()
    gpu.waits.clear()
    assert float((x + 1).sum()) == 6
    assert len(gpu.waits) == 1
