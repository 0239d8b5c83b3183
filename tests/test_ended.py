"""How a run ended, as the screen says it."""

import json
import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from test_watch import run_of, screen

from bridge.logs import how_it_ended
from report import Log, write_end


def plain(run):
    return re.sub(r"\x1b\[\d+m", "", screen(run))


def locked_by(run, pid, host=None):
    lock = run.with_name(f".{run.name}.lock")
    lock.write_text(f"pid {pid} on {host or socket.gethostname()}")


def test_a_run_that_was_stopped_says_when_and_why(tmp_path):
    run = run_of(tmp_path, [0, 1])
    assert "min left, last step" in plain(run)
    write_end(run, 2, "the gradients\nof 3 updates")
    assert not list(run.glob("*.tmp"))
    shown = plain(run)
    assert "a step, ended\nended 0 min ago at step 2: the gradients of 3 updates\n" in shown
    assert "min left" not in shown and "in the last step: " in shown
    (run / "metrics.jsonl").write_text("")  # before its first step
    assert "no step yet; ended 0 min ago at step 2: the gradients of 3 updates" in screen(run)


def test_a_run_whose_process_is_gone_was_killed_and_one_that_is_there_goes_on(tmp_path):
    run = run_of(tmp_path, [0, 1])
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    locked_by(run, gone.pid)
    assert "a step, ended\nended without a word: its process is gone" in plain(run)
    locked_by(run, gone.pid, host="elsewhere")  # nobody knows here
    assert "min left, last step" in plain(run)
    locked_by(run, os.getpid())
    assert "min left, last step" in plain(run)
    finished = run_of(tmp_path / "other", range(6))
    locked_by(finished, gone.pid)
    assert "a step, finished" in plain(finished)


@pytest.mark.parametrize("error", [OSError("No space\nleft"), KeyboardInterrupt()])
def test_an_error_in_the_loop_is_how_the_run_ended(tmp_path, error):
    run = run_of(tmp_path, [0, 1])
    cfg = SimpleNamespace(run_dir=run, max_num_steps=6, wandb_project="", tensorboard=False)
    rollouts = SimpleNamespace(node=None)
    start = SimpleNamespace(step=2, scores={})
    with pytest.raises(type(error)), Log(cfg, rollouts, (None, None, None), start):
        raise error
    known = json.loads((run / "ended.json").read_text())
    assert known["step"] == 2
    said = " ".join(str(error).split())
    assert known["why"] == type(error).__name__ + (f": {said}" if said else "")
    assert f"at step 2: {type(error).__name__}" in how_it_ended(run)
