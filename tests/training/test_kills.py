"""Real training processes, killed at random moments and started again: the result is that of one that never was."""

import random
import signal
import time

import pytest

from hedgelab.saes.io import weights_sha256

pytestmark = pytest.mark.slow
KILLS = 20


def weights(folder):
    return {path.parent.name: weights_sha256(path.parent) for path in sorted((folder / "result").rglob("sae.safetensors"))}


def undisturbed(server, words, folder):
    """Seconds that an undisturbed process takes, after one that warms the disk cache."""
    start = time.monotonic()
    assert server.run(words, folder) == 0, (folder / "out.txt").read_text()
    return time.monotonic() - start


@pytest.mark.parametrize(("kind", "kills"), [("toy", KILLS), ("group", 8)])
def test_killed_at_random_moments(kind, kills, server, workplace, history, kill_after):
    words = ["fits", kind]
    reference = workplace("reference")
    seconds = undisturbed(server, words, reference)
    dice = random.Random(0)
    done = torn = attempt = 0
    while done < kills or (kind == "toy" and not torn and done < 3 * kills):
        attempt += 1
        folder = workplace(f"killed{attempt}")
        ended = -signal.SIGKILL
        while ended == -signal.SIGKILL and done < 3 * kills:
            ended, writing = kill_after(words, folder, dice.uniform(0.1, 1.0) * seconds)
            done += ended == -signal.SIGKILL
            torn += ended == -signal.SIGKILL and writing
            if done >= kills and (torn or kind != "toy"):
                break
        if ended != 0:
            assert server.run(words, folder) == 0, (folder / "out.txt").read_text()
        assert weights(folder) == weights(reference)
        assert history(folder) == history(reference)
    print(f"{kind}: {done} kills, {torn} while a checkpoint was written, {attempt} runs")
    assert torn or kind != "toy"


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
    firing: {class_path: CopulaFiring, init_args: {n: 9, rates: {class_path: Zipf, init_args: {total: 2}}}}
model:
  class_path: BatchTopKSAE
  init_args: {d_sae: 6, k: 2, dead_after_steps: 20}
"""


def by_command(folder):
    """SHA-256 of the weights of every SAE among the artifacts."""
    return sorted({weights_sha256(path.parent) for path in (folder / "runs" / "artifacts").rglob("sae.safetensors")})


@pytest.mark.parametrize(
    ("command", "number", "words"),
    [
        ("fit", signal.SIGKILL, []),
        ("fit", signal.SIGTERM, []),
        ("fit", signal.SIGUSR1, []),
        ("hedge", signal.SIGKILL, ["--hedge.n_new=2", "--hedge.new_norm=1", "--hedge.seeds=2"]),
        ("hedge", signal.SIGTERM, ["--hedge.n_new=2", "--hedge.new_norm=1", "--hedge.seeds=2"]),
    ],
)
def test_commands_go_on(command, number, words, server, workplace, history, kill_in_training):
    words = [command, "--config=tiny.yaml", "--resume", *words]
    reference, folder = workplace("reference"), workplace("killed")
    for place in (reference, folder):
        (place / "tiny.yaml").write_text(CONFIG)
    assert server.run(words, reference) == 0, (reference / "out.txt").read_text()
    dice = random.Random(number)
    killed = 0
    for _ in range(4):
        ended = kill_in_training(words, folder, dice.uniform(0.0, 1.0), number)
        assert ended in (0, -number if number == signal.SIGKILL else 128 + number), (folder / "out.txt").read_text()
        killed += ended != 0
        if ended == 0:
            break
    if ended != 0:
        assert server.run(words, folder) == 0, (folder / "out.txt").read_text()
    assert killed
    assert by_command(folder) == by_command(reference)
    assert history(folder) == history(reference)
    assert "has finished; nothing is left to do" not in (folder / "out.txt").read_text()
    assert server.run(words, folder) == 0
    assert "has finished; nothing is left to do" in (folder / "out.txt").read_text()
