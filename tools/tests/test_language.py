"""What the bundled models are taught about scenes: answers are true, words are known, turns are those of the
processor."""

from __future__ import annotations

import numpy as np

from tools.bundled.language import build_processor, build_tokenizer, caption, multi_image_turns, turns
from tools.bundled.train_tiny import text_batch, vision_batch
from vlmattn.embedded.scenes import CATEGORIES, COLOURS, make_scene, patch_labels
from vlmattn.embedded.tower import IMAGE_TOKENS


def test_patches_are_of_the_thing_that_is_there():
    scene, _ = make_scene(2, 7, "clear", count=1)
    (thing,) = scene.things
    category, colour = patch_labels(scene)
    assert set(category) - {0} == {CATEGORIES.index(thing.category) + 1}
    assert set(colour) - {0} == {list(COLOURS).index(thing.colour) + 1}


def test_answers_are_true():
    rng = np.random.default_rng(0)
    for i in range(60):
        scene, _ = make_scene(4, i)
        for question, answer in turns(scene, rng):
            if question.startswith("what color"):
                name = question.split()[4]
                assert next(t.colour for t in scene.things if t.category == name) == answer
        said = caption(scene, rng)
        assert said.count(" a ") + said.count(" an ") == len(scene.things)
        assert all(t.colour in said for t in scene.things)


def test_which_image_answers_are_true():
    rng = np.random.default_rng(1)
    scenes = [make_scene(4, i)[0] for i in range(3)]
    for question, answer in multi_image_turns(scenes, rng, 40):
        if question.startswith("in which"):
            name = question.split()[5]
            assert [i for i, s in enumerate(scenes) if name in s.categories] == [int(answer) - 1]


def test_every_word_is_in_the_vocabulary():
    tokenizer, rng = build_tokenizer(), np.random.default_rng(2)
    for i in range(40):
        scene, _ = make_scene(4, i)
        for question, answer in turns(scene, rng) + multi_image_turns([scene, make_scene(4, i + 1)[0]], rng):
            assert tokenizer.unk_token_id not in tokenizer(f"{question} {answer}")["input_ids"]
    assert (
        tokenizer("Is there a dog in the image?")["input_ids"]
        == tokenizer("is there a dog in the image ?")["input_ids"]
    )


def turn_numbers(batch):
    """Which turn each token of the first row belongs to; 0 is the image prefix. Every turn starts at the same
    position."""
    return (batch["position"][0] == 2 + IMAGE_TOKENS).cumsum(0)


def test_training_turns_have_the_tokens_of_the_processor():
    """A turn as it is trained is the prompt that the chat template makes."""
    batch = text_batch(0)
    ids = batch["ids"][0][turn_numbers(batch) <= 1].tolist()
    processor = build_processor()
    content = [{"type": "image"}, {"type": "text", "text": "describe the image ."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    prompt = processor(text=text, images=np.zeros((56, 56, 3), np.uint8), add_special_tokens=False)["input_ids"][0]
    assert ids[: len(prompt)] == list(prompt)
    assert ids[-1] == processor.tokenizer.eos_token_id


def test_turns_do_not_see_each_other():
    batch = text_batch(1)
    seen = batch["mask"][0, 0] == 0
    turn = turn_numbers(batch)
    second = int((turn == 2).nonzero()[0])
    assert seen[second, turn == 0].all()
    assert not seen[second, turn == 1].any()
    assert turn.max() == 8


def test_batches_follow_from_their_step():
    for make in (vision_batch, text_batch):
        first, again, other = make(5), make(5), make(6)
        assert all(bool((first[name] == again[name]).all()) for name in first)
        assert first["pixels"].shape != other["pixels"].shape or bool((first["pixels"] != other["pixels"]).any())
