"""Whole training runs under random faults: nothing may be lost, trained twice or trained too late.

    python tools/chaos.py --seed 0 --faults 200        five runs on the stand-in vLLM, half an hour
    python tools/chaos.py --seed 0 --faults 6 --real   the real one: only faults from outside

Each fault strikes between two steps at random; it is over when two more steps are trained, which
may take a minute. At the end of a run its log of ordinals, which is what the optimizer saw, is
compared with the ledger.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the program
from bridge.processes import with_parent

REPO = Path(__file__).resolve().parent.parent
LOG = "runs/tiny/rollout.log"
VLLM = (
    "hang",
    "crash",
    "crash_update",
    "crash_checksum",
    "stall_update",
    "drop",
    "nan",
    "null",
    "empty",
    "long",
    "twice",
    "oom",
)
REWARD = ("raise", "nan", "exit", "hang")
PARTS = (
    "kill -9 vllm",
    "kill -9 rollout",
    "stop rollout 8 s",
    "kill -9 trainer",
    "SIGTERM trainer",
)
SECOND = "a second node, and weights that one refuses"
FAULTS = [
    *(f"vllm {kind}" for kind in VLLM),
    *(f"reward {kind}" for kind in REWARD),
    *PARTS,
    SECOND,
]
# the fake one has crash_update and stall_update for that
IN_PAUSE = "kill -9 vllm between /pause and /resume"
REAL_FAULTS = [*PARTS, IN_PAUSE]
REWARD_FILE = """
import os, signal, sys
from pathlib import Path
ORDER = Path(__file__).with_name("order")
def score(completion, example):
    if ORDER.exists():
        try:
            os.rename(ORDER, f"{ORDER}.{os.getpid()}")  # one worker carries it out
        except OSError:
            return float(completion == example["answer"])
        kind = Path(f"{ORDER}.{os.getpid()}").read_text()
        if kind == "raise": raise ValueError("ordered")
        if kind == "exit": sys.exit(5)
        if kind == "hang": signal.pause()
        if kind == "nan": return float("nan")
    return float(completion == example["answer"])

async def play(sample, example):
    turn = await sample(max_tokens=6)
    await sample(example["prompt"], max_tokens=2)
    return score(turn.text, example)
"""


def paused(port: str) -> bool:
    """Whether the real vLLM is between /pause and /resume."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/is_paused", timeout=5) as response:
        return json.load(response)["is_paused"]


class Run:
    """A training run in a directory of its own, started again when a fault has ended the
    trainer."""

    def __init__(self, root: Path, real: bool, steps: int, plays: bool):
        self.root, self.steps = root, steps
        (root / "my.py").write_text(REWARD_FILE)
        self.second = None  # rollout node, which ends with the trainer
        self.rollout_flags = rollout = (
            "--stall-timeout-s 4 --load-timeout-s 6 --reward-timeout-s 4 --beat-s 0.5"
        )
        if not real:
            fake = REPO / "tests/fake_vllm.py"
            self.rollout_flags = rollout = f"{rollout} --vllm-command " + shlex.quote(
                f"{sys.executable} {fake}"
            )
        else:
            rollout = rollout.replace(
                "--stall-timeout-s 4 --load-timeout-s 6", "--stall-timeout-s 20"
            )
        self.command = [
            sys.executable,
            str(REPO / "train_cispo.py"),
            "--use-cispo",
            "--no-compile",
            "--max-num-steps",
            str(steps),
            "--checkpoint-every-steps",
            "5",
            "--resume",
            "auto",
            "--reward",
            f"{root / 'my.py'}:{'play' if plays else 'score'}",
            "--max-new-tokens",
            "14" if plays else "8",
            "--full-version-every",
            "2",
            f"--rollout-args={rollout}",
        ]
        self.start()

    def start(self):
        with open(self.root / "out", "a") as out:
            env = {**os.environ, "CISPO_TOKEN": "chaos"}
            self.process = subprocess.Popen(
                self.command, cwd=self.root, stdout=out, stderr=out, env=env
            )

    def end_second(self):
        if self.second is not None:
            self.second.kill()  # its vLLM and workers die with it
            self.second.wait()
            self.second = None

    def start_second(self):
        """Another rollout node, to which the newest weights on the trainer's disk are damaged, each
        file by one bit. It refuses them, they are published once more, and the first goes on with
        what it has."""
        self.end_second()
        newest = max(
            self.root.glob("runs/tiny/weights/v*"), key=lambda v: int(v.name[1:].split(".")[0])
        )
        for file in newest.glob("model-*"):
            with contextlib.suppress(FileNotFoundError), open(file, "r+b") as f:
                f.seek(-5, os.SEEK_END)
                last = f.read(1)[0]
                f.seek(-5, os.SEEK_END)
                f.write(bytes([last ^ 1]))
        url = re.findall(r"hub at (http://\S+),", (self.root / "out").read_text())[-1]
        command = [
            sys.executable,
            str(REPO / "rollout.py"),
            url,
            "--dir",
            str(self.root / "second"),
        ]
        with open(self.root / "second.log", "a") as out:
            self.second = subprocess.Popen(
                with_parent([*command, *shlex.split(self.rollout_flags)]),
                stdout=out,
                stderr=out,
                env={**os.environ, "CISPO_TOKEN": "chaos"},
            )

    def steps_done(self) -> int:
        """Steps ever trained, those made again after a restart included."""
        path = self.root / "out"
        return (
            len(re.findall(r"\] step +\d+  reward", path.read_text(errors="replace")))
            if path.exists()
            else 0
        )

    def records(self) -> list[dict]:
        return [
            json.loads(line)
            for line in (self.root / "runs/tiny/metrics.jsonl").read_text().splitlines()
        ]

    def wait(self, condition, within_s: float, what: str):
        deadline = time.monotonic() + within_s
        while not condition():
            tail = (self.root / "out").read_text()[-3000:]
            assert time.monotonic() < deadline, f"{what} took more than {within_s:.0f} s:\n{tail}"
            assert self.process.poll() is None or self.process.returncode == 0, (
                f"the trainer ended by itself:\n{tail}"
            )
            time.sleep(0.05)  # polling another program's output

    def rollout(self) -> psutil.Process | None:
        children = psutil.Process(self.process.pid).children()
        return next(
            (p for p in children if any(x.endswith("rollout.py") for x in p.cmdline())), None
        )

    def strike(self, fault: str, rng: random.Random):
        what, _, how = fault.partition(" ")
        up = re.findall(
            r"vLLM is up after .*, pid (\d+), port (\d+)", (self.root / LOG).read_text()
        )
        if what == "vllm":
            order = json.dumps({"kind": how, "count": rng.randint(1, 4)}).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{up[-1][1]}/fault", order, {"Content-Type": "application/json"}
            )
            try:
                urllib.request.urlopen(request, timeout=5).read()
            except OSError:
                pass  # a crash does not answer, and it may be down already
        elif what == "reward":
            (self.root / "order.tmp").write_text(how)
            (self.root / "order.tmp").rename(self.root / "order")
        elif "-9 vllm" in fault:
            while fault == IN_PAUSE and not paused(up[-1][1]):
                # each turn is a request; a weight update, every step has one, pauses it for some 70
                # ms
                pass
            try:
                os.killpg(int(up[-1][0]), signal.SIGKILL)
            except ProcessLookupError:
                pass
        elif fault == SECOND:
            self.start_second()
        elif fault.endswith("trainer"):
            self.end_second()
            self.process.send_signal(signal.SIGKILL if "-9" in fault else signal.SIGTERM)
            status = self.process.wait(90)
            assert status == (-9 if "-9" in fault else 0), f"status {status}"
            self.start()
        elif (rollout := self.rollout()) is not None:
            rollout.send_signal(signal.SIGKILL if "-9" in fault else signal.SIGSTOP)
            if fault.startswith("stop"):
                time.sleep(8)  # the fault itself: the node is not heard of for so long
                rollout.send_signal(signal.SIGCONT)

    def verdict(self) -> dict:
        """What the optimizer saw, against the ledger of the last step."""
        records = self.records()
        assert [r["step"] for r in records] == list(range(self.steps)), [r["step"] for r in records]
        trained = Counter(ordinal for r in records for ordinal in r["ordinals"])
        hub = records[-1]["hub"]
        assert hub["taken"] == trained.total(), (hub, trained.total())
        lost = [o for o in range(max(trained) + 1) if o not in trained]
        out = (self.root / "out").read_text()
        stamps = re.findall(r"\[(\d+):(\d+):(\d+)\] step +\d+  reward", out)
        clock = [60 * (60 * int(h) + int(m)) + int(s) for h, m, s in stamps]
        return {
            "lost": len(lost) - hub["set_aside"],
            "set_aside": hub["set_aside"],
            "refused": hub["counts"].get("updates_refused", 0),
            "twice": sum(n > 1 for n in trained.values()),
            "too_old": sum(r["train/max_trajectory_age"] > 1 for r in records),
            "reward": sum(r["train/reward"] for r in records[-5:]) / 5,
            "updates_broken_off": len(
                re.findall(r"loading v\d+ failed", (self.root / LOG).read_text())
            ),
            # Some faults are felt only after two more steps; nothing hides from the time between
            # any two.
            "longest_gap_s": max((b - a) % 86400 for a, b in itertools.pairwise(clock)),
        }


def chaos(
    seed: int,
    faults: int,
    real: bool = False,
    per_run: int = 40,
    steps: int = 160,
    within_s: float = 60.0,
    plays: bool = False,
):
    """Returns (step, fault, seconds to recover) of each fault, and each run's verdict; prints both
    as they come."""
    rng, rows, verdicts = random.Random(seed), [], []
    kinds = REAL_FAULTS if real else FAULTS
    deck = []
    for number in range(-(-faults // per_run)):
        with tempfile.TemporaryDirectory() as directory:
            run = Run(Path(directory), real, steps, plays)
            try:
                run.wait(lambda run=run: run.steps_done() >= 3, 240, "the start")
                for _ in range(min(per_run, faults - len(rows))):
                    if not deck:  # each kind once before any comes again
                        deck = rng.sample(kinds, len(kinds))
                    time.sleep(rng.random())  # where in a step it strikes is part of the draw
                    if run.process.poll() is not None:
                        break
                    fault, before, start = deck.pop(), run.steps_done(), time.monotonic()
                    run.strike(fault, rng)

                    def over():
                        return run.steps_done() >= before + 2 or run.process.poll() == 0  # noqa: B023

                    run.wait(over, within_s, f"recovery from {fault!r}")
                    rows.append((before, fault, time.monotonic() - start))
                    print(
                        f"run {number}  after step {before:4d}  {fault:20}  {rows[-1][2]:5.1f} s",
                        flush=True,
                    )
                run.wait(lambda run=run: run.process.poll() == 0, 600, "the end")
                verdicts.append(run.verdict())
                print(f"run {number}: {verdicts[-1]}", flush=True)
            finally:
                run.end_second()
                if run.process.poll() is None:
                    run.process.terminate()
                    run.process.wait(90)
    worst = max(rows, key=lambda row: row[2])
    print(
        f"{len(rows)} faults in {len(verdicts)} runs; slowest recovery {worst[2]:.1f} s "
        f"({worst[1]})"
    )
    return rows, verdicts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--per-run", type=int, default=40)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--within-s", type=float, default=60.0, help="to recover from a fault")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--plays", action="store_true", help="samples of two turns")
    a = parser.parse_args()
    _, verdicts = chaos(a.seed, a.faults, a.real, a.per_run, a.steps, a.within_s, a.plays)
    bad = [
        v
        for v in verdicts
        if v["lost"]
        or v["twice"]
        or v["too_old"]
        or v["reward"] < 0.9
        or v["longest_gap_s"] > a.within_s
    ]
    sys.exit(f"failed: {bad}" if bad else 0)
