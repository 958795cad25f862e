"""Training: every step follows from seed and step number, so an interrupted run ends with the same weights."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tools.bundled import train_tiny as train


def run(folder, *stops: int, stage: int = 1) -> train.Trainee:
    """Train to each of ``stops`` in turn, every time as a new process would."""
    folder.mkdir(parents=True, exist_ok=True)
    for stop in stops:
        torch.manual_seed(train.SEED)
        trainee = train.Trainee()
        train.train_stage(trainee, stage, stop, folder, workers=0, every=2)
    return trainee


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_resumed_run_is_the_same_run(tmp_path, stage):
    straight, resumed = run(tmp_path / "a", 4, stage=stage), run(tmp_path / "b", 2, 4, stage=stage)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    torch.manual_seed(train.SEED)
    start = train.Trainee()
    assert any(not torch.equal(a, b) for a, b in zip(straight.parameters(), start.parameters(), strict=True))
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in "ab"]
    assert [{k: v for k, v in line.items() if k != "seconds"} for line in logs[0]] == [
        {k: v for k, v in line.items() if k != "seconds"} for line in logs[1]
    ]
    assert not list(tmp_path.rglob("*.partial"))


def test_export_is_a_hugging_face_folder(tmp_path):
    trained = run(tmp_path / "run", 2, stage=3)
    train.export(tmp_path / "run", tmp_path / "model")
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for a, b in zip(loaded.parameters(), trained.llava.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
