import pytest
import torch

from hedgelab.data.llm import TextFiles
from hedgelab.data.llm.model import ModelFiles
from hedgelab.data.llm.text import load_contexts, pack
from hedgelab.errors import UserError

BOS, EOS, CHAT = 0, 1, 3


def test_packing_with_separators(make_tokenizer):
    packed = pack(iter(["w0 w1 w2", "w3 <chat> w4"]), make_tokenizer(with_bos=False), length=4)
    assert packed.tokens.tolist() == [[4, 5, 6, EOS], [7, CHAT, 8, EOS]]
    assert packed.tokens.dtype == torch.int32
    assert packed.special.tolist() == [[False, False, False, True], [False, True, False, True]]


def test_packing_with_bos_where_the_tokenizer_adds_it(make_tokenizer):
    packed = pack(iter(["w0 w1 w2", "w3 w4"]), make_tokenizer(with_bos=True), length=4)
    assert packed.tokens.tolist() == [[BOS, 4, 5, 6], [BOS, BOS, 7, 8]]  # the last separator is left over
    assert packed.special.tolist() == [[True, False, False, False], [True, True, False, False]]


def test_packing_loses_nothing_but_the_tail(make_tokenizer):
    documents = [" ".join(f"w{(i * j) % 60}" for j in range(i % 9 + 1)) for i in range(200)]
    tokenizer = make_tokenizer(with_bos=False)
    whole = [token for text in documents for token in [*tokenizer(text)["input_ids"], EOS]]
    packed = pack(iter(documents), tokenizer, length=7)
    assert packed.tokens.flatten().tolist() == whole[: len(whole) // 7 * 7]


def test_first_positions_are_left_out(make_tokenizer):
    packed = pack(iter(["w0 w1 w2", "w3 w4 w5"]), make_tokenizer(with_bos=False), length=4)
    assert packed.usable(0).tolist() == [[True, True, True, False]] * 2
    assert packed.usable(2).tolist() == [[False, False, True, False]] * 2


def test_too_little_text_is_refused(make_tokenizer):
    with pytest.raises(UserError, match=r"data\.text: holds 3 tokens.*context_length 4"):
        pack(iter(["w0 w1"]), make_tokenizer(with_bos=False), length=4)
    with pytest.raises(UserError, match="holds 0 tokens"):
        pack(iter([]), make_tokenizer(with_bos=False), length=4)


def test_cache_is_used_and_follows_text_tokenizer_and_length(tiny_model, tmp_path, monkeypatch):
    text = tmp_path / "a.txt"
    text.write_text("w0 w1 w2 w3 w4 w5 w6")

    def load(length=4):
        return load_contexts(TextFiles([str(text)]), ModelFiles(tiny_model), length, tmp_path / "cache")

    first = load()
    with monkeypatch.context() as patch:
        patch.setattr(ModelFiles, "tokenizer", lambda self: pytest.fail("tokenised again"))
        again = load()
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.special, again.special)
    assert load(length=8).tokens.shape == (1, 8)
    text.write_text("w9 w9 w9 w9")
    assert not torch.equal(load().tokens[0], first.tokens[0])
    assert sorted(path.suffix for path in (tmp_path / "cache" / "tokens").iterdir()) == [".lock"] * 3 + [".safetensors"] * 3
