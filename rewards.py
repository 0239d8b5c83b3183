"""Rewards: what a sample is worth. They run in processes of their own on the rollout node
(bridge/reward_process.py).

The contract of a reward function, `--reward FILE.py:FUNCTION`:
    def score(completion: str, example: dict) -> float        or        async def score(...)
`completion` is the sample's text, without the end token. `example` is the whole row of the data
set, and besides example["prompt"] and example["answer"] whatever their columns are called. The
result is one finite number, or a dict of it as "reward" and of its parts, which become metrics. A
function that raises, returns anything else, exits, or takes longer than the node's
--reward-timeout-s costs that sample: it is left out, counted by kind (hub counts `reward_*`) and
named in the node's log. A prompt all of whose samples are lost so is tried once more and then set
aside. An error of the network, or an HTTP status 429 or 5xx, is no verdict: the
sample is asked for again, for the node's --reward-away-timeout-s.

Samples of a plain function are scored one after the other in each of --reward-workers processes;
those of an async one together. The file and those beside it that it imports are read once: a run
goes on with what it has started with.

By the name of its first parameter a function does more (docs/environments.md):
    async def play(sample, example) -> float      makes the sample itself, turn by turn
    def score(completions, example) -> list       judges all samples of a prompt together

The built-in ones judge the final answer: what follows the last </think>. A thought that is begun
and not ended has none, and is worth 0. (Where the chat template begins it, the sample's text does
not show that.) `numeric` and `math` take what is marked as the answer: in <answer>...</answer>, in
it or else in all the last \\boxed{...}, or a line "#### 72". Without a mark `numeric` takes the
last number of the text ("72 apples and 5 pears" is 5), `math` what math-verify finds. A last box
that is not closed, or holds several numbers for `numeric`, is no answer: better to miss a right
answer than to reward a wrong one. The row's answer may be written in the same ways; of a dict its
"ground_truth" counts, as verl has it, of a list its only element.
"""

import math
import random
import re
import time
import unicodedata
from decimal import Decimal, InvalidOperation
from fractions import Fraction


# ---- the final answer ----------------------------------------------------------------------------
def after_thought(completion: str) -> str | None:
    """What a sample says after it has thought; None while it still thinks."""
    said = completion.rpartition("</think>")[2]
    return None if "<think>" in said else said


def final_answer(text: str) -> tuple[str, str]:
    """The part of a text that is its answer, and what it was marked by: "box", "line", "tag" or "",
    nothing."""
    end = text.rfind("</answer>")
    tag = text.rfind("<answer>", 0, max(0, end))
    text = text[tag + len("<answer>") : end] if tag >= 0 else text
    if (start := max(text.rfind("\\boxed"), text.rfind("\\fbox"))) >= 0:
        return in_braces(re.sub(r"^\\[a-z]+\s*", "", text[start:])), "box"
    # A number behind "####", and no heading such as "#### 2. Add them up".
    hashes = re.findall(r"####[ \t]*(?!\d+[.)][ \t])([-+$€£¥\\(.\d].*)$", text, re.MULTILINE)
    return (hashes[-1], "line") if hashes else (text, "tag" if tag >= 0 else "")


def in_braces(text: str) -> str:
    """Of "{a{b}c} d" it is "a{b}c", of "5 d" it is "5", of "{a" nothing."""
    if not text.startswith("{"):
        return "".join(text.split()[:1])
    depth = 0
    for brace in re.finditer(r"(?<!\\)[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[1 : brace.start()]
    return ""


def reference(answer):
    """The answer of a row, out of what it is wrapped in. Raises: ValueError for what is not one
    answer."""
    if isinstance(answer, dict) and "ground_truth" in answer:
        return reference(answer["ground_truth"])
    if isinstance(answer, list | tuple) and len(answer) == 1:
        return reference(answer[0])
    if answer is None or isinstance(answer, dict | list | tuple):
        raise ValueError(f"the answer {answer!r:.100} is not one text or number")
    return answer


def stated(answer) -> str:
    """The final answer in a row's answer, which may be a whole solution, as GSM8K has it ("... ####
    72")."""
    return final_answer(str(reference(answer)).rpartition("####")[2])[0]


SIGNS = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\u00d7": "\\times ",
        "\u00b7": "\\cdot ",
        "\u00f7": "\\div ",
        "\u2044": "/",
        "\u2264": "\\le ",
        "\u2265": "\\ge ",
        "\u2260": "\\ne ",
        "\u03c0": "\\pi ",
        "\u221e": "\\infty ",
        "\u00b1": "\\pm ",
    }
)


def as_text(text: str) -> str:
    """Unicode's mathematics as LaTeX: minus, times, one half, root of 2."""

    def halves(c):
        return "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", c[1]).split("\u2044"))

    text = re.sub(r" ?([\u00bc-\u00be\u2150-\u215e])", halves, text).translate(SIGNS)
    return re.sub(r"\u221a ?(?:\(([^()]*)\)|(\d+|[a-z]))", r"\\sqrt{\1\2}", text)


# ---- exact ---------------------------------------------------------------------------------------
def exact_match(completion: str, example: dict) -> float:
    """1.0 if what follows the thought is the expected answer, or one of a list of them, letter by
    letter; spaces and line ends around it do not count. A number in the data is compared as a
    number, so 42.0 is 42; true is True.

    Raises: ValueError when the expected answer is a dict or the like.
    """
    said, wanted = after_thought(completion), example["answer"]
    several = wanted if isinstance(wanted, list | tuple) and wanted else [wanted]
    # before a thought is looked at: it may raise
    found = [is_exactly(said, reference(one)) for one in several]
    return float(any(found))


def is_exactly(said: str | None, wanted) -> bool:
    if said is None:
        return False
    if isinstance(wanted, bool):
        return said.strip().lower() == str(wanted).lower()
    if isinstance(wanted, int | float):
        try:
            return Decimal(said.strip()) == Decimal(str(wanted))
        except InvalidOperation:
            return False
    return said.strip() == str(wanted).strip()


# ---- numeric -------------------------------------------------------------------------------------
def numeric_match(completion: str, example: dict) -> float:
    """1.0 if the number of the final answer is the expected one, exactly: 1,024 is 1024.0, 1/2 is
    0.5; 7 %, $7 and 7 km are 7, 2 million is 2000000. What is no number (2x, 2^10, 3:2, a range, a
    pair) is not right, whatever stands before it.

    Raises: ValueError when the expected answer is not one number.
    """
    number, said = number_of(stated(example["answer"]), "answer"), after_thought(completion)
    if number is None:
        raise ValueError(f"the answer {example['answer']!r:.100} holds no number, or more than one")
    return float(said is not None and number_of(*final_answer(said)) == number)


# Between thousands: 10\,000 and 10 000.
SPACE = (
    r"(?<=\d)(?:\\[,;:! ]|\{,\}|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))|"
    r"(?:(?<=\b\d)|(?<=\b\d\d)|(?<=\b\d{3})) (?=\d{3}\b(?!/))"
)


# LaTeX, Unicode and Markdown as one would type it, without spaces in what belongs together. In this
# order.
# m^2: a unit's
# a pair
REWRITES = [
    (re.compile(pattern), by)
    for pattern, by in [
        (
            r"\\(?:text\w*|math\w+|mbox|operatorname|underline)\s*\{([^{}]*)\}(?:\^\{?-?\d\}?)?",
            r" \1 ",
        ),
        (r"\\\\", "\n"),
        (SPACE, ","),
        (r"\\?([-+]?)\\?[$€£¥₹]", r" \1"),
        (r"</?[A-Za-z]\w*/?>|\\[()\[\]]|\^\{?\\circ\}?|\\?[%°]|\*\*(?!\d)|[~`]", " "),
        (r"\\[,;:! ]|\\(?:left|right|quad|displaystyle)(?![a-z])", " "),
        (r"\\(?:times|cdot)(?![a-z]) *", "*"),
        (r"\\div(?![a-z]) *", "/"),
        (r"[-=]>|[→⇒≈]|\\(?:to|approx|implies|[rR]ightarrow)(?![a-z])|(?<=[A-Za-z]):", "= "),
        (r"[<>!]=|\\(?:[gln]eq?|[gl]t)(?![a-z])", "<"),
        (r"(?<=[^\s=]) *([<>]) *", r"\1"),
        (r"(?<=\d) *(?=\\[dtc]?frac)|(?<=\d) +(?=\d+/\d+(?![\d/]))", "&"),  # a mixed number
        (r"\\[dtc]?frac\s*(?:\{ *(-?[\d.,]+) *\}|(\d)) *(?:\{ *([\d.,]+) *\}|(\d))", r"\1\2/\3\4"),
        (r"(?<=\d) : (?=\d)", ":"),
        (r"(\\(?:pm|sqrt|log|ln|sin|cos|tan)\S*) +(?=[\d\\])", r"\1"),
        (r"= *- *", "= -"),
        (r"(?<=[\d)}]) *([*/^+]|x(?= ?\d)|-(?= )) *(?=[-\d({\\√π.])", r"\1"),
        (
            r"[(\[{][^()\[\]{}A-Za-z]*[)\]}]",
            lambda c: c[0].replace(" ", "") if "," in c[0] else c[0],
        ),
    ]
]
NUMBER = r"(\d{1,3}(?:[,'_]\d{2,3})*[,'_]\d{3}(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
UNIT = r"([-/]?(?![nxyzei](?![A-Za-z]))[A-Za-z][A-Za-z.²³/-]*(?:\^\{?\d\}?)?)?"  # and no variable
VALUE = re.compile(
    rf"([-+]?)(?:(\d+)&)?{NUMBER}(?:[eE]([-+]?\d+)|\*10\^\{{?([-+]?\d+)\}}?)?(?:/{NUMBER})?{UNIT}/?"
)
SCALES = {
    "hundred": 2,
    "thousand": 3,
    "million": 6,
    "billion": 9,
    "trillion": 12,
    "k": 3,
    "K": 3,
    "M": 6,
    "B": 9,
}


def number_of(text: str, marked: str) -> Fraction | None:
    """The last number of a text or, of what is marked as the answer, the only one. None: it has
    none there."""
    text = as_text(text)
    for pattern, by in REWRITES:
        text = pattern.sub(by, text)
    if marked:
        parts = re.split(r",(?!\d{2,3}(?!\d))|;|\n|\b(?:and|or)\b", re.sub(r"^\s*- +", "-", text))
        parts = [part.rpartition("=")[2] for part in parts if re.search(r"\d", part)]
        text = parts[0] if len(parts) == 1 else ""
    around = "*_'\"()[]{}#,;:?…" + ("" if marked else "|!")  # in a box 5! is 120, and |-5| is 5
    words = [word.rpartition("=")[2].strip(around).rstrip(around + ".-") for word in text.split()]
    # H2O, x_1 and f(2) are words, and so is the 3rd; 2x, 2^10, 3:2 and 5-10 are expressions.
    at = [
        i
        for i, w in enumerate(words)
        if re.search(r"\d", w) and not re.match(r"[A-Za-z]|\d+(?:st|nd|rd|th)$", w)
    ]
    if not at or (marked and (len(at) > 1 or any(re.match(r"\\[a-z]|\|", w) for w in words))):
        return None
    found, behind = VALUE.fullmatch(words[at[-1]][:400]), " ".join(words[at[-1] + 1 : at[-1] + 2])
    if not found or re.match(r"[nxyz](?![A-Za-z])|\\(?:pi|sqrt)", behind):
        return None
    sign, whole, number, e, ten, below, unit = found.groups()
    exponent = int(e or ten or 0) + SCALES.get(unit or behind.strip("."), 0)

    def read(digits):
        return Fraction(re.sub("[,'_]", "", digits))

    if abs(exponent) > 400 or (below and not read(below)):
        return None
    value = int(whole or 0) + read(number) / (read(below) if below else 1)
    return value * Fraction(10) ** exponent * (-1 if sign == "-" else 1)


# ---- math ----------------------------------------------------------------------------------------
def math_match(completion: str, example: dict) -> float:
    """1.0 if the completion's final answer, marked as one or as the last expression, equals the
    answer as mathematics.

    Raises: TimeoutError when it takes sympy more than 5 s, which is no wrong answer (where sympy
    does not hear of it, this process is ended); ValueError when the answer itself cannot be read.
    Source: NeMo RL's hf_math_verify; the answer is read as LaTeX in \\boxed{}, the completion as
    LaTeX or plain.
    """
    import math_verify  # half a second: only who needs it
    from math_verify.errors import TimeoutException

    latex, plain = math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig()

    def boxed(text):
        return math_verify.parse(f"\\boxed{{{as_latex(text)}}}", [latex], raise_on_error=True)

    wanted = stated(example["answer"])
    said, marked = final_answer(after_thought(completion) or "")
    try:
        gold = boxed(wanted)
        if not gold:
            raise ValueError(f"the answer {example['answer']!r:.100} is not mathematics")
        if not said:
            return 0.0
        # as mathematics, on is no: a product of letters
        if marked and word_in(wanted) and word_in(said):
            return float(word_in(said) == word_in(wanted))
        # math-verify would see the first
        if marked and "\\text" not in wanted and TWO_NUMBERS.search(said[:1000]):
            return 0.0
        prose = not marked or (marked == "tag" and re.search(r"\b[A-Za-z]{2,} +[A-Za-z]{2,}", said))
        found = (
            math_verify.parse(as_text(said), [plain, latex], raise_on_error=True)
            if prose
            else boxed(said)
        )
        return float(math_verify.verify(gold, found, raise_on_error=True))
    except TimeoutException as e:  # a BaseException
        raise TimeoutError(str(e)) from None


# 3 \text{ of } 4
TWO_NUMBERS = re.compile(r"\d[^=]*\\text\w*\{[^{}]*[A-Za-z][^{}]*\}(?!\s*\^)[^=]*\d")


def as_latex(text: str) -> str:
    """What stands in a box, without what does not belong to it."""
    text = as_text(text).strip().removesuffix(".").strip("*$ ").replace("\\quad", ",")
    return re.sub(SPACE, "", text)


def word_in(text: str) -> str:
    """The word or words, where a text is nothing else, or ""."""
    found = re.fullmatch(
        r"(?:\\text\w*\{)?[( ]*([A-Za-z]{2}[A-Za-z ]*?)[) ]*\}?[. ]*", text.strip()
    )
    return found[1].lower() if found else ""


async def rounds(sample, example: dict) -> float:
    """Plays --task rounds: the share of its words that the policy reverses. The prompt shows it the
    first; it writes, and is shown the next."""
    words, right = example["words"], 0
    for i, word in enumerate(words):
        turn = await sample(f"{word}>" if i else "", max_tokens=len(word))
        right += turn.text == word[::-1]
    return right / len(words)


MATCH = {"exact": exact_match, "numeric": numeric_match, "math": math_match}
REWARDS = {**MATCH, "rounds": rounds}


def check_answers(spec: str, examples, name: str) -> str:
    """Whether a built-in reward can give 1 at all: the answers of some rows are scored against
    themselves, for half a second at most. Returns a warning about some of them, or "". One is of
    answers in sentences, in which math-verify multiplies the letters: of "3 is the only value" it
    is a right sample that says the same, and no 3.

    Raises: ValueError when it is so for none.
    """
    tried, failed, sentences, end = 0, [], [], math.inf
    # in any order, since a file may be sorted and not all may be reached
    rows = range(len(examples) if spec in MATCH else 0)
    for i in random.Random(0).sample(rows, min(50, len(rows))):
        tried, why = tried + 1, "scored against itself it is worth 0"
        answer = (example := examples[i])["answer"]
        try:
            if spec == "exact" and "####" in str(answer):
                raise ValueError(
                    f"the answer {answer!r:.100} is a whole solution; --reward numeric reads its "
                    "number"
                )
            same = str(reference(answer if not isinstance(answer, list) else answer[:1]))
            right = (
                MATCH[spec](same if spec == "exact" else f"\\boxed{{{stated(answer)}}}", example)
                == 1
            )
            # in tags a sentence is read for what it says
            if spec == "math" and not math_match(f"<answer>{stated(answer)}</answer>", example):
                sentences.append((i, f"{answer!r:.100} is a sentence"))
        except Exception as e:  # any: sympy's too
            right, why = False, str(e) or repr(e)
        if not right:
            failed.append((i, why))
        if tried == 1:
            end = time.monotonic() + 0.5  # the first has imported math-verify, which takes longer
        elif tried >= 3 and time.monotonic() > end:
            break
    if not (found := failed or sentences):
        return ""
    row, why = min(found)
    what = "cannot be 1" if failed else "is 1 for nothing but the same words"
    text = f"--reward {spec} {what} for {len(found)} of {tried} answers that were tried; {name} row"
    if failed and len(failed) == tried:
        raise ValueError(f"{text} {row}: {why}")
    return f"{text} {row}: {why}"
