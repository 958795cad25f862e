"""Directions in hidden states are the differences that they say, and what cannot be measured is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import build, prompt

import vlmattn
from vlmattn.errors import InputError, OptionError
from vlmattn.evals import steering_pairs
from vlmattn.inspection import Pair, fit_steering
from vlmattn.interventions import load_directions
from vlmattn.models import find_family

DOCS = Path(__file__).parents[2] / "docs"
pytestmark = pytest.mark.usefixtures("no_grad")


def pairs(count=5, rows=(1, 1)):
    return [Pair(prompt("llava", words=4, seed=n), prompt("llava", words=6, seed=100 + n), rows) for n in range(count)]


def outputs(model, inputs, rows):
    """What each layer puts out, mean over the last rows."""
    found = {}
    for number, layer in enumerate(find_family(model).layers(model)):

        def note(module, args, output, number=number):
            found[number] = (output[0] if isinstance(output, tuple) else output)[0, -rows:].mean(0)

        layer.register_forward_hook(note)
    model(**inputs)
    return found


def differences(given):
    good = [outputs(build("llava"), pair.good, pair.rows[0]) for pair in given]
    bad = [outputs(build("llava"), pair.bad, pair.rows[1]) for pair in given]
    return {n: torch.stack([a[n] - b[n] for a, b in zip(good, bad, strict=True)]) for n in range(3)}


@pytest.mark.parametrize("wrapped", [False, True])
def test_means_are_means_of_differences(wrapped, tmp_path):
    given, model = pairs(rows=(1, 3)), build("llava")
    if wrapped:
        vlmattn.wrap(model, "pai")
    found = fit_steering(model, given, path=tmp_path / "d.safetensors", examples="drawn", progress=False)
    wanted = differences(given)
    assert found.by_layer.keys() == wanted.keys()  # the last layer enters no other
    for layer, value in wanted.items():
        torch.testing.assert_close(found.by_layer[layer], value.mean(0)[None], rtol=0, atol=1e-5)
    read = load_directions(str(tmp_path / "d.safetensors"))
    assert (read.method, read.examples) == ("mean", "drawn")
    assert ("vlmattn" in model.__dict__) == wrapped


def test_singular_vectors_and_principal_components():
    given = pairs()
    wanted = differences(given)
    lines = fit_steering(build("llava"), given, "svd", rank=2, progress=False).by_layer
    main = fit_steering(build("llava"), given, "pca", rank=2, progress=False).by_layer
    for layer, value in wanted.items():
        torch.testing.assert_close(lines[layer] @ lines[layer].T, torch.eye(2), rtol=0, atol=1e-5)
        _, vectors = torch.linalg.eigh(value.T @ value)
        torch.testing.assert_close((vectors[:, -1] @ lines[layer][0]).abs(), torch.tensor(1.0), rtol=0, atol=1e-4)
        mean = value.mean(0)
        torch.testing.assert_close(main[layer].norm(dim=-1), mean.norm().expand(2), rtol=1e-4, atol=0)
        assert bool((main[layer] @ mean >= 0).all())
        _, vectors = torch.linalg.eigh(torch.cov(value.T))
        same = (vectors[:, -1] @ main[layer][0]).abs() / mean.norm()
        torch.testing.assert_close(same, torch.tensor(1.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "options", "error", "words"),
    [
        (pairs(2), {"way": "median"}, OptionError, "way must be one of mean, pca, svd"),
        (pairs(2), {"way": "svd", "rank": 3}, OptionError, "3 directions by svd need at least 3 pairs, got 2"),
        (pairs(1), {"way": "pca"}, OptionError, "need at least 2 pairs"),
        ([], {}, OptionError, "need at least 1 pairs, got 0"),
        (pairs(1, (1, 99)), {}, InputError, "looks at the last 99 rows"),
    ],
)
def test_what_cannot_be_measured(given, options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        fit_steering(build("llava"), given, progress=False, **options)


def test_pairs_of_scenes_images_and_files(tmp_path):
    model, processor = vlmattn.load("embedded")
    scenes = list(steering_pairs.of_scenes(model, processor, 2))
    assert len(scenes) == 4
    ends = [(int(pair.good["input_ids"][0, -1]), int(pair.bad["input_ids"][0, -1])) for pair in scenes]
    assert ends[0] == ends[1][::-1]  # yes against no, then no against yes
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "a.png")
    (image,) = steering_pairs.of_images(model, processor, [tmp_path / "a.png"], "describe the image")
    torch.testing.assert_close(image.good["pixel_values"], image.bad["pixel_values"])  # it has one colour
    line = {"image": "a.png", "question": "is there a cup?", "good": "no", "bad": "yes there is"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line))
    (told,) = steering_pairs.of_file(model, processor, tmp_path / "pairs.jsonl")
    assert told.rows == (1, 3)
    assert fit_steering(model, [told, *scenes], progress=False).by_layer.keys()
    (tmp_path / "pairs.jsonl").write_text(json.dumps({**line, "good": ""}))
    with pytest.raises(InputError, match="line 1 needs image, question, good, bad"):
        steering_pairs.of_file(model, processor, tmp_path / "pairs.jsonl")


def test_the_page_runs(tmp_path):
    page = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / "howto-steering.md").read_text(), re.DOTALL))
    done = subprocess.run([sys.executable, "-c", page], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\{'steer': [1-9]\d*\}", done.stdout)
