"""Processes that end with whoever started them, even when that is killed by -9; none but a rollout
node gets the hub's token.

`with_parent` is for one process, `guarded` for one that starts others. `LocalRollout` is the
rollout node on the trainer's own machine.
"""

import contextlib
import fcntl
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from bridge.console import say
from bridge.logs import last_line
from bridge.waits import Wait, backoff_s


def cores() -> int:
    """The cores that this process may use: by its affinity, and by its cgroup's quota, as a
    container has one."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):  # none, or "max"
        return allowed


REPO = Path(__file__).resolve().parent.parent


def program_files() -> list[Path]:
    """The sources of this program, without tests and tools."""
    return [*REPO.glob("*.py"), *REPO.glob("ranks/*.py"), *REPO.glob("bridge/**/*.py")]


def log(message: str) -> None:
    say(message, who=log.who)


log.who = "rollout"  # whose processes these are


def node_name(pid: int, mark: str) -> str:
    """Two containers may have the same host name and process id, hence a mark that is drawn."""
    return f"{socket.gethostname()}:{pid}:{mark}"


def with_parent(command: list[str]) -> list[str]:
    """The command, to end with SIGTERM when this process is gone (Linux), so that even kill -9
    leaves no orphan.

    The child asks for it itself, and then becomes the command. A preexec_fn would ask in a fork of
    this process, whose other threads may hold any lock at that moment: such a child hangs, and
    whoever started it with it.
    """
    # 1 = PR_SET_PDEATHSIG
    ask = f"import ctypes, os, sys; ctypes.CDLL(None).prctl(1, {signal.SIGTERM:d}); "
    ask += f"os.getppid() == {os.getpid()} or os._exit(1); os.execvp(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-I", "-S", "-c", ask, *command]


# What is started may be many processes, hang while it ends, or leave some behind: a process that
# nothing can hang stands between it and the node. Whoever loses its parent becomes the guard's
# child, in whatever session it is.
GUARD = """
import ctypes, os, signal, subprocess, sys, time
def end(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit
signal.signal(signal.SIGTERM, end)
prctl = ctypes.CDLL(None).prctl
prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG: when the node is gone
prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
def kill_children():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = open(f"/proc/{pid}/stat").read()
            if int(stat.rpartition(")")[2].split()[1]) == os.getpid():
                os.kill(int(pid), signal.SIGKILL)
        except OSError:
            pass
child = None
try:
    if os.getppid() == int(sys.argv[1]):
        child = subprocess.Popen(sys.argv[3:])
        while (ended := os.wait())[0] != child.pid:
            pass  # an orphan
        child.returncode = os.waitstatus_to_exitcode(ended[1])
        sys.exit(child.returncode if child.returncode >= 0 else 128 - child.returncode)
finally:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        if child and child.poll() is None and float(sys.argv[2]):
            os.killpg(0, signal.SIGTERM)
            child.wait(float(sys.argv[2]))
    except subprocess.TimeoutExpired:
        pass
    finally:
        give_up = time.monotonic() + 10
        while time.monotonic() < give_up:  # the children of those killed are next
            kill_children()
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                break
            time.sleep(0.01)
        else:
            os.killpg(0, signal.SIGKILL)
"""


def guarded(command: list[str], grace_s: float = 10.0) -> list[str]:
    """The command under a guard. Start it in a session of its own: its end, SIGTERM to the guard,
    or this process's death end all that it has started, the session politely first, after grace_s
    by SIGKILL."""
    return [sys.executable, "-I", "-S", "-c", GUARD, str(os.getpid()), str(grace_s), *command]


# ---- the rollout node on the trainer's machine ---------------------------------------------------
def own_directory(cfg) -> Path:
    """The node's directory, locked while it lives. Directories in /dev/shm that nodes killed by -9
    left are removed: their locks are free. Raises: RuntimeError when another node holds this one
    and does not end."""
    for left in Path("/dev/shm").glob("cispo-*") if not cfg.dir else ():
        with contextlib.suppress(OSError), open(left / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
    root = Path(cfg.dir or f"/dev/shm/cispo-{os.getpid()}")
    root.mkdir(parents=True, exist_ok=True)
    own_directory.lock = open(root / "lock", "w")  # open, and so locked, until the process ends
    deadline = time.monotonic() + 30
    while True:
        try:
            fcntl.flock(own_directory.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # weights of a node that was killed: they would fill the disk, unproven
            for left in root.glob("v*/"):
                shutil.rmtree(left)
            return root
        except OSError:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{root} is in use by another node") from None
            time.sleep(0.1)  # the one before, on its way out


def rollout_gpus(visible: str, ranks: int) -> str:
    """CUDA_VISIBLE_DEVICES of the local rollout node: those that no rank of the trainer has, or all
    if none is left."""
    gpus = visible.split(",")
    return ",".join(gpus[ranks:] or gpus)


def why_no_gpu() -> str:
    """Why torch sees none of the GPUs that nvidia-smi lists; "" where it sees one, or none is
    listed."""
    if torch.cuda.is_available():
        return ""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        drivers = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    if not drivers.split():
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and (not visible.strip() or visible.strip().startswith("-")):
        why = f"CUDA_VISIBLE_DEVICES={visible!r} hides them"
    elif torch.version.cuda is None:
        why = f"torch {torch.__version__} is a build for CPUs (bash launch.sh install)"
    else:
        why = (
            f"the driver {drivers.split()[0]} may be too old for CUDA {torch.version.cuda}, for "
            f"which torch {torch.__version__} is built; CUDA 13 needs 580 or newer"
        )
    return f"nvidia-smi lists {len(drivers.split())} GPUs, and torch sees none: {why}"


def gpus_of_vllm(vllm_args: str) -> int:
    """How many its parallel sizes ask for; 0 on a machine without a GPU."""
    sizes = r"(?:--(?:tensor|data|pipeline)[-_]parallel[-_]size|-tp|-dp|-pp)[ =]+(\d+)"
    asked = math.prod(int(size) for size in re.findall(sizes, vllm_args))
    return asked if torch.cuda.is_available() else 0


class LocalRollout:
    """rollout.py beside the trainer, started again when it ends, unless it ends again and again."""

    MAX_STARTS = 5  # in a row, without a new group between them

    def __init__(self, hub, directory: Path, args: str, log_path: Path):
        self.hub, self.log_path = hub, log_path
        self.command = [
            sys.executable,
            str(REPO / "rollout.py"),
            hub.url,
            "--dir",
            str(directory),
            *shlex.split(args),
        ]
        torchrun = (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "MASTER_ADDR",
            "MASTER_PORT",
            "OMP_NUM_THREADS",
        )
        self.env = {
            k: v
            for k, v in os.environ.items()
            if k not in torchrun and not k.startswith("TORCHELASTIC")
        }
        if torch.cuda.is_available():
            given = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
                map(str, range(torch.cuda.device_count()))
            )
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            self.env["CUDA_VISIBLE_DEVICES"] = rollout_gpus(given, ranks)
            if len(given.split(",")) <= ranks:
                self.env["CISPO_GPUS_SHARED"] = "1"
        self.starts, self.groups, self.not_before = 0, -1, 0.0
        self.process: subprocess.Popen | None = None
        self._start()

    def _start(self) -> None:
        self.starts += 1
        self.mark = secrets.token_hex(4)
        env = {**self.env, "CISPO_TOKEN": self.hub.token, "CISPO_NODE_MARK": self.mark}
        with open(self.log_path, "a") as out:
            print(f"[{time.strftime('%H:%M:%S')}] a rollout node is started", file=out, flush=True)
            self.process = subprocess.Popen(
                with_parent(self.command), env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL
            )

    def keep(self, groups: int, say) -> None:
        """Called while the trainer waits. groups: that have come in so far. Raises: RuntimeError
        when the process has ended MAX_STARTS times and no group came between."""
        if groups > self.groups:
            self.groups, self.starts = groups, min(self.starts, 1)
        if (status := self.process.poll()) is None:
            return
        if not self.not_before:
            said = f"{last_line(self.log_path)} ({self.log_path})"
            why = f"the rollout process ended with status {status}: {said}"
            self.hub.release(node_name(self.process.pid, self.mark))
            # 2: another start would end the same way
            if self.starts >= self.MAX_STARTS or status == 2:
                raise RuntimeError(f"{why}; started {self.starts} times without a group")
            pause_s = backoff_s(self.starts)
            say(f"{why}; starting it again in {pause_s:.1f} s")
            self.not_before = time.monotonic() + pause_s
        elif time.monotonic() >= self.not_before:
            self.not_before = 0.0
            self._start()

    def stop(self, patience_s: float = 60.0) -> None:
        wait = Wait("rollout end", patience_s, whom=f"its rollout process, pid {self.process.pid},")
        self.process.terminate()
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            log(wait.message())
            self.process.kill()  # its vLLM and workers die with it
            self.process.wait()
