"""vlmattn bench: the table, the file, and what is refused before anything is measured."""

from __future__ import annotations

import csv
import sys

import pytest
from PIL import Image
from rich.console import Console

from vlmattn import cli
from vlmattn.embedded.scenes import make_scene
from vlmattn.evals import bench as module
from vlmattn.evals.timing import rows

FAST = ["--rounds", "1", "--new-tokens", "2"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vlmattn", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    monkeypatch.setattr(cli.common.console, "width", 120)
    return call


def table_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_preset_is_in_table_and_file(run, tmp_path):
    path = tmp_path / "new" / "bench.csv"
    code, out, err = run("bench", "--presets", "var,vhr,pai", "--rounds", "2", "--new-tokens", "3", "--out", str(path))
    assert code == 0, err
    for what in (
        "embedded, float32 on cpu", "a prompt of 56 tokens, 49 of the image",
        "first token, ms", "decode step, ms", "3 tokens, ms", "tokens/s", str(path),
    ):  # fmt: skip
        assert what in out
    table = table_of(path)
    measured = list(dict.fromkeys(row["what"] for row in table))
    assert measured[:3] == ["first token", "decode step", "3 tokens"]
    shown = [line.split()[0] for line in out.splitlines() if line.split()[:1] and line.startswith("  ")]
    for name in ("none", "var", "vhr", "pai"):
        assert [row["what"] for row in table if row["candidate"] == name] == measured
        assert shown.count(name) == len(measured)
    assert {
        "model", "median", "extra", "ratio", "ratio_q1", "ratio_q3", "n", "date", "cpu", "threads", "gpu", "torch", "transformers",
        "vlmattn", "python", "dtype", "device", "batch_size", "prompt_tokens", "image_tokens", "new_tokens", "tokens_per_s",
    } <= table[0].keys()  # fmt: skip
    assert all(row["model"] == "embedded" and row["date"] for row in table)
    assert all(bool(row["tokens_per_s"]) == (row["what"] == "3 tokens") for row in table)
    assert [entry.name for entry in path.parent.iterdir()] == ["bench.csv"]


def test_a_preset_that_does_nothing_is_named_once(run, tmp_path):
    """VAR's threshold cannot be reached at the bundled model's width."""
    code, _, err = run("bench", "--presets", "var", *FAST, "--out", str(tmp_path / "b.csv"))
    assert code == 0
    assert err.count("var never fired") == 1


def test_a_picture_a_question_and_a_batch_of_ones_own(run, tmp_path):
    Image.fromarray(make_scene(12, 0)[1]).save(tmp_path / "scene.png")
    own = ["--image", str(tmp_path / "scene.png"), "--prompt", "Is there a cup in the image?", "--batch-size", "2"]
    code, _, err = run("bench", "--presets", "vhr", *own, *FAST, "--out", str(tmp_path / "b.csv"))
    assert code == 0, err
    row = table_of(tmp_path / "b.csv")[0]
    assert (row["batch_size"], row["image_tokens"]) == ("2", "49")
    assert int(row["prompt_tokens"]) > 56


def test_random_weights_need_no_files(run, tmp_path, monkeypatch):
    make = module.RANDOM_MODELS["random-llava"]

    def short():
        config = make()
        config.text_config.num_hidden_layers = 2
        return config

    monkeypatch.setitem(module.RANDOM_MODELS, "random-llava", short)
    options = ["--model", "random-llava", "--device", "cpu", "--presets", "vhr"]
    code, out, err = run("bench", *options, *FAST, "--out", str(tmp_path / "b.csv"))
    assert code == 0, err
    assert "prompt of 618 tokens, 576 of the image" in out
    assert "random weights" in err


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_a_terminal(width, run, tmp_path, monkeypatch):
    seconds = {"none": [1.0] * 9, "pai_official+pai_guidance": [2.3456] * 9, "isolate[images]": [0.1] * 9}
    facts = dict(
        dtype="bfloat16", device="cuda", gpu="card", batch_size=8, prompt_tokens=618, image_tokens=576, tokens_per_s=123.4
    )  # fmt: skip
    monkeypatch.setattr(module, "bench", lambda *_, **__: [row | facts for row in rows("64 tokens", seconds, "none")])
    monkeypatch.setattr(cli.benchmark, "console", Console(force_terminal=True, width=width, color_system=None))
    code, out, _ = run("bench", *FAST, "--out", str(tmp_path / "b.csv"))
    assert code == 0
    monkeypatch.undo()
    assert max(map(len, out.splitlines()[:-1])) <= width
    assert "…" not in out
    (line,) = (line for line in out.splitlines() if "pai_guidance" in line)
    assert line.split() == ["pai_official+pai_guidance", "2345.6", "+1345.6", "2.35", "2.35-2.35", "9", "123.4"]
    assert "isolate[images]" in out, "a name with brackets is no markup"
    assert "-900.00" in out, "what a preset saves is shown like what it costs"


def test_help_has_examples_and_says_what_random_models_are(run):
    code, out, _ = run("bench", "--help")
    assert code == 0
    text = " ".join(out.replace("│", " ").split())
    for words in (
        "Examples",
        "vlmattn bench --presets",
        "random-qwen2.5-vl-7b",
        "1296 image tokens",
        "small vision tower",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--presets", "vra"], ["unknown preset 'vra'", "var"]),
        (["--presets", "var,var"], ["'var' is given twice"]),
        (["--presets", "agla"], ["agla", "augmented"]),
        (["--rounds", "0"], ["rounds must be at least 1", "0"]),
        (["--new-tokens", "1"], ["at least 2 new tokens", "1"]),
        (["--batch-size", "0"], ["--batch-size", "0"]),
        (["--image", "{tmp}/none.png"], ["image not found", "none.png"]),
        (["--image", "{tmp}/file"], ["cannot read the image", "file"]),
        (["--dtype", "int3"], ["--dtype", "float32", "int3"]),
        (["--device", "cuda:99"], ["--device cuda:99", "vlmattn doctor"]),
        (["--device", "abacus"], ["--device abacus", "vlmattn doctor"]),
        (["--model", "{tmp}/nowhere"], ["cannot load", "nowhere"]),
        (["--model", "random-llava", "--prompt", "What?"], ["random-llava has no tokenizer", "--prompt"]),
        (["--model", "random-llava", "--image", "{tmp}/file"], ["random-llava has no tokenizer", "--image"]),
        (["--out", "{tmp}"], ["cannot write", "folder", "--out"]),
        (["--out", "{tmp}/file/b.csv"], ["cannot write", "b.csv", "--out"]),
    ],
)
def test_bad_input_gets_one_line_and_code_two(run, tmp_path, monkeypatch, arguments, words):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(module, "paired", lambda *_, **__: pytest.fail("it was measured"))
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    code, _, err = run("bench", *FAST, *([] if "--out" in given else ["--out", str(tmp_path / "b.csv")]), *given)
    assert code == 2
    assert "Traceback" not in err
    (line,) = (line for line in err.splitlines() if line.startswith("error:"))
    for word in words:
        assert word in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_prompt_without_image_is_refused(run, tmp_path, monkeypatch):
    """A chat template that drops the image."""
    encode = module.encode

    def textual(*arguments):
        inputs = encode(*arguments)
        ids = inputs["input_ids"].clamp(min=10)
        return {"input_ids": ids.where(ids != arguments[1].config.image_token_id, 20)}

    monkeypatch.setattr(module, "encode", textual)
    code, _, err = run("bench", *FAST, "--out", str(tmp_path / "b.csv"))
    assert code == 2
    assert "error: a prompt has no image token" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory")])
def test_nothing_is_written_when_it_stops(run, tmp_path, monkeypatch, error):
    path = tmp_path / "b.csv"
    path.write_text("earlier")

    def stop(*_, **__):
        raise error

    monkeypatch.setattr(module, "paired", stop)
    if error is KeyboardInterrupt:
        code, out, err = run("bench", *FAST, "--out", str(path))
        assert code == 130
        assert f"stopped; nothing was written to {path}" in err
        assert "goes on" not in err, "it does not resume"
        assert not out
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            run("bench", *FAST, "--out", str(path))
    assert path.read_text() == "earlier"
    assert [entry.name for entry in tmp_path.iterdir()] == ["b.csv"]


def test_debug_shows_the_traceback(run):
    from vlmattn.errors import OptionError

    with pytest.raises(OptionError):
        run("bench", "--rounds", "0", "--debug")
