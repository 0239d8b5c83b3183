"""Flags: a dataclass in groups with their rules; it is parsed by tyro, and what is wrong with the
flags is one line.

The comment behind a field of the dataclass is its help text, and `Flags` shows it with the field's
value: whoever adds a field has documented it.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import math
import os
import re
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator

import tyro


@contextlib.contextmanager
def piped():
    """What is printed here may go to a reader that leaves when it has seen enough, as `head` does:
    that is no error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more when it ends
        raise SystemExit(0) from None


# ---- groups and their rules ----------------------------------------------------------------------
TINIEST = 1e-30  # the least value of what must be above 0


class Bounds(typing.NamedTuple):
    """What a number may be, both ends included."""

    low: float = -math.inf
    high: float = math.inf


def flag_of(field: str) -> str:
    return f"--{field.replace('_', '-')}"


class Group:
    """Some flags and their rules. `faults` yields a line for each rule that is broken: it names the
    value, the limit and the flag."""

    def faults(self) -> Iterator[str]:
        return iter(())

    def out_of_bounds(self) -> Iterator[str]:
        """The same for numbers that their type bounds, and for those that are none."""
        for name, kind in typing.get_type_hints(type(self), include_extras=True).items():
            value, bounds = getattr(self, name), next(iter(getattr(kind, "__metadata__", ())), None)
            low, high = bounds if isinstance(bounds, Bounds) else Bounds()
            if isinstance(value, int | float) and not low <= value <= high:  # nor is nan in them
                least = f"at least {low:g}" if low > -math.inf else "a number"
                least = "above 0" if low == TINIEST else least
                most = f" and at most {high:g}" if high < math.inf else ""
                exclusive = " (exclusive)" if most and high < float(f"{high:g}") else ""
                yield f"{flag_of(name)} {value}: must be {least}{most}{exclusive}"


# ---- parsing -------------------------------------------------------------------------------------
def parse_flags(cls, argv: list[str], default=None):
    """The dataclass as the flags have it. Raises: ValueError with one line that says what is
    wrong."""
    said, given = io.StringIO(), {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(said), piped():
            cfg, unknown = tyro.cli(cls, args=joined(argv), return_unknown_args=True, **given)
    except SystemExit as e:
        if e.code == 0:
            raise  # --help
        raise ValueError(words_of(said.getvalue())) from None
    if unknown:
        raise ValueError(f"unknown flag {unknown[0]!r}, {hint_for(unknown[0], cls)}")
    return cfg


def joined(argv: list[str]) -> list[str]:
    """Flags that hold flags, as --vllm-args does, with their value in one word: tyro would take the
    value of `--vllm-args "--tensor-parallel-size 8"` for another flag."""
    words, rest = [], iter(argv)
    for flag in rest:
        holds_flags = re.fullmatch(r"--[\w-]+[-_]args", flag)
        value = next(rest, None) if holds_flags else None
        words.append(flag if value is None else f"{flag}={value}")
    return words


def words_of(box: str) -> str:
    """The text in the box that tyro draws around an error: without its title, and without the help
    text that follows."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", box)
    lines = [line.strip(" ╭╮╰╯│─-") for line in plain.strip().splitlines()]
    text = itertools.takewhile(lambda line: "helptext" not in line, lines[1:])
    words = " ".join(" ".join(text).split()).rstrip(".")
    hint = "; one that begins with - is given as --FLAG=VALUE" if "Missing value" in words else ""
    return f"{words}{hint}"


def hint_for(word: str, cls) -> str:
    """What a word that is no flag may have been meant as."""
    if not word.startswith("-"):
        return "a value stands behind its flag, and a switch takes none: --NAME or --no-NAME"
    names = [f.name.replace("_", "-") for f in dataclasses.fields(cls)]
    known = [f"--{no}{name}" for name in names for no in ("", "no-")]
    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean {close[0]}?" if close else "--help lists all"


# ---- help ----------------------------------------------------------------------------------------
def comments_of(cls) -> dict[str, str]:
    """The comment behind each field of a dataclass, those of its base classes too."""
    found = {}
    for base in (c for c in cls.__mro__ if dataclasses.is_dataclass(c)):
        source = textwrap.dedent(inspect.getsource(base))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t.string[2:] for t in tokens if t.type == tokenize.COMMENT}
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                lines = range(node.lineno, node.end_lineno + 1)
                found.setdefault(
                    node.target.id, " ".join(comments[i] for i in lines if i in comments)
                )
    return found


def choices(kind) -> list[str]:
    """The values of a Literal, or of one that may be None; else none."""
    is_union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    kinds = typing.get_args(kind) if is_union else [kind]
    literals = [k for k in kinds if typing.get_origin(k) is typing.Literal]
    return [str(value) for k in literals for value in typing.get_args(k)]


class Flags:
    """A dataclass as the lines of --help."""

    def __init__(self, cfg, resolved: dict):
        """resolved: values for fields that are None."""
        self.cfg, self.resolved = cfg, resolved
        self.comments, self.kinds = comments_of(type(cfg)), typing.get_type_hints(type(cfg))

    def line(self, field: str) -> str:
        """A flag, its value and what it is."""
        name, value = field.replace("_", "-"), getattr(self.cfg, field)
        value = self.resolved.get(field) if value is None else value
        if isinstance(value, bool):
            shown = f"--{'' if value else 'no-'}{name}"
        else:
            text = repr(value) if isinstance(value, str) else str(value)
            if isinstance(value, tuple):
                text = " ".join(map(repr, value)) or "''"
            text = "unset" if value is None else text if len(text) < 48 else f"{text[:40]}..."
            shown = f"--{name} {text}"
        options = " | ".join(choices(self.kinds[field]))
        return f"  {shown:<44} {options}{': ' if options else ''}{self.comments[field]}"
