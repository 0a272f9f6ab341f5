"""Whatever is measured has an entry, and tables show what matters."""

import torch

from hedgelab.batch import Batch
from hedgelab.kernels.codes import Codes
from hedgelab.metrics import SAEMetrics
from hedgelab.metrics.functional.degree import hedging_degree
from hedgelab.tracking.glossary import GLOSSARY, bare, term, title, worth_showing


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
