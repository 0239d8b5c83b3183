"""Whole training runs as a user starts them, against a real vLLM. Each takes a minute or two (`--slow`)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

REPO = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow
TRAIN = [sys.executable, str(REPO / "train_cispo.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


class Run:
    """A run in a directory of its own; what it prints goes to DIR/out. Leaving the context ends it."""

    def __init__(self, cwd, command, out="out", **env):
        self.cwd, self.path = cwd, cwd / out
        env = {**os.environ, **env}
        with open(self.path, "w") as out:
            self.process = subprocess.Popen(command, cwd=cwd, stdout=out, stderr=out, start_new_session=True, env=env)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    @property
    def out(self):
        return self.path.read_text()

    def wait_for(self, text, timeout_s=180):
        deadline = time.monotonic() + timeout_s
        while text not in self.out:
            assert time.monotonic() < deadline and self.process.poll() is None, f"no {text!r}:\n{self.out[-3000:]}"
            time.sleep(0.2)  # polling a file that another program writes

    def finish(self, timeout_s=420):
        """Wait for a good end, check every step, return the records."""
        status = self.process.wait(timeout_s)
        assert status == 0, self.out[-3000:]
        assert (self.cwd / "runs/tiny/curves.png").stat().st_size > 10_000 and "curves: runs/tiny" in self.out
        lines = (self.cwd / "runs/tiny/metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [r["step"] for r in records] == list(range(len(records)))
        for r in records:
            hub = r["hub"]
            states = ("taken", "buffered", "leased", "returned", "set_aside", "skipped")
            assert hub["handed_out"] == sum(hub[state] for state in states)
            assert r["train/max_trajectory_age"] <= 1
            for node in hub["nodes"].values():  # vLLM's cache is never full here, so nothing holds prompts back
                assert node.get("vllm", {}).get("limit", 16) >= 16
            if r["train/tokens_same_version"]:  # two fp32 implementations of the same policy: rounding, no more
                assert r["train/gen_kl_error_same_version"] <= 1e-5
                assert r["train/token_mult_prob_error_same_version"] <= 1.002
        return records


def learned(records):
    rewards = [r["train/reward"] for r in records]
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    return first <= 0.5 and last >= 0.9, (first, last)


def test_the_first_command_of_the_readme_learns():
    """bash launch.sh, but under another name, so that nobody's runs/tiny is overwritten."""
    done = subprocess.run(["bash", "launch.sh", "--use-cispo", "--name", "test"], cwd=REPO, timeout=420, check=False)
    assert done.returncode == 0
    lines = (REPO / "runs/test/metrics.jsonl").read_text().splitlines()
    ok, rewards = learned([json.loads(line) for line in lines])
    assert ok, rewards


def test_without_use_cispo_the_ppo_clip_learns(tmp_path):
    with Run(
        tmp_path, [*TORCHRUN, "--nproc-per-node", "1", TRAIN[1], "--no-use-cispo", "--max-num-steps", "120"]
    ) as run:
        records = run.finish()
    ok, rewards = learned(records)
    assert ok, rewards
    assert max(r["train/probs_ratio_clamped_max"] for r in records) == pytest.approx(1.2)


def test_at_age_0_every_token_of_60_weight_updates_has_the_trainer_s_own_logprob(tmp_path):
    """The proof of the whole bridge: after each of 60 updates, what vLLM sampled with is what the trainer has."""
    with Run(tmp_path, [*TRAIN, "--max-trajectory-age-steps", "0", "--max-num-steps", "61"]) as run:
        records = run.finish()
    assert len(records) == 61
    for r in records:
        assert r["train/max_trajectory_age"] == 0 and r["train/tokens_older_version"] == 0
        assert r["train/tokens_same_version"] > 0
        assert r["train/gen_kl_error"] <= 1e-5 and r["train/token_mult_prob_error"] <= 1.002
        assert 0.9999 < r["train/sampling_importance_ratio"] < 1.0001


def test_a_vllm_killed_in_mid_run_comes_back_on_the_current_weights(tmp_path):
    with Run(tmp_path, [*TRAIN, "--max-num-steps", "40"]) as run:
        run.wait_for("step   10")
        servers = [p for p in psutil.Process(run.process.pid).children(recursive=True)
                   if "vllm.entrypoints.openai.api_server" in " ".join(p.cmdline())]  # fmt: skip
        assert servers
        servers[0].kill()
        records = run.finish()
    assert len(records) == 40
    log = (tmp_path / "runs/tiny/rollout.log").read_text()
    # noticed by whoever spoke to it first: the watch, or a weight update under way
    assert log.count("vLLM is up") == 2 and ("vLLM ended with status" in log or "vLLM is started again" in log)
    # the version it came back on is a late one, and it stayed current to the end
    assert records[-1]["hub"]["nodes"].popitem()[1]["version"] >= 38


def test_interrupting_the_launcher_ends_every_process_it_started(tmp_path):
    command = ["bash", str(REPO / "launch.sh"), "--use-cispo", "--name", "test-interrupt"]
    with Run(tmp_path, command) as run:
        run.wait_for("step    1 ")
        started = [run.process, *psutil.Process(run.process.pid).children(recursive=True)]
        assert any("vllm" in " ".join(p.cmdline()) for p in started[1:])
        os.killpg(run.process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
        assert run.process.wait(30) == 130
        _, alive = psutil.wait_procs(started[1:], timeout=30)
        assert not alive, [p.cmdline() for p in alive]
