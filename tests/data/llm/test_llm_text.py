import gzip
import json
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
