"""Checkpoints: what is written, what survives, what is refused."""

import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from training_cases import in_child

from training import CheckpointError, CheckpointFolder, DiskError, LockedError, RunLock, load_plain, to_plain


def content(step, size=2000):
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"w": torch.randn(size, generator=generator)},
        "losses": [(1, 0.5)],
        "config": {"a": (1, "b", None)},
    }


def same(found, step):
    assert found.step == step and found.content["step"] == step
    assert torch.equal(found.content["model"]["w"], content(step)["model"]["w"])
    return True


def saved(folder, steps, **options):
    checkpoints = CheckpointFolder(folder, **options)
    for step in steps:
        checkpoints.save(content(step), step)
    return checkpoints


def quietly_read(checkpoints):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = checkpoints.read()
    return found, [str(w.message) for w in caught]


# -- what is written ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_with_an_empty_allow_list(tmp_path):
    checkpoints = saved(tmp_path / "c", [7])
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step_00000007.json", "step_00000007.pt"]
    allowed = torch.serialization.get_safe_globals()
    plain = load_plain(checkpoints.path(7))
    assert set(torch.serialization.get_safe_globals()) == set(allowed)  # the list was emptied and is itself again
    assert plain["config"] == {"a": (1, "b", None)} and plain["losses"] == [(1, 0.5)]
    assert same(checkpoints.read(), 7) and same(checkpoints.read(7), 7)
    assert CheckpointFolder(tmp_path / "nothing").read() is None


def test_values_become_plain():
    value = {
        "n": np.int64(3),
        "x": np.float32(0.5),
        "flag": np.bool_(True),
        "path": Path("a/b"),
        "config": ConfigDict({"k": {"l": (1, 2)}}),
        "view": torch.arange(1000)[:3],
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    plain = to_plain(value)
    assert plain["n"] == 3 and type(plain["n"]) is int
    assert plain["x"] == 0.5 and type(plain["x"]) is float
    assert plain["flag"] is True and plain["path"] == "a/b"
    assert plain["config"] == {"k": {"l": (1, 2)}} and type(plain["config"]["k"]) is dict
    assert plain["view"].untyped_storage().nbytes() == 24
    assert type(plain["parameter"]) is torch.Tensor and not plain["parameter"].requires_grad
    for bad in (np.zeros(2), object(), {1, 2}, b"x"):
        with pytest.raises(TypeError, match=type(bad).__name__):
            to_plain({"x": [bad]})


def test_old_checkpoints_go_and_the_best_and_every_nth_stay(tmp_path):
    checkpoints = CheckpointFolder(tmp_path, keep=2, keep_every=4)
    for step, metric in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 5.0), (5, float("nan")), (6, 4.0), (7, None)):
        checkpoints.save(content(step, 10), step, metric=metric)
    assert checkpoints.steps() == [7, 6, 4, 2]
    assert checkpoints.best_step() == 2
    assert sorted(int(p.stem[5:]) for p in tmp_path.glob("*.pt")) == [2, 4, 6, 7]


# -- damage -------------------------------------------------------------------------------------------------------------


def damage_is_noticed(tmp_path, harm, times):
    """Damages the newest of two checkpoints again and again; the older must be used each time, with a warning."""
    checkpoints = saved(tmp_path / "c", [1, 2])
    path = checkpoints.path(2)
    good = path.read_bytes()
    rng = random.Random(0)
    for _ in range(times):
        bad = harm(bytearray(good), rng)
        assert bad != good
        path.write_bytes(bad)
        found, messages = quietly_read(checkpoints)
        assert same(found, 1)
        assert any(str(path) in m and ("SHA-256" in m or "bytes" in m) for m in messages)
    path.write_bytes(good)
    assert same(checkpoints.read(), 2)


def cut(data, rng):
    return bytes(data[: rng.randrange(len(data))])


def flip(data, rng):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def zero_page(data, rng):
    while True:
        start = rng.randrange(0, len(data), 4096)
        if any(data[start : start + 4096]):
            data[start : start + 4096] = bytes(len(data[start : start + 4096]))
            return bytes(data)


HARMS = {"cut": (cut, 200), "flip": (flip, 200), "zero_page": (zero_page, 50)}


@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_noticed(tmp_path, harm):
    function, times = HARMS[harm]
    damage_is_noticed(tmp_path, function, times)


@pytest.mark.parametrize("case", ["no manifest", "no file", "empty", "folder", "future", "garbled", "other step"])
def test_a_broken_pair_falls_back_to_the_older(tmp_path, case):
    checkpoints = saved(tmp_path / "c", [1, 2])
    path, manifest = checkpoints.path(2), checkpoints.path(2).with_suffix(".json")
    expected = 1
    match case:
        case "no manifest":
            manifest.unlink()
        case "no file":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "folder":
            path.unlink()
            path.mkdir()
        case "future":
            shutil.copy(path, checkpoints.path(99))
            text = json.loads(manifest.read_text()) | {"step": 99, "sha256": "0" * 64}
            checkpoints.path(99).with_suffix(".json").write_text(json.dumps(text))
            expected = 2
        case "garbled":
            manifest.write_text("[" * 50_000)
        case "other step":
            text = json.loads(manifest.read_text()) | {"step": 1}
            manifest.write_text(json.dumps(text))
    found, messages = quietly_read(checkpoints)
    assert same(found, expected)
    assert case == "no manifest" or messages
    checkpoints.save(content(100), 100)
    assert same(checkpoints.read(), 100)


def test_where_nothing_is_usable_the_error_names_every_file(tmp_path):
    checkpoints = saved(tmp_path / "c", [1, 2])
    for step in (1, 2):
        checkpoints.path(step).write_bytes(b"x")
    with warnings.catch_warnings(action="error"), pytest.raises(CheckpointError) as caught:
        checkpoints.read()  # no warning of a checkpoint that is not used
    assert all(checkpoints.path(step).name in str(caught.value) for step in (1, 2))
    assert caught.value.exit_code == 5


def test_a_whole_file_without_a_manifest_is_used_if_there_is_nothing_else(tmp_path):
    checkpoints = saved(tmp_path / "c", [3])
    checkpoints.path(3).with_suffix(".json").unlink()
    with pytest.warns(UserWarning, match="no manifest"):
        assert same(checkpoints.read(), 3)
    data = bytearray(checkpoints.path(3).read_bytes())
    data[len(data) // 2] ^= 1
    checkpoints.path(3).write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged|whole"):
        checkpoints.read()


# -- crashes ------------------------------------------------------------------------------------------------------------

STAGES = (
    "before",
    "writing",
    "written",
    "synced",
    "file in place",
    "manifest writing",
    "manifest written",
    "manifest synced",
    "manifest in place",
    "folder synced",
    "pruning",
    "after",
)


def test_every_stage_is_passed(tmp_path):
    seen = []
    saved(tmp_path, [1, 2], keep=1, stage=seen.append)
    assert set(seen) == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_a_crash_in_a_save_loses_at_most_that_save(tmp_path, stage):
    """`os._exit` at a named point of the third save, the first and (where there are many) the last time it is reached."""
    for last in (False, True):
        folder = tmp_path / str(last)
        saved(folder, [1, 2], keep=2)
        seen = []
        saved(tmp_path / f"trial{last}", [1, 2], keep=2)
        CheckpointFolder(tmp_path / f"trial{last}", keep=2, stage=seen.append).save(content(3), 3)
        at = len(seen) - 1 - seen[::-1].index(stage) if last else seen.index(stage)

        def crash(folder=folder, at=at):
            count = iter(range(10**6))
            CheckpointFolder(folder, keep=2, stage=lambda name: os._exit(9) if next(count) == at else None).save(
                content(3), 3
            )

        assert in_child(crash) == 9
        checkpoints = CheckpointFolder(folder, keep=2)
        done = STAGES.index(stage) >= STAGES.index("manifest in place")
        assert same(quietly_read(checkpoints)[0], 3 if done else 2)
        checkpoints.save(content(4), 4)
        assert same(checkpoints.read(), 4)
        assert checkpoints.steps() == [4, 3 if done else 2]
        assert not list(folder.glob(".partial-*"))
        assert len(list(folder.glob("*.pt"))) == 2


def test_an_error_while_writing_leaves_no_partial_file(tmp_path):
    checkpoints = saved(tmp_path, [1])

    def full(name):
        if name == "writing":
            raise OSError(28, "No space left on device")

    checkpoints.stage = full
    with pytest.raises(DiskError, match="No space left") as caught:
        checkpoints.save(content(2), 2)
    assert caught.value.needed > 8000 and caught.value.free > 0 and f"{caught.value.needed:,}" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001.json", "step_00000001.pt"]
    checkpoints.stage = lambda name: None
    checkpoints.save(content(2), 2)
    assert same(checkpoints.read(), 2)


def test_a_full_disk(tmp_path):
    """The real thing, as far as a test may: the process may not write files of more than 64 KiB."""
    saved(tmp_path, [1])

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
        try:
            CheckpointFolder(tmp_path).save(content(2, 10**6), 2)
        except DiskError as error:
            assert error.needed > 4 * 10**6 and "too large" in str(error), str(error)
            raise

    assert in_child(work) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001.json", "step_00000001.pt"]
    assert same(CheckpointFolder(tmp_path).read(), 1)


# -- strangers ----------------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def deep(path, depth):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".")
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


def bomb(path):
    buffer = io.BytesIO()
    torch.save({"format": 1, "step": 1, "w": torch.zeros(10**6)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))


def test_nothing_in_a_file_is_executed_or_larger_than_it_looks(tmp_path):
    canary = tmp_path / "canary"
    evil = {"format": 1, "step": 1, "x": Evil(canary)}
    torch.save(evil, tmp_path / "zip")
    torch.save(evil, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    (tmp_path / "raw").write_bytes(pickle.dumps(evil))
    bomb(tmp_path / "bomb")
    torch.save({"format": 1, "step": 1, "x": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "giant")
    (tmp_path / "text").write_text("hello")
    reasons = {
        "zip": "system",
        "legacy": "archive",
        "raw": "archive",
        "bomb": "compressed",
        "giant": "larger",
        "text": "archive",
    }
    for name, reason in reasons.items():
        with pytest.raises(CheckpointError, match=f"{name}: .*{reason}"):
            load_plain(tmp_path / name)
    assert not canary.exists()


@pytest.mark.parametrize(("kind", "reason"), [("code", "system"), ("deep", "does not hold")])
def test_a_strangers_file_with_a_right_manifest_is_still_refused(tmp_path, kind, reason):
    import hashlib

    checkpoints = CheckpointFolder(tmp_path)
    if kind == "deep":
        deep(checkpoints.path(1), 100_000)
    else:
        torch.save({"format": 1, "step": 1, "x": Evil(tmp_path / "canary")}, checkpoints.path(1))
    data = checkpoints.path(1).read_bytes()
    manifest = {"format": 1, "step": 1, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    checkpoints.path(1).with_suffix(".json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=reason):
        checkpoints.read()
    assert not (tmp_path / "canary").exists()


# -- the lock -----------------------------------------------------------------------------------------------------------


def test_the_lock_of_a_living_process_names_it(tmp_path):
    with RunLock(tmp_path):

        def second():
            with RunLock(tmp_path):
                pass

        assert in_child(second) == 5
        with pytest.raises(LockedError, match=f"process {os.getpid()} on "), RunLock(tmp_path):
            pass
    with RunLock(tmp_path):
        pass
    assert not (tmp_path / "run.lock").exists()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    def die():
        RunLock(tmp_path).__enter__()
        os._exit(9)

    assert in_child(die) == 9
    assert (tmp_path / "run.lock").exists()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_a_folder_that_cannot_be_used_is_an_error_of_the_disk(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="run folder") as caught, RunLock(tmp_path / "file"):
        pass
    assert caught.value.exit_code == 5
