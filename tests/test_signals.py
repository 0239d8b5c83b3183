"""How a run ends before its end: signals that save the state first, and errors of a machine that
are one line."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

import train_cispo
from bridge import processes, weights
from bridge.waits import Signals, WaitOver
from ranks.checkpoint import CheckpointError

REPO = Path(__file__).resolve().parent.parent
SMALL = (
    "--no-compile --val-every-steps 0 --checkpoint-every-steps 0 --num-prompts-per-step 4 "
    "--num-generations-per-prompt 4 --train-global-batch-size 16"
)


def start(tmp_path, checkpoint, fake_vllm_command, *launcher):
    """A run in a session of its own, as a terminal has its foreground job."""
    python = launcher or [sys.executable]
    command = [
        *python,
        str(REPO / "train_cispo.py"),
        "--model",
        str(checkpoint),
        *SMALL.split(),
        "--max-num-steps",
        "100000",
        "--rollout-args",
        f"--vllm-command '{fake_vllm_command}'",
    ]
    with open(tmp_path / "out", "w") as out:
        return subprocess.Popen(
            command, cwd=tmp_path, stdout=out, stderr=out, start_new_session=True
        )


def until(run, tmp_path, said, within_s=150):
    end = time.monotonic() + within_s
    while said not in (out := (tmp_path / "out").read_text()):
        assert run.poll() is None and time.monotonic() < end, out
        time.sleep(0.02)  # polling another process
    return out


@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_ctrl_c_saves_the_state_and_ends_every_process_with_status_130(
    launcher, tmp_path, tiny_checkpoint, fake_vllm_command
):
    torchrun = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split()]
    run = start(
        tmp_path, tiny_checkpoint, fake_vllm_command, *(torchrun if launcher == "torchrun" else ())
    )
    try:
        until(run, tmp_path, "step    2 ")
        children = psutil.Process(run.pid).children(recursive=True)
        os.killpg(run.pid, signal.SIGINT)
        status = run.wait(60)
        out = (tmp_path / "out").read_text()
        # torchrun reports the signal that it had itself by a status of its own
        assert status == 130 if launcher == "python" else status != 0, out
        assert (
            "its state saved; once more ends it at once" in out
            and "its state is in runs/tiny/checkpoints" in out
        )
        assert 'train_cispo.py", line' not in out  # no traceback of ours
        assert not psutil.wait_procs(children, timeout=30)[1]
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    (saved,) = (tmp_path / "runs/tiny/checkpoints").iterdir()
    steps = (tmp_path / "runs/tiny/metrics.jsonl").read_text().count("\n")
    assert saved.name == f"step-{steps:06d}"  # nothing of what was trained is lost


@pytest.fixture
def signals(monkeypatch):
    kept = {number: signal.getsignal(number) for number in Signals.NAMES}
    monkeypatch.setattr(Signals, "stop", "")
    monkeypatch.setattr(Signals, "since", 0.0)
    monkeypatch.setattr(Signals, "in_loop", False)
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "number, word",
    [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")],
)
def test_the_first_signal_asks_and_the_second_ends(signals, number, word, capfd):
    Signals.install()
    with pytest.raises(SystemExit) as ended:  # before the loop there is nothing to save
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number and not Signals.stop
    Signals.in_loop = True
    os.kill(os.getpid(), number)
    assert (
        Signals.stop == word and Signals.asked(f"{word} on rank 3") and not Signals.asked("train")
    )
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number
    assert ("once more ends it at once" in capfd.readouterr().err) == (number == signal.SIGINT)


def test_a_terminal_that_closes_does_not_end_what_nohup_started(signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    Signals.install()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize(
    "error, said",
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl"),
            "No space left on device: 'runs/x/metr",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), "Permission denied: 'runs'"),
        (weights.WeightsError("m: tensor a is missing"), "m: tensor a is missing"),
        (CheckpointError("runs/x is damaged"), "runs/x is damaged"),
        (WaitOver("wait 'turn': trainer rank 1 waits"), "wait 'turn'"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried to"),
            "Tried to; lower --max-tokens-per-micro-batch",
        ),
        (torch.distributed.DistNetworkError("closed"), "another rank has ended"),
    ],
)
def test_what_a_machine_does_to_a_run_is_one_line(
    error, said, tiny_checkpoint, tmp_path, monkeypatch
):
    def train(*args):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_cispo, "train", train)
    monkeypatch.setattr(Signals, "install", lambda: None)
    monkeypatch.setattr(
        sys, "argv", ["train_cispo.py", "--model", str(tiny_checkpoint), "--no-compile"]
    )
    with pytest.raises(SystemExit) as ended:
        train_cispo.main()
    assert (
        ended.value.code.startswith("train_cispo.py: error: rank 0 on ")
        and said in ended.value.code
    )
    assert "\n" not in ended.value.code and len(ended.value.code) < 800


def test_an_error_of_ours_keeps_its_traceback(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_cispo, "train", lambda *args: {}["a bug"])
    monkeypatch.setattr(Signals, "install", lambda: None)
    monkeypatch.setattr(
        sys, "argv", ["train_cispo.py", "--model", str(tiny_checkpoint), "--no-compile"]
    )
    with pytest.raises(KeyError, match="a bug"):
        train_cispo.main()


def test_cores_are_those_that_this_process_may_use(tmp_path, monkeypatch):
    code = (
        f"import os, sys; sys.path.insert(0, {str(REPO)!r}); os.sched_setaffinity(0, {{0}}); "
        "from bridge import processes; print(processes.cores())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "1\n"
    limit = tmp_path / "cpu.max"
    monkeypatch.setattr(processes, "Path", lambda path: limit if "cgroup" in path else Path(path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    for text, count in (("max 100000", 64), ("350000 100000", 3), ("50000 100000", 1)):
        limit.write_text(text)
        assert processes.cores() == count
    for file in processes.program_files():
        assert "cpu_count" not in file.read_text(), file
