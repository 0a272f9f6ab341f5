"""The callback that fills a run: provenance, throughput, the finished SAE, its cosines and figures."""

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from hedgelab.data.datamodule import ActivationDataModule, data_rank
from hedgelab.identity import EVERYTHING
from hedgelab.tracking.history import ThinnedSeries
from hedgelab.tracking.logger import MLflowTracker
from hedgelab.tracking.provenance import provenance_tags
from hedgelab.tracking.runs import CONTROL_TAG, SAE_TAG
from hedgelab.training.steps import batch_rows

if TYPE_CHECKING:
    from hedgelab.saes.base import SAE

_MOST_LATENTS_LOGGED = 16
_MOST_COSINES_FOLLOWED = 2048
_KEPT_COSINES = 200
Cosines = tuple[Tensor, Tensor]
"""Cosines of decoder and encoder with the known features, ``[d_sae, n]`` each."""


class RunRecord(L.Callback):
    """Records what a run is, how fast it goes, and what comes out of it, in its :class:`MLflowTracker`.

    At the start: tags of code, packages and machine. At every logging interval: ``samples/s``, over the training time
    since the last. At the end: the SAE as the artifact ``sae/`` with the tag ``weights_sha256``, and figures. With
    known features: cosine heatmaps, the decoder bias, and how the cosines moved, and for at most 16 latents the metrics
    ``latent{i}/decoder_cos/feature{j}``, ``latent{i}/encoder_cos/feature{j}`` and ``b_dec_norm``. Without an
    :class:`MLflowTracker` among the trainer's loggers it only keeps the SAE, as ``sae/`` beside the run's checkpoints.
    """

    where_and_how = EVERYTHING
    draws_figures = True
    member = ""
    own_tracker: MLflowTracker | None = None

    def __init__(self) -> None:
        super().__init__()
        self._tracker: MLflowTracker | None = None
        self._cosines: ThinnedSeries[Cosines] = ThinnedSeries(_KEPT_COSINES)
        self._losses_before: dict[str, Any] | None = None
        self._firing_rates: Tensor | None = None
        self._samples = self._logged_at = 0
        self._since = self._paused_at = 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says where the run comes from."""
        found = (logger for logger in trainer.loggers if isinstance(logger, MLflowTracker))
        self._tracker = self.own_tracker or next(found, None)
        if self._tracker is None:
            return
        if self._losses_before is not None:
            self._tracker.losses.load_state_dict(self._losses_before)
        self._tracker.log_tags({**provenance_tags(trainer.world_size), "threads": str(torch.get_num_threads())})
        if (data := self._data(trainer)) is not None and trainer.ckpt_path is None:
            self._tracker.log_metrics(data.describe(), trainer.global_step)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock, and the history of the cosines."""
        self._samples, self._since, self._logged_at = 0, time.perf_counter(), trainer.global_step
        self._follow_cosines(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the clock: throughput is that of training."""
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lets the clock go on."""
        self._since += time.perf_counter() - self._paused_at

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts samples, and reports throughput when a logging interval is over."""
        if self._tracker is None:
            return
        self._samples += batch_rows(batch) * data_rank(trainer)[1]
        self._follow_cosines(trainer, pl_module)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step // every > self._logged_at // every:
            self._log_throughput(self._tracker, trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reports the throughput of the last, shorter interval, and of the data."""
        if self._tracker is None:
            return
        if trainer.global_step > self._logged_at:
            self._log_throughput(self._tracker, trainer.global_step)
        if (data := self._data(trainer)) is not None:
            self._tracker.log_metrics(data.throughput(), trainer.global_step)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the firing rates that the validation pass has measured, before the SAE forgets them."""
        if not trainer.sanity_checking:
            self._firing_rates = pl_module.trainee(self.member).firing_rates  # type: ignore[operator]

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the SAE, its final cosines and the figures; where no tracker takes it, the SAE beside the checkpoints."""
        from hedgelab.saes.io import gathered
        from hedgelab.training.checkpoints import folder_of

        sae = gathered(self._sae(pl_module))
        if self._tracker is not None:
            self._finish(self._tracker, trainer, sae)
        elif trainer.is_global_zero and (folder := folder_of(trainer)) is not None:
            self._save(sae, folder / "sae", trainer)

    def state_dict(self) -> dict[str, Any]:
        """History so far, so that the figures of a resumed run show all of it; and the run, to be resumed."""
        known: dict[str, Any] = {"losses": None, "run_id": None}
        if self._tracker is not None:
            known = {"losses": self._tracker.losses.state_dict(), "run_id": self._tracker.run_id}
        return {"cosines": self._cosines.state_dict(), "firing_rates": self._firing_rates, **known}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self._cosines.load_state_dict(state_dict["cosines"])
        self._losses_before = state_dict["losses"]
        self._firing_rates = state_dict.get("firing_rates")

    def _sae(self, module: Any) -> Any:
        return module.members[self.member] if self.member else module

    def _data(self, trainer: L.Trainer) -> ActivationDataModule | None:
        """What the SAE sees."""
        data = getattr(trainer, "datamodule", None)
        return data.of_member(self.member) if isinstance(data, ActivationDataModule) else None

    def _save(self, sae: "SAE", folder: Path, trainer: L.Trainer) -> None:
        """Write an SAE, and with it where its activations come from."""
        from hedgelab.saes import save_sae

        save_sae(sae, folder)
        if (data := self._data(trainer)) is not None and (source := data.source()) is not None:
            source.save(folder)

    def _log_throughput(self, tracker: MLflowTracker, step: int) -> None:
        now = time.perf_counter()
        tracker.log_metrics({"samples/s": self._samples / (now - self._since)}, step)
        self._samples, self._since, self._logged_at = 0, now, step

    def _follow_cosines(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        sae, directions = self._sae(module), _directions(trainer)
        if directions is not None and sae.d_sae * len(directions) <= _MOST_COSINES_FOLLOWED:
            self._cosines.offer(trainer.global_step, lambda: _cosines(sae, directions))

    @rank_zero_only
    def _finish(self, tracker: MLflowTracker, trainer: L.Trainer, sae: Any) -> None:
        from hedgelab.saes import weights_sha256

        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "sae"
            self._save(sae, folder, trainer)
            tracker.log_artifact(folder, "sae", model=sae.config())
            control = {CONTROL_TAG: sae.control} if sae.control else {}
            tracker.log_tags({SAE_TAG: weights_sha256(folder), **control})
        if (directions := _directions(trainer)) is not None:
            self._keep_recovery(tracker, sae, directions, trainer.global_step)
        if not self.draws_figures:
            return
        from hedgelab.plots import firing_density, loss_terms

        terms: dict[str, tuple[list[int], list[float]]] = {}
        for at, values in zip(tracker.losses.steps, tracker.losses.values, strict=True):
            for name, value in values.items():
                steps, curve = terms.setdefault(name.removeprefix("train/"), ([], []))
                steps.append(at)
                curve.append(value)
        if terms:
            tracker.log_figure(loss_terms(terms), "figures/loss_terms.png")
        if self._firing_rates is not None and len(self._firing_rates) > _MOST_LATENTS_LOGGED:
            tracker.log_figure(firing_density(self._firing_rates.cpu()), "figures/firing_density.png")

    def _keep_recovery(self, tracker: MLflowTracker, sae: Any, directions: Tensor, step: int) -> None:
        cosines, b_dec = _cosines(sae, directions), sae.b_dec.detach().float()
        if sae.d_sae <= _MOST_LATENTS_LOGGED:
            numbers = {"b_dec_norm": float(b_dec.norm())}
            for name, matrix in zip(("decoder_cos", "encoder_cos"), cosines, strict=True):
                for (latent, feature), value in np.ndenumerate(matrix.numpy()):
                    numbers[f"latent{latent}/{name}/feature{feature}"] = float(value)
            tracker.log_metrics(numbers, step)
        if not self.draws_figures:
            return
        from hedgelab.plots import cosine_heatmaps, cosines_over_training, decoder_bias

        along = torch.nn.functional.normalize(directions.to(b_dec), dim=1) @ b_dec
        tracker.log_figure(cosine_heatmaps(*cosines), "figures/cosines.png")
        tracker.log_figure(decoder_bias(along.cpu(), float(b_dec.norm())), "figures/decoder_bias.png")
        if self._cosines.steps:
            history = dict(zip(self._cosines.steps, self._cosines.values, strict=True))
            history.setdefault(step, cosines)
            decoder, encoder = (torch.stack(part) for part in zip(*history.values(), strict=True))
            tracker.log_figure(cosines_over_training([*history], decoder, encoder), "figures/cosines_over_training.png")


class MemberRecord(RunRecord):
    """Records a member of a :class:`~hedgelab.saes.SAEGroup`, or (named ``""``) an SAE trained alone, in a run of its own."""

    draws_figures = False  # groups are large

    def __init__(self, member: str, tracker: MLflowTracker) -> None:
        super().__init__()
        self.member, self.own_tracker = member, tracker

    @property
    def state_key(self) -> str:
        """Each member's state has a name of its own in a checkpoint."""
        return f"{type(self).__qualname__}[{self.member}]"


def _directions(trainer: L.Trainer) -> Any:
    return getattr(getattr(trainer, "datamodule", None), "feature_directions", None)


@torch.no_grad()
def _cosines(sae: "SAE", directions: Tensor) -> Cosines:
    from hedgelab.metrics.functional.recovery import decoder_cosines, encoder_cosines
    from hedgelab.training.sharding import full_tensor

    directions = directions.to(sae.W_dec.device)
    decoder = decoder_cosines(full_tensor(sae.W_dec), directions)
    encoder = encoder_cosines(full_tensor(sae.W_enc), directions)
    return decoder.float().cpu(), encoder.float().cpu()
