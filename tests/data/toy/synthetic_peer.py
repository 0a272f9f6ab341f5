"""SAELens' synthetic models, in an environment that has it: ``python synthetic_peer.py job.json``; knows nothing of hedgelab.

The job gives a config, a folder to save the model to, and a number of samples, whose sums it leaves beside the model.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

CHUNK = 20_000


def sums(x, features, center):
    """What is added up over samples: of which features fire together, of their magnitudes' powers, and of x's products."""
    fires = (features > 0).float()
    x = x.double() - center
    square = x.square()
    powers = features.double()
    return {
        "together": (fires.T @ fires).double(),
        **{f"magnitude_{power}": powers.pow(power).sum(0) for power in (1, 2, 4)},
        "x": x.sum(0),
        "products": x.T @ x,
        "squared_products": square.T @ square,
    }


def add_up(draw, count, center):
    """Sums over ``count`` samples; ``draw(i)`` gives chunk i of them."""
    total = {}
    for chunk in range(count // CHUNK):
        for name, value in sums(*draw(chunk), center).items():
            total[name] = total.get(name, 0) + value
    return total


def make(job):
    from sae_lens.synthetic import SyntheticModel, SyntheticModelConfig

    torch.manual_seed(job["seed"])
    model = SyntheticModel(SyntheticModelConfig.from_dict(job["config"]))
    model.save(job["folder"])
    answer = {
        "mean": model.activation_generator.mean_firing_magnitudes,
        "std": model.activation_generator.std_firing_magnitudes,
        "center": model.sample(1000).double().mean(0),
    }
    if "siblings" in job:  # too many features for a matrix of pairs
        first, last, size = job["siblings"]
        counts, rivals = torch.zeros(model.cfg.num_features), torch.zeros(())
        for _ in range(job["count"] // 1000):
            fires = (model.activation_generator.sample(1000) > 0).float()
            counts += fires.sum(0)
            rivals += (fires[:, first:last].view(1000, -1, size).sum(2) > 1).sum()
        answer |= {"counts": counts, "rivals": rivals}
    else:
        answer |= add_up(lambda _: model.sample_with_features(CHUNK), job["count"], answer["center"])
    save_file({name: value.contiguous() for name, value in answer.items()}, job["answer"])


if __name__ == "__main__":
    make(json.loads(Path(sys.argv[1]).read_text()))
