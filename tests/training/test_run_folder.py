import json
import multiprocessing
import time

import pytest

from hedgelab.errors import UserError
from hedgelab.training.checkpoints import RunFolder
from hedgelab.training.checkpoints.folder import known_runs


def test_newest_run_comes_first(tmp_path):
    for name in "abc":
        RunFolder(tmp_path / name).note(run_id=name)
        time.sleep(0.01)
    (tmp_path / "no run").mkdir()
    assert [folder.run_id for folder in known_runs(tmp_path)] == ["c", "b", "a"]
    assert known_runs(tmp_path / "absent") == []
    assert [folder.run_id for folder in known_runs(tmp_path / "b")] == ["b"]


@pytest.mark.parametrize(
    ("about", "finished"),
    [
        ({"finished": True}, True),
        ({"finished": True, "cut": False, "config": {"trainer": {"max_time": "00:01:00:00"}}}, True),
        ({"finished": False, "cut": True}, False),
        ({"finished": True, "config": {"trainer": {"max_time": None}}}, True),
        ({"finished": True, "config": {"trainer": {"max_time": "00:01:00:00"}}}, False),  # 0.1.0 did not look
    ],
)
def test_a_run_that_max_time_cut_has_not_finished(tmp_path, about, finished):
    folder = RunFolder(tmp_path)
    folder.note(**about)
    assert folder.finished is finished


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
