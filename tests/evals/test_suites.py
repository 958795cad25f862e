"""Suites: the generated questions, the published file formats, the scoring rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vlmattn.embedded.scenes import CATEGORIES
from vlmattn.errors import InputError, OptionError
from vlmattn.evals.suites import PQA, Chair, Pope, Which, World
from vlmattn.evals.suites.chair import whole_sentences
from vlmattn.evals.suites.pope import SPLITS, read_questions, says_yes
from vlmattn.evals.suites.world import absent_objects, co_occurrence
from vlmattn.evals.words import ObjectWords

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("yes", True), ("Yes, there is a dog.", True), ("No", False), ("no.", False), ("No, there is not", False), ("There is not a dog", False),
        ("Yes. No doubt", True), ("NO", True), ("", True), ("nothing", True),
    ],
)  # fmt: skip
def test_answers_are_read_by_popes_own_rule(answer, yes):
    assert says_yes(answer) is yes


def test_generated_pope_is_balanced_and_true():
    world = World("clear", 0.0, 20)
    samples = Pope.on_scenes([world]).samples()
    for split in SPLITS:
        members = [s for s in samples if split in s.splits]
        assert len(members) == 120
        assert sum(s.truth for s in members) == 60
    for sample in samples:
        present = sample.id.split("/")[-1] in world.scene(int(sample.image_id)).categories
        assert present == sample.truth
    assert len({s.id for s in samples}) == len(samples)


def test_negatives_follow_the_three_rules():
    import numpy as np

    counts = co_occurrence()
    scene = World("clear", 0.0, 1).scene(0)
    absent = [name for name in CATEGORIES if name not in scene.categories]
    popular = absent_objects(scene, "popular", np.random.default_rng(0))
    frequency = {name: counts[CATEGORIES.index(name), CATEGORIES.index(name)] for name in absent}
    assert min(frequency[name] for name in popular) >= max(frequency[name] for name in absent if name not in popular)
    adversarial = absent_objects(scene, "adversarial", np.random.default_rng(0))
    assert len(set(adversarial)) == len(adversarial) == len(scene.things)
    first = counts[CATEGORIES.index(scene.categories[0])]
    assert first[CATEGORIES.index(adversarial[0])] == max(first[CATEGORIES.index(name)] for name in absent)


def test_the_prior_dial_breaks_pairs():
    from vlmattn.embedded.scenes import PARTNER

    def pairs(share: float) -> float:
        scenes = [World("clear", share, 200).scene(i) for i in range(200)]
        return sum(any(PARTNER[c] in s.categories for c in s.categories) for s in scenes) / 200

    assert pairs(1.0) == 0
    assert pairs(0.0) > 0.6
    assert pairs(0.0) > pairs(0.5) > 0


def test_swapped_worlds_show_another_scene():
    plain, swapped = World("clear", 0, 5), World("clear", 0, 5, swapped=True)
    assert swapped.scene(2) == plain.scene(2)
    assert list(swapped.image(2)[0].getdata()) == list(plain.image(3)[0].getdata())


@pytest.mark.parametrize("bad", [dict(visibility="foggy"), dict(prior_broken=1.5), dict(count=0)])
def test_worlds_refuse_bad_dials(bad):
    with pytest.raises(OptionError):
        World(**bad)


def test_scores_of_pope():
    pope = Pope.on_scenes([World("clear", 0, 2)])
    positive = next(s for s in pope.samples() if s.truth)
    negative = next(s for s in pope.samples() if not s.truth)
    assert pope.score(positive, "yes") == {"tp": 1, "fp": 0, "tn": 0, "fn": 0}
    assert pope.score(negative, "yes")["fp"] == 1
    assert pope.right(pope.score(negative, "no"))
    assert not pope.right(pope.score(positive, "no"))


def test_scores_of_chair_count_mentions():
    world = World("clear", 0, 30)
    chair = Chair.on_scenes([world])
    sample = next(s for s in chair.samples() if "clock" not in s.truth.objects)
    a, b, _ = sorted(sample.truth.objects)
    record = chair.score(sample, f"there is a red {a} , a blue clock , a {b} and a green clock .")
    assert (record["mentions"], record["wrong_mentions"], record["wrong_captions"]) == (4, 2, 1)
    assert (record["objects"], record["found"], record["repeating"]) == (3, 2, 1)
    assert chair.right(chair.score(sample, f"there is a {a} ."))


def test_synonyms_name_the_same_object():
    chair = Chair.on_scenes([World("clear", 0, 50)])
    sample = next(s for s in chair.samples() if "dog" in s.truth.objects)
    assert chair.score(sample, "there is a brown puppy .")["found"] == 1


def test_which_is_balanced_over_positions():
    samples = Which(World("clear", 0, 24)).samples()
    for count in (2, 3, 4):
        golds = [s.truth for s in samples if s.splits[0] == f"{count} images"]
        assert {golds.count(str(k + 1)) for k in range(count)} == {24 // count}
        assert all(len(s.images()) == count for s in samples if s.splits[0] == f"{count} images")


def question_file(path: Path, as_array: bool = False) -> list[dict]:
    items = [
        {
            "question_id": i,
            "image": f"{i // 2}.png",
            "text": f"Is there a thing {i % 2} in the image?",
            "label": ["yes", "no"][i % 2],
        }
        for i in range(4)
    ]
    path.write_text(json.dumps(items) if as_array else "\n".join(json.dumps(item) for item in items) + "\n")
    return items


@pytest.mark.parametrize("as_array", [False, True])
def test_published_pope_files(tmp_path, as_array):
    path = tmp_path / "coco_pope_popular.json"
    question_file(path, as_array)
    for i in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    samples = Pope.on_files([path], tmp_path).samples()
    assert [s.truth for s in samples] == [True, False, True, False]
    assert samples[0].splits == ("popular",)
    assert samples[0].images()[0].size == (8, 8)
    both = Pope.on_files([path, path], tmp_path).samples()
    assert len(both) == 4
    assert both[0].splits == ("popular", "popular")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image": "a", "text": "q", "label": "yes"}\n{"image": \n', r"q.json:2: not valid JSON"),
        ('{"image": "a", "text": "q"}\n', r"q.json:1: .*needs image, text and label"),
        ('[{"image": "a", "text": "q", "label": "maybe"}]', r"item 1: label must be yes or no, got 'maybe'"),
        ("[1, 2", r"q.json:1: not valid JSON"),
        ("", "the file holds none"),
    ],
)
def test_corrupt_question_files_name_the_place(tmp_path, text, message):
    path = tmp_path / "q.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        Pope.on_files([path], tmp_path)


def test_missing_and_broken_images_name_the_path(tmp_path):
    path = tmp_path / "q.json"
    question_file(path)
    with pytest.raises(InputError, match=r"image not found: .*0\.png"):
        Pope.on_files([path], tmp_path).samples()[0].images()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "1.png")
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[:40] + b"damage" + whole[46:])  # a picture's head on a damaged body
    with pytest.raises(InputError, match=r"cannot read the picture .*0\.png"):
        Pope.on_files([path], tmp_path).samples()[0].images()
    for i in range(2):
        (tmp_path / f"{i}.png").write_text("not a picture")
    with pytest.raises(InputError, match=r"cannot read the picture .*0\.png"):
        Pope.on_files([path], tmp_path).samples()[0].images()
    with pytest.raises(InputError, match=r"cannot read .*none\.json"):
        read_questions(tmp_path / "none.json")


@pytest.mark.skipif(not (SHARED / "pope").is_dir(), reason="the published files are not here")
@pytest.mark.parametrize("name", ["coco_pope_random.json", "coco_pope_adversarial.json", "gqa_pope_seem_random.json"])
def test_the_real_published_files_load(name):
    items = read_questions(SHARED / "pope" / name)
    assert len(items) == 3000
    assert sum(item.yes("label") for item in items) == 1500


def test_chair_on_coco_annotation_files(tmp_path):
    instances = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 9, "file_name": "b.png"}],
        "annotations": [{"image_id": 7, "category_id": 18}, {"image_id": 9, "category_id": 3}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
    }
    captions = {
        "annotations": [{"image_id": 7, "caption": "A dog near a bench."}, {"image_id": 9, "caption": "A red car."}]
    }
    (tmp_path / "i.json").write_text(json.dumps(instances))
    (tmp_path / "c.json").write_text(json.dumps(captions))
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    chair = Chair.on_files(tmp_path / "i.json", tmp_path, tmp_path / "c.json")
    sample = next(s for s in chair.samples() if s.id == "7")
    record = chair.score(sample, "A puppy lies beside two benches and a bus.")
    assert (record["mentions"], record["wrong_mentions"], record["found"]) == (3, 1, 2)


def test_pqa_asks_about_every_image_at_every_position():
    world = World("clear", 0, 12)
    suite = PQA.on_scenes(world, sizes=(2, 3), sets=4)
    samples = suite.samples()
    assert len(samples) == 4 * (2 * 2 + 3 * 3)
    assert len({sample.id for sample in samples}) == len(samples)
    for sample in samples:
        size, number, which, place = (int(part) for part in sample.id.split("/")[1:])
        assert len(sample.images()) == size
        assert f"in image {place + 1}?" in sample.prompt
        group = [s for s in samples if s.id.split("/")[1:4] == [str(size), str(number), str(which)]]
        assert len({s.truth for s in group}) == 1  # the same image, wherever it stands
        pictures = {s.images()[int(s.id.split("/")[-1])].tobytes() for s in group}
        assert len(pictures) == 1
    for position in (1, 2, 3):
        members = [s for s in samples if f"3 images, position {position}" in s.splits]
        assert len(members) == 12


def test_pqa_tells_answers_that_change_with_the_order():
    suite = PQA.on_scenes(World("clear", 0, 12), sizes=(2,), sets=3)
    samples = suite.samples()
    steady = suite.records({s.id: "yes" if s.truth else "no" for s in samples}).values()
    assert sum(r["changed"] for r in steady) == 0
    assert sum(r["changed_asked"] for r in steady) == 6
    assert all(r["right"] for r in steady)
    first_only = suite.records({s.id: "yes" if s.id.endswith("/0") else "no" for s in samples}).values()
    assert sum(r["changed"] for r in first_only) == 6
    assert sum(r["right"] for r in first_only) == 6
    with pytest.raises(OptionError, match="2 images or more"):
        PQA.on_scenes(World("clear", 0, 3), sizes=(4,))


def test_sentences_that_were_cut_off_are_left_out_on_request():
    assert whole_sentences("A cat sits. A dog runs on the") == "A cat sits."
    assert whole_sentences("Is it a cat? Yes!") == "Is it a cat? Yes!"
    assert whole_sentences("a cat and a dog on") == "a cat and a dog on"
    world = World("clear", 0, 1)
    (sample,) = Chair.on_scenes([world]).samples()
    absent = next(name for name in CATEGORIES if name not in sample.truth.objects)
    here = sorted(sample.truth.objects)[0]
    answer = f"There is a {here}. There is also a {absent} on the"
    whole, cut = (
        Chair([sample], ObjectWords(dict.fromkeys(CATEGORIES, ())), {}, 8, drop_cut).score(sample, answer)
        for drop_cut in (False, True)
    )
    assert (whole["mentions"], whole["wrong_mentions"]) == (2, 1)
    assert (cut["mentions"], cut["wrong_mentions"]) == (1, 0)


def test_questions_can_be_asked_with_a_suffix(tmp_path):
    path = tmp_path / "q.json"
    question_file(path)
    plain = Pope.on_files([path], tmp_path)
    asked = Pope.on_files([path], tmp_path, suffix=" Please answer this question with one word.")
    assert [s.prompt for s in asked.samples()] == [
        f"{s.prompt} Please answer this question with one word." for s in plain.samples()
    ]
    assert [s.id for s in asked.samples()] == [s.id for s in plain.samples()]
    assert asked.settings["suffix"].endswith("one word.")  # or a run would be resumed with other prompts


def test_pqa_is_made_of_popes_questions(tmp_path):
    rows = [
        {"image": f"{name}.png", "text": f"Is there a {thing} in the image?", "label": label}
        for thing, labels in (("dog", "yyynn"), ("cat", "nnnnn"), ("ball", "yn"))
        for name, label in zip("abcde", ({"y": "yes", "n": "no"}[mark] for mark in labels), strict=False)
    ]
    path = tmp_path / "q.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, name in enumerate("abcde"):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{name}.png")
    suite = PQA.on_files([path], tmp_path, (2, 4), sets=6)
    truths = {(row["image"], row["text"]): row["label"] == "yes" for row in rows}
    groups: dict[str, list] = {}
    for sample in suite.samples():
        place = int(sample.splits[1].split()[-1])
        assert sample.prompt.endswith(f"in image {place}?")
        question = sample.prompt.replace(f"in image {place}", "in the image")
        shown = [f"{'abcde'[picture.getpixel((0, 0))[0]]}.png" for picture in sample.images()]
        assert len(set(shown)) == sample.image_count == int(sample.splits[0][0])
        assert sample.truth is truths[shown[place - 1], question]
        groups.setdefault(sample.image_id, []).append((shown[place - 1], place, sample.truth))
    for group in groups.values():  # every image at every position, and both answers
        assert len(group) == len(set(group)) == len({place for _, place, _ in group}) ** 2
        assert {truth for _, _, truth in group} == {True, False}
    with pytest.raises(InputError, match="both answers for 8 images"):
        PQA.on_files([path], tmp_path, (8,))
