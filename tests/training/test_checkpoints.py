"""Folders and files that are whole or not there, and the proof of it."""

import io
import os
import random
import subprocess

import numpy as np
import pytest
import torch

from gspo.training.checkpoints import checkpoints_in, newest_whole, random_states, set_random_states
from gspo.training.whole_folders import (
    CHECKSUMS,
    CannotSave,
    damage,
    drop_files,
    listed,
    recover,
    remove,
    whole_folder,
    write_whole,
)


def write(target, text):
    with whole_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text(text)
        (folder / "tokenizer").write_text("last in SHA256SUMS")


def test_folders_are_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "best_model"
    write(target, "first")
    for error in (OSError(28, "No space left on device"), RuntimeError("writer failed")):
        with pytest.raises(CannotSave, match="cannot write .*best_model: "), whole_folder(target) as folder:
            (folder / "half").write_text("half")
            raise error
        assert (target / "sub" / "weights").read_text() == "first"
        assert list(tmp_path.iterdir()) == [target]
    write(target, "second")
    assert (target / "sub" / "weights").read_text() == "second" and damage(target, "sub/weights") is None
    assert list(tmp_path.iterdir()) == [target]
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=target, check=True)


def test_an_error_of_the_program_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(KeyError), whole_folder(tmp_path / "x"):
        raise KeyError("a bug")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", ["old and new", "old alone", "new alone"])
def test_a_kill_between_two_renames_loses_nothing(tmp_path, kept):
    write(tmp_path / "old", "old")
    write(tmp_path / "new", "new")
    if kept != "new alone":
        (tmp_path / "old").rename(tmp_path / "model.previous")
    (tmp_path / "new").rename(tmp_path / ("model.partial" if kept == "old alone" else "model"))
    (tmp_path / "config.json.partial").write_text("{")
    recover(tmp_path)
    expected = "old" if kept == "old alone" else "new"
    assert (tmp_path / "model" / "sub" / "weights").read_text() == expected
    assert {path.name for path in tmp_path.iterdir()} - {"old"} == {"model"}


@pytest.mark.parametrize(
    "harm",
    ["flip a bit", "cut short", "remove", "no sums", "empty sums", "binary sums", "cut sums", "not listed"],
)
def test_damage_is_seen(tmp_path, harm, monkeypatch, capsys):
    folder = tmp_path / "checkpoints" / "step-2"
    for step in (1, 2):
        write(folder.with_name(f"step-{step}"), "weights")
    weights, sums = folder / "sub" / "weights", folder / "SHA256SUMS"
    if harm == "flip a bit":
        weights.write_text("weightr")
    elif harm == "cut short":
        os.truncate(weights, 3)
    elif harm == "remove":
        weights.unlink()
    elif harm == "no sums":
        sums.unlink()
    elif harm == "not listed":  # by whoever wrote the sums again
        sums.write_text("# 0 files\n")
    else:
        cut = sums.read_bytes().splitlines(keepends=True)[:-1]
        sums.write_bytes({"empty sums": b"", "binary sums": b"\xff\x00", "cut sums": b"".join(cut)}[harm])
    monkeypatch.setattr("gspo.training.checkpoints.STATE_FILE", "sub/weights")
    found = newest_whole(checkpoints_in(tmp_path))
    (refused,) = capsys.readouterr().err.splitlines()
    assert found.name == "step-1" and "step-2 is not used" in refused


def test_what_lies_in_the_way_is_no_checkpoint_and_does_no_harm(tmp_path):
    """Files, and links of a user who keeps a checkpoint elsewhere."""
    target, elsewhere = tmp_path / "checkpoints" / "step-3", tmp_path / "elsewhere"
    write(elsewhere, "kept")
    write(target.with_name("step-2"), "weights")
    target.write_text("no folder")
    target.with_name("step-1").symlink_to(elsewhere)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-1", "step-2"]
    write(target, "weights")
    recover(target.parent)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-1", "step-2", "step-3"]
    for path in checkpoints_in(tmp_path):
        remove(path)
    remove(target)
    assert list(target.parent.iterdir()) == [] and (elsewhere / "sub" / "weights").read_text() == "kept"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_mode_that_the_umask_asks_for(tmp_path, umask):
    """Some libraries write weights for the owner alone, whatever the umask is."""
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "model") as folder:
            (folder / "sub").mkdir()
            os.close(os.open(folder / "sub" / "weights", os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    for name in ("sub/weights", "SHA256SUMS"):
        assert (tmp_path / "model" / name).stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_text_file_is_replaced_whole(tmp_path, monkeypatch):
    write_whole(tmp_path / "config.json", "first")
    full = OSError(28, "No space left")
    monkeypatch.setattr("gspo.training.whole_folders.sync", lambda _: (_ for _ in ()).throw(full))
    with pytest.raises(CannotSave, match="No space left"):
        write_whole(tmp_path / "config.json", "second")
    assert (tmp_path / "config.json").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def write_model(target, weights, others=()):
    with whole_folder(target, others) as folder:
        (folder / "model.safetensors").write_text(weights)
        (folder / "tokenizer.json").write_text("the same everywhere")


def test_equal_weights_are_one_file(tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    files = [folder / "model.safetensors" for folder in folders]
    write_model(folders[0], "first")
    write_model(folders[1], "second", folders[:1])
    assert not files[0].samefile(files[1])
    files[1].write_text("damaged")
    write_model(folders[2], "second", folders[:2])
    assert files[1].samefile(files[2]) and not files[0].samefile(files[2])
    assert not (folders[1] / "tokenizer.json").samefile(folders[2] / "tokenizer.json")
    assert [damage(folder, "model.safetensors") for folder in folders] == [None] * 3  # one was mended
    remove(folders[2])
    write_model(folders[1], "third", folders)  # its old file is in the folder that gives way
    assert files[1].read_text() == "third" and damage(folders[1], "model.safetensors") is None
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("no links on this disk")))
    write_model(folders[2], "third", folders)
    assert files[2].read_text() == "third" and not files[1].samefile(files[2])
    assert sorted(path.name for path in folders[2].iterdir()) == [
        CHECKSUMS,
        "model.safetensors",
        "tokenizer.json",
    ]


def test_a_file_is_dropped_and_the_folder_stays_whole(tmp_path, monkeypatch):
    """Also if a kill comes between the list and the file."""
    folder = tmp_path / "step-1"
    write_model(folder, "weights")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: 1 / 0)
        drop_files(folder, ["tokenizer.json"])
    for left in (True, False):
        assert (folder / "tokenizer.json").exists() == left and "tokenizer.json" not in listed(folder)
        assert damage(folder, "model.safetensors") is None
        drop_files(folder, ["tokenizer.json"])


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_random_states_come_back_from_a_file_without_pickled_code():
    random.gauss(0, 1)
    np.random.randn()  # leaves the second of a pair in the state
    file = io.BytesIO()
    torch.save(random_states(), file)
    expected = draws(), random.gauss(0, 1), np.random.randn()
    draws()
    set_random_states(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert (draws(), random.gauss(0, 1), np.random.randn()) == expected
