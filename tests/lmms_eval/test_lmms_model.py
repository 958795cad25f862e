"""The model that lmms-eval sees: arguments, batches, order, and what becomes of it after an evaluation."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest

pytest.importorskip("lmms_eval.models")  # its own name would find this folder

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from lmms_runs import figures, write_tasks
from PIL import Image

import vlmattn
from vlmattn.errors import InputError, OptionError, StateError, UnknownNameError, UnsupportedError
from vlmattn.lmms_eval.model import Vlmattn
from vlmattn.wrapping import handle_of


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    return TaskManager(include_path=str(write_tasks(tmp_path_factory.mktemp("tasks"))), include_defaults=False)


@pytest.fixture(scope="module")
def bundled():
    return vlmattn.load("embedded")


def run(manager, model, task="small_pope", **options):
    """Answers in order, and figures."""
    found = simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0, **options)
    answers = [sample["filtered_resps"][0] for sample in found["samples"][task]]
    return answers, figures(found["results"][task])


@pytest.fixture(scope="module")
def by_fours(manager, bundled):
    model, processor = bundled
    return run(manager, Vlmattn(model, "vhr", batch_size=4, processor=processor))


def test_the_entry_point_leads_to_the_model():
    (point,) = entry_points(group="lmms_eval.models", name="vlmattn")
    (manifest,) = point.load()()
    assert manifest.model_id == "vlmattn"
    assert get_model("vlmattn") is Vlmattn
    assert not Vlmattn.is_simple


def test_batches_of_one_are_batches_of_four(manager, bundled, by_fours):
    model, processor = bundled
    assert run(manager, Vlmattn(model, "vhr", batch_size=1, processor=processor)) == by_fours


def test_a_model_that_is_handed_in_is_given_back_bare_and_asked_again(manager, bundled, by_fours):
    model, processor = bundled
    lm = Vlmattn(model, "vhr", batch_size=4, processor=processor)
    assert run(manager, lm) == by_fours
    assert handle_of(model) is None
    assert run(manager, lm) == by_fours
    assert lm.model is model


def test_a_model_that_was_loaded_is_freed_and_loaded_again(manager, by_fours):
    lm = Vlmattn("embedded", "vhr", batch_size=4)
    assert run(manager, lm) == by_fours
    assert not hasattr(lm, "model")
    assert run(manager, lm) == by_fours


def test_the_response_cache_tells_presets_apart(manager, by_fours, tmp_path):
    for preset in ("none", "vhr", "vhr"):
        arguments = f"pretrained=embedded,preset={preset}"
        found = run(manager, "vlmattn", model_args=arguments, batch_size=4, use_cache=str(tmp_path))
        assert (found == by_fours) == (preset == "vhr")


def test_several_images_in_a_prompt(manager, bundled):
    model, processor = bundled
    answers, found = run(manager, Vlmattn(model, "none", batch_size=4, processor=processor), "small_pqa")
    assert len(answers) == 4 + 16
    assert set(answers) <= {"yes", "no"}
    assert {"accuracy_2_images", "accuracy_4_images_position_3", "inconsistency_4_images"} <= found.keys()


def request(question, settings, *images):
    """A request as lmms-eval makes it, of a task with one document."""
    from lmms_eval.api.instance import Instance

    content = [*({"type": "image", "url": image} for image in images), {"type": "text", "text": question}]
    arguments = ("", lambda doc: [{"role": "user", "content": content}], settings, 0, "task", "test")
    return Instance("generate_until", arguments, 0, {"task": "task", "doc_id": 0, "repeats": 1})


@pytest.fixture
def lm(bundled):
    model, processor = bundled
    found = Vlmattn(model, batch_size=3, processor=processor)
    found.task_dict = {"task": {"test": [{}]}}
    return found


def test_requests_with_different_settings_are_answered_in_their_order(lm):
    picture, questions = Image.new("L", (48, 48)), ["Is there a dog in the image?", "What is in the image?"]
    short, long = {"max_new_tokens": 1, "until": ["\n\n"]}, {"max_new_tokens": 12, "temperature": 0.0}
    wanted = [request(questions[i % 2], short if i % 3 else long, picture) for i in range(8)]
    alone = [lm.generate_until([one])[0] for one in wanted]
    together = lm.generate_until(wanted)
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.token_counts.output_tokens for one in together] == [one.token_counts.output_tokens for one in alone]
    assert together[1].token_counts.output_tokens == 1


def test_a_failed_answer_is_an_error(lm, monkeypatch):
    def fail(**_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(lm.model, "generate", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        lm.generate_until([request("Is there a dog in the image?", {}, Image.new("RGB", (48, 48)))])


def test_pictures_are_images_or_paths(lm, tmp_path):
    Image.new("RGB", (48, 48)).save(tmp_path / "a.png")
    assert lm.generate_until([request("Is there a dog in the image?", {}, str(tmp_path / "a.png"))])[0].text
    with pytest.raises(InputError, match="image not found"):
        lm.generate_until([request("Is there a dog?", {}, str(tmp_path / "b.png"))])
    with pytest.raises(InputError, match="PIL image or a path, got bytes"):
        lm.generate_until([request("Is there a dog?", {}, b"")])


def test_what_it_cannot_do_is_said(lm):
    for call in (lm.loglikelihood, lm.generate_until_multi_round):
        with pytest.raises(UnsupportedError, match="output_type: generate_until"):
            call([])
    film = request("What happens?", {})
    film.arguments = (
        "",
        lambda doc: [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}],
        *film.args[2:],
    )
    with pytest.raises(UnsupportedError, match="task shows video"):
        lm.generate_until([film])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ("preset=vhrr", UnknownNameError, "unknown preset 'vhrr'; did you mean vhr"),
        ("presets=vhr", UnknownNameError, "unknown model argument 'presets'; did you mean preset"),
        ("preset=vcd+deco", OptionError, "conflict"),
        ("preset=agla", OptionError, "with every call"),
        ("pretrained=/no/such/folder", InputError, "cannot load '/no/such/folder'"),
        ("batch_size=auto", OptionError, "must be a number, at least 1, got 'auto'"),
    ],
)
def test_bad_arguments_are_errors_with_a_remedy(arguments, error, match):
    with pytest.raises(error, match=match):
        get_model("vlmattn").create_from_arg_string(arguments)


def test_a_wrapped_model_is_refused(bundled):
    model, processor = bundled
    with vlmattn.applied(model, "vhr"), pytest.raises(StateError, match="preset='vhr'"):
        Vlmattn(model, processor=processor)
    with pytest.raises(InputError, match="needs its processor"):
        Vlmattn(model)
