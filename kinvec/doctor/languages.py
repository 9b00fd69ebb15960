"""The language of a text, offline: py3langid's naive Bayes over byte n-grams (Lui and Baldwin 2012), 139 languages.

It is calibrated, and says little of a short text. So a text is odd only where it is surely in a language that few are
in; one that could be in several is taken to be in those that most are in, if it is in their script.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

SURE = 0.9  # probability from which on a language is taken as told
COMMON = 0.02  # share of texts from which on a language is one of the data's own
LETTERS = 500  # characters of a text that are read: of fewer, a name or two in another script decide
UNKNOWN, NO_LANGUAGE = "und", "zxx"  # ISO 639-2: undetermined; no linguistic content (numbers, markup, identifiers)


def languages(texts: Sequence[str]) -> list[str]:
    """The ISO 639 code of each text's language, `und` where it cannot be told, `zxx` where it is none."""
    told = [_classifier().classify(text[:LETTERS]) for text in texts]
    sure = Counter(code for code, probability in told if probability >= SURE)
    own = {code for code, count in sure.items() if count >= COMMON * sum(sure.values()) and code != NO_LANGUAGE}
    if not own:
        return [code if probability >= SURE else UNKNOWN for code, probability in told]
    written: dict[str, set[str]] = {code: set() for code in own}
    for text, (code, probability) in zip(texts, told, strict=True):
        if code in own and probability >= SURE:
            written[code].add(script(text))
    return [
        code if probability >= SURE or code in own else _likely(text, code, written)
        for text, (code, probability) in zip(texts, told, strict=True)
    ]


def _likely(text: str, guess: str, written: Mapping[str, set[str]]) -> str:
    """Of the data's own languages the likeliest that is written in the text's script; if none is, the guess."""
    own = script(text)
    ranked = (code for code, _ in _classifier().rank(text[:LETTERS]) if own in written.get(code, ()))
    return next(ranked, guess) if own else UNKNOWN


def script(text: str) -> str:
    """The script of most letters, by the first word of their Unicode names (`LATIN`, `CYRILLIC`, `CJK`); or nothing."""
    letters = Counter(character for character in text[:LETTERS] if character.isalpha())
    scripts: Counter[str] = Counter()
    for letter, count in letters.items():
        scripts[unicodedata.name(letter, "").split(" ")[0]] += count
    return scripts.most_common(1)[0][0] if scripts else ""


@cache
def _classifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
