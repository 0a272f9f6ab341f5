"""Toys of others: folders that SAELens' ``SyntheticModel.save`` wrote, such as the published SynthSAEBench models."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hedgelab.data.toy.datamodule import ToyDataModule
from hedgelab.data.toy.dictionary import Dictionary
from hedgelab.data.toy.gaussian import GaussianFiring
from hedgelab.data.toy.hierarchy import Hierarchy
from hedgelab.data.toy.laws import Exponential, FoldedNormal, Linear
from hedgelab.errors import UserError, whole_number

CONFIG, WEIGHTS, HIERARCHY = "synthetic_model_config.json", "synthetic_model.safetensors", "hierarchy.json"
_STD_SEED, _MEAN_SEED = 1, 2  # what SAELens adds to a model's seed before it draws these magnitudes


class SyntheticModelFolder(ToyDataModule):
    """The synthetic data of a folder that SAELens' ``SyntheticModel.save`` wrote, drawn sparsely.

    Directions, bias, probabilities of candidates, correlation and hierarchy are those of the folder. Mean and spread of
    magnitudes are not saved: they are drawn again by the laws and the seed in its config. Rates, co-firing, magnitudes and
    covariances are those of SAELens' own samples; the random numbers are not. Nothing but JSON and safetensors is read.

    SynthSAEBench-16k: Chanin & Garriga-Alonso 2026, arXiv 2602.14687.

    Args:
        path: The folder, with ``synthetic_model_config.json``, ``synthetic_model.safetensors`` and, if any, ``hierarchy.json``.
        batch_size: Examples a step.
        device: Where batches are drawn; the numbers of ``cuda`` are not those of the CPU.
        seed: Seed of the samples; None takes the run's ``seed_everything``.
        val_batches: Batches of a validation or test pass; 489 of 1 024 are the benchmark's 500 000 samples.
        chunk_steps: Most training steps a chunk, as for :class:`ToyDataModule`.
    """

    inputs: ClassVar[dict[str, Any]] = {"path": Path}

    def __init__(
        self,
        path: str,
        batch_size: int = 1024,
        device: Literal["cpu", "cuda"] = "cpu",
        seed: int | None = None,
        val_batches: int = 16,
        chunk_steps: int | None = None,
    ) -> None:
        folder = Path(path)
        if not folder.is_dir():
            raise UserError(f"data.path: there is no folder {path!r}; the path is relative to {Path.cwd()}")
        config = _read_json(folder / CONFIG)
        n, d_in = (whole_number(f"{folder / CONFIG}: {key}", config.get(key)) for key in ("num_features", "hidden_dim"))
        weights = _read_weights(folder / WEIGHTS, n, d_in, config.get("correlation") is not None)
        laws = {"mean_firing_magnitudes": (1.0, _MEAN_SEED), "std_firing_magnitudes": (0.0, _STD_SEED)}
        mean, std = (
            _magnitudes(f"{folder / CONFIG}: {key}", config.get(key, default), config.get("seed"), offset, n)
            for key, (default, offset) in laws.items()
        )
        hierarchy = _read_hierarchy(folder, n, config.get("hierarchy") is not None)
        firing = GaussianFiring(weights["firing_probabilities"], weights.get("correlation_factor"), hierarchy)
        super().__init__(
            firing, d_in, batch_size, magnitude_mean=mean.tolist(), magnitude_std=std.tolist(), bias=weights["bias"].tolist(),
            dictionary=_Saved(weights["feature_vectors"]), device=device, seed=seed, val_batches=val_batches,
            chunk_steps=chunk_steps,
        )  # fmt: skip


class _Saved(Dictionary):
    """Directions that are there already."""

    def __init__(self, vectors: Tensor) -> None:
        self._vectors = vectors

    def directions(self, n: int, d_in: int, generator: torch.Generator) -> Tensor:
        return self._vectors


def _read_weights(path: Path, n: int, d_in: int, is_correlated: bool) -> dict[str, Tensor]:
    """The tensors of a folder, float64, of the shapes that a model of n features has."""
    tensors: dict[str, Tensor] = {name: tensor.double() for name, tensor in _read(path, load_file).items()}
    factor = tensors.get("correlation_factor")
    rank = factor.shape[1] if factor is not None and factor.dim() == 2 else 0
    shapes = {"feature_vectors": (n, d_in), "bias": (d_in,), "firing_probabilities": (n,)}
    if is_correlated or tensors.keys() - shapes:
        shapes |= {"correlation_factor": (n, rank), "correlation_diag": (n,)}
    if unknown := sorted(tensors.keys() - shapes):
        raise UserError(f"{path}: cannot use {', '.join(unknown)}; only low-rank correlation is supported")
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(f"{path}: holds no {name}; save the model with SAELens' SyntheticModel.save")
        if (found := tuple(tensors[name].shape)) != shape:
            raise UserError(f"{path}: {name} should be {list(shape)} by the config beside it, but is {list(found)}")
        if not bool(tensors[name].isfinite().all()):
            raise UserError(f"{path}: {name} holds numbers that are not finite")
    norms = tensors["feature_vectors"].norm(dim=1)
    if float((norms - 1).abs().max()) > 1e-3:
        raise UserError(f"{path}: feature_vectors must have norm 1, got {float(norms.min()):.4g} to {float(norms.max()):.4g}")
    # What the common factors leave of a feature's unit variance is its own noise.
    if factor is not None and float((factor.square().sum(1) + tensors["correlation_diag"] - 1).abs().max()) > 1e-4:
        raise UserError(f"{path}: correlation_factor and correlation_diag must give each feature a variance of 1")
    return tensors


def _magnitudes(key: str, law: Any, seed: Any, offset: int, n: int) -> Tensor:
    """What a magnitude law of SAELens gives each of n features, float64 ``[n]``."""
    if isinstance(law, int | float) and not isinstance(law, bool):
        law = {"generator_name": "constant", "value": law}
    if not isinstance(law, dict):
        raise UserError(f"{key}: expected a number or a law, got {law!r}")
    try:
        match law.get("generator_name"):
            case "constant":
                return torch.full((n,), float(law.get("value", 1.0)), dtype=torch.float64)
            case "linear":
                return Linear(law["start"], law["end"]).values(n)
            case "exponential":
                return Exponential(law["start"], law["end"]).values(n)
            case "folded_normal":
                if seed is None:
                    raise UserError(f"{key}: is random, and the config's seed is null: nobody can draw it again")
                low, high = law.get("min_value"), law.get("max_value")
                drawn = FoldedNormal(law.get("mean", 0.0), law.get("std", 0.1), seed + offset).values(n)
                return drawn.clamp(0.0 if low is None else low, math.inf if high is None else high)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{key}: cannot read the law {law!r} ({error!r})") from None
    known = "constant, linear, exponential and folded_normal"
    raise UserError(f"{key}: unknown law {law.get('generator_name')!r}; known are {known}")


def _read_hierarchy(folder: Path, n: int, expected: bool) -> Hierarchy | None:
    """The forest of ``hierarchy.json``, if any; a node without a feature hands its parent on, not how its children fire."""
    path = folder / HIERARCHY
    if not path.exists():
        if expected:
            raise UserError(f"data.path: {path} is missing, though {CONFIG} has a hierarchy")
        return None
    parent, group = torch.full((n,), -1), torch.full((n,), -1)
    scaled, seen = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    for number, (above, node, children) in enumerate(_families(path)):
        if len(children) > 1 and node.get("mutually_exclusive_children", False):
            group[children] = number
        for child in children:
            if not 0 <= child < n or seen[child]:
                wrong = "stands in it twice" if 0 <= child < n else f"does not exist; there are {n}"
                raise UserError(f"{path}: feature {child} {wrong}")
            seen[child] = True
        parent[children], scaled[children] = above, bool(node.get("scale_children_by_parent", False))
    return Hierarchy(parent, group, scaled)


def _families(path: Path) -> Iterator[tuple[int, dict[str, Any], list[int]]]:
    """Each node of a forest with the feature at or above it (-1: none) and those of its children that are features."""
    document = _read_json(path)
    left: list[tuple[int, Any]] = [(-1, {"children": document.get("roots")})]
    while left:
        above, node = left.pop()
        children = node.get("children", []) if isinstance(node, dict) else None
        if not isinstance(children, list) or not all(isinstance(child, dict) for child in children):
            raise UserError(f"{path}: expected 'roots' with nodes that have 'feature_index' and 'children'")
        features = [child.get("feature_index") for child in children]
        if not all(feature is None or type(feature) is int for feature in features):
            raise UserError(f"{path}: feature_index must be a whole number or null")
        left += [(above if f is None else f, child) for f, child in zip(features, children, strict=True)]
        yield above, node, [feature for feature in features if feature is not None]


def _read_json(path: Path) -> dict[str, Any]:
    """A file with one JSON object."""
    document = _read(path, lambda path: json.loads(path.read_text(encoding="utf-8-sig")))
    if not isinstance(document, dict):
        raise UserError(f"data.path: {path} should hold a JSON object, but holds a {type(document).__name__}")
    return document


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    """What a file of the folder holds."""
    try:
        return read(path)
    except FileNotFoundError:
        raise UserError(f"data.path: {path} is missing; save the model with SAELens' SyntheticModel.save") from None
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"data.path: cannot read {path}: {error}") from None
