"""The lines that a run says on the console, the trainer's and a rollout node's alike."""

import re
import sys
import time
from pathlib import Path

from tqdm import tqdm

from bridge.waits import in_utf8


def say(message: str, who: str = "") -> None:
    """A line with the time of day. It does not break a progress bar. who: the speaker, "rollout" on
    a rollout node."""
    speaker = f"{who}: " if who else ""
    tqdm.write(f"[{time.strftime('%H:%M:%S')}] {speaker}{in_utf8(message)}", file=sys.stdout)
    sys.stdout.flush()
    say.last = time.monotonic()


def last_line(path: Path, within_s: float) -> str:
    """The last line of a log, without its time, if it was written in the last within_s seconds."""
    if not path.exists() or time.time() - path.stat().st_mtime >= within_s:
        return ""
    lines = path.read_text(errors="replace").strip().splitlines()
    return re.sub(r"^\[[\d:]+\] ", "", lines[-1]) if lines else ""
