"""Fits on one rank and on several, and what is compared between them."""

import functools
import logging
import os
import socket
import warnings
from dataclasses import dataclass

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from hedgelab.batch import Batch
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.toy import ConditionalFiring, ToyDataModule
from hedgelab.saes import AbsTopKSAE, BatchTopKSAE, Initialization, JumpReLUSAE, MatryoshkaSAE, SAEGroup, TopKSAE, VanillaSAE
from hedgelab.saes.mitigations import (
    LISTA,
    DetachedInnerLevels,
    FrozenDecoder,
    OrthogonalDecoder,
    OwnRowCredit,
    RandomPrefixes,
    SortedLatents,
    TiltedLoss,
)
from hedgelab.seeding import generator
from hedgelab.training.sharding import full_tensor


def on_ranks(count, function, *args):
    """Run a function of (rank, *args) in as many processes as asked for, as a launcher would have started them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_as_rank, (count, port, function, args), count, start_method="fork")


def _as_rank(rank, count, port, function, args):
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    function(rank, *args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


FEATURES = [0.3, {"f0": 0.3, "not f0": 0.1}, 0.2, {"f2": 0.4, "otherwise": 0}, 0.15, 0.1]


class Correlated(ActivationDataModule):
    """Rows like a language model's: dense, a falling spectrum, a mean of their own, norms that vary."""

    d_in = 24

    def __init__(self, batch_size=64, dtype=torch.float32, **options):
        super().__init__(batch_size, seed=0, val_batches=2, **options)
        source = generator(0, "spectrum")
        self.mixing = torch.linalg.qr(torch.randn(self.d_in, self.d_in, generator=source))[0]
        self.mixing *= torch.arange(1, self.d_in + 1)[:, None] ** -0.7
        self.mean, self.dtype = 0.3 * torch.randn(self.d_in, generator=source), dtype

    def batch(self, stage, index):
        source = generator(0, stage, index)
        single = {"generator": source, "dtype": torch.float32}  # whatever the default is while modules are made
        rows = torch.randn(self.batch_size, self.d_in, **single)
        sizes = 1 + torch.rand(self.batch_size, 1, **single)
        return Batch((sizes * rows @ self.mixing + self.mean).to(self.dtype))


def toy(**options):
    return ToyDataModule(ConditionalFiring(FEATURES), d_in=10, batch_size=64, seed=0, val_batches=2, **options)


def population():
    return toy(sampling="population")


def make(kind, d_in, wide, seed=0):
    """An SAE of every kind: some tens of latents, or so many that the sparse kernels run."""
    d_sae = 640 if wide else 12
    init = Initialization(seed=seed, b_dec="mean")
    k_sparse = {"d_sae": d_sae, "k": 4 if wide else 2, "dead_after_steps": 15, "init": init}
    levels = [d_sae // 8, d_sae // 3, d_sae]
    match kind:
        case "vanilla":
            return VanillaSAE(d_in, d_sae, 0.01, l1_warmup_steps=30, init=init)
        case "clipped":
            return VanillaSAE(d_in, d_sae, 0.01, init=init, gradient_clip_norm=0.1, normalize_decoder=True)
        case "topk":
            return TopKSAE(d_in, **k_sparse)
        case "batch_topk":
            return BatchTopKSAE(d_in, **k_sparse)
        case "norm_aware":
            return BatchTopKSAE(d_in, **k_sparse, norm_aware_selection=True)
        case "jumprelu":
            return JumpReLUSAE(d_in, d_sae, l0_coefficient=0.01, threshold=0.05, init=init)
        case "steered":
            return VanillaSAE(d_in, d_sae, target_l0=2, init=init)
        case "penalty":
            return JumpReLUSAE(d_in, d_sae, threshold=0.05, target_l0=2, l0_control="penalty", init=init)
        case "scheduled":
            return BatchTopKSAE(d_in, **k_sparse, k_start=5.3, k_steps=20)
        case "matryoshka":
            inner = functools.partial(BatchTopKSAE, **k_sparse)
            return MatryoshkaSAE(d_in, inner, levels, beta=0.25, auxiliary_per_level=True)
        case "matryoshka_one_auxiliary":
            return MatryoshkaSAE(d_in, functools.partial(TopKSAE, **k_sparse), levels, beta=2.0)
        case "abs_topk":
            return AbsTopKSAE(d_in, **k_sparse)
        case "own_row_credit":
            inner = functools.partial(TopKSAE, **k_sparse)
            return MatryoshkaSAE(d_in, inner, levels, beta=0.5, mitigations=[OwnRowCredit(start=5)])
        case "orthogonal":
            some = [OrthogonalDecoder(chunk=5, every=2), FrozenDecoder(minimum_cosine=0.8)]
            return TopKSAE(d_in, **k_sparse, mitigations=some)
        case "adaptive":
            inner = functools.partial(VanillaSAE, d_sae=d_sae, l1_coefficient=0.01, init=init)
            return MatryoshkaSAE(d_in, inner, levels, beta=0.5, adaptive=True, credit=0.5)
        case "detached":
            inner = functools.partial(VanillaSAE, d_sae=d_sae, l1_coefficient=0.01, init=init)
            return MatryoshkaSAE(d_in, inner, levels, detached=True)
        case "lista_matryoshka":
            parts = [LISTA(), DetachedInnerLevels(), SortedLatents(decay=0.9), TiltedLoss(tilt=0.5)]
            return MatryoshkaSAE(d_in, BatchTopKSAE(d_in, **k_sparse), levels, mitigations=parts)
        case "random_prefixes":
            parts = [RandomPrefixes(smallest=2, seed=seed), TiltedLoss(tilt=0.5)]
            inner = BatchTopKSAE(d_in, **k_sparse, mitigations=[LISTA(steps=2)])
            return MatryoshkaSAE(d_in, inner, levels, mitigations=parts)
    raise ValueError(kind)


KINDS = (
    "vanilla",
    "clipped",
    "topk",
    "batch_topk",
    "norm_aware",
    "jumprelu",
    "matryoshka",
    "matryoshka_one_auxiliary",
    "detached",
    "abs_topk",
    "own_row_credit",
)


class Recorder(Logger):
    """Keeps every number of every step."""

    name, version = "recorder", "0"

    def __init__(self):
        super().__init__()
        self.history = []

    def log_metrics(self, metrics, step=None):
        self.history.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


def watch(module):
    """The loss of every step of every SAE in full precision, mean over the ranks."""
    seen = {}
    for name, sae in module.saes().items():
        seen[name] = {}
        sae.after_step = functools.partial(_watched, sae, sae.after_step, seen[name])
    return seen


def _watched(sae, after_step, seen, result):
    seen[sae.steps_done + 1] = float(sae.ranks.mean(result.total.detach()))
    after_step(result)


class Keep(L.Callback):
    """Each rank writes what it has seen and what it holds in the end."""

    def __init__(self, folder, recorder):
        self.folder, self.recorder, self.losses = folder, recorder, {}

    def on_fit_start(self, trainer, module):
        self.losses = watch(module)

    def on_fit_end(self, trainer, module):
        weights = {name: full_tensor(value).clone() for name, value in module.state_dict().items()}
        torch.save((self.recorder.history, weights, self.losses), self.folder / f"rank{trainer.global_rank}.pt")


@dataclass
class Outcome:
    """What a fit gave: numbers by step and name, weights by name, and losses (see watch) by SAE and step."""

    numbers: dict
    weights: dict
    losses: dict

    @classmethod
    def read(cls, file):
        history, weights, losses = torch.load(file, weights_only=True)
        numbers = {(step, name): value for step, values in history for name, value in values.items()}
        return cls(numbers, weights, losses)

    def decoders(self):
        return {name: value for name, value in self.weights.items() if name.endswith("W_dec")}


def group(kinds, d_in, wide):
    return SAEGroup({kind: make(kind, d_in, wide) for kind in kinds})


def in_another_order(x, step):
    """The same examples, whose sums are rounded otherwise; those of the first step, where latents start, as they are."""
    return x if step == 0 else x[torch.randperm(len(x), generator=generator(0, "order", step))]


def _fed(sae, loss, change, batch):
    return loss(batch._replace(x=change(batch.x, sae.steps_done)))


def fit(module, data, folder, ranks=1, steps=200, checkpoint=None, change=None, **trainer):
    """Train on some ranks, from a checkpoint where one is given; the outcome of each, where this process started them all.

    With ``change``, SAEs are trained on what that function makes of the activations at a step.
    """
    if change is not None:
        for sae in module.saes().values():
            sae.loss = functools.partial(_fed, sae, sae.loss, change)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    recorder = Recorder()
    settings = {
        "strategy": "ddp_fork" if ranks > 1 else "auto",
        "devices": ranks,
        "accelerator": "cpu",
        "precision": "64-true",
        "max_steps": steps,
        "log_every_n_steps": 1,
        "logger": recorder,
        "callbacks": [Keep(folder, recorder)],
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    } | trainer
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        L.Trainer(**settings).fit(module, datamodule=data, ckpt_path=checkpoint)
    if "LOCAL_RANK" in os.environ:
        return []
    return [Outcome.read(folder / f"rank{rank}.pt") for rank in range(ranks)]


def deviations(one, other):
    """The largest relative difference of each SAE's losses, over all steps."""
    return {
        name: max(abs(other.losses[name][step] - loss) / abs(loss) for step, loss in losses.items())
        for name, losses in one.losses.items()
    }


def assert_as_one(one, other, tolerance=1e-9):
    """Losses of every step are equal to a relative 1e-9, decoder rows point the same way.

    That holds in double precision. In single precision a gradient that is 0 but for rounding (that of a latent which fires
    alone on a row and reconstructs it as well as it can) differs with the order of sums, and Adam's first steps are as large
    for it as for any gradient, so runs on different numbers of ranks drift apart as two runs on one rank do whose rows are
    summed in another order.
    """
    assert one.numbers.keys() == other.numbers.keys()
    assert {name: losses.keys() for name, losses in one.losses.items()} == {n: v.keys() for n, v in other.losses.items()}
    found = deviations(one, other)
    assert max(found.values()) <= tolerance, found
    for name, rows in one.decoders().items():
        assert torch.cosine_similarity(rows.double(), other.weights[name].double()).min() > 1 - 10 * tolerance, name
