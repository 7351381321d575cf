"""One writer at a time, also where the file system has no locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from latentprep.errors import DatasetError, LatentWarning
from latentprep.storage import locks
from latentprep.storage.atomic import locked
from latentprep.storage.locks import LOCK, Held, held


@contextmanager
def without_locks(code: int = errno.ENOLCK) -> Iterator[None]:
    def refuse(handle: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        patch.setattr(locks, "_said", [])
        yield


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_stands_for_the_lock_and_it_is_said_once(code: int, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with without_locks(code), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with locked(tmp_path), held(tmp_path / "other"):
            assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
            with pytest.raises(DatasetError, match=f"process {os.getpid()} on .*delete .*{LOCK}"), locked(tmp_path):
                pass
        assert not (tmp_path / LOCK).exists()
        with locked(tmp_path):
            pass
    assert [w.category for w in said] == [LatentWarning]
    assert f"the file system of {tmp_path} has no locks" in str(said[0].message)


def test_other_errors_are_not_taken_for_a_lack_of_locks(tmp_path: Path) -> None:
    with without_locks(errno.EIO), pytest.raises(OSError, match="Input/output"), held(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


@pytest.mark.filterwarnings("ignore::latentprep.errors.LatentWarning")
def test_what_a_dead_process_left_is_taken_over_and_what_cannot_be_judged_is_not(tmp_path: Path) -> None:
    script = "import os, sys; from latentprep.storage import locks; from pathlib import Path\n"
    script += "lock = locks._file_held(Path(sys.argv[1]), False); lock.__enter__(); os._exit(0)"
    subprocess.run([sys.executable, "-c", script, tmp_path / LOCK], check=True)
    left = json.loads((tmp_path / LOCK).read_text())
    with without_locks(), held(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    for changed in ({"host": "elsewhere"}, {"boot": "another"}, {"space": "pid:[1]"}):
        (tmp_path / LOCK).write_text(json.dumps(left | changed))
        with without_locks(), pytest.raises(Held, match="delete"), held(tmp_path):
            pass
    for text in ("", "no json", "[]", "{}", '{"process": "x"}'):
        (tmp_path / LOCK).write_text(text)
        with without_locks(), pytest.raises(Held, match="the process that created it"), held(tmp_path):
            pass
    mine = json.loads(json.dumps(left | {"process": os.getpid(), "begun": "1"}))  # our number, given out anew
    (tmp_path / LOCK).write_text(json.dumps(mine))
    with without_locks(), held(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_lock_file_counts_also_for_a_process_that_gets_a_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text('{"process": 1, "host": "elsewhere"}')
    with pytest.raises(Held, match="process 1 on elsewhere"), held(tmp_path):
        pass


@pytest.mark.filterwarnings("ignore::latentprep.errors.LatentWarning")
def test_waiting_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_PAUSE", 0.01)
    part, order = tmp_path / "a.part", []
    part.touch()

    def second() -> None:
        with held(part, wait=True):
            order.append("second")

    with without_locks():
        with held(part):
            assert (tmp_path / f"a.part{LOCK}").exists()
            thread = threading.Thread(target=second)
            thread.start()
            time.sleep(0.05)
            order.append("first")
        thread.join()
    assert order == ["first", "second"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.part"]


@pytest.mark.filterwarnings("ignore::latentprep.errors.LatentWarning")
def test_encode_fit_and_download_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import latentprep
    import latenttrain
    from latentprep.sources import named as datasets

    with without_locks():
        latentprep.encode("shapes", limit=20, codec="dct", size=64, out=tmp_path / "shards")
        for resume in (False, True):
            latenttrain.fit(tmp_path / "shards", epochs=1, width=0.25, out=tmp_path / "run", resume=resume)
        monkeypatch.setattr(datasets, "_transfer", lambda url, file, name, progress: file.write(b"x"))
        datasets.download("http://x/a", tmp_path / "a", "9dd4e461268c8034f5c8564e155c67a6")
    assert (tmp_path / "a").read_bytes() == b"x"
    assert not list(tmp_path.rglob(f"*{LOCK}*"))
