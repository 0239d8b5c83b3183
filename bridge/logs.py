"""Files of a run that are read while it goes on: records, logs, and how it ended."""

import contextlib
import json
import math
import os
import re
import socket
import time
from pathlib import Path


def read_jsonl(path: Path) -> list[dict]:
    """One record a line. A last line that is still being written is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def last_line(path: Path, within_s: float = math.inf) -> str:
    """The last line of a log, if it was written in the last within_s seconds, or ""."""
    if not path.exists() or time.time() - path.stat().st_mtime >= within_s:
        return ""
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def without_time(line: str) -> str:
    """A line of `say` without the time of day that it begins with."""
    return re.sub(r"^\[[\d:]+\] ", "", line)


# ---- how a run ended -----------------------------------------------------------------------------
ENDED = "ended.json"


def lock_of(run_dir: Path) -> Path:
    """The file that is locked while a process has a run's directory: beside it, since it may be
    moved aside."""
    return run_dir.resolve().with_name(f".{run_dir.resolve().name}.lock")


def holder_of(pid: int | str) -> str:
    """What a process of this machine writes into it."""
    return f"pid {pid} on {socket.gethostname()}"


def how_it_ended(run_dir: Path) -> str:
    """Of a run that has not made its last step: when and why it ended, "" as long as its process is
    there. Of another machine's process nobody knows here."""
    with contextlib.suppress(FileNotFoundError):  # it goes when the run goes on
        end = json.loads((run_dir / ENDED).read_text())
        minutes = (time.time() - end["time"]) / 60
        return f"ended {minutes:.0f} min ago at step {end['step']}: {end['why']}"
    with contextlib.suppress(FileNotFoundError):
        holder = lock_of(run_dir).read_text()
        pid = re.fullmatch(r"pid (\d+) on .*", holder)
        if pid and holder == holder_of(pid[1]) and not os.path.exists(f"/proc/{pid[1]}"):
            return "ended without a word: its process is gone, killed by somebody or for its memory"
    return ""
