import gzip
import json
import re
import sys
from pathlib import Path

import pytest

from hedgelab.data.llm.text import StandardLibraryText, TextFiles, _docstrings
from hedgelab.errors import UserError


def test_files_come_in_order_and_unpacked(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.jsonl").write_text('{"body": "three"}\n\n{"body": "four"}\n')
    with gzip.open(tmp_path / "c.txt.gz", "wt") as file:
        file.write("five")
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write(json.dumps({"body": "six"}))
    source = TextFiles([str(tmp_path / name) for name in ("c.txt.gz", "a.txt", "b.jsonl", "d.jsonl.gz")], field="body")
    assert list(source.documents()) == ["five", "one\ntwo", "three", "four", "six"]


def test_fingerprint_follows_contents_and_field(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "other": "y"}')
    first = TextFiles([str(path)]).fingerprint()
    assert TextFiles([str(path)], field="other").fingerprint() != first
    path.write_text('{"text": "z", "other": "y"}')
    assert TextFiles([str(path)]).fingerprint() != first


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"data\.text\.paths: names no file"),
        (["there.txt", "missing.txt"], r"data\.text\.paths\[1\]: there is no file '.*missing\.txt'"),
        (["there.pdf"], r"data\.text\.paths\[0\]: expected a \.txt, \.jsonl or \.parquet file"),
    ],
)
def test_bad_paths_are_named(tmp_path, names, message):
    (tmp_path / "there.txt").write_text("x")
    with pytest.raises(UserError, match=message):
        TextFiles([str(tmp_path / name) for name in names])


@pytest.mark.parametrize("line", ["not json", '{"body": "x"}', "[1]"])
def test_bad_lines_are_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(UserError, match=r"line 2 of .*a\.jsonl.*'text'"):
        list(TextFiles([str(path)]).documents())


def test_docstrings_of_all_kinds_are_found_without_importing(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""Of the module."""\nraise SystemExit\nclass A:\n  """Of the class."""\n  async def f(self):\n    "Of f."\n'
    )
    assert _docstrings(path) == "Of the module.\n\nOf the class.\n\nOf f."
    path.write_text("def broken(:")
    assert _docstrings(path) == ""


def test_standard_library_begins_with_the_topics():
    from pydoc_data.topics import topics

    documents = StandardLibraryText().documents()
    assert [next(documents) for _ in range(3)] == [topics[name] for name in sorted(topics)[:3]]
    assert ".".join(map(str, sys.version_info[:3])) in StandardLibraryText().fingerprint()


@pytest.mark.slow
def test_standard_library_is_long_and_the_same_each_time():
    first, second = (list(StandardLibraryText().documents()) for _ in range(2))
    assert first == second
    assert sum(map(len, first)) > 1_500_000


def write_parquet(path, columns):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)
    return str(path)


def test_parquet_rows_in_order(tmp_path):
    plain = write_parquet(tmp_path / "a.parquet", {"text": ["one", None, "two"], "n": [1, 2, 3]})
    packed = tmp_path / "b.parquet.gz"
    packed.write_bytes(gzip.compress(Path(plain).read_bytes()))
    source = TextFiles([plain, str(packed)])
    assert list(source.documents()) == ["one", "two", "one", "two"]
    with pytest.raises(UserError, match=r"a\.parquet has no column 'body'; set data\.text\.field to one of text, n"):
        list(TextFiles([plain], field="body").documents())


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "cut.parquet", "latin.txt"])
def test_damaged_files_are_named(tmp_path, name):
    whole = {
        "cut.jsonl.gz": gzip.compress(b'{"text": "some words"}\n' * 50)[:-12],
        "cut.parquet": b"PAR1 and then nothing",
        "latin.txt": "caf\xe9".encode("latin-1"),
    }[name]
    (tmp_path / name).write_bytes(whole)
    with pytest.raises(UserError, match=rf"data\.text\.paths: cannot read .*{name}"):
        list(TextFiles([str(tmp_path / name)]).documents())


def one_line(source):
    with pytest.raises(UserError) as error:
        list(source.documents())
    assert "\n" not in str(error.value)
    return str(error.value)


NOT_TEXT = [
    ([[1, 2], [3]], "list of int"),
    ([1, 2], "int"),
    ([0.5, 1.5], "float"),
    ([True, False], "bool"),
    ([[{"role": "user", "content": "hi"}], []], "list of dict"),
    ([{"a": 1}, {"a": 2}], "dict"),
]


@pytest.mark.parametrize(("values", "kind"), NOT_TEXT, ids=[kind for _, kind in NOT_TEXT])
def test_columns_that_are_not_text_are_refused(tmp_path, values, kind):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": value}) + "\n" for value in [None, *values]))
    expected = rf"data\.text\.field: column 'body' of .*a\.jsonl, row 2, holds {kind}, not text"
    assert re.match(expected, one_line(TextFiles([str(tmp_path / "a.jsonl")], field="body")))
    parquet = write_parquet(tmp_path / "a.parquet", {"body": [None, *values]})
    expected = rf"data\.text\.field: column 'body' of .*a\.parquet, row 2, holds {kind}, not text"
    assert re.match(expected, one_line(TextFiles([parquet], field="body")))


def test_bytes_are_decoded_and_other_encodings_refused(tmp_path):
    good = write_parquet(tmp_path / "a.parquet", {"text": ["caf\xe9".encode(), b"tea"]})
    assert list(TextFiles([good]).documents()) == ["caf\xe9", "tea"]
    bad = write_parquet(tmp_path / "b.parquet", {"text": [b"tea", "caf\xe9".encode("latin-1")]})
    assert re.match(
        r"data\.text\.field: column 'text' of .*b\.parquet, row 2, holds bytes that are not UTF-8", one_line(TextFiles([bad]))
    )


@pytest.mark.parametrize("packed", [False, True])
def test_a_byte_order_mark_is_no_text(tmp_path, packed):
    mark, suffix = b"\xef\xbb\xbf", ".gz" if packed else ""
    write = gzip.compress if packed else bytes
    lines = mark + b'{"text": "one"}\n' + mark + b'{"text": "two"}\n'  # two files put together
    (tmp_path / f"a.jsonl{suffix}").write_bytes(write(lines))
    (tmp_path / f"a.txt{suffix}").write_bytes(write(mark + b"three"))
    source = TextFiles([str(tmp_path / f"a.jsonl{suffix}"), str(tmp_path / f"a.txt{suffix}")])
    assert list(source.documents()) == ["one", "two", "three"]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_other_encodings_are_one_line(tmp_path, kind, encoding):
    (tmp_path / f"a.{kind}").write_bytes('{"text": "caf\xe9"}'.encode(encoding))
    assert re.match(
        rf"data\.text\.paths: cannot read .*a\.{kind}: it is not UTF-8", one_line(TextFiles([str(tmp_path / f"a.{kind}")]))
    )


def test_half_a_surrogate_pair_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine \\ud83d\\ude00"}\n{"text": "half \\ud83d"}\n')
    message = one_line(TextFiles([str(tmp_path / "a.jsonl")]))
    assert re.match(r"data\.text\.field: column 'text' of .*a\.jsonl, row 2, holds \\ud83d, half of a surrogate pair", message)


def test_json_too_deep_is_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ' + "[" * 100_000)
    assert "line 1 of" in one_line(TextFiles([str(tmp_path / "a.jsonl")]))
