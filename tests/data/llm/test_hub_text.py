"""Text of Hugging Face data sets: local ones read for real, absent ones refused in one line."""

import json

import pytest

from hedgelab.data.llm import HubText
from hedgelab.errors import UserError

DOCUMENTS = [f"document {i}" for i in range(30)]


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    """The package, its caches in a folder of the test."""
    package = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    return package


@pytest.fixture
def folder(tmp_path):
    """A folder of two data files."""
    files = tmp_path / "set"
    files.mkdir()
    for part in range(2):
        rows = [json.dumps({"text": text, "id": i}) for i, text in enumerate(DOCUMENTS[15 * part : 15 * (part + 1)])]
        (files / f"part-{part}.jsonl").write_text("\n".join(rows))
    return files


@pytest.mark.parametrize("streaming", [True, False])
def test_a_folder_of_files(datasets, folder, streaming):
    source = HubText(str(folder), streaming=streaming)
    assert list(source.documents()) == DOCUMENTS
    assert list(source.documents()) == DOCUMENTS  # again, from the start
    assert list(HubText(str(folder), streaming=streaming, max_documents=7).documents()) == DOCUMENTS[:7]


def test_saved_data_sets(datasets, tmp_path):
    one = datasets.Dataset.from_dict({"text": [*DOCUMENTS, None]})
    one.save_to_disk(tmp_path / "one")
    assert list(HubText(str(tmp_path / "one")).documents()) == DOCUMENTS
    datasets.DatasetDict({"train": one, "test": one.select([3])}).save_to_disk(tmp_path / "both")
    assert list(HubText(str(tmp_path / "both"), split="test").documents()) == [DOCUMENTS[3]]


def test_the_fingerprint_changes_with_the_documents(folder):
    before = HubText(str(folder)).fingerprint()
    assert HubText(str(folder)).fingerprint() == before
    others = [HubText(str(folder), max_documents=3), HubText(str(folder), split="test"), HubText(str(folder), "id")]
    assert len({before, *(other.fingerprint() for other in others)}) == 4
    (folder / "part-0.jsonl").write_text("")
    assert HubText(str(folder)).fingerprint() != before
    assert HubText("a/b", revision="1").fingerprint() != HubText("a/b", revision="2").fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": ""}, r"data\.text\.dataset: names no data set"),
        ({"dataset": "a/b", "max_documents": 0}, r"data\.text\.max_documents: expected a whole number of at least 1, got 0"),
    ],
)
def test_impossible_values(options, message):
    with pytest.raises(UserError, match=message):
        HubText(**options)


def test_what_a_folder_lacks_is_named(datasets, folder):
    with pytest.raises(UserError, match=r"data\.text\.field: data set .* has no column 'body'; it has text, id"):
        list(HubText(str(folder), field="body").documents())
    with pytest.raises(UserError, match=r"data\.text\.dataset: cannot read .*offline alternatives: StandardLibraryText"):
        list(HubText(str(folder), split="nowhere").documents())


def test_an_unreachable_hub_is_one_line(datasets, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"data\.text\.dataset: 'some/corpus' is no local folder, and HF_HUB_OFFLINE is set"):
        list(HubText("some/corpus").documents())
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: (_ for _ in ()).throw(OSError("no cache")))
    with pytest.raises(UserError, match=r"cannot read 'some/corpus': HF_HUB_OFFLINE is set, nor .* earlier downloads"):
        list(HubText("some/corpus", streaming=False).documents())


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2], "int"),
        ([[1, 2], [3]], "list of int"),
        ([[{"role": "user", "content": "hi"}]], "list of dict"),
        ([{"a": 1}], "dict"),
    ],
)
def test_columns_that_are_not_text_are_refused(datasets, tmp_path, values, kind):
    datasets.Dataset.from_dict({"text": values}).save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match=rf"data\.text\.field: column 'text' of data set .*one' holds {kind}, not text"):
        list(HubText(str(tmp_path / "one")).documents())


def test_bytes_are_decoded(datasets, tmp_path):
    datasets.Dataset.from_dict({"text": [b"tea", "caf\xe9".encode()]}).save_to_disk(tmp_path / "one")
    assert list(HubText(str(tmp_path / "one")).documents()) == ["tea", "caf\xe9"]
    datasets.Dataset.from_dict({"text": ["caf\xe9".encode("latin-1")]}).save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match="holds bytes that are not UTF-8"):
        list(HubText(str(tmp_path / "two")).documents())
