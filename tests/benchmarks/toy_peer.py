"""SAELens's toy training in a process of its own environment: it trains when told, JSON lines over pipes.

Each command is one call of ``train_toy_sae``: the two features of the given table, one latent, vanilla, fp32.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any

import torch


def build(task: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The SAE, the features and the source of firings."""
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.synthetic import ActivationGenerator, FeatureDictionary

    def correlate(features: torch.Tensor) -> torch.Tensor:
        given = torch.where(features[:, 0] > 0, task["given"], task["otherwise"])
        features[:, 1] = (torch.rand(len(features)) < given).float()
        return features

    rates = torch.tensor([task["rate"], 1.0])
    source = ActivationGenerator(2, rates, modify_activations=correlate)
    features = FeatureDictionary(2, task["d_in"], bias=False)
    config = StandardTrainingSAEConfig(d_in=task["d_in"], d_sae=1, l1_coefficient=task["l1_coefficient"], device="cpu")
    return StandardTrainingSAE(config), features, source


def train(task: dict[str, Any], steps: int) -> float:
    """Seconds of one training."""
    from sae_lens.synthetic import train_toy_sae

    sae, features, source = build(task)
    start = time.perf_counter()
    train_toy_sae(sae, features, source, training_samples=steps * task["batch"], batch_size=task["batch"], lr=task["lr"])
    return time.perf_counter() - start


def main() -> None:
    """Answer commands until the pipe closes; what the library prints goes to standard error."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    task = json.loads(sys.stdin.readline())
    torch.set_num_threads(task["threads"])
    train(task, 20)
    channel.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        command = json.loads(line)
        if command["command"] == "finish":
            answer: dict[str, Any] = {"versions": {"sae-lens": version("sae-lens"), "torch": torch.__version__}}
        else:
            answer = {"seconds": train(task, command["number"])}
        channel.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
