"""Logistic regression and its scores against scikit-learn."""

import numpy as np
import pytest
import torch

from hedgelab.metrics.functional.probing import f1_score, linear_probes, logistic_regression, roc_auc

sklearn_linear = pytest.importorskip("sklearn.linear_model")
sklearn_metrics = pytest.importorskip("sklearn.metrics")


def examples(n=400, d=5, seed=0, share=0.2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64).relu()  # like latents: often exactly zero
    truth = x @ torch.randn(d, generator=generator, dtype=torch.float64) + torch.randn(n, generator=generator)
    return x, truth > truth.quantile(1 - share)


@pytest.mark.parametrize("C", [1e-3, 1.0, 100.0])
def test_few_columns_give_scikit_learns_weights(C):
    x, y = examples()
    probe = logistic_regression(x, y, C)
    reference = sklearn_linear.LogisticRegression(
        C=C, class_weight="balanced", tol=1e-10, max_iter=10_000, solver="newton-cholesky"
    ).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(probe.weight[0], reference.coef_[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(probe.bias, reference.intercept_, rtol=1e-5, atol=1e-7)


def test_separable_data_and_a_dead_column_have_a_solution():
    x = torch.tensor([[0.0, 0], [0, 0], [1, 0], [2, 0]])
    y = torch.tensor([False, False, True, True])
    probe = logistic_regression(x, y, C=100.0)
    assert ((probe.scores(x)[:, 0] > 0) == y).all()
    assert probe.weight[0, 1] == 0


def test_many_columns_give_scikit_learns_scores():
    x, first = examples(300, 40)
    labels = torch.stack([first, examples(300, 40, seed=1)[1]], dim=1)
    probe = linear_probes(x, labels, C=0.1)
    standard = (x - x.mean(0)) / x.std(0, unbiased=False)
    for i in range(2):
        reference = sklearn_linear.LogisticRegression(C=0.1, class_weight="balanced", tol=1e-10, max_iter=10_000)
        reference.fit(standard.numpy(), labels[:, i].numpy())
        np.testing.assert_allclose(probe.scores(x)[:, i], reference.decision_function(standard.numpy()), rtol=1e-3, atol=1e-3)


def test_scores_are_scikit_learns_with_ties():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (200,), generator=generator).double()
    labels = torch.rand(200, generator=generator) < 0.3
    assert roc_auc(scores, labels) == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), abs=1e-12)
    assert f1_score(scores > 2, labels) == pytest.approx(sklearn_metrics.f1_score(labels, scores > 2), abs=1e-12)


def test_one_class_has_no_auc_and_nothing_found_no_f1():
    assert np.isnan(roc_auc(torch.arange(3.0), torch.ones(3, dtype=torch.bool)))
    assert f1_score(torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)) == 0
