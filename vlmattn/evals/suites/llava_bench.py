"""LLaVA-Bench in the wild (arXiv 2304.08485) on its published folder: answers rated beside GPT-4's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmattn.errors import InputError
from vlmattn.evals.judges import Judge, Ratings
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.files import ImageFolder
from vlmattn.evals.suites.keyed import read_keyed


@dataclass(frozen=True)
class _Key:
    reference: str
    context: tuple[str, ...]


class LlavaBench(Suite):
    """relative = 100 x sum of the ratings of the answers / sum of those of GPT-4's answers. A split is a category.

    The judge knows the caption of the image, and rates GPT-4's answer (the reference) like any other.

    Args:
        folder: with ``questions.jsonl``, ``context.jsonl`` and ``answers_gpt4.jsonl``.
        images: folder of the images.
        limit: use the first so many questions.
        judge: who rates; default ``RuleJudge`` (experimental), where the paper asks GPT-4.
        allow_outside: whether the names of images may lead out of the folder.

    Raises:
        InputError: a file that cannot be read, or is not in the published form; a question without context or answer.
    """

    name = "llava_bench"
    title = "LLaVA-Bench in the wild: answers rated beside GPT-4's"
    fields = ("rating", "reference", "hallucinated", "asked")
    metrics = (
        Metric("relative", {"rating": 1}, {"reference": 1}, "ratings in per cent of those of the reference answers"),
        Metric(
            "hallucinations",
            {"hallucinated": 1},
            {"asked": 1},
            "answers with a hallucination, says the judge",
            better="lower",
            label="halluc.",
        ),
    )

    def __init__(
        self,
        folder: Path,
        images: Path,
        limit: int | None = None,
        max_new_tokens: int = 512,
        judge: Judge | None = None,
        allow_outside: bool = False,
    ) -> None:
        self._ratings = Ratings(judge)
        self.max_new_tokens = max_new_tokens
        self.settings = {
            "folder": folder.name,
            "limit": limit,
            "max_new_tokens": max_new_tokens,
            "judge": self._ratings.name,
        }
        if not folder.is_dir():
            raise InputError(
                f"{folder}: no such folder; LLaVA-Bench is one with questions.jsonl, context.jsonl and answers_gpt4.jsonl"
            )
        questions = read_keyed(
            folder / "questions.jsonl", "question_id", ("image", "category", "text"), "a LLaVA-Bench question"
        )
        context = read_keyed(folder / "context.jsonl", "image", ("caption",), "a LLaVA-Bench context")
        answers = read_keyed(folder / "answers_gpt4.jsonl", "question_id", ("text",), "a LLaVA-Bench answer")
        pictures = ImageFolder(images, allow_outside)
        self._samples: list[Sample] = []
        for key, item in list(questions.items())[:limit]:
            image = item.key("image")
            if image not in context:
                raise InputError(f"{item.where}: image {image} is not in context.jsonl; take both from one release")
            if key not in answers:
                raise InputError(
                    f"{item.where}: question {key} is not in answers_gpt4.jsonl; take both from one release"
                )
            about = context[image]
            lines = about.texts("caption") if isinstance(about.values["caption"], list) else [about.text("caption")]
            self._samples.append(
                Sample(
                    id=key,
                    image_id=image,
                    condition="llava_bench",
                    splits=(item.text("category"),),
                    prompt=item.text("text"),
                    images=pictures.files(item.where, [image]),
                    truth=_Key(answers[key].text("text"), tuple(lines)),
                )
            )

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        key: _Key = sample.truth
        said, reference = (
            self._ratings.of(sample.id, sample.prompt, key.reference, key.context, text)
            for text in (answer, key.reference)
        )
        return {
            "rating": said.rating,
            "reference": reference.rating,
            "hallucinated": float(said.hallucinated),
            "asked": 1.0,
        }

    def right(self, record: Mapping[str, float]) -> bool:
        return not record["hallucinated"]

    def expected(self, sample: Sample) -> str:
        return str(sample.truth.reference)
