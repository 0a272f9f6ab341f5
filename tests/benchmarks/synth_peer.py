"""SAELens' ``SyntheticSAERunner`` in a process of its environment: it trains when told, JSON lines over pipes.

First it makes the synthetic model (without orthogonalising, which takes it a quarter of an hour and changes no speed) and saves
it, for both sides to read. Each command is then one run; timed are the steps after the first few, sampling included.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any

import torch


def train(task: dict[str, Any], steps: int) -> float:
    """Seconds a step of one run."""
    from sae_lens.config import LoggingConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAEConfig
    from sae_lens.synthetic import SyntheticSAERunner, SyntheticSAERunnerConfig
    from sae_lens.synthetic.training import SyntheticActivationIterator

    common = {"d_in": task["d_in"], "d_sae": task["d_sae"], "k": task["k"], "device": "cpu"}
    if task["sae"] == "batch_topk":
        sae: Any = BatchTopKTrainingSAEConfig(**common)
    else:
        levels = {"matryoshka_widths": task["levels"], "use_matryoshka_aux_loss": True}
        sae = MatryoshkaBatchTopKTrainingSAEConfig(**common, **levels)
    config = SyntheticSAERunnerConfig(
        synthetic_model=task["folder"],
        sae=sae,
        training_samples=(steps + task["warm_up"]) * task["batch"],
        batch_size=task["batch"],
        lr=task["lr"],
        eval_samples=0,
        run_final_eval=False,
        checkpoint_path=None,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    runner = SyntheticSAERunner(config)
    starts = []
    draw = SyntheticActivationIterator.next_batch

    def noted(self: Any) -> torch.Tensor:
        starts.append(time.perf_counter())
        return draw(self)

    SyntheticActivationIterator.next_batch = noted  # type: ignore[method-assign]
    try:
        runner.run()
    finally:
        SyntheticActivationIterator.next_batch = draw  # type: ignore[method-assign]
    return (time.perf_counter() - starts[task["warm_up"]]) / steps


def main() -> None:
    """Answer commands until the pipe closes; what the library prints goes to standard error."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    task = json.loads(sys.stdin.readline())
    torch.set_num_threads(task["threads"])
    from sae_lens.synthetic import SyntheticModel, SyntheticModelConfig

    SyntheticModel(SyntheticModelConfig.from_dict(task["synthetic_model"])).save(task["folder"])
    channel.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        command = json.loads(line)
        if command["command"] == "finish":
            answer: dict[str, Any] = {"versions": {"sae-lens": version("sae-lens"), "torch": torch.__version__}}
        else:
            answer = {"seconds": train(task | {"sae": command["command"]}, command["number"])}
        channel.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
