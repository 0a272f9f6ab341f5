import json
import multiprocessing
import time

import pytest

from hedgelab.errors import UserError
from hedgelab.training.checkpoints import RunFolder
from hedgelab.training.checkpoints.folder import identity, runs_of


def test_newest_run_of_the_same_experiment_comes_first(tmp_path):
    same = identity("fit", {"model": {"k": 3}})
    for name, wanted in (("a", same), ("b", "other"), ("c", same)):
        RunFolder(tmp_path / name).note(identity=wanted, run_id=name)
        time.sleep(0.01)
    assert [folder.run_id for folder in runs_of(tmp_path, same)] == ["c", "a"]
    assert runs_of(tmp_path / "absent", same) == []
    assert [folder.run_id for folder in runs_of(tmp_path / "b", "other")] == ["b"]


def test_identity_tells_experiments_apart_whatever_the_order_of_keys():
    assert identity("fit", {"a": 1, "b": 2}) == identity("fit", {"b": 2, "a": 1})
    assert len({identity("fit", {"a": 1}), identity("fit", {"a": 2}), identity("hedge", {"a": 1})}) == 3


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\x00"])
def test_a_damaged_note_is_as_good_as_none(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    folder = RunFolder(tmp_path)
    assert (folder.about, folder.run_id, folder.finished, folder.members) == ({}, None, False, {})
    folder.note(finished=True)
    assert folder.finished
    assert json.loads((tmp_path / "run.json").read_text())["finished"] is True


def hold(path, ready, done):
    folder = RunFolder(path)
    folder.claim()
    ready.set()
    done.wait(20)


def test_two_processes_cannot_train_one_run(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(20)
    with pytest.raises(UserError, match="another process is training run"):
        RunFolder(tmp_path).claim()
    other.kill()
    other.join()
    folder = RunFolder(tmp_path)
    folder.claim()
    folder.release()
