"""The page of ``vlmattn inspect``: its numbers are the traces', its script runs, and the command says what is wrong."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
from dataclasses import replace

import hostile
import numpy as np
import pytest
import torch
from hostile import CHROMIUM
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import vlmattn
from vlmattn.cli.figures import write_figures
from vlmattn.errors import InputError
from vlmattn.evals.prompts import encode
from vlmattn.evals.suites import World
from vlmattn.inspection import compare_answers, group_masses
from vlmattn.inspection import page as page_module
from vlmattn.inspection.page import inspect_page
from vlmattn.inspection.pictures import figures
from vlmattn.inspection.recipes_compared import Side

QUESTION = "Describe the image."


@pytest.fixture(scope="module")
def bundled():
    return vlmattn.load("embedded")


@pytest.fixture(scope="module")
def seen(bundled):
    """Pictures and sides of one picture, and of two."""
    model, processor = bundled
    found = {}
    for count in (1, 2):
        pictures = [World("faint", count=4).image(n + 3 - count)[0] for n in range(count)]
        inputs = encode(model, processor, [QUESTION], [pictures])
        found[count] = pictures, compare_answers(model, processor, inputs, ["none", "vhr"], progress=False)
    return found


def data_of(page):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1].replace("<\\/", "</")
    )


def unpacked(packed):
    scale = np.frombuffer(base64.b64decode(packed["scale"]), "<f4").reshape(packed["shape"][:-1])
    share = np.frombuffer(base64.b64decode(packed["bytes"]), np.uint8).reshape(packed["shape"])
    return share / 255 * scale[..., None], scale


def test_the_page_holds_the_attention_of_every_token_layer_and_head(seen):
    pictures, sides = seen[2]
    data = data_of(inspect_page(sides, pictures, QUESTION))
    assert data["counts"] == [49, 49]
    for side, shown in zip(sides, data["sides"], strict=True):
        visual = side.trace.keys_of("image")
        wanted = np.stack([side.trace.attention(row).values[..., visual].numpy() for row in side.trace.answer_rows])
        single, scale = unpacked(shown["single"])
        assert (np.abs(single - wanted) <= scale[..., None] / 255).all()
        mean, scale = unpacked(shown["mean"])
        assert (np.abs(mean - wanted.mean(2)) <= scale[..., None] / 255).all()
        masses = group_masses(side.trace)
        np.testing.assert_allclose(shown["masses"], masses.mean("head").values, atol=1e-4)
        np.testing.assert_allclose(shown["visual"], masses.values[..., 1], atol=1e-4)
        assert [token["text"] for token in shown["tokens"]] == list(side.trace.tokens[side.trace.prompt :])
        for token, own in zip(shown["tokens"], side.trace.logprobs, strict=True):
            assert token["likely"][side.trace.recipe] == pytest.approx(float(own), abs=1e-4)
    vhr = np.array(data["sides"][1]["gains"])
    assert set(np.unique(vhr)) == {1.0, 2.0}


def test_each_answer_is_scored_under_the_other_recipe(bundled, seen):
    model, processor = bundled
    pictures, sides = seen[1]
    assert sides[0].trace.answer != sides[1].trace.answer  # the scene was chosen for that
    inputs = encode(model, processor, [QUESTION], [pictures])
    said = torch.tensor([sides[1].trace.answer])
    ids = torch.cat([inputs["input_ids"], said], 1)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"], attention_mask=torch.ones_like(ids)).logits
    wanted = logits[0, -said.shape[1] - 1 : -1].log_softmax(-1).gather(1, said[0][:, None])[:, 0]
    torch.testing.assert_close(sides[1].logprobs["none"], wanted, rtol=1e-4, atol=1e-4)
    assert (sides[1].logprobs["none"] - sides[1].logprobs["vhr"]).abs().max() > 0.1


def test_large_traces_keep_some_heads_of_each_layer(seen, monkeypatch):
    pictures, sides = seen[1]
    monkeypatch.setattr(page_module, "_MOST", 1000)
    page = inspect_page(sides, pictures, QUESTION)
    shown = data_of(page)["sides"][0]
    assert "the 4 heads of each layer" in page
    assert np.array(shown["some"]).shape == (6, 4)
    assert shown["single"]["shape"][2] == 4
    mass = group_masses(sides[0].trace).values[..., 1].sum(0)
    for layer, kept in enumerate(shown["some"]):
        assert set(kept) == set(mass[layer].topk(4).indices.tolist())


def test_the_page_needs_nothing_from_elsewhere_and_quotes_what_people_wrote(seen):
    pictures, sides = seen[1]
    page = inspect_page(sides, pictures, "</script><b>?", facts={"command": "<i>"})
    assert "<b>?" not in page
    assert "<i>" not in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(http|//)|<link|@import|url\(http""", page)


def named(sides, name):
    """The same answers, with a name wherever a user or a model could bring one in."""
    own = {side.trace.recipe: f"{name}{number}" for number, side in enumerate(sides)}
    return [
        Side(
            replace(
                side.trace,
                recipe=own[side.trace.recipe],
                tokens=tuple(name for _ in side.trace.tokens),
                rivals=tuple(tuple((name, value) for _, value in rivals) for rivals in side.trace.rivals),
                notes=(name,),
            ),
            {own[recipe]: values for recipe, values in side.logprobs.items()},
        )
        for side in sides
    ]


def page_named(seen, name):
    pictures, sides = seen[1]
    return inspect_page(named(sides, name), pictures, name, scores={name: [[0.1] * 8] * 6}, facts={name: name})


@settings(max_examples=15, deadline=None)
@given(name=hostile.names | st.just(hostile.ALL))
def test_names_are_text_on_the_page(seen, name):
    page = page_named(seen, name)
    assert hostile.elements(page) == hostile.elements(page_named(seen, "name"))
    data, name = data_of(page), name.replace("\ud800", "\ufffd")
    assert [side["name"] for side in data["sides"]] == [f"{name}0", f"{name}1"]
    assert list(data["scores"]) == [name]


def test_scores_that_do_not_fit_are_left_out(seen):
    pictures, sides = seen[1]
    good, nan = [[0.1] * 8] * 6, [[float("nan")] * 8] * 6
    scores = {
        "good": good,
        "nan": nan,
        "few layers": good[:3],
        "few heads": [[0.1] * 4] * 6,
        "ragged": [*good[:5], [0.1]],
    }
    assert data_of(inspect_page(sides, pictures, QUESTION, scores=scores))["scores"] == {"good": good}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("name", [hostile.ALL, "<!--<script>", "{{data}}<img src=x onerror=document.title='PWNED'>"])
def test_names_run_nothing_in_a_browser(seen, tmp_path, name):
    title, ready = hostile.title_in_browser(page_named(seen, name), tmp_path)
    assert title.startswith("vlmattn inspect: ")
    assert ready


@pytest.mark.filterwarnings("ignore")  # letters that the font lacks
def test_names_are_drawn_as_they_are(seen, tmp_path):
    pictures, sides = seen[1]
    drawn = figures(named(sides, "$\\frac{" + "a" * 300)[:1], pictures)
    write_figures(tmp_path, drawn)
    assert len(list(tmp_path.iterdir())) == len(drawn)


def test_pictures_must_be_those_of_the_prompt(seen):
    pictures, sides = seen[2]
    with pytest.raises(InputError, match="2 images and 1 pictures"):
        inspect_page(sides, pictures[:1], QUESTION)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_script_runs_and_nothing_sticks_out(seen, tmp_path, width, count):
    pictures, sides = seen[count]
    page = tmp_path / "page.html"
    probe = "<script>setTimeout(()=>{document.body.dataset.wide=document.documentElement.scrollWidth},1500)</script>"
    text = inspect_page(sides, pictures, QUESTION, scores={"vhd": [[0.1] * 8] * 6})
    # a window below 500 pixels is not given: a frame of that width is
    (tmp_path / "inner.html").write_text(text.replace("</body>", f"{probe}</body>"))
    page.write_text(
        f"<iframe id='f' src='inner.html' style='width:{width}px;height:3000px;border:0'></iframe><script>setTimeout(()=>"
        "{const b=f.contentDocument.body;document.title=`ready ${b.dataset.ready} wide ${b.dataset.wide} canvases"
        " ${b.querySelectorAll('canvas.map').length} charts ${b.querySelectorAll('svg').length}`},4000)</script>"
    )
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--allow-file-access-from-files", "--virtual-time-budget=8000", "--dump-dom", "--window-size=1400,3000", page.as_uri(),
    ]  # fmt: skip
    out = subprocess.run(command, capture_output=True, text=True, timeout=600).stdout
    ready, wide, canvases, charts = re.search(r"ready (\w+) wide (\d+) canvases (\d+) charts (\d+)", out).groups()
    assert ready == "yes"
    assert int(wide) <= width
    assert (int(canvases), int(charts)) == (2 * count, 3)


def test_figures_are_drawn(seen):
    pictures, sides = seen[2]
    drawn = figures(sides, pictures)
    assert {"0-none-tokens-image2", "1-vhr-layers-image1", "0-none-heads", "1-vhr-groups", "log-probabilities"} <= set(
        drawn
    )
    assert not any("sinks" in name for name in drawn)  # this model has none
    for figure in drawn.values():
        figure.savefig(data := io.BytesIO(), format="png")
        pixels = np.asarray(Image.open(data).convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


def test_the_command_writes_page_figures_and_attention(run, tmp_path):
    html, png, save = tmp_path / "out" / "page.html", tmp_path / "png", tmp_path / "trace"
    arguments = [
        "embedded",
        "--scene",
        "2",
        "--preset",
        "vhr",
        "--html",
        str(html),
        "--png",
        str(png),
        "--save",
        str(save),
    ]
    code, out, err = run("inspect", *arguments)
    assert code == 0, err
    assert out.startswith("none: there is")
    assert "vlmattn inspect embedded --scene 2" in html.read_text()
    assert {"vhd", "visual", "retrieval", "causal"} <= set(data_of(html.read_text())["scores"])  # the saved profile
    assert len(list(png.glob("*.png"))) >= 9
    again = vlmattn.inspection.Trace.load(save / "0")
    assert again.recipe == "none"
    torch.testing.assert_close(group_masses(again).values.sum(-1), torch.ones(len(again.answer), 6, 8))


def test_a_picture_of_ones_own(run, tmp_path):
    Image.new("RGB", (90, 60), "red").save(tmp_path / "a.png")
    code, _, err = run("inspect", "embedded", "--image", str(tmp_path / "a.png"), "--html", str(tmp_path / "a.html"))
    assert code == 0, err
    assert len(data_of((tmp_path / "a.html").read_text())["sides"]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scene", "1"], "nothing to write; give --html"),
        (["--html", "x.html"], "--image, or a generated scene with --scene"),
        (["--scene", "1", "--image", "a.png", "--html", "x.html"], "not both"),
        (["--image", "missing.png", "--html", "x.html"], "cannot read the picture missing.png"),
        (["--scene", "-1", "--html", "x.html"], "--scene must be 0 or more"),
        (["--scene", "1", "--visibility", "dark", "--html", "x.html"], "visibility must be one of"),
        (["--scene", "1", "--preset", "nope", "--html", "x.html"], "unknown preset 'nope'"),
        (["--scene", "1", "--preset", "opera", "--html", "x.html"], "only one sequence"),
        (["--scene", "1", "--save", "."], "give a new folder"),
        (["--scene", "1", "--html", "x.html", "--max-new-tokens", "9000000"], "too much to keep in memory"),
    ],
)
def test_errors_are_one_line(run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0").mkdir()  # where --save would begin
    code, _, err = run("inspect", "embedded", *arguments)
    assert code == 2
    assert words in err
    assert not (tmp_path / "x.html").exists()
