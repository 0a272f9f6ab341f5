"""Own activations: every row once an epoch, whatever was asked before; in a loop, a trainer, a config, on ranks."""

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from hedgelab.cli import main
from hedgelab.data.tensors import DatasetActivations, TensorActivations
from hedgelab.errors import UserError
from hedgelab.saes import TopKSAE

N, D = 250, 6


@pytest.fixture
def x():
    """Rows that tell their number: row i begins with i."""
    rows = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    rows[:, 0] = torch.arange(N)
    return rows


class Rows(torch.utils.data.Dataset):
    """A dataset of rows, alone or with features."""

    def __init__(self, x, features=None):
        self.x, self.features = x, features

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] if self.features is None else (self.x[i], self.features[i])


def numbers(batches):
    return torch.cat([batch.x[:, 0] for batch in batches]).long().tolist()


@pytest.mark.parametrize("make", [TensorActivations, lambda x, **o: DatasetActivations(Rows(x), **o)], ids=["tensor", "set"])
def test_every_training_row_comes_once_an_epoch_in_another_order_each_time(x, make):
    data = make(x, batch_size=30, seed=1)  # 226 training rows: batches lie across epochs
    seen = numbers(data.batch("train", i) for i in range(16))
    epochs = [seen[:226], seen[226:452]]
    assert all(len(set(epoch)) == 226 for epoch in epochs)
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]
    held = numbers(data.batch(stage, 0) for stage in ("val", "test"))
    assert not set(held) & set(seen)
    again = make(x, batch_size=30, seed=1)
    for i in (15, 2, 7, 0, 15):
        assert torch.equal(again.batch("train", i).x, data.batch("train", i).x)
    other = make(x, batch_size=30, seed=2)
    assert numbers([other.batch("val", 0)]) == numbers([data.batch("val", 0)])
    assert numbers([other.batch("train", 0)]) != numbers([data.batch("train", 0)])


def test_files_give_what_their_tensor_gives(x, tmp_path):
    np.save(tmp_path / "x.npy", x.numpy())
    save_file({"anything": x}, tmp_path / "one.safetensors")
    save_file(
        {"x": x, "features": x[:, :2].abs().contiguous(), "feature_directions": torch.eye(2, D)}, tmp_path / "all.safetensors"
    )
    expected = TensorActivations(x, batch_size=50, seed=0).batch("train", 3).x
    for name in ("x.npy", "one.safetensors", "all.safetensors"):
        data = TensorActivations(str(tmp_path / name), batch_size=50, seed=0)
        assert torch.equal(data.batch("train", 3).x, expected)
    assert torch.equal(data.feature_directions, torch.eye(2, D))
    assert torch.equal(data.batch("train", 3).features, expected[:, :2].abs())


def test_normalisation_is_that_of_the_training_rows_and_travels(x):
    plain = TensorActivations(x, batch_size=226, seed=0)
    rows = plain.batch("train", 0).x.double()
    unit = TensorActivations(x, batch_size=226, seed=0, normalisation="unit_norm")
    assert unit.batch("train", 0).x.double().square().sum(1).mean().item() == pytest.approx(1, rel=1e-6)
    assert unit.source().scale == pytest.approx(rows.square().sum(1).mean().rsqrt().item(), rel=1e-9)
    centred = TensorActivations(x, batch_size=226, seed=0, normalisation="centred")
    torch.testing.assert_close(centred.batch("val", 0).x, plain.batch("val", 0).x - rows.mean(0).float())
    torch.testing.assert_close(torch.tensor(centred.source().mean), rows.mean(0).float())
    assert plain.source() is None


def test_features_are_scaled_with_the_activations():
    directions, features = torch.eye(3, 4), torch.rand(400, 3, generator=torch.Generator().manual_seed(0))
    data = TensorActivations(features @ directions, features, directions, batch_size=64, normalisation="unit_norm")
    batch = data.batch("train", 0)
    torch.testing.assert_close(batch.features @ data.feature_directions, batch.x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_batches_are_float32(x, dtype):
    assert TensorActivations(x.to(dtype), batch_size=50).batch("train", 0).x.dtype == torch.float32


def test_a_loader_gives_its_dataset_batch_size_and_collation(x):
    loader = DataLoader(Rows(x), batch_size=25, shuffle=True, collate_fn=lambda rows: torch.stack(rows) * 2)
    data = DatasetActivations(loader, seed=0)
    assert data.batch_size == 25
    expected = DatasetActivations(Rows(x), batch_size=25, seed=0)
    assert torch.equal(data.batch("train", 1).x, 2 * expected.batch("train", 1).x)
    pairs = DatasetActivations(TensorDataset(x, x[:, :3].abs()), feature_directions=torch.eye(3, D), batch_size=25)
    assert pairs.batch("train", 0).features.shape == (25, 3)


def test_workers_read_what_one_process_reads(x):
    one, several = (DatasetActivations(Rows(x), batch_size=25, num_workers=workers, seed=0) for workers in (0, 2))
    pairs = zip(one.batches("train", 3, 8), several.batches("train", 3, 8), strict=True)
    assert all(torch.equal(a.x, b.x) for a, b in pairs)


def test_reading_draws_no_random_number_of_the_run(x):
    before = torch.get_rng_state()
    for workers in (0, 2):
        list(DatasetActivations(Rows(x), batch_size=25, num_workers=workers, seed=0).batches("train", 0, 3))
    assert torch.equal(torch.get_rng_state(), before)


class Strategy:
    root_device = torch.device("cpu")

    def __init__(self, rank):
        self.distributed_sampler_kwargs = {"rank": rank, "num_replicas": 2}


@pytest.mark.parametrize("make", [TensorActivations, lambda x, **o: DatasetActivations(Rows(x), **o)], ids=["tensor", "set"])
def test_ranks_read_their_own_rows_and_together_all(x, make, monkeypatch):
    whole = make(x, batch_size=40, seed=0)
    parts = []
    for rank in range(2):
        data = make(x, batch_size=40, seed=0)
        data.trainer = type("Trainer", (), {"strategy": Strategy(rank)})()
        parts.append((list(data.batches("train", 2, 9)), list(data.batches("val", 0, 2))))
    for stage, place, numbers_ in (("train", 0, range(2, 9)), ("val", 1, range(2))):
        for i, number in enumerate(numbers_):
            joined = torch.cat([parts[rank][place][i].x for rank in range(2)])
            assert torch.equal(joined, whole.batch(stage, number).x)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("nan", {}, r"data\.x: row 17 is not finite"),
        ("inf", {}, r"data\.x: row 17 is not finite"),
        ("flat", {}, r"data\.x: expected numbers \[rows, width\], got float32 \[250\]"),
        ("bool", {}, r"data\.x: expected numbers \[rows, width\], got bool \[250, 6\]"),
        ("text", {}, r"data\.x: expected a tensor, got list"),
        ("fine", {"batch_size": 300}, r"data\.batch_size: must be at most the 226 training rows \(250 rows, 24 of them"),
        ("fine", {"batch_size": True}, r"data\.batch_size: expected a whole number"),
        ("fine", {"chunk_steps": 2.0}, r"data\.chunk_steps: expected a whole number"),
        ("fine", {"held_out": 0.001}, r"data\.held_out: 0\.001 of 250 rows leaves a stage without any"),
        ("fine", {"held_out": True}, r"data\.held_out: True of 250 rows leaves a stage without any"),
        ("fine", {"features": torch.ones(3, 2)}, r"data\.features: expected 250 rows, as x has, got 3"),
        ("fine", {"feature_directions": torch.eye(2, D)}, r"data\.feature_directions: need data\.features"),
        (
            "fine", {"features": torch.ones(N, 2), "feature_directions": torch.eye(3, D)},
            r"data\.feature_directions: expected \[n_features, d_in\] = \[2, 6\], got \[3, 6\]",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(x, given, options, message):
    wrong = x.clone()
    wrong[17, 3] = float(given) if given in ("nan", "inf") else wrong[17, 3]
    values = {"flat": x[:, 0], "bool": x > 0, "text": ["a", "b"]}
    with pytest.raises(UserError, match=message) as error:
        TensorActivations(values.get(given, wrong), **{"batch_size": 50} | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.pt", b"", r"data\.x: expected a tensor, or a \.safetensors or \.npy file, got '.*x\.pt'"),
        ("x.npy", None, r"data\.x: there is no file '.*x\.npy'"),
        ("x.npy", b"nonsense", r"data\.x: cannot read .*x\.npy"),
        ("x.npy", "objects", r"data\.x: cannot read .*x\.npy"),
        ("x.safetensors", b"\0" * 20, r"data\.x: cannot read .*x\.safetensors"),
        ("x.safetensors", {"a": torch.ones(1), "b": torch.ones(1)}, r"data\.x: .* holds a, b; name the activations 'x'"),
    ],
)
def test_wrong_files_are_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, dict):
        save_file(content, path)
    elif content == "objects":
        np.save(path, np.array([[{}]], dtype=object), allow_pickle=True)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        TensorActivations(str(path))
    assert "\n" not in str(error.value)


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.ones(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: Endless(), r"data\.dataset: expected a map-style dataset .* got Endless"),
        (lambda x: Rows([{"x": 1}] * N), r"data\.dataset: items must be tensors \[d_in\]"),
        (lambda x: Rows(torch.ones(N)), r"data\.dataset: items must be tensors \[d_in\]"),
        (lambda x: DataLoader(Rows(x), sampler=WeightedRandomSampler([1.0] * N, N)), "WeightedRandomSampler would be ignored"),
        (lambda x: DataLoader(Rows(x), batch_size=None), "give the dataset instead"),
        (lambda x: DataLoader(Endless(), batch_size=3), r"data\.dataset: "),
    ],
)
def test_what_is_no_dataset_of_rows_is_refused(x, make, message):
    with pytest.raises(UserError, match=message):
        DatasetActivations(make(x))


def test_items_that_are_not_finite_or_of_another_width_are_named(x):
    x[40, 2] = torch.nan
    data = DatasetActivations(Rows(x), batch_size=226)
    with pytest.raises(UserError, match=r"data\.dataset: item 40 is not finite"):
        [data.batch("train", 0), data.batch("val", 0), data.batch("test", 0)]
    mixed = DatasetActivations(Rows([torch.ones(3)] + [torch.ones(4)] * 249), batch_size=100)
    for rows, found in ([1, 2], r", got 4"), ([0, 1], r" \(each tensor to be equal size"):
        with pytest.raises(UserError, match=r"expected items of width 3, as item 0 has" + found):
            list(mixed.read([torch.tensor(rows)], ahead=False))


def activations(d_in=8, n=2000):
    z = (torch.rand(n, d_in, generator=torch.Generator().manual_seed(0)) < 0.2).float()
    return z @ torch.linalg.qr(torch.randn(d_in, d_in, generator=torch.Generator().manual_seed(1)))[0]


def test_a_stock_trainer_trains_and_validates():
    data = TensorActivations(activations(), batch_size=128, seed=0)
    sae = TopKSAE(d_in=8, d_sae=16, k=2)
    trainer = L.Trainer(max_steps=30, logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False)
    before = sae.W_dec.detach().clone()
    trainer.fit(sae, datamodule=data)
    assert trainer.global_step == 30
    assert not torch.equal(sae.W_dec, before)


def test_fit_and_hedge_read_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"x": activations()}, "own.safetensors")
    words = ["--data", "TensorActivations", "--data.init_args.x", "own.safetensors", "--data.init_args.batch_size", "64"]
    words += ["--model", "BatchTopKSAE", "--model.init_args.d_sae", "6", "--model.init_args.k", "2"]
    words += ["--trainer.max_steps", "20", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    (tmp_path / "own.yaml").write_text("seed_everything: 0\n")
    assert main(["fit", "--config", "own.yaml", *words]) == 0
    assert main(["hedge", "--config", "own.yaml", *words, "--hedge.n_new", "2", "--hedge.new_norm", "1.0"]) == 0
