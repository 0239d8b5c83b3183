"""A program of this repository in a process that has torch already, for runs that end before they
begin: to import torch takes longer than all the rest of them.

The process is a fork of the server that tests/on_ranks.py forks its ranks from. It has its own
directory, environment and output, and runs the script as Python does."""

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from on_ranks import forks


def _program(command, cwd, env, outputs):
    """Runs in a process of its own."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for fd, path in zip((1, 2), outputs):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), fd)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def run_program(*command, cwd, env=None, timeout_s: float = 120.0) -> subprocess.CompletedProcess:
    """command: a script and its arguments. What `subprocess.run` would return, with text."""
    command = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as directory:
        outputs = [Path(directory, name) for name in ("out", "err")]
        args = (command, cwd, dict(env or os.environ), outputs)
        process = forks().Process(target=_program, args=args)
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, timeout_s)
        return subprocess.CompletedProcess(
            command, process.exitcode, *(path.read_text() for path in outputs)
        )
