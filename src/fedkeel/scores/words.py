"""What two texts are compared by, in every script, and with numbers and code told apart.

Words are compared for ROUGE, whole texts for exact match. On English prose the words are those of Google's `rouge-score`.
"""

from __future__ import annotations

import unicodedata
from functools import cache, lru_cache
from typing import Any

import regex

# Scripts written without spaces: each of their letters, with its marks, is a word.
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}--\p{M}]\p{M}*"
_WORD = regex.compile(
    rf"""{_UNSPACED}
    | (?<![\p{{L}}\p{{N}}\p{{M}})\]])[-+](?=\.?\d)\.?\d+(?:[.,:]\d+)*(?![\p{{L}}\p{{N}}\p{{M}}])  # a number with its sign
    | (?<![\p{{L}}\p{{N}}\p{{M}}])\.?\d+(?:[.,:]\d+)*(?![\p{{L}}\p{{N}}\p{{M}}])
    | (?:(?!{_UNSPACED})[\p{{L}}\p{{N}}\p{{M}}])+
    | [\p{{S}}#%&*@/\\\[\]{{}}]  # of code and formulas; `^`, `+`, `=`, `<`, `|`, `~`, `$` are symbols too
    """,
    regex.VERBOSE | regex.VERSION1,
)
_SAME = str.maketrans({"−": "-", "’": "'", "‘": "'", "“": '"', "”": '"', "\u00ad": None, "\ufeff": None, "\u200b": None})
_QUOTES = "\"'«»„‚‹›「」『』¿¡"
_STOPS = ".,;:!?…。、，．！？；：،؛؟।॥։።"


def plain(text: str) -> str:
    """`text` in one spelling: composed (NFC), lower case, one kind of minus, apostrophe and quotation mark."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).translate(_SAME)


@cache
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


@lru_cache(100_000)
def _stem(word: str) -> str:
    return str(_stemmer().stem(word))


class Words:
    """A tokeniser as `rouge_score` takes it."""

    def tokenize(self, text: str) -> list[str]:
        """The words of `text`, in order: of spaced scripts its runs of letters and digits (English ones of over three letters
        by their stem, Porter 1980), of others its letters, and numbers with sign and decimals, and signs of code. Marks of
        prose are no words, unless there is nothing else.
        """
        flat = plain(text)
        found = _WORD.findall(flat) or [c for c in flat if not c.isspace()]
        return [_stem(w) if len(w) > 3 and w.isascii() and w.isalnum() else w for w in found]


def _bare(word: str) -> str:
    """`word` without quotation marks around it and the marks that end a sentence; a word of nothing else stays."""
    bare = word.strip(_QUOTES)
    while bare and (bare[-1] in _STOPS or bare[-1] in _QUOTES):
        if bare[-1] == "!" and bare[:-1] and (bare[-2].isdigit() or bare[-2] in ")]"):
            break  # a factorial
        bare = bare[:-1]
    return bare or word


def normalise(text: str) -> str:
    """What exact match compares: `plain`, white space folded, each word without quotation marks around it and the marks that
    end a sentence. What stands inside of a word counts, and so do signs and brackets: −5 is not 5, nor is C++ C.
    """
    words = [_bare(word) for word in plain(text).split()]
    while len(words) > 1 and not words[-1].strip(_STOPS + _QUOTES):  # as in "oui !"
        del words[-1]
    return " ".join(words)
