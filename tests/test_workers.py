"""The processes of benchmarks."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

PARENT = "import sys; from benchmarks.searches import side_by_side; side_by_side(exec, [(sys.argv[1],)], 1, 'nap')"
JOB = "import os, pathlib, time; pathlib.Path({!r}).write_text(str(os.getpid())); time.sleep(100)"


def ended(pid: int) -> bool:
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc")
def test_workers_end_with_the_process_that_began_them(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    process = subprocess.Popen([sys.executable, "-c", PARENT, JOB.format(str(file))])
    try:
        wait_for(lambda: file.is_file() and file.read_text() != "")
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: ended(int(file.read_text())))
