"""A long run on the fake vLLM: memory, file handles, threads and /dev/shm of every process stay
where they were.

    python tools/soak.py --steps 1000
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the program
from bridge.logs import read_jsonl

REPO = Path(__file__).resolve().parent.parent
PARTS = {
    "train_cispo.py": "trainer and hub",
    "rollout.py": "rollout",
    "reward_process.py": "reward worker",
    "fake_vllm.py": "vLLM",
}


def sample(trainer: psutil.Process) -> dict[str, tuple[int, int, int, int]]:
    """(resident bytes, file handles but TCP, threads, TCP sockets) of each part; of the reward
    workers, the largest."""
    found = {
        "/dev/shm": (
            sum(f.stat().st_size for f in Path("/dev/shm").glob("cispo-*/**/*") if f.is_file()),
            0,
            0,
            0,
        )
    }
    for p in [trainer, *trainer.children(recursive=True)]:
        names = [
            part for script, part in PARTS.items() if any(x.endswith(script) for x in p.cmdline())
        ]
        if names:
            tcp = len(p.net_connections("tcp"))
            now = (p.memory_info().rss, max(0, p.num_fds() - tcp), p.num_threads(), tcp)
            found[names[0]] = max(found.get(names[0], (0, 0, 0, 0)), now)
    return found


def soak(steps: int, every: int = 20) -> list[tuple[int, dict]]:
    """Runs the tiny preset and samples its processes; returns (step, sample) of each."""
    fake = REPO / "tests/fake_vllm.py"
    command = [
        sys.executable,
        str(REPO / "train_cispo.py"),
        "--use-cispo",
        "--max-num-steps",
        str(steps),
        f"--rollout-args=--vllm-command '{sys.executable} {fake}'",
    ]
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "runs/tiny/metrics.jsonl"
        with open(Path(directory) / "out", "w") as out:
            run = subprocess.Popen(command, cwd=directory, stdout=out, stderr=out)
        try:
            trainer = psutil.Process(run.pid)
            while run.poll() is None:
                step = len(log.read_text().splitlines()) if log.exists() else 0
                if step >= every * (len(rows) + 1) and step < steps - 2:
                    rows.append((step, sample(trainer)))
                    print(
                        f"step {step:5d}  "
                        + "  ".join(
                            f"{part}: {size >> 20} MiB {fds}+{tcp} fds {threads} thr"
                            for part, (size, fds, threads, tcp) in sorted(rows[-1][1].items())
                        ),
                        flush=True,
                    )
                time.sleep(0.1)  # polling another program's output
            assert run.returncode == 0, (Path(directory) / "out").read_text()[-3000:]
            assert len(read_jsonl(log)) == steps
        finally:
            if run.poll() is None:
                run.terminate()
                run.wait(90)
    return rows


WARM_UP_STEPS = 100
# TCP sockets come and go: one for each request in flight, and idle ones are closed after 2 s (20 to
# 64 handles of the node were seen within 100 steps). So they have a bound of their own:
# --max-groups, and 16 for all else.
CONNECTIONS = 64 + 16


def growth(rows: list[tuple[int, dict]]) -> dict[str, tuple[float, int, int, int]]:
    """Of each part, from the end of the warm-up to the last sample: memory in percent, handles but
    TCP, threads; and the most TCP sockets at any time."""
    (_, first), (_, last) = next(row for row in rows if row[0] >= WARM_UP_STEPS), rows[-1]

    # What leaks is there in every sample; a file that is open for a moment is not in the least of
    # three.
    def least(part, i):
        return min(row[part][i] for _, row in rows[-3:] if part in row)

    def most(part):
        return max(row[part][3] for _, row in rows if part in row)

    return {
        part: (
            100 * (last[part][0] / max(1, was[0]) - 1) if was[0] else 0.0,
            least(part, 1) - was[1],
            least(part, 2) - was[2],
            most(part),
        )
        for part, was in first.items()
        if part in last
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    if (steps := parser.parse_args().steps) < 2 * WARM_UP_STEPS:
        parser.error(
            f"--steps {steps}: the first {WARM_UP_STEPS} are warm-up, so at least "
            f"{2 * WARM_UP_STEPS}"
        )
    grown = growth(soak(steps))
    print(
        {
            part: (
                f"{percent:+.1f} % memory, {fds:+d} handles, {threads:+d} threads, {tcp} TCP "
                "sockets at most"
            )
            for part, (percent, fds, threads, tcp) in grown.items()
        }
    )
    sys.exit(
        any(
            percent > 5 or fds > 4 or threads > 1 or tcp > CONNECTIONS
            for percent, fds, threads, tcp in grown.values()
        )
    )
