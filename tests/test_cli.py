"""The command line: what it prints, and what bad input gets (one line, exit code 2, nothing half-written)."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from rich.console import Console

import vlmattn
from vlmattn import cli
from vlmattn.embedded import FOLDER
from vlmattn.embedded.scenes import make_scene
from vlmattn.errors import InputError
from vlmattn.evals.loading import quantisation
from vlmattn.evals.suites.world import EVAL_SEED
from vlmattn.evals.tune import TUNE_SEED
from vlmattn.options import checked_against, paper_id
from vlmattn.registry import find_method

MMHAL = ["eval", "--out", "{tmp}/o", "--suite", "mmhal", "--data", "mmhal={tmp}/good.json", "--images", "{tmp}"]
TUNE = ["tune", "--out", "{tmp}/o"]


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "scene.png"
    Image.fromarray(make_scene(12, 0)[1]).save(path)
    return str(path)


def test_presets_lists_every_preset_on_one_line_for_other_programs(run):
    code, out, _ = run("presets")
    assert code == 0
    head, *lines = out.splitlines()
    assert head.split()[:4] == ["preset", "about", "parts", "checked"]
    known = vlmattn.presets()
    assert sorted(line.split()[0] for line in lines) == sorted(known)
    for line in lines:
        info = known[line.split()[0]]
        method = find_method(info.method).info
        assert all(text in line for text in (info.about, method.parts, paper_id(method.paper), method.cost))
    (line,) = (line for line in lines if line.startswith("var_official "))
    assert all(word in line for word in ("2503.03321", "golden"))
    assert "experimental" in next(line for line in lines if line.startswith("rbd "))


def test_presets_fit_a_terminal(run, monkeypatch):
    """At 100 columns names, papers and what vouches for a preset are whole."""
    monkeypatch.setattr(cli.information, "console", Console(force_terminal=True, width=100, color_system=None))
    code, out, _ = run("presets")
    assert code == 0
    monkeypatch.undo()
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    assert "…" not in out
    for name, info in vlmattn.presets().items():
        method = find_method(info.method).info
        (line,) = (
            line for line in lines if line.startswith((f"{name} ", f" {name} "))
        )  # wrapped words are further right
        assert paper_id(method.paper) in line
        assert checked_against(info.about, method.faithful) in line
        assert info.about.split()[0] in line
    assert find_method("vhr").info.cost.split()[0] in out


def test_one_preset_shows_its_options_and_a_recipe(run):
    code, out, _ = run("presets", "var")
    assert code == 0
    for word in ("keep", "0..1", "rho = .5", "schema: 1", "gamma"):
        assert word in out
    code, out, _ = run("presets", "var", "--json")
    assert json.loads(out)["interventions"][0]["keep"] == 0.4
    code, out, _ = run("presets", "--json")
    assert [recipe["name"] for recipe in json.loads(out)] == list(vlmattn.presets())


def test_one_preset_shows_the_choices_of_its_options(run):
    found = [
        (preset, spec.metadata["choices"])
        for preset, info in vlmattn.presets().items()
        for spec in dataclasses.fields(find_method(info.method))
        if spec.metadata["choices"]
    ]
    for preset, choices in found[:3]:
        code, out, _ = run("presets", preset)
        assert code == 0
        assert "range or choices" in out
        assert all(choice in out for choice in choices)


def test_ask_shows_both_answers(run, picture):
    code, out, _ = run("ask", picture, "Is there a cup in the image?", "--preset", "vhr")
    assert code == 0
    assert "none" in out
    assert "vhr" in out
    assert any(word in out for word in ("yes", "no"))


def test_ask_gives_the_processor_to_methods(run, picture, monkeypatch):
    seen = []
    applied = vlmattn.applied

    def spy(*arguments, **options):
        seen.append(options.get("processor"))
        return applied(*arguments, **options)

    monkeypatch.setattr(vlmattn, "applied", spy)
    assert run("ask", picture, "Is there a cup in the image?", "--preset", "pai")[0] == 0
    assert len(seen) == 1
    assert hasattr(seen[0], "chat_template")


def test_tune_chooses_a_recipe_that_eval_takes(run, tmp_path):
    """Two values of which one breaks the model; then the winner on the scenes of eval."""
    tuning = ["tune", "--preset", "vhr", "--grid", "alpha=1:10:9", "--grid", "drop_outliers=true,false"]
    tuning += ["--suite", "which", "--shots", "9", "--scenes", "8", "--out", str(tmp_path / "t")]
    code, out, err = run(*tuning)
    assert code == 0, err
    rows = [line.split() for line in out.splitlines() if line.startswith(" vhr[")]
    assert [row[0] for row in rows] == [
        f"vhr[alpha={alpha},drop_outliers={outliers}]" for alpha in ("1.0", "10.0") for outliers in ("True", "False")
    ]
    marked = [row for row in rows if row[-2:] == ["<-", "chosen"]]
    record = json.loads((tmp_path / "t" / "tune.json").read_text())
    assert [row[0] for row in marked] == [record["chosen"]] == ["vhr[alpha=1.0,drop_outliers=True]"]
    figures = {setting["name"]: f"{setting['value']:.1f}" for setting in record["settings"]}
    assert figures == {row[0]: row[1] for row in rows}
    assert len(set(figures.values())) > 1
    for words in ("9 validation samples", "flatter it", "equally good", "tuned.yaml", "report.html"):
        assert words in out
    assert record["suite_settings"]["scenes"]["seed"] == TUNE_SEED == 13
    assert record["command"].startswith("vlmattn tune --preset vhr")
    recipe = str(tmp_path / "t" / "tuned.yaml")
    options = ["--suite", "which", "--scenes", "4", "--presets", recipe, "--out", str(tmp_path / "e")]
    code, out, err = run("eval", *options)
    assert code == 0, err
    assert "vhr[alpha=1.0,drop_outliers=True]" in out, "a name with brackets is no markup"
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert summary["suites"]["which"]["scenes"]["seed"] == EVAL_SEED
    assert summary["command"].endswith(f"--out {tmp_path / 'e'}")


def test_tune_on_published_files(run, tmp_path):
    for i in range(3):
        Image.fromarray(make_scene(12, i)[1]).save(tmp_path / f"{i}.png")
    questions = [
        {"image": f"{i}.png", "text": f"Is there a {thing} in the image?", "label": "no"}
        for i in range(3)
        for thing in ("cup", "dog")
    ]
    path = tmp_path / "questions.json"
    path.write_text("\n".join(map(json.dumps, questions)))
    options = ["--preset", "pai", "--grid", "alpha=.1,.2", "--data", f"pope={path}", "--images", str(tmp_path)]
    code, out, err = run("tune", *options, "--shots", "4", "--out", str(tmp_path / "t"))
    assert code == 0, err
    assert "not tested" in out  # all pictures had a part in the choice
    assert len(json.loads((tmp_path / "t" / "tune.json").read_text())["samples"]) == 4


def test_weights_in_fewer_bits_are_asked_for(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more)
    )
    with pytest.raises(InputError, match="pip install bitsandbytes"):
        quantisation("4bit", "auto")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: True if name == "bitsandbytes" else find(name, *more)
    )
    four, eight = (quantisation(bits, "float16")["quantization_config"] for bits in ("4bit", "8bit"))
    assert four.load_in_4bit
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_compute_dtype) == ("nf4", torch.float16)
    assert eight.load_in_8bit
    assert quantisation(None, "auto") == {}


def test_processes_start_the_same_command_under_torchrun(run, monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: started.append(command) or subprocess.CompletedProcess(command, 3)
    )
    code, _, _ = run("eval", "--out", str(tmp_path), "--processes", "2", "--scenes", "4")
    assert code == 3  # theirs
    (command,) = started
    where = command.index("vlmattn.cli")
    assert command[where + 1 :] == ["eval", "--out", str(tmp_path), "--scenes", "4"]
    assert command[command.index("--nproc_per_node") + 1] == "2"


def test_doctor_is_content(run):
    code, out, _ = run("doctor")
    assert code == 0
    for word in ("torch", "backend merge", "model types", "found", "no trouble"):
        assert word in out


def test_help_has_examples(run):
    for command in ("demo", "eval", "tune", "ask", "presets", "families"):
        code, out, _ = run(command, "--help")
        assert code == 0
        assert "Example" in out


def test_eval_on_published_formats_with_a_model_folder(run, tmp_path):
    """POPE questions and COCO annotations about two pictures, on a model that is loaded from a folder."""
    for i in range(2):
        Image.fromarray(make_scene(12, i)[1]).save(tmp_path / f"{i}.png")
    questions = [
        {"image": f"{i}.png", "text": f"Is there a {thing} in the image?", "label": "no"}
        for i in range(2)
        for thing in ("cup", "dog")
    ]
    (tmp_path / "coco_pope_random.json").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "instances.json").write_text(
        json.dumps(
            {
                "images": [{"id": i, "file_name": f"{i}.png"} for i in range(2)],
                "annotations": [{"image_id": i, "category_id": 1} for i in range(2)],
                "categories": [{"id": 1, "name": "dog"}],
            }
        )
    )
    (tmp_path / "captions.json").write_text(
        json.dumps({"annotations": [{"image_id": i, "caption": "a dog and a bus"} for i in range(2)]})
    )
    data = [f"--data=chair={tmp_path}/instances.json", f"--set=chair.captions={tmp_path}/captions.json"]
    data += [f"--data=pope={tmp_path}/coco_pope_random.json", "--images", str(tmp_path), "--max-new-tokens", "40"]
    code, out, err = run("eval", "--out", str(tmp_path / "run"), "--model", str(FOLDER), "--presets", "pai,vhr", *data)
    assert code == 0, err
    assert "random" in out
    assert "chair_i" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [(t["suite"], t["samples"]) for t in summary["tables"]] == [("pope", 4), ("chair", 2)]
    assert list(summary["tables"][0]["rows"]) == ["none", "pai", "vhr"]
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "--out", "{tmp}/o", "--presets", "none,vra"], ["unknown preset 'vra'", "did you mean", "var"]),
        (["eval", "--out", "{tmp}/o", "--suite", "poep"], ["unknown suite 'poep'", "pope"]),
        (["eval", "--out", "{tmp}/o", "--visibility", "foggy"], ["clear, dim, faint, tiny", "foggy"]),
        (["eval", "--out", "{tmp}/o", "--prior", "7"], ["prior_broken", "0..1", "7"]),
        (
            ["eval", "--out", "{tmp}/o", "--data", "pope={tmp}/none.json", "--images", "{tmp}"],
            ["no such file", "none.json"],
        ),
        (
            ["eval", "--out", "{tmp}/o", "--data", "pope={tmp}/bad.json", "--images", "{tmp}"],
            ["bad.json:2", "not valid JSON"],
        ),
        (["eval", "--out", "{tmp}/o", "--data", "pope={tmp}/good.json"], ["--images"]),
        (
            ["eval", "--out", "{tmp}/o", "--data", "pope={tmp}/good.json", "--images", "{tmp}"],
            ["image not found", "a.png"],
        ),
        (["eval", "--out", "{tmp}/o", "--dtype", "int3"], ["float32", "int3"]),
        (["eval", "--out", "{tmp}/o", "--load-in", "3bit"], ["--load-in", "8bit or 4bit", "3bit"]),
        (["eval", "--out", "{tmp}/o", "--on-error", "hope"], ["stop, skip", "hope"]),
        (["eval", "--out", "{tmp}/o", "--suite", "popes"], ["unknown suite 'popes'", "pope"]),
        (["eval", "--out", "{tmp}/o", "--suite", "mme", "--data", "mme={tmp}/nowhere"], ["nowhere"]),
        (
            ["eval", "--out", "{tmp}/o", "--suite", "mmhal", "--data", "mmhal={tmp}/good.json", "--images", "{tmp}"],
            ["good.json", "MMHal-Bench"],  # POPE's questions
        ),
        (
            [*MMHAL, "--set", "mmhal.judge=gpt"],
            ["unknown judge 'gpt'", "package.module:function"],
        ),
        (
            ["eval", "--out", "{tmp}/o", "--suite", "which", "--set", "which.sizes=1,2"],
            ["which asks about 2 images or more"],
        ),
        (
            ["eval", "--out", "{tmp}/o", "--suite", "which", "--set", "which.sizes=a"],
            ["which.sizes takes a whole number", "'a'"],
        ),
        (
            ["eval", "--out", "{tmp}/o", "--suite", "which", "--set", "which.size=2"],
            ["option of suite 'which'", "sizes"],
        ),
        (["eval", "--out", "{tmp}/o", "--set", "which"], ["--set is NAME.option=value", "'which'"]),
        (["eval", "--out", "{tmp}/o", "--set", "wich.sizes=2"], ["unknown suite 'wich'", "which"]),
        (["eval", "--out", "{tmp}/o", "--set", "which.sizes=2"], ["--suite does not name which"]),
        (["eval", "--out", "{tmp}/o", "--data", "mme=x"], ["--suite does not name mme", "pope, chair"]),
        (["eval", "--out", "{tmp}/o", "--data", "pope"], ["--data is NAME=PATH", "'pope'"]),
        (["eval", "--out", "{tmp}/o", "--suite", "which", "--data", "which=x"], ["which is made of generated scenes"]),
        (
            ["eval", "--out", "{tmp}/o", "--suite", "vqa"],
            ["no data for suite vqa", "--data vqa=PATH", "VQAv2's folder"],
        ),
        (["eval", "--out", "{tmp}/o", "--suite", "pqa", "--set", "pqa.sizes=8", "--scenes", "4"], ["4 scenes for 8"]),
        (["compare", "{tmp}", "{tmp}"], ["no finished run", "vlmattn eval --out"]),
        (["eval", "--out", "{tmp}/o", "--model", "{tmp}/nowhere"], ["cannot load", "nowhere"]),
        (["eval", "--out", "{tmp}/o", "--model", "{tmp}/bert"], ["model type 'bert'", "llava", "qwen2_5_vl"]),
        (["eval", "--out", "{tmp}/file/x"], ["cannot use", "file/x"]),
        (["ask", "{tmp}/none.png", "what?"], ["image not found", "none.png"]),
        (["ask", "{tmp}/bad.json", "what?"], ["cannot read the picture", "bad.json"]),
        (["ask", "{picture}", "what?", "--preset", "{tmp}/recipe.yaml"], ["recipe.yaml", "var.keep", "0..1", "3"]),
        (["presets", "vhrr"], ["unknown preset 'vhrr'", "vhr"]),
        ([*TUNE, "--preset", "pai", "--grid", "alpa=.1"], ["unknown option of 'pai' 'alpa'", "alpha"]),
        ([*TUNE, "--preset", "pai", "--grid", "alpha=.1,3"], ["pai.alpha", "0..0.999", "3"]),
        ([*TUNE, "--preset", "pai", "--grid", "alpha"], ["--grid", "sigma=0.25,0.5", "'alpha'"]),
        ([*TUNE, "--preset", "pai", "--grid", "alpha=0:1"], ["--grid alpha", "start:stop:step", "'0:1'"]),
        ([*TUNE, "--preset", "vhr+pai", "--grid", "alpha=.1"], ["one method", "'vhr+pai' has 2"]),
        ([*TUNE, "--preset", "vhrr", "--grid", "alpha=.1"], ["unknown preset 'vhrr'", "vhr"]),
        ([*TUNE, "--preset", "pai", "--grid", "alpha=.1", "--suite", "pope,chair"], ["unknown suite 'pope,chair'"]),
        ([*TUNE, "--preset", "pai", "--grid", "alpha=.1", "--seed", "12"], ["--seed 12", "eval"]),
        ([*TUNE, "--preset", "pai", "--grid", "alpha=.1", "--scenes", "2", "--shots", "99"], ["within 1..", "99"]),
        (
            [
                *TUNE,
                "--preset",
                "pai",
                "--grid",
                "alpha=.1",
                "--data",
                "pope={tmp}/good.json",
                "--suite",
                "chair",
                "--images",
                "{tmp}",
            ],
            ["--data pope: --suite does not name pope"],
        ),
    ],
)
def test_bad_input_gets_one_line_and_code_two(run, tmp_path, picture, arguments, words):
    (tmp_path / "bad.json").write_text('{"image": "a.png", "text": "q", "label": "yes"}\n{"image"\n')
    (tmp_path / "good.json").write_text('{"image": "a.png", "text": "q", "label": "yes"}\n')
    (tmp_path / "recipe.yaml").write_text("schema: 1\nname: x\ninterventions:\n- method: var\n  keep: 3\n")
    (tmp_path / "file").write_text("")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    code, _, err = run(*(a.format(tmp=tmp_path, picture=picture) for a in arguments))
    assert code == 2
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]
    assert not (tmp_path / "o" / "answers.jsonl").exists()


def test_debug_shows_the_traceback(run):
    from vlmattn.errors import UnknownNameError

    with pytest.raises(UnknownNameError):
        run("presets", "vhrr", "--debug")


def test_a_broken_torchvision_is_named_with_its_remedy(tmp_path):
    """A torchvision that raises at import, as a CUDA wheel does beside a CPU torch."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    info = tmp_path / "torchvision-0.28.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    for command in (["doctor"], ["ask", "x.png", "q"]):
        (tmp_path / "x.png").write_bytes(b"")
        if command[0] == "ask":
            Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['vlmattn', *{command!r}]; from vlmattn.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2, done.stderr[-2000:]
        assert "pip uninstall -y torchvision timm" in done.stderr
        assert "Traceback" not in done.stderr


def test_layer_ranges_are_no_emoji(run):
    assert "0:-1:2" in run("presets", "sofa")[1]


def test_families_lists_what_runs_where(run):
    code, out, _ = run("families")
    assert code == 0
    assert "qwen2_5_vl" in out
    assert "generic patcher" in out
    assert "types of transformers" in out
    assert run("families", "--markdown")[1].startswith("| model type |")


def test_families_are_readable_in_a_narrow_pipe(run, monkeypatch):
    monkeypatch.setattr(cli.common.console, "width", 80)
    lines = run("families")[1].splitlines()
    (line,) = (line for line in lines if line.startswith("gemma3,"))
    assert line.split()[-1] == "yes"
    assert max(map(len, lines[: lines.index(next(line for line in lines if line.startswith("(1)")))])) <= 80


def test_a_family_shows_itself(run):
    code, out, _ = run("families", "gemma4")
    assert code == 0
    assert "google/gemma-4-e2b-it" in out
    assert "decoder:      model.model.language_model\n" in out
    assert "model.config.image_token_id (images)" in out
    assert "model.config.boi_token_id" in out
    _, out, _ = run("families", "gemma3n")
    assert "pruning:      no: its residual stream is four streams" in out
    assert "pruning on other models, like qwen2_5_vl" in out
    assert run("families", "florence2")[1].count("encoder-decoder") == 1
    assert json.loads(run("families", "blip-2", "--json")[1])["blip-2"]["edits"] == "yes"
    assert json.loads(run("families", "--json")[1])["llava"]["pruning"] == "yes"
    code, _, err = run("families", "gema4")
    assert code == 2
    assert "did you mean gemma4" in err


def test_fit_measures_directions_that_the_method_finds(run, tmp_path):
    code, out, _ = run("fit", "steer", "--scenes", "2", "--out", str(tmp_path / "d.safetensors"))
    assert code == 0
    assert "4 pairs, directions by mean" in out
    model, _ = vlmattn.load("embedded")
    vlmattn.wrap(model, "steer", file=str(tmp_path / "d.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["pai", "--scenes", "2"], "no directions are measured for 'pai'; take steer, vti, nullu"),
        (["steer"], "give one of --pairs, --images or --scenes"),
        (["steer", "--scenes", "2", "--images", "."], "give one of --pairs, --images or --scenes"),
        (["steer", "--images", "nowhere"], "nowhere is no folder"),
        (["nullu", "--scenes", "1"], "4 directions by svd need at least 4 pairs, got 2"),
    ],
)
def test_fit_refuses_in_one_line(run, tmp_path, arguments, reason):
    code, _, err = run("fit", *arguments, "--out", str(tmp_path / "d.safetensors"))
    assert code == 2
    assert reason in " ".join(err.split())
    assert not list(tmp_path.iterdir())
