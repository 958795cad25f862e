"""LLaVA-Bench in the wild (arXiv 2304.08485) on its published folder: answers rated beside GPT-4's."""

from __future__ import annotations

from pathlib import Path

from vlmattn.errors import InputError
from vlmattn.evals.judges import Judge, load_judge
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample
from vlmattn.evals.suites.files import ImageFolder, read_keyed
from vlmattn.evals.suites.rated import HALLUCINATIONS, Key, Rated
from vlmattn.evals.suites.registry import suite


@suite(
    "llava_bench",
    "open questions, rated beside GPT-4's answers",
    "LLaVA-Bench's folder (questions.jsonl, context.jsonl, answers_gpt4.jsonl)",
    "arXiv 2304.08485",
)
class LlavaBench(Rated):
    """relative = 100 x sum of the ratings of the answers / sum of those of GPT-4's answers. A split is a category.

    The judge knows the caption of the image, and rates GPT-4's answer (the reference) like any other.
    """

    title = "LLaVA-Bench in the wild: answers rated beside GPT-4's"
    fields = ("rating", "reference", "hallucinated", "asked")
    metrics = (
        Metric("relative", {"rating": 1}, {"reference": 1}, "ratings in per cent of those of the reference answers"),
        HALLUCINATIONS,
    )

    @classmethod
    def on_files(
        cls,
        data: Path,
        images: Path,
        limit: int | None = None,
        max_new_tokens: int = 512,
        judge: Judge | str = "rule",
        allow_outside: bool = False,
    ) -> LlavaBench:
        """The published folder; arguments and errors as of ``MMHal.on_files``.

        Raises:
            InputError: a question without context or answer.
        """
        judge = load_judge(judge)  # before the files are read
        if not data.is_dir():
            raise InputError(
                f"{data}: no such folder; LLaVA-Bench is one with questions.jsonl, context.jsonl and answers_gpt4.jsonl"
            )
        questions = read_keyed(
            data / "questions.jsonl", "question_id", ("image", "category", "text"), "a LLaVA-Bench question"
        )
        context = read_keyed(data / "context.jsonl", "image", ("caption",), "a LLaVA-Bench context")
        answers = read_keyed(data / "answers_gpt4.jsonl", "question_id", ("text",), "a LLaVA-Bench answer")
        pictures = ImageFolder(images, allow_outside)
        samples = []
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
            samples.append(
                Sample(
                    id=key,
                    image_id=image,
                    condition="llava_bench",
                    splits=(item.text("category"),),
                    prompt=item.text("text"),
                    images=pictures.files(item.where, [image]),
                    truth=Key(answers[key].text("text"), tuple(lines)),
                )
            )
        return cls(samples, {"folder": data.name, "limit": limit}, judge, max_new_tokens)

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        said, reference = (self.rated(sample, text) for text in (answer, sample.truth.reference))
        return {
            "rating": said.rating,
            "reference": reference.rating,
            "hallucinated": float(said.hallucinated),
            "asked": 1.0,
        }
