"""Whatever is measured has an entry, and tables show what matters."""

import sys
from importlib.metadata import EntryPoint

import pytest
import torch

from hedgelab import glossary
from hedgelab.batch import Batch
from hedgelab.glossary import GLOSSARY, bare, term, title, worth_showing
from hedgelab.kernels.codes import Codes
from hedgelab.metrics import SAEMetrics, ValidationMetric, evaluation, readme
from hedgelab.metrics.functional.degree import hedging_degree


def test_every_metric_of_a_validation_pass_is_explained():
    directions, features = torch.eye(3, 4), torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 1]])
    metrics = SAEMetrics(4, 3, directions, parents=torch.tensor([-1, 0, -1]))
    metrics.update(Batch(features @ directions, features), features @ directions, Codes.from_dense(features))
    computed = metrics.compute(directions.t(), directions)
    assert "absorption" in computed
    assert not [name for name in computed if term(f"val/{name}") is None]


def test_every_number_of_the_hedging_degree_is_explained():
    old, new = torch.eye(4)[:3], torch.eye(4)[3:]
    moved = torch.nn.functional.normalize(old + 0.1 * new, dim=1)
    full = {"covariance": torch.eye(4).double(), "foreign": [new.double()], "reordered": old.double()}
    scores = hedging_degree(old.double(), torch.cat([moved, new]).double(), **full).scalars()
    assert {"degree", "noise_floor", "foreign_degree", "covariance_degree"} <= set(scores)
    assert not [name for name in scores if term(f"hedging/{name}") is None]
    assert term("hedging/seed2/degree") is GLOSSARY["hedging/degree"]


def test_tables_show_the_best_known_first_and_no_clutter():
    logged = ["system/cpu", "latent0/decoder_cos/feature1", "train/loss", "val/mse", "val/l0", "test/l0", "own/score"]
    logged += ["val/explained_variance", "hedging/degree", "hedging/degree_seed_std", "hedging/seed0/degree"]
    shown = worth_showing(dict.fromkeys(logged, 1.0))
    assert shown == ["val/explained_variance", "test/l0", "hedging/degree", "val/mse", "own/score"]


def test_titles():
    assert title("val/l0") == "L0"
    assert title("probing/auc_k10") == "probing AUC, 10"
    assert bare("control/explained_variance") == "explained_variance"
    assert len({one.title for one in GLOSSARY.values()}) == len(GLOSSARY)


def test_readme_of_the_metrics_is_fresh():
    assert readme.FILE.read_text() == readme.page(), "renew it: python -m hedgelab.metrics.readme"


OWN_METRIC = '''"""A metric from outside."""
import torch
from hedgelab.metrics import ValidationMetric


class Largest(ValidationMetric):
    """Mean of the largest latent of an example.

    Logged as:
        largest_latent: largest latent [units] (higher): largest activation of an example, mean over examples
    """

    name = "largest_latent"

    def __init__(self, d_in, d_sae, **kwargs):
        super().__init__(d_in, d_sae, **kwargs)
        self.add_sum("total")
        self.add_sum("count")

    def update(self, batch, x_hat, codes):
        self.add_to(total=codes.to_dense().amax(1).double().sum(), count=torch.tensor(float(len(x_hat))))

    def compute(self):
        return self.total / self.count
'''


@pytest.fixture
def own_metric(tmp_path, monkeypatch):
    """One file on the path, and nothing of it left behind."""
    (tmp_path / "metric_from_outside.py").write_text(OWN_METRIC)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ValidationMetric, "declared", {})
    yield "metric_from_outside"
    sys.modules.pop("metric_from_outside", None)


def measured():
    features = torch.tensor([[2.0, 0, 0], [1, 4, 0]])
    metrics = SAEMetrics(4, 3)
    metrics.update(Batch(features @ torch.eye(3, 4)), features @ torch.eye(3, 4), features)
    return metrics.compute(torch.eye(4, 3), torch.eye(3, 4))


def test_a_metric_of_an_entry_point_is_one_file(own_metric, monkeypatch):
    """Measured in every validation pass, explained in tables."""
    assert "largest_latent" not in measured()
    point = EntryPoint("largest", f"{own_metric}:Largest", glossary.GROUP)
    for module in (glossary, evaluation):
        monkeypatch.setattr(module, "entry_points", lambda group: [point])
    assert float(measured()["largest_latent"]) == 3.0
    glossary.declarations.cache_clear()
    try:
        declared = {name: one for entry in glossary.declarations() for name, one in entry.terms.items()}
    finally:
        glossary.declarations.cache_clear()
    expected = ("largest latent", "units", "higher", "largest activation of an example, mean over examples")
    assert tuple(declared["largest_latent"]) == expected
