"""A run that goes on: what its answers were made from is compared, and what has changed is refused or asked again, by name."""

from __future__ import annotations

import json
import os
import zlib
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import vlmattn
from vlmattn.errors import StateError
from vlmattn.evals import asking, runner
from vlmattn.evals.compare import compare
from vlmattn.evals.environment import decoding, decoding_in_words, fingerprint
from vlmattn.evals.report import markdown_tables, notes
from vlmattn.evals.runner import evaluate
from vlmattn.evals.suites import Pope
from vlmattn.interventions import SinkProfile
from vlmattn.models import find_family


@pytest.fixture(scope="module")
def bundled():
    return vlmattn.load("embedded")


@pytest.fixture
def asked(monkeypatch):
    """Prompts that the model is asked, answered without it."""
    found: list[str] = []

    def answer(model, processor, prompts, images, max_new_tokens):
        found.extend(prompts)
        return ["yes" if zlib.crc32(prompt.encode()) % 2 else "no" for prompt in prompts]

    monkeypatch.setattr(asking, "answer", answer)
    return found


def question(index, text="dog", label="yes"):
    return {"question_id": index, "image": f"{index % 4}.bmp", "text": f"Is there a {text} {index}?", "label": label}


@pytest.fixture
def data(tmp_path):
    """A question file about four images, and its images."""
    for index in range(4):
        Image.new("RGB", (56, 56), (index * 40, 0, 0)).save(tmp_path / f"{index}.bmp")
    (tmp_path / "q.json").write_text("\n".join(json.dumps(question(index)) for index in range(12)))
    return tmp_path


def run(bundled, data, presets=(), **options):
    """A run on the data, and all that it said."""
    said: list[str] = []
    suite = Pope.on_files([data / "q.json"], data)
    result = evaluate(
        *bundled, [suite], presets, data / "run", "embedded", batch_size=3, say=said.append, **options
    )  # fmt: skip
    return result, said


def test_an_unchanged_run_asks_nothing(bundled, data, asked):
    first, _ = run(bundled, data)
    assert len(asked) == 12
    again, said = run(bundled, data)
    assert len(asked) == 12
    assert again.summary["tables"] == first.summary["tables"]
    assert not any("asked again" in line for line in said)


def test_questions_of_a_changed_image_are_asked_again_by_name(bundled, data, asked):
    run(bundled, data, ["vhr"])
    path = data / "2.bmp"
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 255  # a pixel: same size, same time
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    del asked[:]
    _, said = run(bundled, data, ["vhr"])
    assert any(f"has changed ({path})" in line for line in said)
    assert {question(index)["text"] for index in (2, 6, 10)} <= set(asked)
    assert len(asked) % 3 == 0
    assert len(asked) < 24, "batches without it stay"


@pytest.mark.parametrize("change", [{"text": "cat"}, {"label": "no"}])
def test_changed_questions_and_truths_are_not_answered_by_old_answers(bundled, data, asked, change):
    run(bundled, data)
    lines = [question(index, **(change if index == 5 else {})) for index in range(12)]
    (data / "q.json").write_text("\n".join(map(json.dumps, lines)))
    del asked[:]
    resumed, said = run(bundled, data)
    assert question(5, **change)["text"] in asked
    assert any("asked again" in line and "pope" in line for line in said)
    fresh = evaluate(
        *bundled,
        [Pope.on_files([data / "q.json"], data)],
        [],
        data / "fresh",
        "embedded",
        batch_size=3,
        say=said.append,
    )
    assert resumed.answers == fresh.answers
    for name in ("tables", "overall", "questions"):
        assert resumed.summary[name] == fresh.summary[name]


def test_an_image_that_changes_during_the_run_ends_it(bundled, data, asked, monkeypatch):
    real, batches = runner.ask_all, []

    def ask(model, processor, suite, preset, *rest):
        real(model, processor, suite, preset, *rest)
        batches.append(preset)
        if preset == "none":
            Image.new("RGB", (56, 56), "blue").save(data / "1.bmp")

    monkeypatch.setattr(runner, "ask_all", ask)
    with pytest.raises(StateError, match=r"the image of '1\.bmp/.*' changed during the run"):
        run(bundled, data, ["vhr"])
    monkeypatch.setattr(runner, "ask_all", real)
    _, said = run(bundled, data, ["vhr"])
    assert any("1.bmp" in line for line in said)


@pytest.mark.parametrize("where", ["middle", "last", "buffer"])
def test_one_weight_anywhere_is_another_model(where):
    model, _ = vlmattn.load("embedded")
    before = fingerprint(model)
    assert before == fingerprint(vlmattn.load("embedded")[0])
    with torch.no_grad():
        weight = model.get_input_embeddings().weight.view(-1)
        if where == "buffer":
            next(buffer for _, buffer in model.named_buffers() if buffer.is_floating_point()).view(-1)[-1] += 1
        else:
            weight[len(weight) // 2 + 1 if where == "middle" else -1] += 1e-3
    assert fingerprint(model) != before


@settings(max_examples=60)
@given(st.data())
def test_any_flipped_bit_moves_the_fingerprint(data):
    dtype = data.draw(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.int64])
    )
    shape = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=2))
    holder = torch.nn.Module()
    base = torch.randint(0, 2, (3, *shape), generator=torch.Generator().manual_seed(1)).to(dtype)
    holder.register_buffer("w", base[data.draw(st.integers(0, 2))])  # a part of a larger storage
    if len(shape) == 2 and data.draw(st.booleans()):
        holder.w = holder.w.T
    before = fingerprint(holder)
    place = data.draw(st.integers(0, holder.w.numel() - 1))
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), holder.w.shape))
    holder.w[index] = 1 - holder.w[index].to(torch.float32)
    assert fingerprint(holder) != before


def test_other_settings_that_change_answers_are_refused_by_name(bundled, data, asked):
    model, processor = bundled
    run(bundled, data)
    template, mean = processor.chat_template, processor.image_processor.image_mean
    changes = [
        (model.generation_config, "num_beams", 3, r"\(decoding\): decoding\.num_beams"),
        (model.generation_config, "repetition_penalty", 1.5, r"\(decoding\): decoding\.repetition_penalty"),
        (processor, "chat_template", template + " ", r"\(processor\)"),
        (processor.image_processor, "image_mean", [0.4, *mean[1:]], r"\(processor\)"),
        (model.config.text_config, "rms_norm_eps", 0.1, r"\(config\)"),
    ]
    for owner, name, value, words in changes:
        before = getattr(owner, name)
        setattr(owner, name, value)
        try:
            with pytest.raises(StateError, match=words):
                run(bundled, data)
        finally:
            setattr(owner, name, before)
    run(bundled, data)
    assert len(asked) == 12


def test_a_changed_file_of_a_preset_is_refused_by_its_path(bundled, data, asked):
    model, _ = bundled
    sizes = find_family(model).anatomy(model)
    path = SinkProfile(fingerprint=sizes.fingerprint, dims=(1,), tau=2.0).save(data / "sinks.json")
    recipe = vlmattn.Recipe.of("var", profile=str(path))
    result, _ = run(bundled, data, [recipe])
    assert list(result.summary["files"]) == [str(path)]
    path.write_text(path.read_text() + " ")
    with pytest.raises(StateError, match=rf"\(files\): files\.{path}"):
        run(bundled, data, [recipe])


def test_the_record_and_the_words_say_how_answers_are_decoded(bundled, data, asked, monkeypatch):
    model, _ = bundled
    result, said = run(bundled, data)
    assert "decoding: greedy decoding" in said
    assert result.summary["decoding"]["num_beams"] == 1
    monkeypatch.setattr(model.generation_config, "num_beams", 5)
    monkeypatch.setattr(model.generation_config, "no_repeat_ngram_size", 3)
    monkeypatch.setattr(model.generation_config, "temperature", 0.7)  # nothing is sampled
    beams, said = run(bundled, data, restart=True)
    words = "beam search with 5 beams, no_repeat_ngram_size 3"
    assert f"decoding: {words}" in said
    told = json.loads((data / "run" / "settings.json").read_text())["decoding"]
    assert (told["num_beams"], told["no_repeat_ngram_size"], "temperature" in told) == (5, 3, False)
    assert f"All answers: {words}, as the model's generation config says." in notes(beams)
    assert words in markdown_tables(beams).replace("\\", "")


def test_what_is_recorded_is_what_generate_does(bundled, data, monkeypatch):
    model, _ = bundled
    seen, real = [], type(model)._beam_search

    def search(self, *given, **named):
        seen.append(named["generation_config"].num_beams)
        return real(self, *given, **named)

    monkeypatch.setattr(type(model), "_beam_search", search)
    monkeypatch.setattr(model.generation_config, "num_beams", 2)
    result, _ = run(bundled, data)
    assert set(seen) == {result.summary["decoding"]["num_beams"]} == {2}


def test_decoding_settings_are_those_that_differ_from_the_library():
    config = vlmattn.load("embedded")[0].generation_config
    found = decoding(SimpleNamespace(generation_config=config), [])
    assert decoding_in_words(found) == "greedy decoding"


def cut(content, data):
    return content[: data.draw(st.integers(0, len(content)))]


def flip(content, data):
    place = data.draw(st.integers(0, len(content) - 1))
    return content[:place] + bytes([content[place] ^ 1 << data.draw(st.integers(0, 7))]) + content[place + 1 :]


def shuffle(content, data):
    lines = data.draw(st.permutations(content.splitlines(keepends=True)))
    return b"".join([*lines, *data.draw(st.lists(st.sampled_from(lines), max_size=2))])


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(drawn=st.data())
def test_after_any_damage_a_resume_ends_with_the_undisturbed_answers(bundled, data, asked, drawn):
    if not (data / "run" / "answers.jsonl").exists():
        run(bundled, data)
        for name in ("answers.jsonl", "journal.jsonl", "settings.json"):
            (data / f"whole-{name}").write_bytes((data / "run" / name).read_bytes())
    whole = (data / "whole-journal.jsonl").read_bytes()
    damaged = drawn.draw(st.sampled_from([cut, flip, shuffle]))(whole, drawn)
    (data / "run" / "journal.jsonl").write_bytes(damaged)
    kept = sum(line in damaged.split(b"\n") for line in whole.splitlines())
    del asked[:]
    run(bundled, data)
    assert len(asked) == 12 - 3 * kept or damaged.endswith(b"}"), "a last line may lack its line break only"
    assert (data / "run" / "answers.jsonl").read_bytes() == (data / "whole-answers.jsonl").read_bytes()


def test_answers_with_unicode_line_ends_are_read_again(bundled, data, asked):
    lines = [question(index, text=f"do\u2028g\u0085 {index}") for index in range(12)]
    (data / "q.json").write_text(json.dumps(lines, ensure_ascii=False))
    run(bundled, data, ["vhr"])
    assert compare(data / "run", data / "run", [("none", "vhr")]).rows[0].questions == 12
