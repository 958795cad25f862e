"""One run at a time works in a results folder, and a run that was killed holds nobody up."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmattn.errors import InputError, StateError
from vlmattn.evals import lock as locks
from vlmattn.evals.journal import Journal
from vlmattn.evals.lock import Lock, refuse_if_used
from vlmattn.evals.processes import Processes

HOLD = """
import sys, time
from pathlib import Path
from vlmattn.evals.lock import Lock
from vlmattn.errors import VlmattnError
lock = Lock(Path(sys.argv[1]), int(sys.argv[2]))
try:
    lock.take()
except VlmattnError as error:
    print(error, flush=True)
    sys.exit(2)
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


def holder(folder, rank=0):
    """Another process that holds the folder until its input ends."""
    command = [sys.executable, "-c", HOLD, str(folder), str(rank)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_second_run_is_refused_by_the_name_of_the_first(tmp_path):
    other = holder(tmp_path)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(StateError) as refused:
        Journal(tmp_path, {}, Processes())
    for words in (f"process {other.pid} on {socket.gethostname()} since {time.strftime('%Y-')}", "--out"):
        assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {"lock-0.json"}, "nothing was touched"
    other.communicate("")
    Journal(tmp_path, {}, Processes()).__exit__(None, None, None)


@pytest.mark.parametrize("after", [0, 1])
def test_a_run_that_was_killed_is_taken_over(tmp_path, after):
    other = holder(tmp_path, rank=after)
    assert other.stdout.readline() == "held\n"
    other.send_signal(signal.SIGKILL)
    other.communicate()
    assert (tmp_path / f"lock-{after}.json").exists()
    with Journal(tmp_path, {}, Processes()):
        assert json.loads((tmp_path / "lock-0.json").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.glob("lock-*"))


def test_a_process_that_outlived_the_first_one_of_its_run_is_waited_for(tmp_path):
    other = holder(tmp_path, rank=3)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(StateError, match=f"process {other.pid}"):
        Journal(tmp_path, {}, Processes())
    other.communicate("")
    Journal(tmp_path, {}, Processes()).__exit__(None, None, None)


@pytest.mark.parametrize("end", [KeyboardInterrupt, ValueError, SystemExit])
def test_the_folder_is_free_after_any_end(tmp_path, end):
    def run():
        with Journal(tmp_path, {"a": 1}, Processes()):
            with pytest.raises(StateError, match="in use"):
                Journal(tmp_path, {"a": 1}, Processes(), restart=True)
            raise end

    with pytest.raises(end):
        run()
    with pytest.raises(StateError, match="other settings"):
        Journal(tmp_path, {"a": 2}, Processes())
    refuse_if_used(tmp_path)
    assert not list(tmp_path.glob("lock-*"))


def test_only_one_of_many_that_start_at_once_begins(tmp_path):
    for _ in range(2):
        started = [holder(tmp_path) for _ in range(4)]
        said = [other.stdout.readline() for other in started]
        assert said.count("held\n") == 1
        assert sum("in use by" in line for line in said) == 3
        for other in started:
            other.communicate("")
        assert not list(tmp_path.glob("lock-*"))


def test_the_lock_of_another_host_is_never_taken_over(tmp_path):
    (tmp_path / "lock-0.json").write_text(json.dumps({"pid": 7, "host": "elsewhere", "since": "yesterday"}))
    with pytest.raises(StateError, match=r"process 7 on elsewhere since yesterday.*delete .*lock-0\.json"):
        Lock(tmp_path).take()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"pid": "x"', b"\xff\x00" * 3000])
def test_a_lock_file_that_says_nothing_is_taken_over(tmp_path, content):
    (tmp_path / "lock-0.json").write_bytes(content)
    Lock(tmp_path).take()


def test_without_locks_of_the_system_the_process_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_locks", None)
    mine = Lock(tmp_path)
    mine.take()
    with pytest.raises(StateError, match=f"process {os.getpid()}"):
        Lock(tmp_path).take()
    mine.release()
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / "lock-0.json").write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname(), "since": ""}))
    Lock(tmp_path).take()


def test_what_cannot_hold_a_lock_is_an_error_of_one_line(tmp_path):
    (tmp_path / "lock-0.json").mkdir()
    with pytest.raises(InputError, match=r"cannot lock .*lock-0\.json: Is a directory"):
        Journal(tmp_path, {}, Processes())
    (tmp_path / "lock-0.json").rmdir()
    os.mkfifo(tmp_path / "lock-0.json")
    with pytest.raises(InputError, match="not a regular file"):
        Journal(tmp_path, {}, Processes())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot use .*file: File exists"):
        Journal(tmp_path / "file", {}, Processes())


def test_the_command_is_refused_before_a_model_is_loaded(run, tmp_path):
    with Journal(tmp_path, {}, Processes()):
        code, _, said = run("eval", "--out", str(tmp_path), "--model", "/no/such/model", "--scenes", "2")
    assert code == 2
    assert f"{tmp_path} is in use by process {os.getpid()}" in said


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=25))
def test_whatever_the_order_at_most_one_holds(tmp_path_factory, moves):
    folder = tmp_path_factory.mktemp("lock")
    ours, held = [Lock(folder) for _ in range(4)], None
    for who, takes in moves:
        if takes and held is None:
            ours[who].take()
            held = who
        elif takes and held != who:
            with pytest.raises(StateError):
                ours[who].take()
        elif not takes:
            ours[who].release()
            held = None if held == who else held
        assert (folder / "lock-0.json").exists() == (held is not None)
    for lock in ours:
        lock.release()
