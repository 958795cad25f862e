"""What is asked about scenes."""

from __future__ import annotations

DESCRIBE = "Describe the image."


def with_article(words: str) -> str:
    """``"apple" -> "an apple"``."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def existence_question(category: str) -> str:
    """The question of POPE: "Is there a cup in the image?"."""
    return f"Is there {with_article(category)} in the image?"
