import math

import jsonargparse
import lightning as L
import pytest
import torch

import hedgelab.data.toy
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.toy import ConditionalFiring, CopulaFiring, IndependentFiring, ToyDataModule, TreeFiring, Zipf
from hedgelab.errors import UserError


def hierarchical(**options) -> ToyDataModule:
    options = {"d_in": 10, "batch_size": 20, "seed": 0, **options}
    return ToyDataModule(ConditionalFiring([0.25, {"f0": 0.2, "otherwise": 0}]), **options)


def test_activations_are_magnitudes_along_directions():
    data = ToyDataModule(IndependentFiring([0.5, 0.3, 0.9]), 10, 64, magnitude_mean=[1.0, 2.0, 3.0], seed=0)
    batch = data.batch("train", 0)
    assert batch.x.shape == (64, 10)
    assert batch.x.dtype == torch.float32
    assert batch.weight is None
    assert torch.allclose(batch.x, batch.features @ data.feature_directions, atol=1e-6)
    for i, magnitude in enumerate((1.0, 2.0, 3.0)):
        assert set(batch.features[:, i].tolist()) == {0.0, magnitude}
    assert data.d_in == 10


@pytest.mark.parametrize("std", [0.0, 0.3])
def test_many_features_take_the_sparse_path_to_the_same_activations(std):
    data = ToyDataModule(CopulaFiring(200, Zipf(total=10)), 16, 32, bias=2.0, magnitude_std=std, seed=0, dtype="float64")
    batch = data.batch("train", 1)
    features = batch.features.to_dense()
    assert torch.allclose(batch.x, features @ data.feature_directions + data.bias, atol=1e-12)
    silent_row = ToyDataModule(CopulaFiring(200, Zipf(0.0, 1e-4)), 16, 32, seed=0).batch("train", 0)
    assert float(silent_row.x[silent_row.features.to_dense().sum(1) == 0].abs().max()) == 0


def test_noisy_magnitudes_are_rectified_gaussians():
    data = ToyDataModule(IndependentFiring([1.0, 0.5]), 4, 5000, magnitude_mean=1.0, magnitude_std=[1.0, 0.0], seed=0)
    features = data.batch("train", 0).features
    assert set(features[:, 1].tolist()) == {0.0, 1.0}
    silenced = float((features[:, 0] == 0).float().mean())
    assert silenced == pytest.approx(0.5 * math.erfc(math.sqrt(0.5)), abs=5 * math.sqrt(0.135 / 5000))
    expected_mean = 0.5 * math.erfc(-math.sqrt(0.5)) + math.exp(-0.5) / math.sqrt(2 * math.pi)
    assert float(features[:, 0].mean()) == pytest.approx(expected_mean, abs=5 / math.sqrt(5000))


@pytest.mark.parametrize("n", [2, 200])
def test_noise_goes_with_the_norm_and_features_know_nothing_of_it(n):
    data = ToyDataModule(CopulaFiring(n, Zipf(0.0, 0.5)), 64, 512, noise=0.3, bias=1.0, seed=0, dtype="float64")
    batch = data.batch("train", 3)
    features = batch.features if n == 2 else batch.features.to_dense()
    clean = features @ data.feature_directions + data.bias
    share = (batch.x - clean).norm(dim=1) / clean.norm(dim=1)
    assert share.square().mean().item() == pytest.approx(0.09, rel=0.03)  # chi square of 64 · 512 has a spread of .8 %
    assert share.std().item() == pytest.approx(0.3 / math.sqrt(2 * 64), rel=0.2)
    norms = clean.norm(dim=1)
    correlation = torch.corrcoef(torch.stack([(batch.x - clean).norm(dim=1), norms]))[0, 1]
    spread = norms.std() / norms.mean()  # beside that of chi, of 64 degrees of freedom
    assert float(correlation) == pytest.approx(float(spread / (spread**2 + 1 / 128).sqrt()), abs=0.1)
    assert torch.equal(batch.x, data.batch("train", 3).x)


def test_batches_are_a_pure_function_of_stage_and_index():
    data, again = hierarchical(), hierarchical()
    n = data.block_batches
    indices = [0, 1, n - 1, n, n + 1, 2 * n, 5 * n + 3]
    in_order = {i: data.batch("train", i).x.clone() for i in indices}
    for i in reversed(indices):
        assert torch.equal(again.batch("train", i).x, in_order[i])
        assert torch.equal(data.batch("train", i).x, in_order[i])
    shapes = {tuple(x.shape) for x in in_order.values()}
    assert shapes == {(20, 10)}


def test_blocks_stages_and_seeds_differ():
    data = hierarchical(batch_size=200)
    n = data.block_batches
    first = data.batch("train", 0)
    for other in (
        data.batch("train", 1),
        data.batch("train", n),
        data.batch("val", 0),
        data.batch("test", 0),
        hierarchical(batch_size=200, seed=1).batch("train", 0),
    ):
        assert not torch.equal(first.features, other.features)


def test_the_stream_ignores_chunks_and_validation():
    plain, other = hierarchical(), hierarchical(chunk_steps=7, val_batches=3)
    expected = [batch.x for batch in plain.batches("train", 60, 70)]
    seen = []
    for i in range(60, 70):
        other.batch("val", i)
        seen.append(other.batch("train", i).x)
    assert torch.equal(torch.stack(expected), torch.stack(seen))


def test_the_dictionary_depends_on_the_seed_alone():
    data = hierarchical()
    data.batch("train", 9)
    assert torch.equal(data.feature_directions, hierarchical(batch_size=3).feature_directions)
    assert not torch.equal(data.feature_directions, hierarchical(seed=1).feature_directions)
    assert torch.allclose(data.feature_directions @ data.feature_directions.T, torch.eye(2), atol=1e-6)
    assert float(hierarchical(target_cosine=0.4).feature_directions.prod(0).sum().item()) == pytest.approx(0.4, abs=1e-6)


def test_frequencies_over_many_batches():
    data = hierarchical(batch_size=500)
    fired = torch.cat([batch.features for batch in data.batches("train", 0, 100)]) > 0
    for feature, rate in ((0, 0.25), (1, 0.05)):
        assert float(fired[:, feature].float().mean()) == pytest.approx(rate, abs=5 * math.sqrt(rate / 50_000))
    assert not bool((fired[:, 1] & ~fired[:, 0]).any())


def test_population_is_the_whole_support():
    data = hierarchical(sampling="population", dtype="float64", bias=[0.5] * 10)
    batch = data.batch("train", 0)
    assert batch.weight.tolist() == pytest.approx([0.75, 0.2, 0.05])
    assert batch.features.tolist() == [[0, 0], [1, 0], [1, 1]]
    assert batch.x.dtype == batch.weight.dtype == torch.float64
    assert torch.allclose(batch.x, batch.features @ data.feature_directions + 0.5)
    assert data.batch("val", 7) is batch
    assert data.describe()["data/seconds_per_batch"] == 0.0


def test_population_means_are_sample_means():
    population = hierarchical(sampling="population").batch("train", 0)
    sampled = torch.cat([batch.x for batch in hierarchical(batch_size=500).batches("train", 0, 100)])
    assert torch.allclose(population.weight @ population.x, sampled.mean(0), atol=0.01)


def test_bias_as_norm_or_vector():
    assert float(hierarchical(bias=3.0).bias.norm()) == pytest.approx(3.0)
    data = hierarchical(bias=[1.0, *[0.0] * 9])
    batch = data.batch("train", 0)
    assert torch.allclose(batch.x[batch.features.sum(1) == 0][0], data.bias)
    assert not bool(hierarchical().bias.any())


def test_a_tree_brings_its_magnitudes():
    firing = TreeFiring({"children": [{"probability": 1.0, "magnitude": 2.5}]})
    assert ToyDataModule(firing, 3, 4, seed=0).batch("train", 0).features.tolist() == [[2.5]] * 4
    assert ToyDataModule(firing, 3, 4, seed=0, magnitude_mean=1.5).batch("train", 0).features.tolist() == [[1.5]] * 4


def test_the_seed_defaults_to_the_runs(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert torch.equal(hierarchical(seed=None).batch("train", 0).x, hierarchical(seed=5).batch("train", 0).x)


def test_cost_is_measured_without_moving_the_stream():
    data = hierarchical()
    before = data.batch("train", 3)
    assert 0 < data.describe()["data/seconds_per_batch"] < 0.1
    assert data.batch("train", 3) is before


def test_large_batches_get_small_blocks_and_chunks():
    small, large = hierarchical(), ToyDataModule(CopulaFiring(500, Zipf()), 512, 4096, seed=0)
    assert (small.block_batches, small.chunk_steps) == (64, 100)
    assert large.block_batches == 1
    assert large.chunk_steps < 10
    assert hierarchical(chunk_steps=5).chunk_steps == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_in": 0}, r"data\.d_in: expected a whole number of at least 1"),
        ({"d_in": True}, r"data\.d_in: expected a whole number of at least 1, got True"),
        ({"batch_size": True}, r"data\.batch_size: expected a whole number of at least 1, got True"),
        ({"val_batches": True}, r"data\.val_batches: expected a whole number of at least 1, got True"),
        ({"chunk_steps": 2.0}, r"data\.chunk_steps: expected a whole number of at least 1, got 2\.0"),
        ({"seed": False}, r"data\.seed: expected a whole number of at least 0, got False"),
        ({"batch_size": 0}, r"data\.batch_size: expected a whole number of at least 1"),
        ({"chunk_steps": 0}, r"data\.chunk_steps: expected a whole number of at least 1"),
        ({"target_cosine": 1.5}, r"data\.target_cosine: must be at least -1 .* below 1, got 1\.5"),
        ({"magnitude_mean": 0.0}, r"data\.magnitude_mean: must be positive and finite, got 0"),
        ({"magnitude_mean": [1.0, math.nan]}, r"data\.magnitude_mean: must be positive and finite, got nan"),
        ({"magnitude_mean": [1.0]}, r"data\.magnitude_mean: expected one number or a list of 2, one a feature, got 1"),
        ({"magnitude_std": -0.5}, r"data\.magnitude_std: must be at least 0 and finite, got -0\.5"),
        ({"magnitude_std": 0.1, "sampling": "population"}, r"data\.magnitude_std: must be 0 with sampling: population"),
        ({"noise": -0.1}, r"data\.noise: must be at least 0 and finite, got -0\.1"),
        ({"noise": 0.1, "sampling": "population"}, r"data\.noise: must be 0 with sampling: population"),
        ({"bias": -1.0}, r"data\.bias: a norm must be at least 0"),
        ({"bias": [1.0]}, r"data\.bias: expected a norm or a list of d_in = 10 finite numbers, got 1"),
        ({"bias": [math.inf] * 10}, r"data\.bias: expected"),
    ],
)
def test_impossible_values_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        hierarchical(**options)


def test_copulas_have_no_population():
    with pytest.raises(UserError, match=r"data\.sampling: CopulaFiring cannot be enumerated"):
        ToyDataModule(CopulaFiring(5, Zipf()), sampling="population")


CONFIG = """
data:
  class_path: ToyDataModule
  init_args:
    d_in: 6
    batch_size: 8
    seed: 3
    firing:
      class_path: ModifiedFiring
      init_args:
        base:
          class_path: ConditionalFiring
          init_args:
            features:
              - 0.25
              - f0: 0.2
                not f0: 0.1
              - {f0 and not f1: 0.5, otherwise: 0}
        modifiers:
          - {class_path: MutualExclusion, init_args: {features: [1, 2]}}
          - {class_path: Suppression, init_args: {trigger: 1, target: 0, probability: 0.5}}
"""


def test_yaml_with_short_class_names():
    parser = jsonargparse.ArgumentParser(parser_mode="omegaconf+", exit_on_error=False)
    parser.add_subclass_arguments(ActivationDataModule, "data")
    config = parser.parse_string(CONFIG)
    data = parser.instantiate(config).data
    assert isinstance(data, ToyDataModule)
    expected = ConditionalFiring([0.25, {"f0": 0.2, "not f0": 0.1}, {"f0 and not f1": 0.5, "otherwise": 0}])
    assert torch.equal(data.firing.base.pattern_probabilities(), expected.pattern_probabilities())
    assert [type(modifier).__name__ for modifier in data.firing.modifiers] == ["MutualExclusion", "Suppression"]
    assert data.batch("train", 0).x.shape == (8, 6)


def test_every_public_name_exists():
    for name in hedgelab.data.toy.__all__:
        assert callable(getattr(hedgelab.data.toy, name))


class CountingModule(L.LightningModule):
    """Steps an optimiser once a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(10))
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch, _):
        self.seen.append(batch.x)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((batch.x @ self.weight).sum())
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainer_sees_the_batches_in_order(tmp_path):
    trainer = L.Trainer(
        max_steps=90,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        log_every_n_steps=30,
    )
    module, data = CountingModule(), hierarchical()
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 90
    expected = [batch.x for batch in hierarchical().batches("train", 0, 90)]
    assert torch.equal(torch.stack(module.seen), torch.stack(expected))


def test_a_device_that_cannot_draw_is_refused():
    with pytest.raises(UserError, match=r"data\.device: cuda draws samples of CopulaFiring alone"):
        ToyDataModule(IndependentFiring([0.1]), 4, device="cuda")
    if not torch.cuda.is_available():
        data = ToyDataModule(CopulaFiring(200, Zipf(total=10)), 16, 32, device="cuda", seed=0)
        with pytest.raises(UserError, match=r"data\.device: there is no CUDA device"):
            data.batch("train", 0)
