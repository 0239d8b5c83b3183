"""A run's logged samples, to be read, for watch.py: from samples.jsonl, in pages on a terminal and
plain into a pipe."""

import math
import pydoc
import sys
from pathlib import Path

from bridge.logs import read_jsonl

BOLD, DIM, GREEN, RED, BLUE, OFF = (f"\x1b[{code}m" for code in (1, 2, 32, 31, 34, 0))
# Backgrounds of 256-colour terminals, from far below the middle to far above it, and the bounds
# between them: of a log-ratio, whose middle is 0; of a weight, its logarithm's.
SHADES = [f"\x1b[38;5;16;48;5;{code}m" for code in (33, 75, 153, 0, 224, 210, 203)]
BOUNDS = (-0.7, -0.2, -0.05, 0.05, 0.2, 0.7)
DROPPED = "\x1b[9;2m"  # struck through: a weight of 0, so no gradient
COLOURS = {"log-ratio": 1, "weight": 2}  # and where in a piece


def printable(text: str) -> str:
    """What a model wrote, without power over the terminal: control characters are shown."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


def indented(text: str, colour: str = "") -> str:
    """Each line has its own colour: a pager forgets it at the line's end."""
    off = OFF if colour else ""
    return "\n".join(f"    {colour}{line}{off}" for line in printable(text).split("\n"))


def shade(value: float | None, colour: str) -> str:
    """The ANSI code of a token; "" in the middle, and where there is no advantage."""
    if value is None or (colour == "weight" and value < 0):
        return ""
    if colour == "weight":
        if value == 0:
            return DROPPED
        value = math.log(value)
    at = sum(value > bound for bound in BOUNDS)
    return SHADES[at] if at != 3 else ""


def legend(colour: str) -> str:
    """What the shades mean."""
    edges = [math.exp(b) if colour == "weight" else b for b in BOUNDS]
    below = [f"{SHADES[i]} < {edges[i]:.2f} {OFF}" for i in range(3)]
    above = [f"{SHADES[i + 1]} > {edges[i]:.2f} {OFF}" for i in range(3, 6)]
    dropped = f"  {DROPPED} 0 {OFF}" if colour == "weight" else ""
    put_in = f"  {BLUE}put in, not sampled{OFF}"
    return f"{colour} of each token:  {' '.join([*below, *above])}{dropped}{put_in}\n"


def shaded(pieces: list, colour: str) -> str:
    """An answer, each token in its shade; one that ends a line shows where, by a ↵ for each line
    that it ends."""
    text = "    "
    for piece in pieces:
        sampled = piece[COLOURS["log-ratio"]] is not None
        code = shade(piece[COLOURS[colour]], colour) if sampled else BLUE
        *ended, last = printable(piece[0]).split("\n")
        shown = [*(f"{line}↵" for line in ended), last] if code else [*ended, last]
        text += "\n    ".join(f"{code}{part}{OFF}" if code and part else part for part in shown)
    return text


def answer_of(sample: dict, colour: str = "") -> list[str]:
    """An answer's lines: what the model wrote, and what its environment or an interruption put in
    between, each under its writer's name; or, coloured, as one text."""
    if colour:
        return [
            shaded(sample["values"], colour)
            if sample["values"]
            else indented(sample["completion"], DIM)
        ]
    turns = sample.get("turns") or [{"policy": sample["completion"]}]
    lines = []
    for turn in turns:
        ((writer, text),) = turn.items()
        if len(turns) > 1:
            lines.append(f"  {DIM}{'model' if writer == 'policy' else writer}:{OFF}")
        lines.append(indented(text, BLUE if writer != "policy" else ""))
    return lines


def as_text(samples: list[dict], colour: str = "") -> str:
    """The samples as text with ANSI colours: a prompt once, its answers below it. colour: one of
    COLOURS, of each token."""
    lines, before = [legend(colour)] if colour else [], None
    for s in samples:
        if (which := (s["step"], s["ordinal"])) != before:
            before = which
            title = f"step {s['step']}, prompt {s['ordinal']}, {s['prompt_tokens']} tokens"
            lines += ["", f"{BOLD}{title:─<100}{OFF}", indented(s["prompt"], DIM)]
            if s.get("answer") is not None:
                lines.append(f"  {BOLD}expected{OFF}  {printable(str(s['answer']))}")
        old, new = s["versions"]
        weights = f"v{old}" if old == new else f"v{old} to v{new}"
        cut = f", {RED}cut off{OFF}" if s["truncated"] else ""
        good = GREEN if s["reward"] > 0 else RED
        lines += [
            "",
            f"  {BOLD}reward {good}{s['reward']:.3f}{OFF}  {s['tokens']} tokens of {weights}{cut}",
            *answer_of(s, colour),
        ]
    return "\n".join(lines).lstrip("\n") + "\n"


def show_samples(run_dir: Path, step: int | None, colour: str = "") -> str:
    """A step's samples as text; None: the last step that has some. Raises: ValueError where there
    are none, or `colour` asks for what the run did not log."""
    samples = read_jsonl(run_dir / "samples.jsonl")
    steps = [s["step"] for s in samples]
    if not steps:
        raise ValueError(f"{run_dir} has no samples yet")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ValueError(
            f"--samples {step}: {run_dir} has those of steps {min(steps)} to {steps[-1]}"
        )
    shown = [s for s in samples if s["step"] == step]
    if colour and not all("values" in s for s in shown):
        raise ValueError(f"--colour {colour}: {run_dir} did not log its tokens; --log-tokens does")
    return as_text(shown, colour)


def without_colours(text: str) -> str:
    for code in (BOLD, DIM, GREEN, RED, BLUE, OFF):
        text = text.replace(code, "")
    return text


def page(text: str, coloured: bool = False) -> None:
    """To the terminal by less (space and b turn pages, / searches, q ends), to a pipe plain, unless
    the colours were asked for."""
    if sys.stdout.isatty():
        pydoc.pipepager(text, "less -R")
    else:
        print(text if coloured else without_colours(text), end="")
