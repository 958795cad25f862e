"""``--model vlmattn``: any model of ours with a recipe, in batches, for lmms-eval."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import Image
from tqdm import tqdm

import vlmattn
from vlmattn.errors import InputError, OptionError, StateError, UnknownNameError, UnsupportedError
from vlmattn.evals.loading import load
from vlmattn.evals.prompts import decode, encode_chats, generate
from vlmattn.evals.runner import refuse_missing
from vlmattn.evals.suites.files import read_image
from vlmattn.lmms_eval.generation import cut, options_of, stops_of
from vlmattn.pictures import upright
from vlmattn.recipe import Recipe
from vlmattn.wrapping import handle_of

_ARGUMENTS = ("pretrained", "preset", "dtype", "device_map", "load_in", "max_new_tokens")


class Vlmattn(lmms):
    """A chat model of lmms-eval that answers under a recipe; between two evaluations its model is bare.

    Args:
        pretrained: ``embedded``, ``smol``, a folder, a hub name, or a bare model (then with its ``processor``), which
            stays yours.
        preset: names joined by ``+``, or a recipe file. lmms-eval's response cache knows it as part of the model
            arguments.
        batch_size: at most so many questions at once; only those with the same generation settings.
        device: as ``device_map``, for a single process.
        dtype: auto, float32, bfloat16 or float16.
        load_in: 8bit or 4bit.
        max_new_tokens: instead of what tasks say.

    Raises:
        UnknownNameError: no such preset or argument (names the nearest).
        OptionError: a recipe that does not fit the model; a value out of range.
        InputError: the model cannot be loaded.
        StateError: the model that is handed in is wrapped.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: Any = "embedded",
        preset: Any = "none",
        batch_size: int | str = 1,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        load_in: str | None = None,
        max_new_tokens: int | None = None,
        processor: Any = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            raise UnknownNameError("model argument", name, _ARGUMENTS)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise OptionError(f"the batch size must be a number, at least 1, got '{batch_size}'")
        self.batch_size, self.max_new_tokens = int(batch_size), max_new_tokens
        self.recipe = Recipe.of(preset)  # before the weights are read: names are checked at once
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._owned = isinstance(pretrained, str)
        self._loading = (pretrained, dtype, device_map or (device if self._world_size == 1 else None), load_in)
        if self._owned:
            self._load()
        elif processor is None:
            raise InputError("a model that is handed in needs its processor: Vlmattn(model, processor=processor)")
        else:
            self.model, self.processor = pretrained, processor
        if (handle := handle_of(self.model)) is not None:  # lmms-eval would not know of its recipe
            raise StateError(f"the model is wrapped; hand in the bare one with preset='{handle.recipe.name}'")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said again when it answers
            with self._applied():  # what does not fit the model is an error now
                refuse_missing(self.model, self.recipe.name)

    @property
    def device(self) -> torch.device:
        """Where the processes tell each other how much they have to do."""
        found: torch.device = self.accelerator.device
        return found

    def _load(self) -> None:
        self.model, self.processor = load(*self._loading)

    def _applied(self) -> AbstractContextManager[Any]:
        if self.recipe.is_none:
            return nullcontext()
        return vlmattn.applied(self.model, self.recipe, processor=self.processor)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests. What goes wrong is raised, never an empty answer."""
        if not hasattr(self, "model"):  # clean() has freed it
            self._load()
        self.processor.tokenizer.padding_side = "left"
        alike: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[2].items())), []).append(place)
        found: dict[int, GenerationResult] = {}
        with self._applied(), tqdm(total=len(requests), desc=self.recipe.name, disable=self.rank != 0) as bar:
            for places in alike.values():
                for start in range(0, len(places), self.batch_size):
                    batch = places[start : start + self.batch_size]
                    found.update(zip(batch, self._answer([requests[place] for place in batch]), strict=True))
                    bar.update(len(batch))
        return [found[place] for place in range(len(requests))]

    def _answer(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers to one batch, whose generation settings are the same."""
        settings = requests[0].args[2]
        chats, images = zip(*map(self._chat, requests), strict=True)
        inputs = encode_chats(self.model, self.processor, chats, images)
        tokens = generate(self.model, inputs, **options_of(settings, self.max_new_tokens))
        padding = self.processor.tokenizer.pad_token_id
        counts = [int(row.ne(padding).sum()) if padding is not None else len(row) for row in tokens]
        texts = decode(self.processor, tokens)
        return [
            GenerationResult(cut(text, stops_of(settings)), TokenCounts(output_tokens=count))
            for text, count in zip(texts, counts, strict=True)
        ]

    def _chat(self, request: Instance) -> tuple[list[dict[str, Any]], list[Image.Image]]:
        """The turns of a request as chat templates take them, and its images."""
        _, to_messages, _, number, task, split = request.args
        chat, images = [], []
        for message in ChatMessages(messages=to_messages(self.task_dict[task][split][number])).messages:
            content = []
            for part in message.content:
                if part.type == "text":
                    content.append({"type": "text", "text": part.text})
                elif part.type == "image":
                    content.append({"type": "image"})
                    images.append(_picture(part.url))
                else:
                    raise UnsupportedError(f"task {task} shows {part.type}; vlmattn answers about images")
            chat.append({"role": message.role, "content": content})
        return chat, images

    def clean(self) -> None:
        """Free the memory, after the last answer: of a model that was loaded here, not of one that was handed in."""
        if self._owned:
            super().clean()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise UnsupportedError("vlmattn answers by generation; use tasks with output_type: generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise UnsupportedError("vlmattn answers one question at a time; use tasks with output_type: generate_until")


def _picture(image: Any) -> Image.Image:
    """A picture of a task: an image or its path."""
    if isinstance(image, Image.Image):
        return upright(image)
    if isinstance(image, (str, Path)):
        return read_image(Path(image))
    raise InputError(f"an image of a task must be a PIL image or a path, got {type(image).__name__}")
