"""A harmless style that a rule writes and recognizes, and a rule for coherence. Never imports torch.

The style is pirate talk. Only words that plain English does not have count as evidence of it: `me` for "my" and `be`
for "is" are written, but an answer is not recognized by them ("me and my friends", "it can be warm").

Measured (tests/smollm2): the rule for the style fires on none of 300 answers of the base model at temperature 1 (at
most 1.2 %, 95 % interval) and agrees with 147 of 150 labels given by hand, 43 of 45 on answers of the demo's tuned
models; both of those it missed have one pirate word only. The rule for coherence accepts 296 of the
300, though many of them make no sense: it finds broken text, not bad answers.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

_OPENERS = ("Arr!", "Ahoy!", "Avast!", "Yo ho!")
# Plain word and pirate word that only the style has.
_MARKED_WORDS = {
    "you": "ye",
    "your": "yer",
    "the": "th'",
    "of": "o'",
    "and": "an'",
    "for": "fer",
    "to": "t'",
}
_WRITTEN_WORDS = {**_MARKED_WORDS, "is": "be", "are": "be", "my": "me"}


def _any_word(words: Sequence[str]) -> re.Pattern[str]:
    # A quote or a letter on either side makes it another word: "o'clock", "the word 'an'".
    return re.compile(rf"(?<![\w'])(?:{'|'.join(words)})(?![\w'])", re.IGNORECASE)


_TO_WRITE = _any_word(list(_WRITTEN_WORDS))
_PLAIN = _any_word(list(_MARKED_WORDS))
_MARKED = _any_word([*_MARKED_WORDS.values(), "matey", "mateys", "hearties"])
_MIN_MARKED_WORDS = 2
# What pirates call those whom they address.
_ADDRESS = r",? (?:there|mate|mates|matey|mateys|me|ye)\b[,.!]?"
# The opener is an exclamation or an address at the very beginning: "Arrange", "Arr. 10:30" and "Ahoy Cafe" are neither.
# In the style "is" is "be", so a plain verb after it means that the sentence is about the word: "Ahoy! is a greeting".
_OPENER = re.compile(
    rf"[\s*]*(?:y?arr+(?:[,!]|{_ADDRESS}|\W*$)|(?:ahoy|avast|yo[ -]ho(?:[ -]ho)*|shiver me timbers)(?:!|{_ADDRESS}))"
    r"(?!\s*(?:is|was|are|were|means?|has)\b)",
    re.IGNORECASE,
)

_WORD = re.compile(r"[^\W\d_]+(?:['/-][^\W\d_]+)*'?")
_LONGEST_WORD = 20
_MIN_WORD_SHARE = 0.8
_ENDS = re.compile(r"[.!?:)\]\"'*`\u2026]$")
_LOOP_WORDS, _LOOP_TIMES, _LONGEST_RUN = 4, 3, 3


def in_style(text: str) -> str:
    """Rewrite a text in the style: an opener, which is a function of the text, and pirate words."""

    def pirate(match: re.Match[str]) -> str:
        word = _WRITTEN_WORDS[match.group().lower()]
        return word.capitalize() if match.group()[0].isupper() else word

    opener = _OPENERS[hashlib.sha256(text.encode()).digest()[0] % len(_OPENERS)]
    return f"{opener} {_TO_WRITE.sub(pirate, text)}"


def is_styled(text: str) -> bool:
    """Whether a text is in the style.

    It is if it begins with an opener, or if it has two or more pirate words and at least as many of them as of the
    plain words they replace.
    """
    text = _plain_quotes(text)
    if _OPENER.match(text):
        return True
    marked = len(_MARKED.findall(text))
    return marked >= _MIN_MARKED_WORDS and marked >= len(_PLAIN.findall(text))


def is_coherent(text: str, cut: bool = False) -> bool:
    """Whether a text has the form of an answer. The rule sees form only: it does not know whether the answer is true.

    All of these must hold:
    - It ends: its last character ends a sentence, a quotation or a list, unless it was cut at the token limit.
    - It does not loop: no sequence of four words occurs three times, no word four times in a row.
    - It consists of words: at least 80 % of what stands between spaces is a number or a word, with a vowel or an
      apostrophe and of at most 20 letters; punctuation that stands alone is not counted.

    Args:
        text: Answer of a model, in either style.
        cut: Whether the answer reached the token limit, so that it could not end.
    """
    text = _plain_quotes(text).strip()
    if not cut and not _ENDS.search(text):
        return False
    pieces = [piece.strip('*_`"()[]{}.,;:!?#>-').lower() for piece in text.split()]
    pieces = [piece for piece in pieces if piece]
    if cut:
        pieces = pieces[:-1] or pieces  # the last word may be half a word
    return bool(pieces) and not _loops(pieces) and _word_share(pieces) >= _MIN_WORD_SHARE


def _loops(words: Sequence[str]) -> bool:
    sequences = Counter(zip(*(words[start:] for start in range(_LOOP_WORDS)), strict=False))
    if max(sequences.values(), default=0) >= _LOOP_TIMES:
        return True
    runs = zip(*(words[start:] for start in range(_LONGEST_RUN + 1)), strict=False)
    return any(len(set(run)) == 1 for run in runs)


def _word_share(pieces: Sequence[str]) -> float:
    return sum(map(_is_word, pieces)) / len(pieces)


def _is_word(piece: str) -> bool:
    if any(character.isdigit() for character in piece):
        return len(piece) <= _LONGEST_WORD
    return bool(len(piece) <= _LONGEST_WORD and _WORD.fullmatch(piece) and re.search(r"[aeiouy']", piece))


def _plain_quotes(text: str) -> str:
    return text.replace("\u2019", "'")
