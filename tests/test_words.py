"""What texts are compared by: a perfect answer scores 1 in every script, and what is not the same does not."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer
from rouge_score.tokenize import tokenize

from fedkeel.scores.metrics import exact_match, rouge_l
from fedkeel.scores.words import Words, normalise

PERFECT = [
    "The answer is forty-two.", "答案是北京", "東京は日本の首都です。", "서울은 한국의 수도입니다", "กรุงเทพเป็นเมืองหลวง",
    "ພາສາລາວ", "ភាសាខ្មែរ", "မြန်မာဘာသာ", "བོད་ཡིག", "दिल्ली भारत की राजधानी है।", "கல்வி", "القاهرة عاصمة مصر؟",
    "ירושלים", "Москва — столица", "Αθήνα", "Հայաստան", "ქართული", "አዲስ አበባ", "-5", "3.14159", "1/2", "C++",
    "C#", "f(x) = x**2", "{}", "[]", "<=", "()", "...", "?", "—", "😀", "👩\u200d👩\u200d👧", "€ 5", "x_1",
    "$\\alpha$", "¬p", "∅", "e\u0301te\u0301", "\u200b", "", "\U0001f1eb\U0001f1f7",
]  # fmt: skip
APART = [
    ("-5", "5"), ("−5", "5"), ("+5", "-5"), ("C++", "C"), ("C#", "C"), ("3.5", "35"), ("1.5", "15"), (".5", "5"),
    ("1/2", "12"), ("50%", "50"), ("a[0]", "a{0}"), ("<b>", "b"), ("x = 1", "x == 1"), ("a && b", "a || b"),
    ("x*y", "x y"), ("x^2", "x 2"), ("北京", "南京"), ("सात", "सत"), ("ไม่ใช่", "ใช่"), ("año", "ano"), ("مدرسة", "مدرس"),
    ("😀", "😢"), ("$5", "€5"), ("2 < 3", "2 > 3"), ("@home", "home"), ("10:30", "10:45"), ("x²", "x2"),
]  # fmt: skip
ALIKE = [
    ("Paris.", "paris"), ("“Yes”", "yes"), ("It’s", "it's"), ("caf\u00e9", "cafe\u0301"), ("oui !", "Oui"),
    ("答案是北京。", "答案是北京"), ("STRASSE", "straße"), ("−5", "-5"), ("¿Qué?", "qué"),
    ("  two\twords\n", "two words"), ("नमस्ते।", "नमस्ते"), ("\ufeffyes", "yes"),
]  # fmt: skip


@pytest.mark.parametrize("text", PERFECT)
def test_a_perfect_answer_scores_one(text: str) -> None:
    assert rouge_l(text, ["zzz", text]) == 1.0
    assert exact_match(text, ["zzz", text]) == 1.0
    for form in ("NFC", "NFD"):
        assert (
            exact_match(unicodedata.normalize(form, text), [text]) == rouge_l(unicodedata.normalize(form, text), [text]) == 1.0
        )


@given(st.text())
def test_any_text_equals_itself(text: str) -> None:
    assert rouge_l(text, [text]) == exact_match(text, [text]) == 1.0


@pytest.mark.parametrize(("one", "other"), APART)
def test_what_differs_in_sign_script_or_code_is_told_apart(one: str, other: str) -> None:
    assert exact_match(one, [other]) == exact_match(other, [one]) == 0.0
    assert rouge_l(one, [other]) < 1.0


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_case_spelling_and_marks_of_prose_do_not_count(one: str, other: str) -> None:
    assert exact_match(one, [other]) == rouge_l(one, [other]) == 1.0


def test_words_by_hand() -> None:
    def words(text: str) -> list[str]:
        return Words().tokenize(text)

    assert words("Running dogs ran.") == ["run", "dog", "ran"]
    assert words("北京 is 首都") == ["北", "京", "is", "首", "都"]
    assert words("ที่นี่") == ["ที่", "นี่"]
    assert words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    assert words("x-5, -5 and 3 - 5 (1,000.5)") == ["x", "5", "-5", "and", "3", "5", "1,000.5"]
    assert words("a[i] += b/2; # c++") == ["a", "[", "i", "]", "+", "=", "b", "/", "2", "#", "c", "+", "+"]
    assert words("?!") == ["?", "!"]
    assert normalise("He said: “No!” — twice, at 5! and f().") == "he said no — twice at 5! and f()"


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyzABCE'\"().,;:!?-–—_ \n", max_size=80))
def test_on_english_prose_the_words_are_those_of_rouge_score(text: str) -> None:
    expected = tokenize(text, PorterStemmer())
    if expected:
        assert Words().tokenize(text) == expected


def test_partial_credit_by_hand_in_two_scripts() -> None:
    """Of a b c d and a b x d 3/4 each way. Of the Chinese 4 of 4 and 4 of 5 letters: F = 2 · 1 · 0.8 / 1.8."""
    assert rouge_l("a b c d", ["a b x d"]) == pytest.approx(0.75)
    assert rouge_l("北京大学", ["北京的大学"]) == pytest.approx(2 * 0.8 / 1.8)
