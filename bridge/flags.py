"""Flags: a dataclass is parsed by tyro, and what is wrong with the flags is one line.
 Also `train_cispo.py --help`: every flag on one line, in its group, with the value that it has
under the chosen preset. The text is read from the source of the Config class: a comment that stands
alone begins a group, and the one behind a field is that field's help. So whoever adds a field has
documented it.
"""

import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import os
import re
import sys
import types
import typing

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


def parse_flags(cls, argv: list[str], default=None):
    """The dataclass as the flags have it. Raises: ValueError with one line that says what is
    wrong."""
    # Flags that hold flags: tyro would take the value of `--vllm-args "--tensor-parallel-size 8"`
    # for another flag.
    joined, rest = [], iter(argv)
    for flag in rest:
        value = next(rest, None) if re.fullmatch(r"--[\w-]+[-_]args", flag) else None
        joined.append(flag if value is None else f"{flag}={value}")
    said, given = io.StringIO(), {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(said), piped():
            cfg, unknown = tyro.cli(cls, args=joined, return_unknown_args=True, **given)
    except SystemExit as e:
        if e.code == 0:
            raise  # --help
        plain = re.sub(
            r"\x1b\[[\d;]*m", "", said.getvalue()
        )  # a box: title, text, and what "helptext" begins
        lines = [line.strip(" ╭╮╰╯│─-") for line in plain.strip().splitlines()]
        words = " ".join(
            " ".join(itertools.takewhile(lambda line: "helptext" not in line, lines[1:])).split()
        )
        hint = (
            "; one that begins with - is given as --FLAG=VALUE" if "Missing value" in words else ""
        )
        raise ValueError(f"{words.rstrip('.')}{hint}") from None
    if unknown:
        names = [f.name.replace("_", "-") for f in dataclasses.fields(cls)]
        close = difflib.get_close_matches(
            unknown[0], [f"--{no}{n}" for n in names for no in ("", "no-")], 1
        )
        hint = f"did you mean {close[0]}?" if close else "--help lists all"
        if not unknown[0].startswith("-"):
            hint = "a value stands behind its flag, and a switch takes none: --NAME or --no-NAME"
        raise ValueError(f"unknown flag {unknown[0]!r}, {hint}")
    return cfg


def choices(kind) -> list[str]:
    """Of a Literal, or of one or None; else none."""
    kinds = (
        typing.get_args(kind)
        if typing.get_origin(kind) in (types.UnionType, typing.Union)
        else [kind]
    )
    return [str(c) for k in kinds for c in typing.get_args(k)]


def help_text(cfg, presets: dict[str, str], resolved: dict) -> str:
    """All flags as `cfg` has them. presets: name and what it is; resolved: values for fields that
    are unset."""
    lines = [
        f"usage: train_cispo.py [--preset NAME] [--flag VALUE ...]      values shown: --preset {cfg.preset}",
        "",
    ]
    lines += [f"  --preset {name:16} {what}" for name, what in presets.items()]
    lines += ["", "A switch that is on is turned off by --no-NAME, and the other way round."]
    kinds = typing.get_type_hints(type(cfg))
    for line in inspect.getsource(type(cfg)).splitlines():
        if group := re.fullmatch(r"    # (.*)", line):
            lines += ["", group[1]]
        elif (field := re.fullmatch(r"    (\w+): .* = .*?  # (.*)", line)) and field[1] != "preset":
            name, what = field.groups()
            flag, value = name.replace("_", "-"), getattr(cfg, name)
            value = resolved.get(name) if value is None else value
            if isinstance(value, bool):
                shown = f"--{'' if value else 'no-'}{flag}"
            else:
                text = (
                    "unset"
                    if value is None
                    else repr(value)
                    if isinstance(value, str)
                    else str(value)
                )
                shown = f"--{flag} {text if len(text) < 48 else text[:40] + '...'}"
            if options := choices(kinds[name]):
                what = f"{' | '.join(options)}: {what}"
            lines.append(f"  {shown:<44} {what}")
    return "\n".join(lines)
