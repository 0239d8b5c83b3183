"""The lines that a run says on the console, the trainer's and a rollout node's alike."""

import sys
import time

from tqdm import tqdm

from bridge.waits import in_utf8


def say(message: str, who: str = "") -> None:
    """A line with the time of day. It does not break a progress bar. who: the speaker, "rollout" on
    a rollout node."""
    speaker = f"{who}: " if who else ""
    tqdm.write(f"[{time.strftime('%H:%M:%S')}] {speaker}{in_utf8(message)}", file=sys.stdout)
    sys.stdout.flush()
    say.last = time.monotonic()
