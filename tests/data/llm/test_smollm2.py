"""The embedded model for real; converted into the repository's cache on first use."""

import socket

import pytest
import torch

from hedgelab.data.llm import LLMDataModule, TextFiles

pytestmark = pytest.mark.llm

TEXT = (
    "The history of the city begins with a small settlement on the river. In the nineteenth century the railway came, "
    "and with it came workers from the countryside, who built houses close to the factories. "
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "city.txt"
    path.write_text("\n".join(f"{i}. {TEXT}" for i in range(100)))
    return LLMDataModule(
        text=TextFiles([str(path)]), context_length=64, contexts_per_block=8, batch_size=256, held_out=0.3, seed=0
    )


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: pytest.fail("asked the network"))


def test_the_model_understands_english(data):
    model = data.files.causal_lm()
    tokens = torch.tensor([data.files.tokenizer()(TEXT)["input_ids"]])
    loss = model(input_ids=tokens, labels=tokens).loss
    assert loss < 4  # nats a token; a unigram model needs more than 7


def test_block_12_is_sane(data):
    data.prepare_data()
    data.setup("fit")
    norms = {key.removeprefix("data/norm/"): value for key, value in data.describe().items()}
    assert data.d_in == 576
    assert 90 < norms["p0.1"] < norms["p50"] < norms["p99.9"] < 300  # the first position's would be 20 000
    x = data.batch("train", 3).x
    assert x.shape == (256, 576)
    assert x.square().sum(dim=1).mean().item() == pytest.approx(1, abs=0.1)
    unit = x / x.norm(dim=1, keepdim=True)
    between = (unit @ unit.T).fill_diagonal_(0).sum() / (256 * 255)
    assert 0 < between < 0.9  # a common mean, not a single direction
