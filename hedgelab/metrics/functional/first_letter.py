"""Absorption and splitting on the first-letter task.

The task and the definition are those of Chanin et al. 2024 (*A is for Absorption*) in the form in which SAEBench measures it
(Karvonen et al. 2025): projections onto the probe take the place of ablations, so that no model needs to run.

For each letter: a dense probe on the activations knows which words start with it. Latents are ranked by an L1-penalised
probe on all of them; k-sparse probes on the best 1, 2, … tell how many latents the letter is *split* into: as long as each
adds .03 to the F1. Words that the dense probe gets right are *fully absorbed* when all split latents are silent while a latent
along the probe carries at least .4 of the activation's projection on it; the *absorption fraction* counts partial absorption
by at most three latents.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional import probing
from hedgelab.metrics.functional.accumulate import fold_decoder, on_cpu, picked

F1_JUMP, MOST_SPLITS = 0.03, 10  # what a further latent must add to the F1 to count as a split, and the most splits
MIN_PROBE_F1 = 0.6  # letters whose dense probe is worse are left out
ABSORBER_COSINE, FULL_ABSORBER_COSINE = 0.1, 0.025  # with the probe, for the fraction and for full absorption
PROJECTION_SHARE, MOST_ABSORBERS = 0.4, 3  # share of the activation's projection that so many of them must carry
_L1, _L1_STEPS, _SETTLED, _SILENT = 0.01, 400, 1e-4, 1e-8


class FirstLetterScores(NamedTuple):
    """Scores by letter, ``[letters]`` each, float64 on the CPU; NaN where the dense probe is too weak or finds no word."""

    full: Tensor  # share of the words that the dense probe finds which are fully absorbed
    fraction: Tensor  # mean absorption fraction over them
    splits: Tensor  # number of latents that the letter is split into
    f1: Tensor  # of the best single latent on the test words
    probe_f1: Tensor  # of the dense probe on the test words; NaN for letters without a word in either split


def first_letter_scores(
    train: Tensor | Codes,
    train_labels: Tensor,
    test: Tensor | Codes,
    test_labels: Tensor,
    test_x: Tensor,
    probe: probing.LinearProbe,
    W_dec: Tensor,
) -> FirstLetterScores:
    """Absorption (from 0 to 1) and splitting (from 1 to 10) of every letter; formulas and sources in the module.

    Latents of training and test words are codes or dense ``[n, d_sae]`` of any device, labels bool ``[n, letters]``;
    ``test_x [n, d_in]`` are the activations as the SAE reads them, ``probe`` the letters' dense probes on such, ``W_dec
    [d_sae, d_in]`` the decoder of any norms. Trust it where ``probe_f1`` is high; it sees only absorption along the probe.

    >>> y = torch.tensor([[True], [True], [False], [False]]).repeat(5, 1)
    >>> x, W_dec = 2 * y.float(), torch.ones(2, 1)
    >>> latents = x * torch.tensor([[1.0, 0], [0, 1], [0, 0], [0, 0]]).repeat(5, 1)  # the second takes half of the words
    >>> probe = probing.LinearProbe(torch.ones(1, 1), -torch.ones(1))
    >>> first_letter_scores(latents, y, latents, y, x, probe, W_dec).splits.item()
    2.0

    Logged as:
        absorption/full: full absorption (lower): first-letter task: words whose letter only another latent carries
        absorption/fraction: absorption share (lower): first-letter task: the share of the letter that others carry
        absorption/split_latents: splits [latents] (lower): latents that a letter is split into, mean
    """
    train, test, train_labels, test_labels = on_cpu(train), on_cpu(test), train_labels.cpu(), test_labels.cpu()
    test_x, W_dec, probe = test_x.detach().cpu(), W_dec.detach().cpu(), probing.LinearProbe(*(p.cpu() for p in probe))
    known, scale = probing.known_classes("first letters", train_labels, test_labels), probing.firing_magnitudes(train)
    ranked, norms = l1_ranking(train, train_labels, scale), fold_decoder(W_dec)[1]
    found = probe.scores(test_x) > 0
    scores = {name: torch.full(known.shape, torch.nan, dtype=torch.float64) for name in FirstLetterScores._fields}
    for letter in known.nonzero().flatten().tolist():
        y, y_test, best = train_labels[:, letter], test_labels[:, letter], ranked[letter]
        scores["probe_f1"][letter] = probe_f1 = probing.f1_score(found[:, letter], y_test)
        words = (found[:, letter] & y_test).nonzero().squeeze(1)
        if probe_f1 <= MIN_PROBE_F1 or not len(words):
            continue
        x, x_test = (picked(codes, 1, best) / scale[best] for codes in (train, test))
        f1: list[float] = []
        for k in range(1, len(best) + 1):
            score = probing.f1_score(probing.logistic_regression(x[:, :k], y).scores(x_test[:, :k])[:, 0] > 0, y_test)
            if f1 and score <= f1[-1] + F1_JUMP:
                break
            f1.append(score)
        activations = picked(test, 0, words) * norms
        full, fraction = word_absorption(activations, test_x[words], probe.weight[letter], best[: len(f1)], W_dec)
        scores["full"][letter], scores["fraction"][letter] = full.double().mean(), fraction.mean()
        scores["splits"][letter], scores["f1"][letter] = len(f1), f1[0]
    return FirstLetterScores(**scores)


def word_absorption(activations: Tensor, x: Tensor, direction: Tensor, main: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each word that the dense probe finds is fully absorbed (bool), and its absorption fraction, ``[words]`` each.

    ``activations [words, d_sae]`` are latents in units of decoder norm (folded), ``x [words, d_in]`` activations of the model,
    ``direction [d_in]`` is the probe's weight, ``main [splits]`` the latents that the letter is split into.

    >>> x, W_dec = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    >>> word_absorption(torch.tensor([[1.0, 1.25]]), x, x[0], torch.tensor([0]), W_dec)[1]  # half by the second latent
    tensor([0.5000], dtype=torch.float64)
    """
    direction = normalize(direction.double(), dim=0)
    cosines = normalize(W_dec.double(), dim=1) @ direction
    activations, on_probe = activations.double(), x.double() @ direction
    projections = activations * cosines
    best = projections.max(dim=1)
    silent, enough = (activations[:, main] < _SILENT).all(1), best.values >= PROJECTION_SHARE * on_probe
    full = silent & enough & (cosines[best.indices] >= FULL_ABSORBER_COSINE) & (on_probe > 0)
    by_main = projections[:, main].sum(1)
    absorbs = cosines >= ABSORBER_COSINE
    absorbs[main] = False
    rest = torch.where(absorbs, projections, 0.0).clamp_min(0)
    by_absorbers = rest.topk(min(MOST_ABSORBERS, rest.shape[1]), dim=1).values.sum(1)
    taken = torch.minimum(by_absorbers, on_probe - by_main)
    fraction = torch.where(by_main <= 0, 1.0, taken / (taken + by_main)).clamp(0, 1)
    none = (by_main >= on_probe) | (by_absorbers / on_probe < PROJECTION_SHARE)
    return full, torch.where(none, 0.0, fraction)


def l1_ranking(codes: Codes, labels: Tensor, scale: Tensor, k: int = MOST_SPLITS) -> Tensor:
    """The k latents of each class with the largest positive weight in an L1-penalised probe, ``[classes, k]``.

    The loss is SAEBench's: mean over examples of the cross-entropy, positives weighing as much as the rest together, plus .01
    times the L1 norm; minimised by accelerated proximal gradients (FISTA) on latents divided by ``scale [d_sae]``.
    """
    n, target = codes.batch_size, labels.float()
    crow, latents, values = codes.scale((1 / scale).to(codes.values)).detach().csr()
    matrix = torch.sparse_csr_tensor(crow, latents, values.float(), (n, codes.d_sae), check_invariants=False)
    transpose = matrix.t().to_sparse_csr()
    sample = torch.where(labels, (n - target.sum(0)) / target.sum(0).clamp_min(1), 1.0) / n
    v = torch.ones(codes.d_sae, labels.shape[1])
    for _ in range(20):  # power iteration: the largest curvature of each class's loss
        v = transpose @ (sample * (matrix @ normalize(v, dim=0)))
    lipschitz = v.norm(dim=0) * (1.1 / 4) + sample.sum(0) / 4  # of the latents and of the intercept
    w, b = torch.zeros_like(v), torch.zeros(labels.shape[1])
    ahead_w, ahead_b, t = w, b, 1.0
    for _ in range(_L1_STEPS):
        pull = sample * (torch.sigmoid(matrix @ ahead_w + ahead_b) - target)
        moved = ahead_w - (transpose @ pull) / lipschitz
        new_w = torch.sign(moved) * (moved.abs() - _L1 / lipschitz).clamp_min(0)
        new_b = ahead_b - pull.sum(0) / lipschitz
        following = (1 + (1 + 4 * t * t) ** 0.5) / 2
        ahead_w, ahead_b = new_w + (t - 1) / following * (new_w - w), new_b + (t - 1) / following * (new_b - b)
        settled = (new_w - w).abs().max() < _SETTLED * new_w.abs().max()
        w, b, t = new_w, new_b, following
        if settled:
            break
    return w.T.sort(dim=1, descending=True, stable=True).indices[:, :k]
