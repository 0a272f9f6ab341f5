"""Ranks that share the model's work get the batches of one rank, to the last bit, each having run its part."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hedgelab.data.llm import LLMDataModule, TextFiles
from hedgelab.data.llm.stream import shared_by_ranks

BATCHES = 100  # more than an epoch


def make(model, texts, cache_dir, storage_dtype, normalisation):
    return LLMDataModule(
        model, 1, text=TextFiles(texts), context_length=16, contexts_per_block=20, contexts_at_once=4, batch_size=32,
        seed=0, device="cpu", storage_dtype=storage_dtype, normalisation=normalisation, cache_dir=cache_dir,
    )  # fmt: skip


def as_rank(rank, count, port, folder, settings):
    """What each process does; it is started anew, since torch's threads do not survive a fork."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    data = make(*settings)
    torch.save(contents(data), Path(folder) / f"{rank}.pt")
    data.teardown("fit")
    torch.distributed.destroy_process_group()


def contents(data):
    return {
        "train": torch.stack([batch.x for batch in data.batches("train", 0, BATCHES)]),
        "val": data.batch("val", 1).x,
        "scale": torch.tensor(data.activation_scale, dtype=torch.float64),
        "tokens": torch.tensor(data.tokens_read),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("count", "options"), [(2, ("float32", "none")), (3, ("bfloat16", "unit_norm"))])
def test_batches_are_those_of_one_rank(tiny_model, tiny_text, tmp_path, count, options):
    settings = (tiny_model, tiny_text, str(tmp_path), *options)
    expected = contents(make(*settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen([sys.executable, __file__, *map(str, (rank, count, port, tmp_path)), repr(settings)])
        for rank in range(count)
    ]
    try:
        assert [rank.wait(timeout=500) for rank in ranks] == [0] * count
    finally:
        for rank in ranks:
            rank.kill()
    for number in range(count):
        found = torch.load(tmp_path / f"{number}.pt")
        for key in ("train", "val", "scale"):
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0)
        assert found["tokens"] < expected["tokens"] / count * 1.1  # blocks of 20 do not split evenly in three


def test_one_process_shares_nothing(make_data):
    data = make_data()
    assert shared_by_ranks(data.rows) is data.rows


if __name__ == "__main__":
    import ast

    words = sys.argv[1:]
    as_rank(*map(int, words[:3]), words[3], ast.literal_eval(words[4]))
