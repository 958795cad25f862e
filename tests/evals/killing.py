"""Kills a run in two processes twice, and compares what it comes to with a run in one process that nobody disturbs.

python tests/evals/killing.py --questions 10000 --out runs/killed
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_COMMAND = ["-m", "vlmattn.cli", "eval", "--suite", "pope", "--presets", "none,pai", "--visibility", "faint"]


def kill_and_compare(folder: Path, questions: int, batch: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the killed run and the undisturbed one have written, timings apart.

    After about a quarter of the batches one rank is killed, after half of them the launcher with all ranks.
    """
    scenes = round(questions / 9.17)  # questions on a scene, those that splits share counted once
    options = [*_COMMAND, "--scenes", str(scenes), "--batch-size", str(batch), "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    quiet: dict[str, Any] = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    batches = 2 * questions / batch  # with and without a preset, about
    done = 0
    for attempt in (1, 2):
        running = subprocess.Popen([*launcher, *options, str(folder / "killed")], start_new_session=True, **quiet)
        while (now := written(folder / "killed")) < attempt * batches / 4 and running.poll() is None:
            time.sleep(0.05)
        if attempt == 1:
            os.kill(ranks_of(running.pid)[-1], signal.SIGKILL)
        else:
            ranks = ranks_of(running.pid)
            os.kill(running.pid, signal.SIGKILL)  # its ranks have sessions of their own
            for rank in ranks:
                os.kill(rank, signal.SIGKILL)
        running.wait(timeout=600)
        parts = [keys(path) for path in sorted((folder / "killed").glob("journal-*.jsonl"))]
        assert len(parts) == 2, "both processes must have written"
        assert not parts[0] & parts[1], "no batch may be asked twice"
        done = written(folder / "killed")
        print(f"killed after {now} batches, {done} are kept", flush=True)
    for name, command in (("killed", [*launcher, *options]), ("whole", [sys.executable, *options])):
        begun = time.monotonic()
        subprocess.run([*command, str(folder / name)], env=environment, capture_output=True, text=True, check=True)
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)
    assert 0 < done < written(folder / "whole"), "it must have been killed in the middle"
    return outcome(folder / "killed"), outcome(folder / "whole")


def written(folder: Path) -> int:
    """Batches in the journals of a run."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("journal*.jsonl") if path.exists())


def keys(path: Path) -> set[tuple[str, str, int]]:
    """The batches of one journal; a last line may be cut off."""
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    return {(line["suite"], line["preset"], line["number"]) for line in lines}


def ranks_of(launcher: int) -> list[int]:
    """Processes that the launcher started."""
    return [int(word) for word in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def outcome(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "answers": (folder / "answers.jsonl").read_text(),
        **{name: summary[name] for name in ("tables", "overall", "reports", "weights", "skipped")},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    first, second = kill_and_compare(given.out, given.questions, given.batch_size)
    lines = first["answers"].count("\n")
    print(f"{lines // 2} questions, {lines} answers: {'equal' if first == second else 'DIFFERENT'}")
    sys.exit(first != second)
