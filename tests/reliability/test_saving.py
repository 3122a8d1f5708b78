"""Saving a selection, scores and patches when the process is killed, the disk is full or the folder cannot be written."""

import errno
import os
import resource
import signal
import tempfile
from pathlib import Path

import pytest

import alps_kernels as alps
from alps_kernels.tensors import files

from .models import optimizer_of, some_heads, tiny, train

pytestmark = pytest.mark.fault("All or nothing")
STAGES = ("mkstemp", "write", "half written", "fsync", "chmod", "replace", "replaced")


def saver(kind, which):
    """(suffix, a function that writes document number `which` of this kind)"""
    heads = alps.HeadSelection([(0, which)], [4, 4], provenance={"text": "x" * 5000 * (which + 1)})
    if kind == "heads":
        return ".json", heads.save
    scores = alps.HeadScores([float(which)] * 8, [0, 1], [4, 4], metric="pad", provenance={"text": "x" * 5000 * (which + 1)})
    return (".json" if kind == "scores as JSON" else ".safetensors"), scores.save


KINDS = ("heads", "scores as JSON", "scores as safetensors")


def in_a_child(action):
    """Run `action` in a forked process; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def dying_at(stage, monkeypatch=None):
    """From now on this process kills itself when a save reaches `stage`."""
    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def half(self, data):
        with open(self, "wb") as file:
            file.write(data[:len(data) // 2])
            file.flush()
        die()

    def replaced(*paths, real=os.replace):
        real(*paths)
        die()

    targets = {"mkstemp": (files.tempfile, "mkstemp", die), "write": (Path, "write_bytes", die),
               "half written": (Path, "write_bytes", half), "fsync": (os, "fsync", die), "chmod": (Path, "chmod", die),
               "replace": (os, "replace", die), "replaced": (os, "replace", replaced)}
    setattr(*targets[stage])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_killed_while_saving(kind, stage, tmp_path):
    """kill -9 at each stage of saving heads and scores: the old file or the new one, whole"""
    suffix, save_old = saver(kind, 0)
    _, save_new = saver(kind, 1)
    old, new, path = (tmp_path / f"{name}{suffix}" for name in ("old", "new", "it"))
    save_old(old)
    save_new(new)
    save_old(path)

    def action():
        dying_at(stage)
        save_new(path)

    status = in_a_child(action)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert path.read_bytes() == (new if stage == "replaced" else old).read_bytes()
    (alps.HeadSelection if kind == "heads" else alps.HeadScores).load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_disk_is_full(kind, tmp_path):
    """the file system takes no more bytes (RLIMIT_FSIZE): an OSError that names the file, the old file, nothing beside it"""
    suffix, save_old = saver(kind, 0)
    _, save_new = saver(kind, 1)
    path = tmp_path / f"it{suffix}"
    save_old(path)
    before = path.read_bytes()

    def action():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        try:
            save_new(path)
        except OSError as error:
            assert error.errno == errno.EFBIG and f"{path} cannot be written" in str(error)
            os._exit(42)

    assert os.waitstatus_to_exitcode(in_a_child(action)) == 42
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_cannot_be_written(kind):
    """a folder without write permission, as a user who is not root: an OSError that names the file, the old file"""
    suffix, save = saver(kind, 0)
    _, save_new = saver(kind, 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"it{suffix}"
        save(path)
        before = path.read_bytes()
        path.parent.chmod(0o555)

        def action():
            if os.getuid() == 0:
                os.setuid(65534)
            try:
                save_new(path)
            except PermissionError as error:
                assert f"{path} cannot be written" in str(error)
                os._exit(42)

        assert os.waitstatus_to_exitcode(in_a_child(action)) == 42
        path.parent.chmod(0o755)
        assert path.read_bytes() == before


@pytest.mark.parametrize("where, error", [("missing/it", FileNotFoundError), ("file/it", NotADirectoryError),
                                          ("folder", IsADirectoryError)])
@pytest.mark.parametrize("kind", KINDS)
def test_paths_that_cannot_be(kind, where, error, tmp_path):
    """a missing folder, a file for a folder, a folder for a file: an OSError that names the path, nothing written"""
    suffix, save = saver(kind, 0)
    (tmp_path / "file").write_text("x")
    (tmp_path / f"folder{suffix}").mkdir()
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(error, match=f"{where}{suffix} cannot be written"):
        save(tmp_path / f"{where}{suffix}")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_that_is_no_json(kind, tmp_path):
    """a provenance that JSON cannot say (NaN, an object): refused before the old file is touched"""
    suffix, save = saver(kind, 0)
    path = tmp_path / f"it{suffix}"
    save(path)
    before = path.read_bytes()
    for provenance in ({"x": float("nan")}, {"x": object()}):
        save.__self__.provenance = provenance
        with pytest.raises((ValueError, TypeError)):
            save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_patch_is_killed_while_saved(tmp_path):
    """kill -9 while a patch is written over another: one of the two, whole"""
    model = tiny()
    heads = some_heads(model)
    path = tmp_path / "p.safetensors"
    alps.save_patch(model, path, heads)
    old = path.read_bytes()
    train(model, optimizer_of(model, heads), 1)
    for stage in ("fsync", "replace", "replaced"):
        def action(stage=stage):
            dying_at(stage)
            alps.save_patch(model, path, heads)

        assert os.WTERMSIG(in_a_child(action)) == signal.SIGKILL
        assert (path.read_bytes() == old) == (stage != "replaced")
        alps.HeadPatch.load(path)
