"""Files of lines that grow while they are read: records and logs."""

import json
import math
import re
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
