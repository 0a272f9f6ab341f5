from argparse import Namespace

import pytest

from hedgelab.tracking.params import clean_key, flatten


@pytest.mark.parametrize(
    ("key", "clean"), [("train/mse", "train/mse"), ("a.b-c d:e_f", "a.b-c d:e_f"), ("w@[0]", "w_0_"), ("loss (λ)", "loss _λ_")]
)
def test_names_keep_what_mlflow_allows(key, clean):
    assert clean_key(key) == clean


def test_long_names_stay_apart():
    one, other = clean_key("x" * 300 + "1"), clean_key("x" * 300 + "2")
    assert one != other
    assert len(one) == len(other) == 250


def test_flattening_follows_the_config():
    params = {
        "model": Namespace(k=8, inner={"lr": 1e-3, "tied": False}),
        "trainer": {"callbacks": [{"class_path": "A"}, {"class_path": "B"}], "loggers": []},
        "data": {},
    }
    assert flatten(params) == {
        "model.k": "8",
        "model.inner.lr": "0.001",
        "model.inner.tied": "false",
        "trainer.callbacks.0.class_path": "A",
        "trainer.callbacks.1.class_path": "B",
        "trainer.loggers": "[]",
        "data": "{}",
    }
