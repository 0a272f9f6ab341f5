"""The suites of the package: density and decoder geometry of any SAE, and what needs a language model."""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.llm.hook import Replacement
from hedgelab.data.llm.labelled import FirstLetters, TaggedWords
from hedgelab.errors import whole_number
from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional.basic import density_histogram, explained_variance
from hedgelab.metrics.functional.first_letter import FirstLetterScores, first_letter_scores
from hedgelab.metrics.functional.loss_recovered import baseline_sums, recovered_loss, spliced_sums
from hedgelab.metrics.functional.probing import firing_magnitudes, k_sparse_probing, linear_probes
from hedgelab.metrics.functional.projection import nth_decoder_projection
from hedgelab.metrics.functional.recovery import NEAR_DUPLICATE, decoder_cosines, decoder_geometry, mcc
from hedgelab.plots import evaluation as plots
from hedgelab.plots.training import firing_density
from hedgelab.protocols.evaluation.reader import ModelReader, Readings
from hedgelab.protocols.evaluation.suite import NOISE, Scores, Suite, encode_rows, finite, rows_of, whole_numbers
from hedgelab.protocols.planting.measures import NULLS, ResidualAndNulls
from hedgelab.saes import SAE
from hedgelab.seeding import generator
from hedgelab.training.trainee import Trainee

OFTEN, SELDOM = 0.1, 1e-4
"""Firing rates from which a latent is dense, and below which it is rare."""
_ROWS_OF_PROJECTIONS = 2048
_PARTS = 8  # of the activations: how a score differs between them is its noise


def with_noise(name: str, values: Tensor) -> dict[str, float]:
    """The mean of a score measured anew several times, and its standard error as ``<name>_noise``, of two or more."""
    noise = {} if len(values) < 2 else {f"{name}{NOISE}": float(values.std()) / len(values) ** 0.5}
    return {name: float(values.mean()), **noise}


def jackknife(left_out: Tensor) -> Tensor:
    """Standard errors of scores, from their values ``[n, ...]`` with each of n equal parts of what was measured on left out.

    ``√((n - 1) / n Σ (v_i - mean v)²)`` (Tukey 1958); of a mean that is the usual standard error.

    >>> values = torch.tensor([1.0, 2.0, 6.0])
    >>> round(jackknife((values.sum() - values) / 2).item(), 6) == round(values.std().item() / 3**0.5, 6)
    True
    """
    return left_out.double().std(0, correction=0) * math.sqrt(len(left_out) - 1)


def over_live(name: str, values: Tensor, elsewhere: Tensor) -> dict[str, float]:
    """The mean of values of live latents ``[live]`` (0 of none), and how it varies with which of them fire.

    ``elsewhere [parts, live]``: whether each fires outside a part of the activations. Its noise is the jackknife's.
    """
    means = torch.stack([values[kept].double().mean() for kept in elsewhere]).nan_to_num()
    return {name: float(values.double().mean().nan_to_num()), f"{name}{NOISE}": float(jackknife(means))}


def fired_elsewhere(codes: Codes) -> Tensor:
    """Whether each latent fires outside each of some equal parts of the rows, bool ``[parts, d_sae]``."""
    fired = torch.stack([part.firing_counts() for part in codes.split(-(-codes.batch_size // _PARTS))])
    return fired.sum(0) > fired


class DensitySuite(Suite):
    """How often latents fire, how many never do, and how well they reconstruct.

    Args:
        rows: Activations of the validation stage on which it is measured, at least.
    """

    name = "density"
    reads_language_model = reconstructs = False
    titles: ClassVar[Mapping[str, str]] = {
        "density/explained_variance": "explained variance ↑",
        "density/dead_fraction": "dead latents ↓",
    }

    def __init__(self, rows: int = 8192) -> None:
        self.rows = whole_number("rows", rows)

    @torch.no_grad()
    def score(self, saes: Mapping[str, SAE], readings: Readings) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE."""
        x = readings.rows(self.rows)
        for name, sae in saes.items():
            codes = encode_rows(sae, x)
            rates = codes.firing_counts().double() / len(x)
            counts, edges, _ = density_histogram(rates)
            live = rates[rates > 0]
            dead = (~fired_elsewhere(codes)).double().mean(1)
            metrics = {
                "density/l0": float(rates.sum()),
                "density/dead_fraction": float((rates == 0).double().mean()),
                "density/dead_fraction_noise": float(jackknife(dead)),
                "density/dense_fraction": float((rates >= OFTEN).double().mean()),
                "density/rare_fraction": float(((rates > 0) & (rates < SELDOM)).double().mean()),
                "density/median_rate": float(live.median()) if len(live) else 0.0,
            }
            if sae.reconstructs:
                x_hat = sae.decode(sae.encode(x.to(sae.W_dec.device))).cpu()
                metrics["density/explained_variance"] = float(explained_variance(x, x_hat))
                parts = zip(x.tensor_split(_PARTS), x_hat.tensor_split(_PARTS), strict=True)
                of_parts = torch.stack([explained_variance(*part) for part in parts]).double()
                metrics["density/explained_variance_noise"] = float(of_parts.std()) / _PARTS**0.5
            latents = {"latent": range(sae.d_sae), "firing_rate": rates, "mean_magnitude": firing_magnitudes(codes)}
            histogram = {"log10_rate_from": edges[:-1], "log10_rate_to": edges[1:], "latents": counts}
            tables = {"density/histogram.csv": rows_of(histogram), "density/latents.csv": rows_of(latents)}
            yield name, Scores(metrics, tables, {"density.png": partial(firing_density, rates)})


class GeometrySuite(Suite):
    """How decoder rows of live latents lie to one another.

    Args:
        rows: Activations of the validation stage that tell live latents from dead ones, at least.
    """

    name = "geometry"
    reads_language_model = reconstructs = False
    titles: ClassVar[Mapping[str, str]] = {
        "geometry/mean_max_cosine": "mean largest cosine ↓",
        "geometry/pw_mcc": "agreement of seeds (PW-MCC) ↑",
    }

    def __init__(self, rows: int = 8192) -> None:
        self.rows = whole_number("rows", rows)

    def score(self, saes: Mapping[str, SAE], readings: Readings) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE."""
        x = readings.rows(self.rows)
        for name, sae in saes.items():
            codes = encode_rows(sae, x)
            live, elsewhere = codes.fired(), fired_elsewhere(codes)[:, codes.fired()]
            W_dec, b_dec = sae.W_dec.detach().cpu(), sae.b_dec.detach().cpu()
            geometry = decoder_geometry(W_dec, live)
            of_latents = {
                "mean_max_cosine": geometry.largest,
                "mean_absolute_cosine": geometry.absolute,
                "near_duplicates": geometry.largest >= NEAR_DUPLICATE,
            }
            if sae.reconstructs:
                read, written = (normalize(weight.detach().cpu().float(), dim=1) for weight in (sae.W_enc.T, W_dec))
                of_latents["encoder_decoder_cosine"] = (read * written).sum(1)[live]
            metrics: dict[str, float] = {}
            for key, values in of_latents.items():
                metrics |= over_live(f"geometry/{key}", values, elsewhere)
            if sae.reconstructs and getattr(sae, "normalize_activations", "none") == "none":  # else b_dec is another's
                parts = x.tensor_split(max(_PARTS, -(-len(x) // _ROWS_OF_PROJECTIONS)))
                projections = torch.stack([nth_decoder_projection(part, W_dec, b_dec) for part in parts])
                metrics |= with_noise("geometry/nth_projection", projections.double())
            others = [other for key, other in saes.items() if key != name and alike(sae, other)]
            if others:
                metrics |= with_noise("geometry/pw_mcc", torch.stack([between(sae, other) for other in others]))
            latents = live.nonzero().squeeze(1)
            nearest = {"latent": latents, "nearest": latents[geometry.nearest], "cosine": geometry.largest}
            draw = partial(plots.cosine_distribution, geometry.counts, geometry.largest, NEAR_DUPLICATE)
            yield name, Scores(metrics, {"geometry/nearest.csv": rows_of(nearest)}, {"geometry.png": draw})


def alike(one: SAE, other: SAE) -> bool:
    """Whether two SAEs differ in the seed of their weights at most."""
    mine, theirs = (unseeded(sae.config()) for sae in (one, other))
    return type(one) is type(other) and mine == theirs


def unseeded(config: Any) -> Any:
    """An SAE's config without seeds."""
    if not isinstance(config, dict):
        return config
    return {key: unseeded(value) for key, value in config.items() if key != "seed"}


def between(one: SAE, other: SAE) -> Tensor:
    """PW-MCC: mean |cosine| of decoder rows matched one to one (arXiv 2505.20254)."""
    return mcc(decoder_cosines(one.W_dec.detach().cpu(), other.W_dec.detach().cpu()))


class ResidualSuite(Suite):
    """Residual hedging (see :mod:`hedgelab.metrics.functional.error_spread`), and what it says where nothing can be missing.

    Its nulls are errors with signs drawn at random (``flipped``), and of the same norms in random directions (``surrogate``):
    believe a score only where it is far above both. On language models it has not been (see ``configs/README.md``).

    Args:
        rows: Activations of the validation stage on which it is measured, at least.
        nulls: Whether the nulls are measured too, which takes three times as long.
    """

    name = "residual"
    reads_language_model = False
    titles: ClassVar[Mapping[str, str]] = {"residual/hedging": "residual hedging ↓"}

    def __init__(self, rows: int = 8192, nulls: bool = True) -> None:
        self.rows, self.nulls = whole_number("rows", rows), nulls

    @torch.no_grad()
    def score(self, saes: Mapping[str, SAE], readings: Readings) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE."""
        x = readings.rows(self.rows)
        for name, sae in saes.items():
            measures = ResidualAndNulls(sae.W_dec, NULLS if self.nulls else ())
            for rows in torch.split(x.to(sae.W_dec.device), _ROWS_OF_PROJECTIONS):
                codes = sae.encode(rows)
                measures.update(rows, codes.on_raw(), sae.decode(codes))
            found = measures.compute()
            metrics = {f"residual/{key}": score.hedging for key, score in found.items() if key != "residual"}
            metrics |= {"residual/hedging": found["residual"].hedging, "residual/hedging_noise": found["residual"].std}
            latents = {"latent": range(sae.d_sae), **{key: score.latents for key, score in found.items()}}
            yield name, Scores(finite(metrics), {"residual/latents.csv": rows_of(latents)})


class TruthSuite(Suite):
    """Everything that a validation pass measures where features are known: toys, and planted ones with ``--truth``.

    Args:
        truth_batches: Validation batches on which it is measured.
    """

    name = "truth"
    reads_language_model = False
    titles: ClassVar[Mapping[str, str]] = {
        "truth/nearest_f1": "F1 ↑",
        "truth/mcc": "MCC ↑",
        "truth/hedging/decoder": "true hedging ↓",
    }

    def __init__(self, truth_batches: int = 64) -> None:
        self.truth_batches = whole_number("truth_batches", truth_batches)

    def lacks(self, data: ActivationDataModule) -> str | None:
        """Known features."""
        if data.feature_directions is None:
            return "needs activations whose features are known: a toy, or planted ones with --truth"
        return None

    @torch.no_grad()
    def score(self, saes: Mapping[str, SAE], readings: Readings) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE."""
        for name, sae in saes.items():
            measured = Trainee(sae)
            measured.start_measuring(readings.data, sae.W_dec.device)
            for batch in readings.batches(self.truth_batches):
                measured.measure(batch.to(sae.W_dec.device))
            yield name, Scores(finite(measured.measurements("truth")))


class LossSuite(Suite):
    """Loss recovered on contexts that training never saw.

    Activations are replaced at the positions that training used; the others stay as they are. The untouched model and both
    ablations run once for all SAEs.

    Args:
        loss_contexts: Contexts of the test stage on which it is measured, the first ones.
    """

    name = "loss_recovered"
    titles: ClassVar[Mapping[str, str]] = {"loss_recovered/recovered": "loss recovered ↑"}

    def __init__(self, loss_contexts: int = 8) -> None:
        self.loss_contexts = whole_number("loss_contexts", loss_contexts)

    @torch.inference_mode()
    def score(self, saes: Mapping[str, SAE], readings: Readings) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE, all at the end."""
        reader, model = readings.model, readings.model.spliced
        contexts = reader.data.stage_contexts("test")
        tokens = contexts.tokens[: self.loss_contexts].long().to(model.device)
        usable = contexts.usable(reader.data.skip_first)[: self.loss_contexts].to(model.device)
        parts = list(zip(torch.split(tokens, 1), torch.split(usable, 1), strict=True))  # one by one: logits are large
        total = sum(model.activations(part)[where].double().sum(0) for part, where in parts)
        mean = (torch.as_tensor(total) / usable.sum()).float()
        sums: dict[str, list[dict[str, Tensor]]] = {name: [] for name in saes}  # of each context

        def reconstruct(sae: SAE, rows: Tensor) -> Tensor:
            x = reader.normalise(rows.float()).to(sae.W_dec.device)
            return reader.restore(sae(x).to(rows.device))

        for part, where in tqdm(parts, "Loss recovered", unit="context", delay=1):
            clean = model.logits(part)
            ablations = (partial(replaced, where, by) for by in (torch.zeros_like, mean.expand_as))
            baselines = baseline_sums(part, where, clean, *(model.logits(part, ablation) for ablation in ablations))
            for name, sae in saes.items():
                spliced = model.logits(part, partial(replaced, where, partial(reconstruct, sae)))
                sums[name].append(baselines | spliced_sums("sae", part, where, clean, spliced))
        for name, contexts_sums in sums.items():
            losses = losses_of(contexts_sums)
            values = {f"loss_recovered/{key}": value for key, value in losses.items()}
            if len(contexts_sums) > 1:
                without = [losses_of(contexts_sums[:i] + contexts_sums[i + 1 :]) for i in range(len(contexts_sums))]
                for key in (key for key in losses if "recovered" in key):
                    noise = jackknife(torch.tensor([one[key] for one in without]))
                    values[f"loss_recovered/{key}{NOISE}"] = float(noise)
            yield name, Scores(finite(values), {}, {"loss_recovered.png": partial(plots.losses_spliced, losses)})


def losses_of(contexts: list[dict[str, Tensor]]) -> dict[str, float]:
    """Losses and shares recovered over some contexts, of the sums of each."""
    total = {key: torch.stack([sums[key] for sums in contexts]).sum(0) for key in contexts[0]}
    return {key: float(value) for key, value in recovered_loss(total, total["count"])._asdict().items()}


def replaced(where: Tensor, by: Replacement, hooked: Tensor) -> Tensor:
    """Hooked activations ``[n, length, d_in]`` with the rows at ``where [n, length]`` put through ``by``."""
    result = hooked.clone()
    result[where] = by(hooked[where]).to(hooked.dtype)
    return result


class ProbingSuite(Suite):
    """k-sparse probing of tagged words (see :mod:`hedgelab.metrics.functional.probing`), means over splits of the documents.

    Args:
        words: Tagged words; without them there is no probing.
        ks: Numbers of latents of the probes.
        splits: Splits into documents for training and for testing; how scores differ between them is their noise.
    """

    name = "probing"
    reconstructs = False
    needs = "words"
    titles: ClassVar[Mapping[str, str]] = {f"probing/f1_k{k}": f"probing F1, k = {k} ↑" for k in (1, 5, 10)}

    def __init__(self, words: TaggedWords | None = None, ks: list[int] = [1, 2, 5, 10], splits: int = 3) -> None:  # noqa: B006
        self.words, self.ks, self.splits = words, whole_numbers("ks", ks), whole_number("splits", splits)

    def activations(self, reader: ModelReader) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Activations at the last token of every word, ``[n, d_in]``, their classes, and by split which are for testing."""
        assert self.words is not None
        data = self.words.load(reader.tokenizer)
        context, position = data.positions.T
        word = (context * data.tokens.shape[1] + position).argsort()  # in reading order
        word = word[position[word] >= reader.data.skip_first]
        usable = torch.zeros_like(data.tokens, dtype=torch.bool)
        usable[context[word], position[word]] = True
        x, kept = reader.rows("probing", data.tokens, usable)
        word = word[kept]
        tests, documents = [data.test[word]], len(data.tokens)
        for_testing = torch.zeros(documents, dtype=torch.bool).index_put_((context[data.test],), torch.tensor(True))
        for split in range(1, self.splits):
            tests.append(for_testing[torch.randperm(documents, generator=generator(split, "split"))][context[word]])
        return x, data.labels[word], tests

    def score(self, saes: Mapping[str, SAE], readings: Readings) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE."""
        (x, labels, tests), ks = self.activations(readings.model), self.ks
        classes = list(self.words.classes) if self.words is not None else []
        for name, sae in saes.items():
            of_splits = [
                k_sparse_probing(encode_rows(sae, x[~test]), labels[~test], encode_rows(sae, x[test]), labels[test], ks)
                for test in tests
            ]
            scores, metrics = of_splits[0], dict[str, float]()
            for kind in ("f1", "auc"):
                found = torch.stack([getattr(one, kind).nanmean(0) for one in of_splits]).double()  # [splits, ks]
                for column, k in enumerate(ks):
                    metrics |= with_noise(f"probing/{kind}_k{k}", found[:, column])
            columns = {
                "class": [label for label in classes for _ in ks],
                "k": ks * len(classes),
                **{key: getattr(scores, key).flatten() for key in ("f1", "auc", "C")},
                "latents": [ranked[:k] for ranked in scores.latents.tolist() for k in ks],
            }
            draw = partial(plots.probing_by_class, classes, ks, scores.f1)
            yield name, Scores(metrics, {"probing/classes.csv": rows_of(columns)}, {"probing.png": draw})


class AbsorptionSuite(Suite):
    """First-letter absorption and splitting (see :mod:`hedgelab.metrics.functional.first_letter`).

    Args:
        letters: The first-letter task.
        splits: Splits into words for training and for testing; how scores differ between them is their noise.
    """

    name = "absorption"
    titles: ClassVar[Mapping[str, str]] = {
        "absorption/full": "full absorption ↓",
        "absorption/split_latents": "latents a letter is split into ↓",
        "absorption/f1_k1": "first letter F1, k = 1 ↑",
    }

    def __init__(self, letters: FirstLetters = FirstLetters(), splits: int = 3) -> None:  # noqa: B008 (frozen)
        self.letters, self.splits = letters, whole_number("splits", splits)

    def score(self, saes: Mapping[str, SAE], readings: Readings) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE."""
        words = self.letters.load(readings.model.tokenizer)
        x, kept = readings.model.word_rows(words)
        labels = words.labels[kept]
        tests = [reshuffled(words.test[kept], labels, split) for split in range(self.splits)]
        probes = [linear_probes(x[~test], labels[~test]) for test in tests]  # dense: they know the letters
        for name, sae in saes.items():
            of_splits = [
                first_letter_scores(
                    encode_rows(sae, x[~test]), labels[~test], encode_rows(sae, x[test]), labels[test], x[test], probe,
                    sae.W_dec.detach().cpu(),
                )
                for test, probe in zip(tests, probes, strict=True)
            ]  # fmt: skip
            scores = of_splits[0]
            metrics = {"absorption/letters": float((~scores.full.isnan()).sum())}
            for field in FirstLetterScores._fields:
                key = "split_latents" if field == "splits" else "f1_k1" if field == "f1" else field
                means = torch.stack([getattr(one, field).nanmean() for one in of_splits])
                metrics |= with_noise(f"absorption/{key}", means)
            tables = {"absorption/letters.csv": rows_of({"letter": words.letters, **scores._asdict()})}
            draw = partial(plots.absorption_by_letter, words.letters, scores.full, scores.fraction)
            yield name, Scores(finite(metrics), tables, {"absorption.png": draw})


def reshuffled(test: Tensor, labels: Tensor, split: int) -> Tensor:
    """Which words are for testing (bool ``[words]``) in another split; as they are in split 0, as many of each class in all."""
    test = test.clone()
    for number, members in enumerate(one.nonzero().squeeze(1) for one in labels.T if split):
        test[members] = test[members][torch.randperm(len(members), generator=generator(split, "letters", number))]
    return test
