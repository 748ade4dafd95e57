r"""The number at the end of an answer: what counts as one, and when two are equal.

It is that of the last `\boxed{…}` or `#### …` (GSM8K), whichever comes later; without either, the last one in the text.
Read are `1,234.50`, `1{,}234`, `$1,234`, `−3`, `.5`, `3/4`, `3 1/2`, `\frac{3}{4}`, `1.5e3`, `1.5 \times 10^3` and
`2 million`, with a unit or a full stop behind. A point is the decimal mark, commas group thousands. Numbers are equal
exactly, without rounding: `0.5` is `1/2` and `42.0` is `42`. A percent sign counts as a unit (`25%` is `25`), and `25%`
is also `0.25`. What holds digits and is no number (`12:30`, `1.2.3`, `1,00`, `1 234`, `2k`, `10-3`, `6 * 7`,
`\sqrt{2}`, `(3,4)`) is none: such an answer is wrong rather than guessed at.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple


class Number(NamedTuple):
    """A number as it was written."""

    value: Fraction
    percent: bool


UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d+)(?:\.\d+)?|\.\d+"  # 1,00,000 as India writes it, too
LATEX_FRACTION = (
    rf"\\[dt]?frac\s*(?:\{{\s*(?P<over>-?(?:{UNSIGNED}))\s*\}}\s*\{{\s*(?P<under>-?(?:{UNSIGNED}))\s*\}}"
    r"|(?P<over1>\d)\s*(?P<under1>\d))"
)
TEN_TO = r"10\s*(?:\^|\*\*)\s*(?:\{\s*(?P<power1>[-+]?\d{1,3})\s*\}|(?P<power2>[-+]?\d{1,3}))"
NUMBER = re.compile(
    # a sign belongs to the number unless it stands between two things
    r"(?P<sign>(?<![\w)\]}])[-+]|(?<==)\s*-\s+|(?<=:)\s*-\s+)?"
    # not inside of a longer run of digits, behind an operator without a space, or under a sign that makes it another
    r"(?<![\w±√⁻₋])(?<!\d[.,:/])(?<![\w)\]}][-+*/^])"
    rf"(?:(?:(?P<whole>\d+)\s*)?{LATEX_FRACTION}"
    r"|(?P<mixed>\d+)\s+(?P<part>\d+)/(?P<of>\d+)"
    rf"|(?P<top>{UNSIGNED})\s*/\s*(?P<bottom>{UNSIGNED})"
    rf"|(?:(?P<times>{UNSIGNED})\s*(?:×|\\times|\\cdot|·|\*|x)\s*)?{TEN_TO}"
    rf"|(?P<plain>{UNSIGNED})(?:[eE](?P<exponent>[-+]?\d{{1,3}})(?!\w))?)"
    # … and not the beginning of something longer: 12:30, 1.2.3, 4x2, 10-3, 2^5, 2π, 2x, 2k
    r"(?![.,:/-]?\d|\s*/\s*\d|[A-Za-z]+\d|(?:[xyzikKMB]|bn|mn)(?![A-Za-z])|\s*(?:\^|\*\*)|[⁰¹²³⁴-⁹⁺⁻]"
    r"|\s*(?:\\pi|π|\\sqrt|√|\\infty|∞))"
    r"\s*(?P<percent>%|percent\b|per cent\b)?"
    r"(?:(?P<magnitude>(?i:dozen|hundred|thousand|million|billion|trillion))\b)?",
)
# Digits that are no number of their own: in names (H2O, GPT-4) and in the powers of units (cm^2).
NAMES = re.compile(r"[^\W\d_]\w*(?:-\w+)*|(?<=[^\W\d_)}°])\s*\^\s*(?:\{\s*-?\d+\s*\}|-?\d+)")
MAGNITUDES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
LONGEST = 300  # characters of a number; Python refuses to read numbers of thousands of digits


def final_number(text: str) -> Number | None:
    """The number at the end of `text`, None where there is none: see the module."""
    boxed = [*re.finditer(r"\\(?:boxed|fbox)\b\s*", text)][-1:]
    rule = [*re.finditer(r"(?<!#)####(?!#)\s*([^\n]*)", text)][-1:]
    if rule and not (boxed and boxed[0].start() > rule[0].start()):
        found = _marked(rule[0][1], heading=True)  # else it is a heading
        if found is not None:
            return found
    if boxed:
        inside = _braced(text[boxed[0].end() :])
        return None if inside is None else _marked(inside)
    return _last_number(_plain(text))


def same_number(one: Number, other: Number) -> bool:
    """Whether both are the same number; where only one has a percent sign, it may be a unit or mean hundredths."""
    if one.value == other.value:
        return True
    if one.percent == other.percent:
        return False
    return one.value / (100 if one.percent else 1) == other.value / (100 if other.percent else 1)


def _braced(text: str) -> str | None:
    """What stands in the braces that `text` begins with; None where they do not close."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:i] if i else None
    return None


def _marked(part: str, heading: bool = False) -> Number | None:
    """The number that is the whole of a marked answer, but for `x =` before it and a unit behind.

    `heading`: what was found may be a heading of Markdown (`#### Step 2`, `#### 1. Add`), so there are no words before
    and no sentence behind.
    """
    part = _plain(part).strip()
    while _braced(part) == part[1:-1]:  # as in \boxed{{42}}
        part = part[1:-1].strip()
    part = re.sub(r"^-\s+", "-", part)
    found = [*NUMBER.finditer(part)][-1:]
    if not found or not _stands_alone(part, found[0]):
        return None
    before = re.split(r"[=:≈]|\\approx", part[: found[0].start()])[-1].strip()
    behind = NAMES.sub(lambda m: re.sub(r"[\d\\]", "", m[0]), part[found[0].end() :])
    more = re.search(r"[\d,;<>≤≥()\[\]{}\\]", before) or re.search(r"[\d,;\\]", behind)
    sentence = heading and (before or re.search(r"[.:]\s*\w", behind))
    return None if more or sentence else _value(found[0])


def _last_number(text: str) -> Number | None:
    """The last number in `text`; None where digits come later that are not one."""
    found = [*NUMBER.finditer(text)][-1:]
    if not found or not _stands_alone(text, found[0]):
        return None
    return None if re.search(r"\d", NAMES.sub("", " " + text[found[0].end() :])) else _value(found[0])


def _stands_alone(text: str, found: re.Match) -> bool:
    """Whether a number is neither the last part of a calculation or of a longer number nor an argument in LaTeX."""
    before = text[max(0, found.start() - 80) : found.start()]
    if found["sign"] and re.search(r"[-+]\s*$", before) or re.search(r"(?<!\S)—$", before):
        return False  # --5, and a dash that may be a minus
    if re.match(r"\d{3}(?!\d)", found[0]) and re.search(r"(?<![\w.,])\d{1,3}(?:[ '’]\d{3})*[ '’]$", before):
        return False  # 1 234
    calculation = r"[\d)\]}%]\s*(?:[+*/×·÷^±-]|\*\*|\\times|\\cdot|\\div|\\pm)\s*$"
    argument = r"\\[A-Za-z]+\s*(?:\[[^\]]*\])?\s*\{\s*$|\}\s*\{\s*$|[_^]\{?\s*$|\\(?:sqrt|pm|mp)\s*$|[√±]\s*$"
    return not re.search(f"{calculation}|{argument}", before)


def _value(match: re.Match) -> Number | None:
    """What a match of `NUMBER` is worth; None for a division by zero and for numbers of absurd length."""
    if len(match[0]) > LONGEST:
        return None
    part = {name: text.replace(",", "") for name, text in match.groupdict().items() if text}
    over, under = part.get("over") or part.get("over1"), part.get("under") or part.get("under1")
    try:
        if over and under:
            value = Fraction(part.get("whole", "0")) + Fraction(over) / Fraction(under)
        elif "mixed" in part:
            value = int(part["mixed"]) + Fraction(int(part["part"]), int(part["of"]))
        elif "top" in part:
            value = Fraction(part["top"]) / Fraction(part["bottom"])
        elif "plain" in part:
            value = Fraction(part["plain"]) * Fraction(10) ** int(part.get("exponent", "0"))
        else:
            power = int(part.get("power1") or part["power2"])
            value = Fraction(part.get("times", "1")) * Fraction(10) ** power
    except ZeroDivisionError:
        return None
    value *= MAGNITUDES.get(part.get("magnitude", "").lower(), 1)
    return Number(-value if "-" in part.get("sign", "") else value, "percent" in part)


WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|operatorname|boldsymbol)\s*\{([^{}]*)\}"
)


def _plain(text: str) -> str:
    """The text without what only dresses it: currency, emphasis, LaTeX's spaces and fonts; digits are ASCII."""
    text = re.sub(r"[^\W_]", lambda m: str(unicodedata.decimal(m[0], m[0])), text)
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda m: unicodedata.normalize("NFKC", m[0]).replace("⁄", "/"), text)
    text = re.sub("[−–‒﹣－]", "-", text).replace("＋", "+")
    text = WRAPPED.sub(r"\1", text).replace("{,}", ",")
    text = re.sub(r"(?<=\d)(?:\\[,;:! ]|[\u00a0\u2009\u202f])\s?(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"\\left|\\right|\\displaystyle|\\[,;:! ()\[\]]|~|[\u00a0\u2009\u202f]", " ", text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)", "°", text).replace("\\%", "%").replace("\\$", "$")
    text = re.sub(r"(?<=\d)[$€£¥₹](?=\d)", " ", text)
    text = re.sub(r"[$€£¥₹]\s*(?=[\d.-])|[$€£¥₹]", "", text)
    return re.sub(r"(?<![\d)])\*\*|\*\*(?![\d(])|`|__|(?<!\w)_(?=\S)|(?<=\S)_(?!\w)", "", text)
