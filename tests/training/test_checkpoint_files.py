"""Checkpoints on disk: whole or not there; what is torn, foreign or hostile is told from what is whole."""

import os
import pickle
import resource
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgelab.errors import UserError
from hedgelab.training.checkpoints import LAST, PREVIOUS, VerifiedCheckpointIO, newest_whole
from hedgelab.training.checkpoints.files import NEXT, fault, promote, write_atomically

IO = VerifiedCheckpointIO()


def checkpoint(step=7):
    weights = {"W_dec": torch.arange(3000.0), "b_dec": torch.ones(5)}
    return {"state_dict": weights, "global_step": step, "loops": {}, "epoch": 0, "pytorch-lightning_version": "2.6.6"}


def save(folder, step):
    IO.save_checkpoint(checkpoint(step), folder / NEXT)
    promote(folder)


def step_in(path):
    return IO.load_checkpoint(path)["global_step"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "whole.ckpt"
    IO.save_checkpoint(checkpoint(), path)
    return path.read_bytes()


def test_reads_what_it_wrote(tmp_path):
    path = tmp_path / "new" / "a.ckpt"
    IO.save_checkpoint(checkpoint(), path)
    assert fault(path) is None
    assert torch.equal(IO.load_checkpoint(path)["state_dict"]["W_dec"], torch.arange(3000.0))
    assert [entry.name for entry in path.parent.iterdir()] == ["a.ckpt"]


@given(share=st.floats(0, 0.9999))
@settings(max_examples=60, deadline=None)
def test_every_cut_is_noticed(whole, tmp_path_factory, share):
    path = tmp_path_factory.getbasetemp() / "cut.ckpt"
    path.write_bytes(whole[: int(share * len(whole))])
    assert fault(path)
    with pytest.raises(UserError, match=r"ckpt_path: cannot use .*cut\.ckpt"):
        IO.load_checkpoint(path)


@given(at=st.floats(0, 0.9999), mask=st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_a_flipped_byte_is_noticed_or_changes_nothing(whole, tmp_path_factory, at, mask):
    path = tmp_path_factory.getbasetemp() / "flipped.ckpt"
    position = int(at * len(whole))
    path.write_bytes(whole[:position] + bytes([whole[position] ^ mask]) + whole[position + 1 :])
    try:
        read = IO.load_checkpoint(path)
    except UserError:
        return
    assert torch.equal(read["state_dict"]["W_dec"], torch.arange(3000.0))
    assert torch.equal(read["state_dict"]["b_dec"], torch.ones(5))
    assert read["global_step"] == 7


def test_a_hole_in_the_middle_is_noticed(whole, tmp_path):
    path = tmp_path / "hole.ckpt"
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(512) + whole[middle + 512 :])
    assert fault(path)


def test_two_newest_are_kept(tmp_path):
    for step in range(1, 5):
        save(tmp_path, step)
    assert {path.name: step_in(path) for path in tmp_path.iterdir()} == {LAST: 4, PREVIOUS: 3}


def test_torn_last_is_reported_and_the_one_before_it_used(tmp_path, caplog):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:-300])
    assert step_in(newest_whole(tmp_path)) == 1
    assert len(caplog.messages) == 1
    assert "last.ckpt is damaged" in caplog.messages[0]
    (tmp_path / PREVIOUS).write_bytes(b"")
    assert newest_whole(tmp_path) is None
    assert len(caplog.messages) == 3


@pytest.mark.parametrize("moment", [1, 2])
def test_promotion_never_leaves_the_folder_without_a_whole_checkpoint(tmp_path, monkeypatch, moment):
    save(tmp_path, 1)
    IO.save_checkpoint(checkpoint(2), tmp_path / NEXT)
    calls, replace = [], type(tmp_path).replace

    def killed(*args):
        calls.append(args)
        if len(calls) == moment:
            raise KeyboardInterrupt
        return replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            promote(tmp_path)
    assert step_in(newest_whole(tmp_path)) == 1
    save(tmp_path, 3)
    assert step_in(newest_whole(tmp_path)) == 3


def test_a_disk_that_takes_no_more_costs_the_new_file_only(tmp_path):
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            IO.save_checkpoint(checkpoint(2), tmp_path / NEXT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: step_in(path) for path in tmp_path.iterdir()} == {LAST: 1}


def test_what_fails_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def write(file):
        file.write(b"half")
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


class Bomb:
    """Unpickling it runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("where", ["top", "callbacks", "optimizer_states", "hyper_parameters"])
def test_a_hostile_checkpoint_executes_nothing(tmp_path, where):
    proof = tmp_path / "executed"
    bomb = Bomb(f"touch {proof}")
    content = bomb if where == "top" else {**checkpoint(), where: {"x": [bomb]}}
    torch.save(content, tmp_path / "hostile.ckpt")
    with pytest.raises(UserError, match=r"ckpt_path: .*hostile\.ckpt.*refused"):
        IO.load_checkpoint(tmp_path / "hostile.ckpt", weights_only=False)
    assert not proof.exists()


def test_a_bare_pickle_executes_nothing(tmp_path):
    proof = tmp_path / "executed"
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(Bomb(f"touch {proof}")))
    with pytest.raises(UserError, match="ckpt_path: cannot use"):
        IO.load_checkpoint(tmp_path / "bare.ckpt")
    assert not proof.exists()


def test_an_archive_that_unpacks_without_end_is_not_unpacked(tmp_path):
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    assert "compressed" in fault(path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    torch.save({"weights": torch.ones(2)}, tmp_path / "weights.ckpt")
    with pytest.raises(UserError, match="is no checkpoint of a fit"):
        IO.load_checkpoint(tmp_path / "weights.ckpt")
    torch.save(torch.ones(2), tmp_path / "tensor.ckpt")
    with pytest.raises(UserError, match="is no checkpoint of a fit"):
        IO.load_checkpoint(tmp_path / "tensor.ckpt")
