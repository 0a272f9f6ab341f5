"""SAE-steps per second of ``hedgelab phase``'s ensemble, beside SAELens's ``train_toy_sae`` on the same toy, in turns.

``python -m tests.benchmarks.toy_speed [--peer saelens --peer-python PATH] [--json]``

Ours is the whole ensemble of a phase config (all cells, all seeds), each SAE taking an optimiser step on its exact population.
One SAE-step of the peer is one of its optimiser steps on ``--batch`` samples of the toy at the diagram's middle, with as many
latents and dimensions. Both sides run on one thread unless told otherwise. Ratios are of rates measured within one turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hedgelab.cli.studies import parse
from hedgelab.protocols.phase import Phase
from hedgelab.protocols.study import Bench
from hedgelab.saes.ensemble import EnsembleSAE, stack_batches
from tests.benchmarks.training_step import Worker, add_peer_python, processor

CONFIG = Path(__file__).parents[2] / "configs" / "theory" / "phase_correlation.yaml"


class Ensemble:
    """The members of a phase config, ready to take steps."""

    def __init__(self, config: Path) -> None:
        words = ["--config", str(config)]
        study, parsed, _ = parse(Phase, "phase", words)
        cells = study.cells(Bench(parsed.seed_everything))
        members = [member for cell in cells for member in cell.members]
        batches = [cell.data.batch("train", 0) for cell in cells]
        self.d_in, self.l1_coefficient = members[0].d_in, float(members[0].l1_coefficient)
        self.batch = stack_batches([one for one in batches for _ in range(study.seeds)])
        self.ensemble = EnsembleSAE(members)

    def seconds(self, steps: int) -> float:
        """What so many steps of all members take."""
        start = time.perf_counter()
        self.ensemble.fit(self.batch, steps)
        return time.perf_counter() - start


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the benchmark."""
    torch.set_num_threads(options.threads)
    ours = Ensemble(options.config)
    ours.seconds(5)
    task = {
        "d_in": ours.d_in, "rate": 0.25, "given": 0.2, "otherwise": 0.125, "l1_coefficient": ours.l1_coefficient,
        "batch": options.batch, "lr": 3e-4, "threads": options.threads,
    }  # fmt: skip
    peer = Worker(options.peer_python, "toy_peer.py", task) if options.peer else None
    if peer is not None:
        peer.wait()
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(options.turns):
        rates["ours"].append(len(ours.ensemble.members) * options.steps / ours.seconds(options.steps))
        if peer is not None:
            rates["peer"].append(options.peer_steps / peer.ask("train", options.peer_steps)["seconds"])
    machine = f"{processor()}, {options.threads} threads, {platform.platform()}"
    result = {
        "config": options.config.stem, "peer": options.peer, "machine": machine, "members": len(ours.ensemble.members),
        "sae_steps_per_s": median(rates["ours"]), "versions": {"torch": torch.__version__},
    }  # fmt: skip
    if peer is not None:
        ratios = [a / b for a, b in zip(rates["ours"], rates["peer"], strict=True)]
        result |= {"peer_sae_steps_per_s": median(rates["peer"]), "ratio": median(ratios), "ratios": ratios}
        result["peer_versions"] = peer.ask("finish")["versions"]
        peer.close()
    return result


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="a config of `hedgelab phase`")
    parser.add_argument("--peer", choices=("saelens",))
    add_peer_python(parser)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help="of the ensemble, a turn")
    parser.add_argument("--peer-steps", type=int, default=1000, help="of the peer's SAE, a turn")
    parser.add_argument("--batch", type=int, default=500, help="samples of a peer's step")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    result = measure(options)
    if options.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:22} {f'{value:,.1f}' if isinstance(value, float) else value}")


if __name__ == "__main__":
    main()
