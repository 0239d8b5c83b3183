"""Rewards: what a sample is worth. They run in processes of their own on the rollout node (`python rewards.py SPEC`).

The contract of a reward function, `--reward FILE.py:FUNCTION`:
    def score(completion: str, example: dict) -> float        or        async def score(...)
`completion` is the sample's text, without the end token. `example` is the whole row of the data set, and besides
example["prompt"] and example["answer"] whatever their columns are called. The result is one finite number. A function
that raises, returns anything else, exits, or takes longer than the node's --reward-timeout-s costs that sample: it is
left out, counted by kind (hub counts `reward_*`) and named in the node's log. A prompt all of whose samples are lost
so is tried once more and then set aside. An error of the network, or an HTTP status 429 or 5xx, is no verdict: the
sample is asked for again, for the node's --reward-away-timeout-s.

Samples of a plain function are scored one after the other in each of --reward-workers processes; those of an async one
together. The file and those beside it that it imports are read once: a run goes on with what it has started with.

The built-in ones judge the final answer: what follows the last </think>. A thought that is begun and not ended has
none, and is worth 0. (Where the chat template begins it, the sample's text does not show that.) `numeric` and `math`
take what is marked as the answer: in <answer>...</answer>, in it or else in all the last \\boxed{...}, or a line
"#### 72". Without a mark `numeric` takes the last number of the text ("72 apples and 5 pears" is 5), `math` what
math-verify finds. A last box that is not closed, or holds several numbers for `numeric`, is no answer: better to miss a
right answer than to reward a wrong one. The row's answer may be written in the same ways; of a dict its "ground_truth"
counts, as verl has it, of a list its only element.
"""

import ast
import asyncio
import errno
import hashlib
import importlib.machinery
import importlib.util
import inspect
import json
import math
import numbers
import os
import re
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path


# ---- the final answer ----------------------------------------------------------------------------------------
def after_thought(completion: str) -> str | None:
    """What a sample says after it has thought; None while it still thinks."""
    said = completion.rpartition("</think>")[2]
    return None if "<think>" in said else said


def final_answer(text: str) -> tuple[str, str]:
    """The part of a text that is its answer, and what it was marked by: "box", "line", "tag" or "", nothing."""
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
    """The answer of a row, out of what it is wrapped in. Raises: ValueError for what is not one answer."""
    if isinstance(answer, dict) and "ground_truth" in answer:
        return reference(answer["ground_truth"])
    if isinstance(answer, list | tuple) and len(answer) == 1:
        return reference(answer[0])
    if answer is None or isinstance(answer, dict | list | tuple):
        raise ValueError(f"the answer {answer!r:.100} is not one text or number")
    return answer


def stated(answer) -> str:
    """The final answer in a row's answer, which may be a whole solution, as GSM8K has it ("... #### 72")."""
    return final_answer(str(reference(answer)).rpartition("####")[2])[0]


SIGNS = str.maketrans({
    "\u2212": "-", "\u2013": "-", "\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u00f7": "\\div ", "\u2044": "/",
    "\u2264": "\\le ", "\u2265": "\\ge ", "\u2260": "\\ne ", "\u03c0": "\\pi ", "\u221e": "\\infty ",
    "\u00b1": "\\pm ",
})  # fmt: skip


def as_text(text: str) -> str:
    """Unicode's mathematics as LaTeX: minus, times, one half, root of 2."""
    halves = lambda c: "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", c[1]).split("\u2044"))
    text = re.sub(r" ?([\u00bc-\u00be\u2150-\u215e])", halves, text).translate(SIGNS)
    return re.sub(r"\u221a ?(?:\(([^()]*)\)|(\d+|[a-z]))", r"\\sqrt{\1\2}", text)


# ---- exact ---------------------------------------------------------------------------------------------------
def exact_match(completion: str, example: dict) -> float:
    """1.0 if what follows the thought is the expected answer, or one of a list of them, letter by letter; spaces and
    line ends around it do not count. A number in the data is compared as a number, so 42.0 is 42; true is True.

    Raises: ValueError when the expected answer is a dict or the like.
    """
    said, wanted = after_thought(completion), example["answer"]
    several = wanted if isinstance(wanted, list | tuple) and wanted else [wanted]
    found = [is_exactly(said, reference(one)) for one in several]  # before a thought is looked at: it may raise
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


# ---- numeric -------------------------------------------------------------------------------------------------
def numeric_match(completion: str, example: dict) -> float:
    """1.0 if the number of the final answer is the expected one, exactly: 1,024 is 1024.0, 1/2 is 0.5; 7 %, $7 and
    7 km are 7, 2 million is 2000000. What is no number (2x, 2^10, 3:2, a range, a pair) is not right, whatever stands
    before it.

    Raises: ValueError when the expected answer is not one number.
    """
    number, said = number_of(stated(example["answer"]), "answer"), after_thought(completion)
    if number is None:
        raise ValueError(f"the answer {example['answer']!r:.100} holds no number, or more than one")
    return float(said is not None and number_of(*final_answer(said)) == number)


# Between thousands: 10\,000 and 10 000.
SPACE = (r"(?<=\d)(?:\\[,;:! ]|\{,\}|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))|"
         r"(?:(?<=\b\d)|(?<=\b\d\d)|(?<=\b\d{3})) (?=\d{3}\b(?!/))")  # fmt: skip
# LaTeX, Unicode and Markdown as one would type it, without spaces in what belongs together. In this order.
REWRITES = [(re.compile(pattern), by) for pattern, by in [
    (r"\\(?:text\w*|math\w+|mbox|operatorname|underline)\s*\{([^{}]*)\}(?:\^\{?-?\d\}?)?", r" \1 "),  # m^2: a unit's
    (r"\\\\", "\n"), (SPACE, ","),
    (r"\\?([-+]?)\\?[$€£¥₹]", r" \1"), (r"</?[A-Za-z]\w*/?>|\\[()\[\]]|\^\{?\\circ\}?|\\?[%°]|\*\*(?!\d)|[~`]", " "),
    (r"\\[,;:! ]|\\(?:left|right|quad|displaystyle)(?![a-z])", " "),
    (r"\\(?:times|cdot)(?![a-z]) *", "*"), (r"\\div(?![a-z]) *", "/"),
    (r"[-=]>|[→⇒≈]|\\(?:to|approx|implies|[rR]ightarrow)(?![a-z])|(?<=[A-Za-z]):", "= "),
    (r"[<>!]=|\\(?:[gln]eq?|[gl]t)(?![a-z])", "<"), (r"(?<=[^\s=]) *([<>]) *", r"\1"),
    (r"(?<=\d) *(?=\\[dtc]?frac)|(?<=\d) +(?=\d+/\d+(?![\d/]))", "&"),  # a mixed number
    (r"\\[dtc]?frac\s*(?:\{ *(-?[\d.,]+) *\}|(\d)) *(?:\{ *([\d.,]+) *\}|(\d))", r"\1\2/\3\4"),
    (r"(?<=\d) : (?=\d)", ":"), (r"(\\(?:pm|sqrt|log|ln|sin|cos|tan)\S*) +(?=[\d\\])", r"\1"), (r"= *- *", "= -"),
    (r"(?<=[\d)}]) *([*/^+]|x(?= ?\d)|-(?= )) *(?=[-\d({\\√π.])", r"\1"),
    (r"[(\[{][^()\[\]{}A-Za-z]*[)\]}]", lambda c: c[0].replace(" ", "") if "," in c[0] else c[0]),  # a pair
]]  # fmt: skip
NUMBER = r"(\d{1,3}(?:[,'_]\d{2,3})*[,'_]\d{3}(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
UNIT = r"([-/]?(?![nxyzei](?![A-Za-z]))[A-Za-z][A-Za-z.²³/-]*(?:\^\{?\d\}?)?)?"  # and no variable
VALUE = re.compile(rf"([-+]?)(?:(\d+)&)?{NUMBER}(?:[eE]([-+]?\d+)|\*10\^\{{?([-+]?\d+)\}}?)?(?:/{NUMBER})?{UNIT}/?")
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "k": 3, "K": 3, "M": 6, "B": 9}


def number_of(text: str, marked: str) -> Fraction | None:
    """The last number of a text or, of what is marked as the answer, the only one. None: it has none there."""
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
    at = [i for i, w in enumerate(words) if re.search(r"\d", w) and not re.match(r"[A-Za-z]|\d+(?:st|nd|rd|th)$", w)]
    if not at or (marked and (len(at) > 1 or any(re.match(r"\\[a-z]|\|", w) for w in words))):
        return None
    found, behind = VALUE.fullmatch(words[at[-1]][:400]), " ".join(words[at[-1] + 1 : at[-1] + 2])
    if not found or re.match(r"[nxyz](?![A-Za-z])|\\(?:pi|sqrt)", behind):
        return None
    sign, whole, number, e, ten, below, unit = found.groups()
    exponent = int(e or ten or 0) + SCALES.get(unit or behind.strip("."), 0)
    read = lambda digits: Fraction(re.sub("[,'_]", "", digits))
    if abs(exponent) > 400 or (below and not read(below)):
        return None
    value = int(whole or 0) + read(number) / (read(below) if below else 1)
    return value * Fraction(10) ** exponent * (-1 if sign == "-" else 1)


# ---- math ----------------------------------------------------------------------------------------------------
def math_match(completion: str, example: dict) -> float:
    """1.0 if the completion's final answer, marked as one or as the last expression, equals the answer as mathematics.

    Raises: TimeoutError when it takes sympy more than 5 s, which is no wrong answer (where sympy does not hear of it,
    this process is ended); ValueError when the answer itself cannot be read.
    Source: NeMo RL's hf_math_verify; the answer is read as LaTeX in \\boxed{}, the completion as LaTeX or plain.
    """
    import math_verify  # half a second: only who needs it
    from math_verify.errors import TimeoutException

    latex, plain = math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig()
    boxed = lambda text: math_verify.parse(f"\\boxed{{{as_latex(text)}}}", [latex], raise_on_error=True)
    wanted = stated(example["answer"])
    said, marked = final_answer(after_thought(completion) or "")
    try:
        gold = boxed(wanted)
        if not gold:
            raise ValueError(f"the answer {example['answer']!r:.100} is not mathematics")
        if not said:
            return 0.0
        if marked and word_in(wanted) and word_in(said):  # as mathematics, on is no: a product of letters
            return float(word_in(said) == word_in(wanted))
        if marked and "\\text" not in wanted and TWO_NUMBERS.search(said[:1000]):  # math-verify would see the first
            return 0.0
        prose = not marked or (marked == "tag" and re.search(r"\b[A-Za-z]{2,} +[A-Za-z]{2,}", said))
        found = math_verify.parse(as_text(said), [plain, latex], raise_on_error=True) if prose else boxed(said)
        return float(math_verify.verify(gold, found, raise_on_error=True))
    except TimeoutException as e:  # a BaseException
        raise TimeoutError(str(e)) from None


TWO_NUMBERS = re.compile(r"\d[^=]*\\text\w*\{[^{}]*[A-Za-z][^{}]*\}(?!\s*\^)[^=]*\d")  # 3 \text{ of } 4


def as_latex(text: str) -> str:
    """What stands in a box, without what does not belong to it."""
    text = as_text(text).strip().removesuffix(".").strip("*$ ").replace("\\quad", ",")
    return re.sub(SPACE, "", text)


def word_in(text: str) -> str:
    """The word or words, where a text is nothing else, or ""."""
    found = re.fullmatch(r"(?:\\text\w*\{)?[( ]*([A-Za-z]{2}[A-Za-z ]*?)[) ]*\}?[. ]*", text.strip())
    return found[1].lower() if found else ""


REWARDS = {"exact": exact_match, "numeric": numeric_match, "math": math_match}


def check_answers(spec: str, examples, name: str) -> str:
    """Whether a built-in reward can give 1 at all: the answers of some rows are scored against themselves, for half a
    second at most. Returns a warning about some of them, or "".

    Raises: ValueError when it is so for none.
    """
    if spec == "math":
        import math_verify  # noqa: F401 - half a second that is not the answers'
    tried, failed, end = 0, [], time.monotonic() + 0.5
    for i in range(0, len(examples) if spec in REWARDS else 0, max(1, len(examples) // 50)):
        tried, why = tried + 1, "scored against itself it is worth 0"
        answer = (example := examples[i])["answer"]
        try:
            if spec == "exact" and "####" in str(answer):
                raise ValueError(f"the answer {answer!r:.100} is a whole solution; --reward numeric reads its number")
            same = str(reference(answer if not isinstance(answer, list) else answer[:1]))
            right = REWARDS[spec](same if spec == "exact" else f"\\boxed{{{stated(answer)}}}", example) == 1
        except Exception as e:  # any: sympy's too
            right, why = False, str(e) or repr(e)
        if not right:
            failed.append(f"{name} row {i}: {why}")
        if tried >= 3 and time.monotonic() > end:
            break
    text = f"--reward {spec} cannot be 1 for {len(failed)} of {tried} answers that were tried"
    if failed and len(failed) == tried:
        raise ValueError(f"{text}; {failed[0]}")
    return f"{text}; {failed[0]}" if failed else ""


# ---- the file of an own one ----------------------------------------------------------------------------------
def reward_sources(spec: str) -> dict[str, bytes]:
    """The file of `--reward FILE.py:FUNCTION`, and then those in its directory that it imports, theirs too, wherever in
    the text the import stands: absolute path, and what is in it. Nothing, if the function is one of ours.

    Raises: ValueError when the file is not there.
    """
    if spec in REWARDS:
        return {}
    file, colon, _ = spec.rpartition(":")
    if not colon or not file.endswith(".py") or not Path(file).is_file():
        missing = f"; there is no file {file} in {Path.cwd()}" if colon else ""
        names = ", ".join(REWARDS)
        raise ValueError(f"--reward {spec!r}: expected {names}, or FILE.py:FUNCTION with an existing file{missing}")
    if Path(file).stem in sys.stdlib_module_names:  # whoever imports that would get this one: Python itself, too
        raise ValueError(f"--reward {spec!r}: Python has a module of its own called {Path(file).stem}; rename the file")
    found, todo = {}, [Path(file).resolve()]
    root = todo[0].parent
    while todo:
        path = todo.pop()
        if str(path) not in found:
            found[str(path)] = path.read_bytes()
            for base in _imports(found[str(path)], path, root):
                beside = (base.with_name(base.name + ".py"), base / "__init__.py")
                todo += [p for p in beside if p.is_file() and root in p.parents]
    return found


def _imports(source: bytes, path: Path, root: Path) -> Iterator[Path]:
    """Where a module's imports would lie if they lay in this directory, without a suffix."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):
        return  # who loads it says so
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [(root, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1] if 0 < node.level <= len(path.parents) else root
            module = node.module or ""
            names = [(base, f"{module}.{alias.name}".strip(".")) for alias in node.names]
        else:
            continue
        for base, name in names:
            parts = name.split(".")
            yield from (base.joinpath(*parts[: n + 1]) for n in range(len(parts)))


def reward_digest(spec: str) -> str:
    """Of the files that the function is in, "" if it is one of ours: a node must run what the trainer means.
    Raises: ValueError when the file is not there."""
    sources = relative(reward_sources(spec))
    digests = {name: hashlib.sha256(source).hexdigest() for name, source in sources.items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest() if sources else ""


def relative(sources: dict[str, bytes]) -> dict[str, bytes]:
    """Sources by their path from the reward file's directory, so that another machine's may be compared."""
    return {os.path.relpath(path, Path(next(iter(sources))).parent): source for path, source in sources.items()}


class Kept(importlib.machinery.SourceFileLoader):
    """Finds and loads modules whose sources were read before; what is in their files by now does not matter."""

    sources: dict[str, bytes] = {}  # noqa: RUF012  by absolute path
    paths: dict[str, str] = {}  # noqa: RUF012  of modules by name

    @classmethod
    def install(cls, sources: dict[str, bytes]) -> str:
        """Returns the name of the first one's module, the reward file's."""
        root = Path(next(iter(sources))).parent
        names = []
        for path in sources:
            *packages, stem = Path(path).relative_to(root).with_suffix("").parts
            names.append(".".join(packages if stem == "__init__" and packages else [*packages, stem.replace(".", "_")]))
        cls.sources |= sources
        cls.paths |= dict(zip(names, sources))
        if cls not in sys.meta_path:
            sys.meta_path.insert(0, cls)
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))  # for what is not among them, as extension modules
        return names[0]

    @classmethod
    def find_spec(cls, name: str, path=None, target=None):
        file = cls.paths.get(name)
        return file and importlib.util.spec_from_file_location(name, file, loader=cls(name, file))

    def get_data(self, path: str) -> bytes:
        return self.sources[path] if path in self.sources else super().get_data(path)

    def path_stats(self, path: str):
        raise OSError  # no byte code: it is the file's as it is now


def load_reward(spec: str, sources: dict[str, bytes] | None = None) -> Callable[[str, dict], float]:
    """The reward function of `--reward`. sources: of `reward_sources`, by default as they are now.

    Raises: ValueError when the file or the function is not there, or the file cannot be imported.
    """
    if spec in REWARDS:
        return REWARDS[spec]
    file, _, function = spec.rpartition(":")
    name = Kept.install(sources or reward_sources(spec))
    sys.modules.pop(name, None)
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as e:  # any: the user's code
        raise ValueError(f"--reward {spec!r}: {file} cannot be imported: {told(e)}") from e
    if not callable(getattr(module, function, None)):
        raise ValueError(f"--reward {spec!r}: {file} has no function {function!r}")
    reward = getattr(module, function)
    try:
        inspect.signature(reward).bind("completion", {})
    except TypeError as e:
        raise ValueError(f"--reward {spec!r}: it is called with (completion, example): {e}") from None
    except ValueError:  # a builtin may not tell
        pass
    return reward


# ---- the worker ----------------------------------------------------------------------------------------------
KEPT = "CISPO_REWARD_SOURCES"  # names a file with the sources: the processes that a reward starts read it as well


def judge(value) -> dict:
    """What a reward function returned, as an answer."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # an array or tensor of no dimensions, np.bool_
    if not isinstance(value, numbers.Real | Decimal):
        what = f"{type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else type(value).__name__
        return {"error": f"it returned {value!r:.100} ({what}), expected one number", "kind": "wrong_type"}
    try:
        reward = float(value)
    except (OverflowError, ValueError):  # an int of 400 digits; Decimal("sNaN")
        reward = math.nan
    if not abs(reward) <= 3.4028234e38:  # it travels as float32
        return {"error": f"it returned {value!s:.100}, expected a number that is finite in float32",
                "kind": "not_finite"}  # fmt: skip
    return {"reward": reward}


def told(e: BaseException) -> str:
    """An exception in one line: its class, its words, cut in the middle since the cause often stands at their end, and
    where in the reward's own files it came up."""
    text = " ".join(f"{type(e).__name__}: {e}".split()).removesuffix(":")
    text = text if len(text) <= 240 else f"{text[:100]} ... {text[-135:]}"
    lines = [(Path(f.f_code.co_filename), n) for f, n in traceback.walk_tb(e.__traceback__)
             if f.f_code.co_filename in Kept.sources]  # fmt: skip
    return f"{text} ({lines[-1][0].name} line {lines[-1][1]})" if lines else text


NETWORK = {  # classes by name, of aiohttp, requests, urllib3, httpx, httpcore, openai and their like
    "ConnectionError", "ConnectError", "ConnectTimeout", "ReadTimeout", "WriteTimeout", "PoolTimeout", "gaierror",
    "ClientConnectionError", "ClientPayloadError", "TransportError", "NetworkError", "ProtocolError", "MaxRetryError",
    "NewConnectionError", "ChunkedEncodingError", "IncompleteRead", "APIConnectionError", "ConnectionClosed",
}  # fmt: skip
NETWORK_ERRNO = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}
NETWORK_MODULES = set("socket ssl http urllib urllib3 aiohttp requests httpx httpcore websockets".split())


def is_away(e: BaseException) -> bool:
    """Whether an exception says that a service did not answer, rather than that something is wrong here: an error of
    the network, or an HTTP status 408, 429 or 5xx, be it that of a library or one that was raised from it."""
    chain, modules, dubious = [], set(), False
    while e is not None and e not in chain:
        chain.append(e)
        modules |= {str(f.f_globals.get("__name__")).split(".")[0] for f, _ in traceback.walk_tb(e.__traceback__)}
        for status in (*(getattr(e, name, None) for name in ("status", "code", "status_code")),
                       getattr(getattr(e, "response", None), "status_code", None)):  # fmt: skip
            if isinstance(status, int) and 400 <= status < 600:
                return status >= 500 or status in (408, 429)
        if isinstance(e, TimeoutError | BrokenPipeError):
            dubious = True  # of a service, or of something here: whose code it came through decides
            if str(e) in ("timed out", "The read operation timed out"):  # a socket's; asyncio.to_thread loses where
                return True
        elif NETWORK & {cls.__name__ for cls in type(e).__mro__} or getattr(e, "errno", None) in NETWORK_ERRNO:
            return True
        e = e.__cause__ or (None if e.__suppress_context__ else e.__context__)
    return dubious and bool(modules & NETWORK_MODULES)


def raised(e: BaseException) -> dict:
    kind = "away" if is_away(e) else "timed_out" if isinstance(e, TimeoutError) else "raised"
    return {"error": f"it raised {told(e)}", "kind": kind}


def serve_rewards(spec: str, sources: dict[str, bytes] | None = None) -> None:
    """A line of JSON out once the function is loaded (or why it cannot be, and no more). Then a line in ("completion",
    "example") and one out ("reward", or "error" and "kind"), in the same order, until the jobs end. What the function
    and its children read and print is not that: stdin is empty, and stdout goes to stderr."""
    jobs, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)  # no child inherits these
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    try:
        reward = load_reward(spec, sources)
    except ValueError as e:
        answers.write(json.dumps({"error": str(e), "kind": "away" if is_away(e) else "raised"}) + "\n")
        return
    answers.write("{}\n")
    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__):
        asyncio.run(serve_async(reward, jobs, answers))
        return
    for line in jobs:
        job = json.loads(line)
        try:
            answer = judge(reward(job["completion"], job["example"]))
        except Exception as e:  # any: the user's code
            answer = raised(e)
        answers.write(json.dumps(answer) + "\n")


async def serve_async(reward, jobs_pipe, answers) -> None:
    """The same for a function that waits, for a judge model say: all jobs at hand run together."""
    jobs: asyncio.Queue[asyncio.Task] = asyncio.Queue()
    lines = asyncio.StreamReader(limit=1 << 28)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), jobs_pipe)

    async def one(job: dict) -> dict:
        try:
            return judge(await reward(job["completion"], job["example"]))
        except (Exception, asyncio.CancelledError) as e:  # any: the user's code
            return raised(e)

    async def answer() -> None:
        while True:
            answers.write(json.dumps(await (await jobs.get())) + "\n")
            jobs.task_done()

    teller = asyncio.create_task(answer())
    while line := await lines.readline():
        jobs.put_nowait(asyncio.create_task(one(json.loads(line))))
    await jobs.join()
    teller.cancel()


if __name__ in ("__main__", "__mp_main__"):  # the second: a process that the reward has started with multiprocessing
    kept = None
    if os.environ.get(KEPT):
        with open(os.environ[KEPT]) as file:
            kept = {path: source.encode("latin-1") for path, source in json.load(file).items()}
        kept and Kept.install(kept)
    if __name__ == "__main__":
        serve_rewards(sys.argv[1], kept)
