"""Files that are whole or absent, and where caches lie."""

import os
import threading
from pathlib import Path

import pytest

from hybridnas import files
from hybridnas.data import source_config
from hybridnas.files import cache_home, write_atomic, write_text


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "one")
    write_text(tmp_path / "a" / "b.txt", "two")
    assert (tmp_path / "a" / "b.txt").read_text() == "two"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / "x", "old")
    monkeypatch.setattr(files.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        write_text(tmp_path / "x", "new")
    monkeypatch.undo()
    assert (tmp_path / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no umask")
def test_writing_never_changes_the_umask_of_other_threads(tmp_path):
    before = os.umask(0o022)
    os.umask(before)
    seen, done = set(), threading.Event()

    def watch():
        while not done.is_set():
            path = tmp_path / "watched"
            path.touch(mode=0o666)
            seen.add(path.stat().st_mode & 0o777)
            path.unlink()

    thread = threading.Thread(target=watch)
    thread.start()
    for number in range(200):
        write_atomic(tmp_path / "written", str(number).encode())
    done.set()
    thread.join()
    assert seen == {0o666 & ~before}
    assert (tmp_path / "written").stat().st_mode & 0o777 == 0o666 & ~before


def test_all_caches_follow_one_rule(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDNAS_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_home() == source_config({"kind": "stdlib"}).cache == tmp_path / "own"
    monkeypatch.delenv("HYBRIDNAS_CACHE")
    assert cache_home() == source_config({"kind": "stdlib"}).cache == tmp_path / "xdg" / "hybridnas"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_home() == Path(tmp_path, ".cache", "hybridnas")
    assert source_config({"kind": "stdlib", "cache_dir": str(tmp_path / "given")}).cache == tmp_path / "given"
