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


def write_end(run_dir: Path, step: int, why: str) -> None:
    """Of a run that ends before its last step; step: the one in progress."""
    part = run_dir / f"{ENDED}.part"
    part.write_text(
        json.dumps({"time": time.time(), "step": step, "why": " ".join(why.split())[:300]})
    )
    part.replace(run_dir / ENDED)


def how_it_ended(run_dir: Path) -> str:
    """Of a run that has not made its last step: when and why it ended, "" as long as its process is
    there. Of another machine's process nobody knows here."""
    with contextlib.suppress(FileNotFoundError):  # it goes when the run goes on
        end = json.loads((run_dir / ENDED).read_text())
        minutes = (time.time() - end["time"]) / 60
        return f"ended {minutes:.0f} min ago at step {end['step']}: {end['why']}"
    lock, holder = run_dir.resolve().with_name(f".{run_dir.resolve().name}.lock"), ""
    with contextlib.suppress(FileNotFoundError):
        holder = lock.read_text()
    pid = re.fullmatch(rf"pid (\d+) on {re.escape(socket.gethostname())}", holder)
    if pid and not os.path.exists(f"/proc/{pid[1]}"):
        return "ended without a word: its process is gone, killed by somebody or for its memory"
    return ""
