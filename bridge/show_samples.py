"""A run's logged samples, to be read, for watch.py: from samples.jsonl, in pages on a terminal and
plain into a pipe."""

import pydoc
import sys
from pathlib import Path

from bridge.logs import read_jsonl

BOLD, DIM, GREEN, RED, BLUE, OFF = (f"\x1b[{code}m" for code in (1, 2, 32, 31, 34, 0))


def printable(text: str) -> str:
    """What a model wrote, without power over the terminal: control characters are shown."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


def indented(text: str, colour: str = "") -> str:
    """Each line has its own colour: a pager forgets it at the line's end."""
    off = OFF if colour else ""
    return "\n".join(f"    {colour}{line}{off}" for line in printable(text).split("\n"))


def answer_of(sample: dict) -> list[str]:
    """An answer's lines: what the model wrote, and what its environment or an interruption put in
    between, each under its writer's name."""
    turns = sample.get("turns") or [{"policy": sample["completion"]}]
    lines = []
    for turn in turns:
        ((writer, text),) = turn.items()
        if len(turns) > 1:
            lines.append(f"  {DIM}{'model' if writer == 'policy' else writer}:{OFF}")
        lines.append(indented(text, BLUE if writer != "policy" else ""))
    return lines


def as_text(samples: list[dict]) -> str:
    """The samples as text with ANSI colours: a prompt once, its answers below it."""
    lines, before = [], None
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
        colour = GREEN if s["reward"] > 0 else RED
        lines += [
            "",
            f"  {BOLD}reward {colour}{s['reward']:.3f}{OFF}  {s['tokens']} tokens of {weights}"
            f"{cut}",
            *answer_of(s),
        ]
    return "\n".join(lines).lstrip("\n") + "\n"


def show_samples(run_dir: Path, step: int | None) -> str:
    """A step's samples as text; None: the last step that has some. Raises: ValueError where there
    are none."""
    samples = read_jsonl(run_dir / "samples.jsonl")
    steps = [s["step"] for s in samples]
    if not steps:
        raise ValueError(f"{run_dir} has no samples yet")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ValueError(
            f"--samples {step}: {run_dir} has those of steps {min(steps)} to {steps[-1]}"
        )
    return as_text([s for s in samples if s["step"] == step])


def without_colours(text: str) -> str:
    for code in (BOLD, DIM, GREEN, RED, BLUE, OFF):
        text = text.replace(code, "")
    return text


def page(text: str) -> None:
    """To the terminal by less (space and b turn pages, / searches, q ends), to a pipe plain."""
    if sys.stdout.isatty():
        pydoc.pipepager(text, "less -R")
    else:
        print(without_colours(text), end="")
