"""Real runs, cut short by a signal and gone on with after an upgrade: a class has got, lost or changed an argument."""

import signal

import pytest

from hedgelab.saes.io import weights_sha256

pytestmark = pytest.mark.slow

FIRING = """\
from hedgelab.data.toy import IndependentFiring

class MyFiring(IndependentFiring):
    def __init__(self, probabilities: list[float], {arguments}):
        super().__init__([{scale} for p in probabilities])
"""
RELEASES = {
    "first": FIRING.format(arguments="gain: float = 1.0, bend: float = 1.0", scale="p * gain * bend"),
    "added": FIRING.format(
        arguments="gain: float = 1.0, bend: float = 1.0, twist: float = 1.0", scale="p * gain * bend * twist"
    ),
    "dropped": FIRING.format(arguments="gain: float = 1.0", scale="p * gain"),
    "changed": FIRING.format(arguments="gain: float = 0.5, bend: float = 1.0", scale="p * gain * bend"),
}
CONFIG = """\
seed_everything: 1
trainer: {max_steps: 600, log_every_n_steps: 6, accelerator: cpu, enable_progress_bar: false}
checkpoint: {every_n_train_steps: 12}
data:
  class_path: ToyDataModule
  init_args:
    d_in: 12
    batch_size: 8
    val_batches: 2
    firing: {class_path: myfiring.MyFiring, init_args: {probabilities: [0.2, 0.3, 0.1, 0.4, 0.2, 0.1, 0.3, 0.2, 0.3]}}
model:
  class_path: BatchTopKSAE
  init_args: {d_sae: 6, k: 2, dead_after_steps: 20}
"""
WORDS = {"fit": [], "hedge": ["--hedge.n_new=2", "--hedge.new_norm=1"]}


def by_command(folder):
    """SHA-256 of the weights of every SAE among the artifacts."""
    return sorted(weights_sha256(path.parent) for path in (folder / "runs" / "artifacts").rglob("sae.safetensors"))


@pytest.mark.parametrize(
    ("command", "release", "seconds"),
    [("fit", "added", 0.2), ("fit", "dropped", 0.2), ("fit", "changed", 0.2), ("hedge", "added", 0.1), ("hedge", "changed", 3)],
)
def test_a_run_goes_on_after_an_upgrade(command, release, seconds, server, workplace, history, kill_in_training):
    words = [command, "--config=tiny.yaml", "--resume", *WORDS[command]]
    reference, folder = workplace("reference"), workplace("killed")
    for place in (reference, folder):
        (place / "tiny.yaml").write_text(CONFIG)
        (place / "myfiring.py").write_text(RELEASES["first"])
    assert server.run(words, reference) == 0, (reference / "out.txt").read_text()
    assert kill_in_training(words, folder, seconds, signal.SIGTERM) == 128 + signal.SIGTERM
    (folder / "myfiring.py").write_text(RELEASES[release])
    assert server.run(words, folder, RELEASE="99.0") == 0, (folder / "out.txt").read_text()
    said = (folder / "out.txt").read_text()
    assert said.count("starting afresh") == 1  # at the very first start
    assert ("was begun with other defaults: data.firing.gain=1.0 (now 0.5)" in said) == (release == "changed")
    assert by_command(folder) == by_command(reference)
    assert history(folder) == history(reference)
    assert server.run(words, folder, RELEASE="99.0") == 0
    assert "has finished" in (folder / "out.txt").read_text()
