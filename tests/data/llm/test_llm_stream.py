import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hedgelab.data.llm.hook import CutModel
from hedgelab.data.llm.model import ModelFiles
from hedgelab.data.llm.stream import BlockStream, Harvester
from hedgelab.errors import UserError
from hedgelab.seeding import generator


class Counting(torch.nn.Module):
    """Stands in for a cut model: activation [token, token + 0.5], so that rows tell where they come from."""

    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
        self.threads = set()
        self.vocabulary = 1_000_000

    def forward(self, tokens):
        self.threads.add(threading.current_thread().name)
        return torch.stack([tokens.float(), tokens + 0.5], dim=-1)


def make_stream(n=20, usable=None, **options):
    tokens = torch.arange(n * 10, dtype=torch.int32).view(n, 10) + 1000
    usable = torch.ones(n, 10, dtype=torch.bool) if usable is None else usable
    defaults = {
        "contexts_per_block": 6,
        "batch_size": 8,
        "max_norm_ratio": None,
        "seed": 0,
        "name": "train",
        "device": torch.device("cpu"),
    }
    harvester = Harvester(Counting(), contexts_at_once=4)
    stream = BlockStream(
        lambda numbers, usable: harvester.rows(tokens[numbers], usable), ThreadPoolExecutor(1), torch.arange(n), usable,
        **(defaults | options),
    )  # fmt: skip
    stream.harvester, stream.tokens = harvester, tokens
    return stream


def test_blocks_are_whole_batches_of_distinct_usable_rows():
    usable = torch.ones(20, 10, dtype=torch.bool)
    usable[:, 0] = False
    usable[3:5] = False
    stream = make_stream(usable=usable)
    assert stream.batches_per_block == (4 * 9) // 8  # the poorest six contexts, two of them empty
    for number in range(3):
        rows = stream.block(number).rows
        tokens = rows[:, 0].long() - 1000
        assert rows.shape == (stream.batches_per_block * 8, 2)
        assert len(tokens.unique()) == len(tokens)
        assert usable.flatten()[tokens].all()
        assert set((tokens // 10).tolist()) <= set(stream.context_numbers(number).tolist())
        assert not torch.equal(tokens, tokens.sort().values)


def test_an_epoch_meets_each_context_once_and_the_next_in_another_order():
    stream = make_stream(n=18)
    epochs = [torch.cat([stream.context_numbers(3 * epoch + i) for i in range(3)]) for epoch in range(3)]
    for order in epochs:
        assert order.sort().values.tolist() == list(range(18))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(stream.block(0).rows, make_stream(n=18, seed=1).block(0).rows)


@pytest.mark.parametrize(("n", "per_block"), [(20, 6), (7, 7), (11, 4), (5, 6)])
def test_no_context_is_left_out_of_an_epoch(n, per_block):
    stream = make_stream(n=n, contexts_per_block=per_block)
    per_block = min(n, per_block)
    epochs = 3
    met = torch.cat([stream.context_numbers(number) for number in range(epochs * n // per_block + 1)])
    for epoch in range(epochs):
        assert met[epoch * n : (epoch + 1) * n].sort().values.tolist() == list(range(n))
    order = torch.randperm(n, generator=generator(0, "train", "epoch", 0))
    assert torch.equal(stream.context_numbers(0), order[:per_block])  # the blocks of earlier releases, in the first epoch


def test_a_short_stream_that_is_read_again_does_not_run_the_model_again():
    stream = make_stream()
    made = []
    rows = stream.rows
    stream.rows = lambda numbers, usable: made.append(numbers) or rows(numbers, usable)
    first, again = ([*stream.read(range(35))] for _ in range(2))
    assert len(made) == 5
    assert torch.equal(torch.stack(first), torch.stack(again))


def test_batches_do_not_depend_on_what_was_asked_before(monkeypatch):
    monkeypatch.setattr("hedgelab.data.llm.stream._KEPT_BYTES", 0)
    in_order = [make_stream().batch(i) for i in range(40)]
    stream = make_stream()
    numbers = (39, 0, 17, 3, 38, 0, 20)
    for i, rows in zip(numbers, stream.read(numbers), strict=True):
        torch.testing.assert_close(rows, in_order[i], rtol=0, atol=0)
    assert len(stream._blocks) == 2


def test_outliers_are_dropped_by_their_ratio_to_the_median():
    stream = make_stream(max_norm_ratio=3.0, batch_size=10)
    stream.tokens[:, 7] = 100_000
    stream.tokens[::6, 7] = 1_000
    block = stream.block(0)
    chosen = stream.context_numbers(0)
    assert len(block.norms) == 60
    assert (block.norms > 50_000).sum() == (stream.tokens[chosen, 7] == 100_000).sum() > 0
    assert block.rows.max() < 50_000
    stream = make_stream(max_norm_ratio=3.0)
    stream.tokens[:, 5:9] = 100_000
    with pytest.raises(UserError, match=r"data\.max_norm_ratio: 3\.0 leaves 36 of a block's 60 rows where 56 are needed"):
        stream.block(0)


def test_too_few_rows_for_a_batch():
    with pytest.raises(UserError, match=r"data\.contexts_per_block: 6 of the 20 train contexts have 60 usable"):
        make_stream(batch_size=64)


def test_rows_can_be_trained_on_and_come_from_the_background():
    stream = make_stream()
    weight = torch.ones(2, 1, requires_grad=True)
    (stream.batch(0) @ weight).sum().backward()
    list(stream.read(range(2 * stream.batches_per_block)))
    assert weight.grad is not None
    assert stream.harvester._model.threads
    assert all(name.startswith("hedgelab-forward") for name in stream.harvester._model.threads)


def test_reading_ahead_stops_where_the_batches_stop_and_closing_ends_it():
    stream = make_stream()
    per_block = stream.batches_per_block
    next(stream.read(range(per_block)))
    assert list(stream._blocks) == [0]
    next(stream.read([0, 5 * per_block]))
    assert list(stream._blocks) == [0, 5]
    before = stream.batch(per_block)
    stream.harvester.close()
    stream._blocks.clear()
    assert stream.harvester._passes is None
    torch.testing.assert_close(stream.batch(per_block), before, rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_do_not_depend_on_the_number_of_threads(tiny_model, threads):
    before = torch.get_num_threads()
    tokens = torch.arange(4 * 16).view(4, 16) % 60 + 4
    expected = CutModel(ModelFiles(tiny_model).causal_lm(), "model.layers.1")
    try:
        torch.set_num_threads(threads)
        harvester = Harvester(CutModel(ModelFiles(tiny_model).causal_lm(), "model.layers.1"), contexts_at_once=1)
        rows = harvester.rows(tokens, torch.ones(4, 16, dtype=torch.bool))
        assert torch.get_num_threads() == threads
        torch.set_num_threads(1)
        one_by_one = torch.cat([expected(context[None])[0] for context in tokens])
        torch.testing.assert_close(rows, one_by_one, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)
