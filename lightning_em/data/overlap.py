"""Find duplicate questions: exact, equal up to case and spacing, or nearly equal."""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch

Likeness = Literal["exact", "normalised", "near"]

NEAR = 0.6
_SHINGLE = 4
_BUCKETS = 1024
_CHUNK = 512


class Question(NamedTuple):
    """A question and the row it comes from."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


class Match(NamedTuple):
    """Two similar questions.

    Attributes:
        first: First question.
        second: Second question.
        likeness: Kind of similarity.
        similarity: Jaccard similarity of the character 4-grams of both; 1 unless `near`.
    """

    first: Question
    second: Question
    likeness: Likeness
    similarity: float


def find_matches(
    first: Sequence[Question], second: Sequence[Question] | None = None, near: float = NEAR
) -> list[Match]:
    """Return the questions of `second` that resemble one of `first`, each with its best match.

    Args:
        first: Questions to search in.
        second: Questions to search for; without it, `first` is searched for questions that repeat an earlier one.
        near: Similarity from which two different questions count as near.
    """
    targets = first if second is None else second
    exact: dict[str, Question] = {}
    normalised: dict[str, Question] = {}
    for question in () if second is None else first:
        exact.setdefault(question.text, question)
        normalised.setdefault(normalise(question.text), question)
    matches: list[Match] = []
    unlike: list[Question] = []
    for question in targets:
        key = normalise(question.text)
        if question.text in exact:
            matches.append(Match(exact[question.text], question, "exact", 1.0))
        elif key in normalised:
            matches.append(Match(normalised[key], question, "normalised", 1.0))
        else:
            unlike.append(question)
        if second is None:
            exact.setdefault(question.text, question)
            normalised.setdefault(key, question)
    matches += _near_matches(list(normalised.values()), unlike, near, earlier_only=second is None)
    order = {id(question): number for number, question in enumerate(targets)}
    return sorted(matches, key=lambda match: order[id(match.second)])


def normalise(text: str) -> str:
    """Return the letters and digits of a text in one case, with words separated by single spaces."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _near_matches(
    first: Sequence[Question], second: Sequence[Question], near: float, earlier_only: bool
) -> list[Match]:
    """Return the best match of each question of `second`; with `earlier_only`, both are the same list."""
    if not first or not second:
        return []
    sets, wanted = ([_shingles(normalise(question.text)) for question in part] for part in (first, second))
    vectors, sizes = _counts(sets), torch.tensor([len(shingles) for shingles in sets])
    matches = []
    for start in range(0, len(second), _CHUNK):
        chunk = wanted[start : start + _CHUNK]
        common = _counts(chunk) @ vectors.T
        together = torch.tensor([len(shingles) for shingles in chunk])[:, None] + sizes
        # Shingles that collide in a bucket can only raise `common`, so this is an upper bound of the similarity.
        bounds = torch.where(common < together, common / (together - common), torch.inf)
        for offset, row in enumerate(bounds):
            number = start + offset
            allowed = row[:number] if earlier_only else row
            best, index = _best(chunk[offset], sets, allowed, near)
            if index is not None:
                matches.append(Match(first[index], second[number], "near", best))
    return matches


def _best(
    wanted: frozenset[str], sets: Sequence[frozenset[str]], bounds: torch.Tensor, near: float
) -> tuple[float, int | None]:
    """Return the most similar set; compare in the order of the bounds until no better one is possible."""
    candidates = torch.nonzero(bounds >= near - 1e-4).flatten()
    best, best_index = near, None
    for candidate in candidates[bounds[candidates].argsort(descending=True, stable=True)].tolist():
        if float(bounds[candidate]) < best - 1e-4:
            break
        similarity = _jaccard(wanted, sets[candidate])
        if similarity > best or (best_index is None and similarity >= near):
            best, best_index = similarity, candidate
    return best, best_index


def _counts(sets: Sequence[frozenset[str]]) -> torch.Tensor:
    """Count the shingles of each set in each of a fixed number of buckets, `[sets buckets]`."""
    counts = torch.zeros(len(sets), _BUCKETS)
    for row, shingles in enumerate(sets):
        buckets = torch.tensor([zlib.crc32(shingle.encode()) % _BUCKETS for shingle in shingles])
        counts[row] = torch.bincount(buckets, minlength=_BUCKETS)
    return counts


def _shingles(normalised: str) -> frozenset[str]:
    padded = f" {normalised} "
    return frozenset(padded[i : i + _SHINGLE] for i in range(max(1, len(padded) - _SHINGLE + 1)))


def _jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    common = len(first & second)
    return common / (len(first) + len(second) - common)


def count_by_likeness(matches: Iterable[Match]) -> dict[Likeness, int]:
    """Count the matches of each kind."""
    counts = Counter(match.likeness for match in matches)
    kinds: tuple[Likeness, ...] = ("exact", "normalised", "near")
    return {kind: counts[kind] for kind in kinds}
