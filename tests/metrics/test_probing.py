"""k-sparse probing against the same protocol done directly with scikit-learn."""

import numpy as np
import pytest
import torch

from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional.accumulate import picked
from hedgelab.metrics.functional.probing import PENALTIES, firing_magnitudes, k_sparse_probing, rank_latents
from hedgelab.seeding import generator

KS = (1, 2, 5)


def latents(n, seed, classes=3, d_sae=40):
    """Sparse latents of very different scales, some of which know a class, and the classes."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.rand(n, classes, generator=random) < torch.tensor([0.3, 0.1, 0.5])
    fires = torch.rand(n, d_sae, generator=random) < 0.1
    for c in range(classes):
        for i, heard in enumerate((0.8, 0.5, 0.3)):
            fires[:, 5 * c + i] |= labels[:, c] & (torch.rand(n, generator=random) < heard)
    scale = torch.logspace(-2, 2, d_sae)[torch.randperm(d_sae, generator=torch.Generator().manual_seed(9))]
    values = fires * (1 + torch.rand(n, d_sae, generator=random)) * scale
    return values, labels


def sparse(values):
    return Codes.from_csr(*Codes.from_dense(values).csr(), values.shape[1])


def test_scores_are_those_of_scikit_learn():
    linear, metrics = pytest.importorskip("sklearn.linear_model"), pytest.importorskip("sklearn.metrics")
    (train, y), (test, y_test) = latents(600, 0), latents(300, 1)
    scores = k_sparse_probing(sparse(train), y, sparse(test), y_test, KS)
    train, test, y, y_test = (part.numpy().astype(float) for part in (train, test, y, y_test))
    magnitude = np.array([column[column > 0].mean() for column in train.T])
    train, test = train / magnitude, test / magnitude
    held = (torch.randperm(600, generator=generator(0, "probing split")) < 120).numpy()
    for c in range(3):
        difference = np.abs(train[y[:, c] == 1].mean(0) - train[y[:, c] == 0].mean(0))
        best = np.argsort(-difference, kind="stable")[: max(KS)]
        np.testing.assert_array_equal(scores.latents[c], best)
        for column, k in enumerate(KS):

            def fitted(C, rows, k=k, best=best, c=c):
                model = linear.LogisticRegression(C=C, class_weight="balanced", tol=1e-8, max_iter=1000)
                return model.fit(train[rows][:, best[:k]], y[rows, c])

            aucs = [
                metrics.roc_auc_score(y[held, c], fitted(C, ~held).decision_function(train[held][:, best[:k]]))
                for C in PENALTIES
            ]
            C = PENALTIES[int(np.argmax(np.round(aucs, 9)))]
            decided = fitted(C, slice(None)).decision_function(test[:, best[:k]])
            assert scores.auc[c, column] == pytest.approx(metrics.roc_auc_score(y_test[:, c], decided), abs=2e-3)
            assert scores.f1[c, column] == pytest.approx(metrics.f1_score(y_test[:, c], decided > 0), abs=5e-3)


def test_the_same_twice_and_for_both_layouts():
    (train, y), (test, y_test) = latents(300, 0), latents(200, 1)
    first, again = (k_sparse_probing(sparse(train), y, sparse(test), y_test, KS) for _ in range(2))
    dense = k_sparse_probing(Codes.from_dense(train), y, Codes.from_dense(test), y_test, KS)
    for one, same, other in zip(first, again, dense, strict=True):
        assert torch.equal(one, same)
        torch.testing.assert_close(one, other)


def test_latents_that_know_a_class_come_first_whatever_their_scale():
    train, y = latents(2000, 0)
    ranked = rank_latents(sparse(train), y, 3)
    assert [set(row) for row in ranked.tolist()] == [{0, 1, 2}, {5, 6, 7}, {10, 11, 12}]


def test_columns_and_magnitudes():
    values = torch.tensor([[0.0, 2, 0, 1], [3, 0, 0, 0], [1, 4, 0, 0]])
    for codes in (sparse(values), Codes.from_dense(values)):
        assert picked(codes, 1, torch.tensor([3, 0])).tolist() == [[1, 0], [0, 3], [0, 1]]
        assert picked(codes, 0, torch.tensor([2])).tolist() == [[1, 4, 0, 0]]
    assert firing_magnitudes(sparse(values)).tolist() == [2, 3, 1, 1]
    assert firing_magnitudes(Codes.from_dense(values * torch.tensor([[1], [-1], [1]]))).tolist() == [2, 3, 1, 1]


def test_more_latents_than_there_are():
    (train, y), (test, y_test) = latents(200, 0, d_sae=20), latents(100, 1, d_sae=20)
    assert k_sparse_probing(sparse(train), y, sparse(test), y_test, (1, 50)).latents.shape == (3, 20)
