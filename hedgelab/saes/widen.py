"""New SAEs like old ones: with other random weights, or with new latents appended."""

from dataclasses import replace

import torch

from hedgelab.errors import UserError, positive, whole_number
from hedgelab.saes.base import SAE
from hedgelab.saes.flat import FlatSAE
from hedgelab.saes.initialization import random_directions
from hedgelab.saes.matryoshka import MatryoshkaSAE
from hedgelab.seeding import generator


def flat_part(sae: SAE) -> FlatSAE:
    """The SAE that holds the weights: a matryoshka's inner one, else the SAE itself."""
    flat = sae.inner if isinstance(sae, MatryoshkaSAE) else sae
    if not isinstance(flat, FlatSAE):
        raise UserError(f"{type(flat).__name__}: is no SAE that hedgelab widens or exports; measure it")
    return flat


@torch.no_grad()
def fresh(sae: SAE, seed: int) -> SAE:
    """An untrained SAE of the same kind, trained in the same way, its random weights drawn from ``seed``."""
    made = _alike(sae, n_new=0)
    flat = flat_part(made)
    flat.init = replace(flat.init, seed=seed)
    encoder, decoder = flat.init.random_weights(flat.d_in, flat.d_sae)
    flat.W_enc_rows.copy_(encoder)
    flat.W_dec.copy_(decoder)
    return made.to(sae.W_dec)


def duplicate(sae: SAE) -> SAE:
    """An SAE with the same weights, buffers and way of training, that shares no memory with the first."""
    made = _alike(sae, n_new=0).to(sae.W_dec)
    made.load_state_dict(sae.state_dict())
    made.initialized = sae.initialized
    return made


@torch.no_grad()
def widen(sae: SAE, n_new: int, norm: float = 0.1, seed: int = 0) -> SAE:
    """An SAE of the same kind with new latents appended (SPEC section 5); the old one is left as it is.

    New latents start at random unit directions times ``norm`` in the decoder, the same in the encoder, encoder bias 0;
    JumpReLU thresholds at the configured start, dead-latent clocks at 0. In a matryoshka SAE they join the last level.
    Optimiser and schedules are taken over, optimiser states are not. ``seed`` decides the new directions.
    """
    wide = _alike(sae, whole_number("hedge.n_new", n_new)).to(sae.W_dec)
    old = sae.state_dict()
    for name, value in wide.state_dict().items():
        value[tuple(map(slice, old[name].shape))].copy_(old[name])
    directions = random_directions(n_new, sae.d_in, generator(seed, "new latents")) * positive("hedge.new_norm", norm)
    for rows in (wide.W_dec, flat_part(wide).W_enc_rows):
        rows[sae.d_sae :] = directions.to(rows)
    wide.initialized = True
    return wide


def _alike(sae: SAE, n_new: int) -> SAE:
    """An SAE of the same architecture with ``n_new`` more latents, and the same initialisation and training."""
    config = sae.config()
    config.get("inner", config)["d_sae"] += n_new
    if isinstance(sae, MatryoshkaSAE):
        config["levels"] = [*sae.levels[:-1], sae.d_sae + n_new]
    made = SAE.from_config(config)
    flat_part(made).init = flat_part(sae).init
    train_like(made, sae)
    return made


def train_like(sae: SAE, other: SAE) -> None:
    """Give an SAE the optimiser, schedule and clipping of another of its kind."""
    for name in ("optimizer", "lr_scheduler", "gradient_clip_norm"):
        setattr(sae, name, getattr(other, name))
