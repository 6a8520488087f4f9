"""How answers are counted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence


def normalize(text: str) -> str:
    """An answer as it is compared: lower case, without outer blanks and a closing full stop."""
    return text.strip().rstrip(".").strip().lower()


def exact_match(answers: Sequence[str], truths: Sequence[str]) -> float:
    """Share of answers equal to the truth after `normalize`.

    >>> exact_match(["Yes.", "red"], ["yes", "blue"])
    0.5
    """
    return sum(normalize(a) == normalize(t) for a, t in zip(answers, truths, strict=True)) / len(truths)


def constant_accuracy(questions: Sequence[str], truths: Sequence[str]) -> float:
    """What the best constant answer to each question text scores: the most that words alone can give.

    >>> constant_accuracy(["q", "q", "q", "r"], ["a", "a", "b", "c"])
    0.75
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question, truth in zip(questions, truths, strict=True):
        counts[question][normalize(truth)] += 1
    return sum(counter.most_common(1)[0][1] for counter in counts.values()) / len(truths)
