"""What a validation pass knows of the data, and what only the last pass of a fit measures."""

import lightning as L
import pytest
import torch

from hedgelab.data.toy import ConditionalFiring, ToyDataModule
from hedgelab.saes import TopKSAE


class Hierarchy(ToyDataModule):
    """Five independent features in three dimensions, which call themselves parent and child."""

    def __init__(self, known):
        super().__init__(ConditionalFiring([0.4, 0.3, 0.3, 0.2, 0.2]), d_in=3, batch_size=200, seed=0, val_batches=2)
        self.known = known

    @property
    def parents(self):
        return torch.tensor([-1, 0, -1, -1, -1]) if self.known else None


class Passes(L.Callback):
    """The numbers of each validation pass, by step."""

    def __init__(self):
        self.found = {}

    def on_validation_end(self, trainer, pl_module):
        self.found[trainer.global_step] = {k for k in trainer.callback_metrics if k.startswith("val/")}
        trainer.callback_metrics.clear()


def trained(known=False, **flags):
    passes, sae = Passes(), TopKSAE(3, 4, k=2)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[passes], **flags,
    )  # fmt: skip
    data = Hierarchy(known)
    trainer.fit(sae, datamodule=data)
    return passes.found, lambda: trainer.validate(sae, datamodule=data, verbose=False)[0]


@pytest.mark.parametrize("known", [False, True])
def test_absorption_is_measured_along_the_parents_that_the_data_know(known):
    found, _ = trained(known, max_steps=10)
    assert ("val/absorption_parents_f1" in found[10]) == known
    assert {"val/nearest_f1", "val/nearest_precision", "val/nearest_recall", "val/norm_ratio"} <= found[10]


@pytest.mark.parametrize("steps", [30, 35])
def test_dear_hedging_is_measured_in_the_last_pass_alone(monkeypatch, steps):
    monkeypatch.setattr("hedgelab.metrics.evaluation.MOST_PAIRS_EVERY_PASS", 19)
    found, validate = trained(max_steps=steps, val_check_interval=10)
    assert {step: "val/hedging/decoder" in names for step, names in found.items()} == {10: False, 20: False, 30: True}
    assert all("val/nearest_f1" in names for names in found.values())
    assert "val/hedging/decoder" in validate()


def test_hedging_of_few_pairs_is_measured_in_every_pass():
    found, _ = trained(max_steps=20, val_check_interval=10)
    assert all("val/hedging/decoder" in names for names in found.values())
