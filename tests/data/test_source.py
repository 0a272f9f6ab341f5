"""Files beside an SAE, and files of a toy, as editors of other systems write them: with a byte order mark."""

import pytest
import torch

from hedgelab.data.source import ActivationSource
from hedgelab.data.toy import TreeFiring
from hedgelab.saes import TopKSAE, load_sae, save_sae

MARK = b"\xef\xbb\xbf"


@pytest.fixture
def folder(tmp_path):
    sae = TopKSAE(d_in=4, d_sae=6, k=2)
    save_sae(sae, tmp_path)
    ActivationSource(model="gpt2", layer=3, scale=0.5, mean=(1.0, 2.0)).save(tmp_path)
    for file in tmp_path.glob("*.json"):
        file.write_bytes(MARK + file.read_bytes())
    return tmp_path, sae


def test_an_sae_folder(folder):
    path, sae = folder
    assert torch.equal(load_sae(path).W_dec, sae.W_dec)
    assert ActivationSource.load(path) == ActivationSource(model="gpt2", layer=3, scale=0.5, mean=(1.0, 2.0))


def test_a_tree(tmp_path):
    (tmp_path / "tree.yaml").write_bytes(MARK + b"children: [{probability: 0.5}]")
    assert TreeFiring(file=str(tmp_path / "tree.yaml")).n == 1
