"""--after-checkpoint: the user's command, run behind every checkpoint that is whole."""

import os
import shlex
import subprocess
import threading
import time
from pathlib import Path

from bridge.console import say
from bridge.processes import guarded


class AfterCheckpoint:
    """Runs the command for one checkpoint after the other, in a thread; it prints into
    runs/NAME/after-checkpoint.log. What goes wrong with it is said, and harms nothing else.

    As a context manager: a run that ends well gives the commands `patience_s` to end, any other
    ends them at once. They end with this process too, however it ends.
    """

    def __init__(self, command: str, run_dir: Path, patience_s: float = 600.0):
        """command: "" for none; {dir} and {step} in it are filled in, quoted for the shell."""
        self.command, self.patience_s = command, patience_s
        self.log_path = run_dir / "after-checkpoint.log"
        self._due: list[tuple[Path, int]] = []
        self._changed, self._closed = threading.Condition(), False
        self._process: subprocess.Popen | None = None
        self._thread = threading.Thread(target=self._run, name="after checkpoint", daemon=True)

    def __enter__(self) -> "AfterCheckpoint":
        if self.command:
            self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if not self.command:
            return
        with self._changed:
            self._closed = True
            self._changed.notify()
        if kind is None:
            self._thread.join(min(1.0, self.patience_s))
            if self._thread.is_alive() and self.patience_s:
                say(f"waiting up to {self.patience_s:.0f} s for --after-checkpoint's command")
            self._thread.join(self.patience_s)
        with self._changed:
            left, self._due = [step for _, step in self._due], []
            if self._process is not None:
                say("warning: --after-checkpoint: its command still runs, and is ended")
                self._process.terminate()  # the guard, which ends all that the command has started
        if left:
            say(f"warning: --after-checkpoint: not run for steps {', '.join(map(str, left))}")
        self._thread.join(30)

    def __call__(self, checkpoint: Path, step: int) -> None:
        """A checkpoint is whole. Returns at once."""
        with self._changed:
            self._due += [(checkpoint, step)] if self.command else []
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due or self._closed)
                if not self._due:
                    return
                checkpoint, step = self._due.pop(0)
                what = f"--after-checkpoint, step {step}"
                if not checkpoint.exists():  # others came while the command before this one ran
                    say(f"warning: {what}: not run, {checkpoint} has been removed for newer ones")
                    continue
                try:
                    self._process = self._start(checkpoint, step)
                except OSError as e:
                    say(f"warning: {what}: {e}")
                    continue
            status = self._process.wait()
            with self._changed:
                self._process = None
            if status:
                say(f"warning: {what}: its command ended with status {status}, see {self.log_path}")

    def _start(self, checkpoint: Path, step: int) -> subprocess.Popen:
        command = self.command.replace("{dir}", shlex.quote(str(checkpoint.resolve())))
        command = command.replace("{step}", str(step))
        env = {name: value for name, value in os.environ.items() if name != "CISPO_TOKEN"}
        with open(self.log_path, "a") as out:
            print(f"[{time.strftime('%H:%M:%S')}] step {step}: {command}", file=out, flush=True)
            return subprocess.Popen(
                guarded(["bash", "-c", command]),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=env,
                start_new_session=True,
            )
