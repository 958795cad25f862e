"""What the tests of the lmms-eval integration share: small tasks, and runs of the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from vlmattn.evals.suites import PQA, Pope, World
from vlmattn.lmms_eval import __path__ as package

TASKS = Path(package[0]) / "tasks"
FAINT, CLEAR = World("faint", count=6), World("clear", count=4)
NAMES = {"small_pope": Pope.on_scenes([FAINT]), "small_pqa": PQA.on_scenes(CLEAR)}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def write_tasks(folder: Path) -> Path:
    """Our tasks on few scenes, by files that include the packaged ones."""
    for name, base, world in (
        ("small_pope", "vlmattn_pope_embedded", '{"visibility": "faint", "count": 6}'),
        ("small_pqa", "vlmattn_pqa", '{"visibility": "clear", "count": 4}'),
    ):
        (folder / f"{name}.yaml").write_text(
            f"include: {TASKS / base}.yaml\ntask: {name}\n"
            f"dataset_kwargs: {{suite: {name.removeprefix('small_')}, worlds: [{world}]}}\n"
        )
    return folder


def start(tasks: Path, out: Path, preset: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """The command of the documentation, with batches of four. DEBUG makes lmms-eval exit with an error if there is one."""
    command = [sys.executable, *launcher, "-m", "lmms_eval", "--model", "vlmattn", "--batch_size", "4"]
    command += ["--model_args", f"pretrained=embedded,preset={preset}", "--tasks", ",".join(NAMES)]
    command += ["--include_path", str(tasks), "--log_samples", "--output_path", str(out), "--verbosity", "DEBUG"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        command, cwd=tasks, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def outcome(running: subprocess.Popen[str], out: Path) -> dict[str, Any]:
    """Figures and answers of a run, by task, and what it printed."""
    printed, _ = running.communicate(timeout=300)
    assert running.returncode == 0, printed[-3000:]
    (results,) = out.rglob("*_results.json")
    found = json.loads(results.read_text())
    answers = {
        name: [
            json.loads(line) for path in out.rglob(f"*_samples_{name}.jsonl") for line in path.read_text().splitlines()
        ]
        for name in NAMES
    }
    return {
        "figures": {name: figures(found["results"][name]) for name in NAMES},
        "answers": {name: {line["score"]["id"]: line["filtered_resps"] for line in answers[name]} for name in NAMES},
        "errors": {name: found["results"][name]["score_stderr_clustered,none"] for name in NAMES},
        "printed": printed,
    }


def figures(results: dict[str, Any]) -> dict[str, float]:
    """Metrics by name, without what lmms-eval adds to them."""
    return {
        key.removesuffix(",none"): value
        for key, value in results.items()
        if key.endswith(",none") and "_stderr" not in key
    }
