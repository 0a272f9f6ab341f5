"""Labelled text: which token gets which label, what is split how, and what is refused."""

import json

import pytest
import torch

from hedgelab.data.llm.labelled import FirstLetters, TaggedWords
from hedgelab.data.llm.text import pack
from hedgelab.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer(with_bos=False)


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    """Documents of words; even words are tagged `nn`, odd ones `vb`, multiples of five `nn-tl`."""
    folder = tmp_path_factory.mktemp("tagged")
    with (folder / "text.jsonl").open("w") as text, (folder / "tags.jsonl").open("w") as tags:
        for doc in range(24):
            numbers = [(7 * doc + 3 * i) % 60 for i in range(30)]
            words = [f"w{n}" for n in numbers]
            text.write(json.dumps({"doc": f"d{doc}", "text": " ".join(words), "kind": "abc"[doc % 3]}) + "\n")
            starts = [sum(len(w) + 1 for w in words[:i]) for i in range(30)]
            offsets = [[s, s + len(w)] for s, w in zip(starts, words, strict=True)]
            names = ["nn-tl" if n % 5 == 0 else "nn" if n % 2 == 0 else "vb" for n in numbers]
            for part in (slice(0, 15), slice(15, 30)):
                start = offsets[part][0][0]  # offsets of a line may be counted from a place in the text
                counted = [[a - start, b - start] for a, b in offsets[part]]
                line = {"doc": f"d{doc}", "start": start, "tags": names[part], "offsets": counted}
                tags.write(json.dumps(line) + "\n")
    return folder


def words(folder, **options):
    defaults = {
        "text": str(folder / "text.jsonl"),
        "tags": str(folder / "tags.jsonl"),
        "classes": {"NN": ["nn(-tl)?"], "VB": ["vb"]},
        "contexts": 9,
        "context_length": 20,
    }
    return TaggedWords(**(defaults | options))


def test_every_word_gets_its_label_at_its_token(tagged, tokenizer):
    data = words(tagged).load(tokenizer)
    assert data.tokens.shape == (9, 20)
    assert data.classes == ["NN", "VB"]
    for (context, position), (nn, vb) in zip(data.positions.tolist(), data.labels.tolist(), strict=True):
        number = int(tokenizer.decode([data.tokens[context, position]]).removeprefix("w"))
        assert nn == (number % 5 == 0 or number % 2 == 0)
        assert vb == (not nn)
    assert len(data.positions) == 9 * 20


def test_words_of_python_s_own_documentation_are_their_own_tags(tokenizer, monkeypatch):
    documents = [" ".join(f"w{(doc + 3 * n) % 60}" for n in range(40)) for doc in range(30)]
    monkeypatch.setattr("hedgelab.data.llm.text.StandardLibraryText.documents", lambda self: iter(documents))
    data = TaggedWords(classes={"teens": [r"w1\d"]}, contexts=12, context_length=20).load(tokenizer)
    assert len(data.positions) == 12 * 20
    for (context, position), (teen,) in zip(data.positions.tolist(), data.labels.tolist(), strict=True):
        assert teen == (10 <= int(tokenizer.decode([data.tokens[context, position]]).removeprefix("w")) < 20)


def test_documents_are_never_split(tagged, tokenizer):
    data = words(tagged).load(tokenizer)
    for context in range(9):
        assert data.test[data.positions[:, 0] == context].unique().tolist() == [context % 3 == 0]


def test_a_bos_token_moves_positions(tagged, make_tokenizer):
    tokenizer = make_tokenizer(with_bos=True)
    data = words(tagged).load(tokenizer)
    assert (data.tokens[:, 0] == 0).all()
    assert data.positions[:, 1].min() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": {}}, r"words\.classes: names no class"),
        ({"classes": {"NN": ["("]}}, r"words\.classes\.NN: '\(' is no regular expression"),
        ({"classes": {"NN": ["xx"]}}, r"words\.classes\.NN: fits too few"),
        ({"text": "nowhere.jsonl"}, r"words\.text: there is no file 'nowhere\.jsonl'"),
    ],
)
def test_mistakes_are_named(tagged, tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        words(tagged, **options).load(tokenizer)


def test_offsets_from_the_wrong_place_are_refused(tagged, tokenizer, tmp_path):
    lines = [json.loads(line) for line in (tagged / "tags.jsonl").read_text().splitlines()]
    (tmp_path / "tags.jsonl").write_text("".join(json.dumps({**line, "start": 0}) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"words\.tags: .* tags .* words twice"):
        words(tagged, tags=str(tmp_path / "tags.jsonl"), context_length=30).load(tokenizer)


def test_lines_without_the_keys_are_named(tmp_path, tokenizer):
    (tmp_path / "text.jsonl").write_text('{"doc": 1, "text": "w1"}\nnonsense\n')
    with pytest.raises(UserError, match=r"words\.text: line 2 of .* is no JSON object with the keys 'doc', 'text'"):
        words(tmp_path).load(tokenizer)


class Vocabulary:
    """A tokenizer of words with a leading space, as byte-level tokenizers write them."""

    bos_token_id = 0

    def __init__(self, n=400):
        self.prompt = None
        self.tokens = ["<s>", "Ġ1st", "the", "Ġx"] + [f"Ġ{chr(97 + i % 4)}{chr(97 + i % 7)}{'q' * (i // 28)}" for i in range(n)]

    def __len__(self):
        return len(self.tokens)

    def convert_ids_to_tokens(self, ids):
        return [self.tokens[i] for i in ids]

    def __call__(self, text, add_special_tokens):
        self.prompt = self.prompt if text == "a" else text
        return {"input_ids": [0, 7, 2] if add_special_tokens else [7]}


def test_words_of_the_vocabulary_by_first_letter():
    vocabulary = Vocabulary()
    data = FirstLetters(words=300, examples=3).load(vocabulary)
    assert data.letters == ["a", "b", "c", "d"]
    assert len(data.words) == 300
    for word, row in zip(data.words.tolist(), data.labels.tolist(), strict=True):
        assert data.letters[row.index(True)] == vocabulary.tokens[word][1]
    assert data.test.float().mean().item() == pytest.approx(1 / 3, abs=0.01)
    assert data.prefix.tolist() == [0, 7]  # the BOS token in front, no EOS token behind the prompt
    lines = vocabulary.prompt.strip("\n").split("\n")
    assert len(lines) == 3
    for line in lines:
        shown, _, letter = line.strip().partition(" has the first letter: ")
        assert letter == shown[0].upper()
        assert shown not in [vocabulary.tokens[i][1:] for i in data.words.tolist()]
    again = FirstLetters(words=300, examples=3).load(Vocabulary())
    assert torch.equal(again.words, data.words)


def test_a_template_without_a_word_and_a_vocabulary_without_words():
    with pytest.raises(UserError, match=r"letters\.template: must contain \{word\}"):
        FirstLetters(template="spell it")
    with pytest.raises(UserError, match="too few single-token words"):
        FirstLetters().load(Vocabulary(10))


@pytest.mark.parametrize("with_bos", [False, True])
@pytest.mark.parametrize("eos", ["</s>", "<s>"], ids=["an EOS of its own", "EOS is BOS"])
def test_an_appended_eos_token_stands_nowhere(tagged, make_tokenizer, with_bos, eos):
    plain, appending = make_tokenizer(with_bos, eos=eos), make_tokenizer(with_bos, with_eos=True, eos=eos)
    expected, got = (words(tagged).load(tokenizer) for tokenizer in (plain, appending))
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.positions, expected.positions)
    documents = ["w1 w2 w3 w4 w5 w6", "w7 w8 w9 w10"]
    assert torch.equal(pack(iter(documents), appending, 4).tokens[:, 1:], pack(iter(documents), plain, 4).tokens[:, 1:])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"doc": "d", "text": ["w1"]}, r"words\.text: key 'text' of .*, line 1, holds list of str, not text"),
        ({"doc": "d", "text": "\ud800"}, r"words\.text: .* half of a surrogate pair"),
    ],
)
def test_texts_that_are_no_text_are_named(tmp_path, tokenizer, line, message):
    (tmp_path / "text.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match=message):
        words(tmp_path).load(tokenizer)


@pytest.mark.parametrize(
    "wrong", [{"tags": ["nn"], "offsets": []}, {"tags": ["nn"], "offsets": [3]}, {"tags": 3, "offsets": [[0, 1]]}]
)
def test_tags_without_offsets_are_named(tmp_path, tokenizer, wrong):
    (tmp_path / "text.jsonl").write_text('{"doc": 1, "text": "w1"}')
    (tmp_path / "tags.jsonl").write_text(json.dumps({"doc": 1, **wrong}))
    with pytest.raises(UserError, match=r"words\.tags: line 1 of .* must have as many `tags` as `offsets`"):
        words(tmp_path).load(tokenizer)


def test_files_with_a_byte_order_mark_and_in_other_encodings(tagged, tokenizer, tmp_path):
    for name in ("text.jsonl", "tags.jsonl"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tagged / name).read_bytes())
    assert torch.equal(words(tmp_path).load(tokenizer).tokens, words(tagged).load(tokenizer).tokens)
    (tmp_path / "text.jsonl").write_bytes((tagged / "text.jsonl").read_text().encode("utf-16"))
    with pytest.raises(UserError, match=r"words\.text: cannot read .*text\.jsonl: it is not UTF-8"):
        words(tmp_path).load(tokenizer)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: FirstLetters(words=True), "letters.words"),
        (lambda: FirstLetters(examples=1.0), "letters.examples"),
        (lambda: TaggedWords("t", "u", {"a": ["b"]}, contexts=True), "words.contexts"),
        (lambda: TaggedWords("t", "u", {"a": ["b"]}, context_length=0), "words.context_length"),
    ],
)
def test_counts_are_whole_numbers(make, key):
    with pytest.raises(UserError, match=f"{key}: expected a whole number"):
        make()
