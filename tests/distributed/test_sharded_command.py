"""``configs/cluster/sharded.yaml`` on the real command line, which starts a process of its own for each part."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_sharded_resume import assert_same

pytestmark = pytest.mark.slow
CONFIG = Path(__file__).parents[2] / "configs" / "cluster" / "sharded.yaml"
QUICK = (
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--data.val_batches=1",
    "--data.chunk_steps=1",
    "--checkpoint.every_n_train_steps=10",
)


def start(folder, *words, command="fit"):
    folder.mkdir(exist_ok=True)
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in launched} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "hedgelab", command, "--config", str(CONFIG), *QUICK, *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(folder, *words, expect=0, command="fit"):
    process = start(folder, *words, command=command)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == expect, output
    return output


def mistakes(output):
    return {line for line in output.splitlines() if line.startswith("hedgelab: ")}


def last(folder):
    (file,) = folder.glob("runs/checkpoints/*/last.ckpt")
    return torch.load(file, weights_only=True)


def test_latents_that_cannot_be_split(tmp_path):
    output = run(tmp_path, "--model.d_sae=4095", expect=2)
    assert mistakes(output) == {"hedgelab: model.d_sae: 4095 latents cannot be split evenly over 2 processes"}
    assert "Traceback" not in output


def test_sizes_that_do_not_fit(tmp_path):
    name = "--trainer.strategy=hedgelab.training.sharding.ShardedStrategy"
    output = run(tmp_path, name, "--trainer.strategy.data_parallel_size=2", expect=2)
    (line,) = mistakes(output)
    assert line.startswith("hedgelab: trainer.strategy: data_parallel_size 2 times tensor_parallel_size 2 must be")


def test_preempted_and_requeued(tmp_path):
    """SIGTERM to the first process, as a scheduler sends it; the end is that of an undisturbed run, optimiser and all."""
    steps = "--trainer.max_steps=60"
    run(tmp_path / "whole", steps)
    process = start(tmp_path / "broken", steps)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "broken").glob("runs/checkpoints/*/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert 10 <= last(tmp_path / "broken")["global_step"] < 60
    run(tmp_path / "broken", steps, "--resume")
    expected, found = last(tmp_path / "whole"), last(tmp_path / "broken")
    for name in ("state_dict", "optimizer_states", "global_step"):
        assert_same(expected[name], found[name], path=name)
    (file,) = (tmp_path / "broken").glob("runs/checkpoints/*/last.ckpt")
    assert "val/mse" in run(tmp_path, f"--ckpt_path={file}", command="validate")


def test_in_16_bits(tmp_path):
    """As near to one process as sums of bfloat16 products are."""
    words = ("--trainer.max_steps=20", "--trainer.precision=bf16-mixed")
    run(tmp_path / "split", *words)
    run(tmp_path / "alone", *words, "--trainer.devices=1")
    split, alone = (last(tmp_path / name)["state_dict"] for name in ("split", "alone"))
    assert split["W_dec"].dtype == torch.float32
    assert torch.cosine_similarity(split["W_dec"].float(), alone["W_dec"].float()).min() > 0.999
