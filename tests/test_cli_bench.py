"""vlmattn bench: its table, its CSV, and what it refuses before anything is measured."""

from __future__ import annotations

import csv

import pytest

from vlmattn import cli
from vlmattn.evals import bench as module

SHORT = ["bench", "--rounds", "1", "--new-tokens", "2"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_the_table_and_the_csv_have_every_preset(run, tmp_path):
    code, out, err = run(*SHORT, "--presets", "vhr,pai", "--out", "deep/figures.csv")
    assert code == 0, err
    for words in ("first token", "decode step", "2 tokens", "none", "vhr", "pai", "tokens/s", "deep/figures.csv"):
        assert words in out
    with (tmp_path / "deep" / "figures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["candidate"] for row in rows} == {"none", "vhr", "pai"}
    assert {"first token", "decode step", "2 tokens"} <= {row["what"] for row in rows}
    for row in rows:
        assert row["model"] == "embedded"
        assert float(row["median"]) > 0
        assert float(row["ratio"]) > 0
        assert all(
            row[name] for name in ("date", "cpu", "threads", "torch", "transformers", "vlmattn", "dtype", "device")
        )
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_a_terminal(run, monkeypatch, width):
    monkeypatch.setattr(cli.common.console, "width", width)
    _, out, _ = run(*SHORT, "--presets", "pai_official+pai_guidance")
    assert max(map(len, out.splitlines())) <= width
    assert "pai_official+pai_guidance" in out.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--presets", "pia"], "unknown preset 'pia'; did you mean pai"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--new-tokens", "1"], "at least 2 new tokens"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--image", "nowhere.jpg"], "image not found: nowhere.jpg"),
        (["--dtype", "int3"], "--dtype must be"),
        (["--device", "abacus"], "--device abacus is not there"),
        (["--model", "random-llava", "--prompt", "What?"], "no tokenizer"),
        (["--out", "."], "it is a folder"),
    ],
)
def test_what_cannot_be_measured_is_one_line(run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.setattr(module, "bench", lambda *_, **__: pytest.fail("measured all the same"))
    code, out, err = run(*SHORT, *arguments)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert not out
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_when_it_is_stopped(run, tmp_path, monkeypatch):
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "bench", stopped)
    code, _, err = run(*SHORT)
    assert code == 130
    assert "nothing was written" in err
    assert not list(tmp_path.iterdir())


def test_a_random_model_needs_no_files(run, monkeypatch):
    monkeypatch.setitem(module.RANDOM_MODELS, "random-llava", _tiny)
    code, out, err = run(*SHORT, "--model", "random-llava", "--presets", "pai", "--batch-size", "2")
    assert code == 0, err
    assert "2 prompts" in out
    assert "answers mean nothing" in err


def _tiny() -> object:
    from tiny import build

    return build("llava").config
