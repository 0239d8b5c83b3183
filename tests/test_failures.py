"""Failures of parts: a rollout node with a fake vLLM, real weights and a real hub, and what breaks
on order."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import aiohttp
import psutil
import pytest
import torch
from published import publish, write_version

from bridge import reward_pool, weights
from bridge.groups import Group
from bridge.hub import Hub
from bridge.ledger import Ledger
from bridge.reward_process import reward_digest
from config import RolloutConfig
from model import ModelConfig, Qwen3MoE
from rollout import Node, next_limit
from task import Codec

REPO = Path(__file__).resolve().parent.parent
SAMPLES = 4


def make_hub(tmp_path, tiny_checkpoint, reward="exact", prompts=None, **ledger):
    """A hub that wants as many groups as it can get; versions 0 to 2 are on disk, 0 is
    published."""
    model = Qwen3MoE(ModelConfig.from_dir(tiny_checkpoint))
    weights.load_hf(model, tiny_checkpoint)
    for version in range(3):
        write_version(tmp_path / "hub", version, list(model.hf_tensors()), tiny_checkpoint)
    sampling = {"n": SAMPLES, "temperature": 1.0, "max_tokens": 8, "stop_token_ids": [1]}
    run = {
        "num_generations": SAMPLES,
        "max_new_tokens": 8,
        "sampling": sampling,
        "dtype": "float32",
        "seed": 0,
        "max_model_len": 64,
        "reward": reward,
        "reward_digest": reward_digest(reward),
    }
    prompts = prompts or [{"prompt": "abcde>", "answer": "edcba"}] * 100_000
    ledger = {
        "prompts_per_step": 1,
        "max_age": 10**6,
        "num_steps": 10**6,
        "lease_timeout_s": 120.0,
        **ledger,
    }
    hub = Hub(
        Ledger(**ledger), prompts, Codec(tiny_checkpoint).encode, tmp_path / "hub", 32, "t", run
    )
    hub.start("127.0.0.1", 0)
    publish(hub, 0)
    return hub


@pytest.fixture
def hub(tmp_path, tiny_checkpoint):
    hub = make_hub(tmp_path, tiny_checkpoint)
    yield hub
    hub.close(patience_s=0.0)


def run_node(hub, tmp_path, command, scenario, **flags):
    """A whole node, until `scenario(node)` returns."""
    flags = {
        "stall_timeout_s": 2.0,
        "load_timeout_s": 5.0,
        "beat_s": 0.2,
        "reward_workers": 1,
        "max_groups": 1,
        **flags,
    }

    async def run():
        async with aiohttp.ClientSession(hub.url, headers={"Authorization": "Bearer t"}) as session:
            node = Node(
                RolloutConfig(hub.url, dir=str(tmp_path / "node"), vllm_command=command, **flags),
                session,
            )
            await node.join()
            tasks = [
                asyncio.create_task(t())
                for t in (node.follow_weights, node.watch_vllm, node.answer_prompts, node.beat)
            ]
            done = asyncio.create_task(scenario(node))
            try:
                await asyncio.wait([done, *tasks], timeout=200, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    assert not task.done(), task.exception()
                assert done.done(), "the scenario did not end in 200 s"
                return done.result()
            finally:
                for task in (*tasks, done):
                    task.cancel()
                await asyncio.wait([*tasks, done])
                await node.close()

    return asyncio.run(run())


async def until(condition, within_s=60.0):
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.02)  # a short poll of another task's state


async def groups(hub, more):
    """Wait for so many more groups, within a minute: the bound on recovery."""
    target = len(hub.ledger.buffer) + more
    await until(lambda: len(hub.ledger.buffer) >= target)


def test_requests_that_fail_or_come_back_damaged_cost_a_retry_or_a_sample(
    hub, tmp_path, fake_vllm_command, capfd
):
    """A dropped connection or a 500 is repeated; a damaged sample is dropped and counted, its
    siblings are used."""

    async def scenario(node):
        dropped = {}
        await groups(hub, 2)
        for kind in ("drop", "oom", "twice", "nan", "null", "empty", "long"):
            before = hub.ledger.counts["samples_dropped"]
            await node.vllm.post("/fault", {"kind": kind})
            await groups(hub, 3)
            dropped[kind] = hub.ledger.counts["samples_dropped"] - before
        return dropped

    dropped = run_node(hub, tmp_path, fake_vllm_command, scenario)
    assert dropped == {"drop": 0, "oom": 0, "twice": 0, "nan": 1, "null": 1, "empty": 1, "long": 1}
    assert all(len(g.lengths) in (SAMPLES, SAMPLES - 1) for g in hub.ledger.buffer)
    log = capfd.readouterr().out
    assert (
        log.count("generation failed") == 2 and log.count("1 x a log-prob that is not finite") == 2
    )
    assert "1 x no tokens" in log and re.search(r"1 x \d+ tokens, asked for at most 8", log)
    hub.ledger.check()


def test_a_vllm_that_hangs_dies_or_stalls_in_an_update_is_started_again(
    hub, tmp_path, fake_vllm_command, capfd
):
    """Each within a minute, on the newest weights, without a prompt lost."""

    async def scenario(node):
        await groups(hub, 2)
        for published, kind in [
            (0, "hang"),
            (0, "crash"),
            (1, "crash_update"),
            (2, "stall_update"),
        ]:
            with contextlib.suppress(aiohttp.ClientError):  # a crash does not answer
                await node.vllm.post("/fault", {"kind": kind})
            await asyncio.to_thread(publish, hub, published)
            await until(
                lambda published=published: node.version == published and node.ready.is_set()
            )
            await groups(hub, 40)  # more than the answers that were on their way
        return [max(g.versions.tolist()) for g in hub.ledger.buffer]

    versions = run_node(hub, tmp_path, fake_vllm_command, scenario)
    assert versions == sorted(versions) and versions[-1] == 2
    log = capfd.readouterr().out
    assert (
        log.count("vLLM is up") == 5
        and "wait 'vllm progress': rollout node waits for a token from vLLM since" in log
    )
    assert "vLLM ended with status 1" in log and log.count("failed, vLLM is started again") == 2
    assert sorted(g.ordinal for g in hub.ledger.buffer) == list(range(len(hub.ledger.buffer)))
    hub.ledger.check()
    assert not [
        p for p in psutil.Process().children(recursive=True) if "fake_vllm" in " ".join(p.cmdline())
    ]


def test_a_prompt_that_fails_everywhere_is_set_aside_and_named(
    tmp_path, tiny_checkpoint, fake_vllm_command, monkeypatch
):
    prompts = [
        {"prompt": "xyzab>" if i == 2 else "abcde>", "answer": "edcba"} for i in range(100_000)
    ]
    (poison,) = Codec(tiny_checkpoint).encode({"prompt": "x"})
    monkeypatch.setenv("FAKE_VLLM_FAULT", json.dumps({"kind": "poison", "token": poison}))
    hub = make_hub(tmp_path, tiny_checkpoint, prompts=prompts, max_failures=2)
    try:
        run_node(hub, tmp_path, fake_vllm_command, lambda node: groups(hub, 8), max_tries=2)
        assert list(hub.ledger.set_aside) == [2] and hub.status()["set_aside"] == 1
        (news,) = [line for line in hub.take_news() if "set aside" in line]
        assert re.match(
            r"prompt 2 failed 2 times and is set aside: 2 tries, the last: generation failed: .*out of memory",
            news,
        )
        assert {g.ordinal for g in hub.ledger.buffer}.isdisjoint({2}) and len(
            hub.ledger.buffer
        ) >= 8
        hub.ledger.check()
    finally:
        hub.close(patience_s=0.0)


# call: what the function does, kind under which it is counted, words in the node's log
FAILURES = {
    1: ("raise KeyError('no such thing')", "raised", "it raised KeyError: 'no such thing'"),
    2: ("return float('nan')", "not_finite", "it returned nan"),
    5: ("sys.exit(3)", "exited", "the reward function's process ended with status 3"),
    6: ("signal.pause()", "timed_out", "wait 'reward'"),
    9: ("return '1.0'", "wrong_type", "it returned '1.0' (str of 3), expected one number"),
    10: (
        "return [1.0, 0.0]",
        "wrong_type",
        "it returned [1.0, 0.0] (list of 2), expected one number",
    ),
    13: ("return None", "wrong_type", "it returned None (NoneType), expected one number"),
    14: ("raise TimeoutError('too hard')", "timed_out", "it raised TimeoutError: too hard"),
}


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_rewards_that_fail_in_whatever_way_cost_samples_are_counted_by_kind_and_named(
    tmp_path, tiny_checkpoint, fake_vllm_command, capfd, kind
):
    """The fourth group of four samples is the last that the function spoils; the run goes on."""
    (tmp_path / "bad.py").write_text(
        "import signal, sys\nfrom pathlib import Path\n"
        f"calls = Path({str(tmp_path / 'calls')!r})\n"
        f"{kind} score(completion, example):\n"
        "    number = len(calls.read_text()) if calls.exists() else 0\n"
        "    calls.write_text('x' * (number + 1))\n"
        "    print('a word on stdout')\n"
        + "".join(f"    if number == {call}: {what}\n" for call, (what, *_) in FAILURES.items())
        + "    return 1.0\n"
    )
    hub = make_hub(tmp_path, tiny_checkpoint, reward=f"{tmp_path / 'bad.py'}:score")
    counted = lambda: {k: int(n) for k, n in hub.ledger.counts.items() if k.startswith("reward_")}
    wanted = Counter(f"reward_{kind}" for _, kind, _ in FAILURES.values())

    async def scenario(node):
        await groups(hub, 5)
        await until(lambda: sum(counted().values()) >= len(FAILURES))

    try:
        run_node(hub, tmp_path, fake_vllm_command, scenario, reward_timeout_s=5.0)
        assert counted() == wanted
        assert len(hub.ledger.buffer[4].rewards) == SAMPLES
        assert hub.ledger.counts["samples_dropped"] == len(FAILURES)
    finally:
        hub.close(patience_s=0.0)
    log = capfd.readouterr().out
    for _, _, words in FAILURES.values():
        assert f"1 x reward: {words}" in log, (words, log)
    assert "abcde>" in log  # the example is named


def test_a_node_without_the_trainer_s_reward_file_says_so(
    tmp_path, tiny_checkpoint, fake_vllm_command
):
    file = tmp_path / "my.py"
    file.write_text("def score(completion, example):\n    return 1.0\n")
    hub = make_hub(tmp_path, tiny_checkpoint, reward=f"{file}:score")
    try:
        for change, reason in [
            (lambda: file.write_text("# another"), "differs from the trainer's; copy it to"),
            (file.unlink, "my.py in "),
        ]:
            change()
            with pytest.raises(RuntimeError, match=reason):
                run_node(hub, tmp_path, fake_vllm_command, lambda node: groups(hub, 1))
    finally:
        hub.close(patience_s=0.0)


def test_a_reward_that_always_fails_stops_the_run_instead_of_eating_the_data(
    tmp_path, tiny_checkpoint, fake_vllm_command
):
    (tmp_path / "bad.py").write_text("def score(completion, example):\n    return 1 / 0\n")
    hub = make_hub(tmp_path, tiny_checkpoint, reward=f"{tmp_path / 'bad.py'}:score", max_failures=1)

    async def scenario(node):
        with pytest.raises(
            RuntimeError,
            match=r"prompts in a row were set aside, the last of them \d+: .*ZeroDivisionError",
        ):
            while await asyncio.to_thread(hub.next_batch, 0, 1.0) is None:
                pass

    try:
        run_node(hub, tmp_path, fake_vllm_command, scenario, max_tries=1)
    finally:
        hub.close(patience_s=0.0)


def test_a_prompt_that_the_reward_function_cannot_judge_costs_two_generations(
    tmp_path, tiny_checkpoint, fake_vllm_command
):
    """No more are to be had from it, and the step waits for none; what some samples are without,
    others may have."""
    (tmp_path / "bad.py").write_text(
        "from pathlib import Path\n"
        f"calls = Path({str(tmp_path / 'calls')!r})\n"
        "def score(completion, example):\n"
        "    if example['bad']:\n"
        "        with calls.open('a') as file: file.write('x')\n"
        "        raise ValueError('the answer cannot be parsed')\n"
        "    return 1.0\n"
    )
    prompts = [{"prompt": "abcde>", "answer": "edcba", "bad": i in (1, 4)} for i in range(1000)]
    hub = make_hub(
        tmp_path, tiny_checkpoint, reward=f"{tmp_path / 'bad.py'}:score", prompts=prompts
    )
    try:
        run_node(hub, tmp_path, fake_vllm_command, lambda node: groups(hub, 10))
        assert (
            list(hub.ledger.set_aside) == [1, 4]
            and len((tmp_path / "calls").read_text()) == 2 * 2 * SAMPLES
        )
        said = [line for line in hub.take_news() if "set aside" in line]
        assert len(said) == 2 and said[0].startswith(
            "prompt 1 failed 2 times and is set aside: samples dropped: 4 x "
        )
        # said once
        assert (
            said[0].count("it raised ValueError: the answer cannot be parsed (bad.py line 6)") == 1
        )
        hub.ledger.check()
    finally:
        hub.close(patience_s=0.0)


def test_no_prompt_is_set_aside_while_the_judge_is_away(
    tmp_path, tiny_checkpoint, fake_vllm_command, monkeypatch
):
    """Though some samples need no judge, and so have their reward at once."""
    monkeypatch.setattr(reward_pool.RewardWorkers, "PATIENCE_S", 30.0, raising=False)
    (tmp_path / "judge.py").write_text(
        "from pathlib import Path\n"
        f"here, calls = Path({str(tmp_path / 'here')!r}), Path({str(tmp_path / 'calls')!r})\n"
        "def score(completion, example):\n"
        "    with calls.open('a') as file: file.write('x')\n"
        "    if calls.stat().st_size % 7 and not here.exists():\n"
        "        raise ConnectionRefusedError('nobody at judge:80')\n"
        "    return 1.0\n"
    )
    hub = make_hub(
        tmp_path, tiny_checkpoint, reward=f"{tmp_path / 'judge.py'}:score", max_failures=1
    )

    async def scenario(node):
        await until(
            lambda: (tmp_path / "calls").exists() and (tmp_path / "calls").stat().st_size > 20
        )
        (tmp_path / "here").touch()
        await groups(hub, 5)
        await until(lambda: hub.ledger.counts["reward_away"] > 10)

    try:
        run_node(hub, tmp_path, fake_vllm_command, scenario, max_groups=2)
        assert not hub.ledger.set_aside and hub.ledger.counts["samples_dropped"] == 0
        assert {k for k in hub.ledger.counts if k.startswith("reward_")} == {"reward_away"}
    finally:
        hub.close(patience_s=0.0)


def test_a_judge_that_stays_away_stops_the_run_with_a_line_when_the_last_node_ends(
    tmp_path, tiny_checkpoint, fake_vllm_command
):
    """The trainer hears of it from a node on another machine, too. Nothing is set aside."""
    text = (
        "def score(completion, example):\n    raise ConnectionRefusedError('nobody at judge:80')\n"
    )
    (tmp_path / "judge.py").write_text(text)
    hub = make_hub(tmp_path, tiny_checkpoint, reward=f"{tmp_path / 'judge.py'}:score")
    command = [
        sys.executable,
        str(REPO / "rollout.py"),
        hub.url,
        "--dir",
        str(tmp_path / "node"),
        "--beat-s",
        "0.2",
        "--vllm-command",
        fake_vllm_command,
        "--reward-away-timeout-s",
        "2",
    ]
    try:
        node = subprocess.run(
            command,
            env={**os.environ, "CISPO_TOKEN": "t"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        why = (
            "wait 'reward away': rollout node waits for the service that the reward function asks "
            "since "
        )
        assert node.returncode == 2 and f"error: {why}" in node.stdout.splitlines()[-1], node.stdout
        with pytest.raises(
            RuntimeError, match=f"the last rollout node, .*, ends: {why}.*nobody at judge:80"
        ):
            hub.next_batch(0, 1.0)
        assert not hub.ledger.set_aside and "Traceback" not in node.stdout + node.stderr
    finally:
        hub.close(patience_s=0.0)


def test_what_was_set_aside_in_the_streak_that_stops_the_run_comes_back_with_its_state():
    """Prompts 0 and 7 were at fault themselves: groups came after them. All after 8 shared one
    fault."""
    one = torch.zeros(2)
    ledger = Ledger(4, 1, 100, 60.0, max_failures=2)
    for ordinal in range(8):
        lease = ledger.grant("n", 10, 0.0)
        assert lease.ordinal == ordinal
        if ordinal in (0, 7):
            ledger.give_back(lease.id, "leases_returned", failure="bad")
            lease = ledger.grant("n", 10, 0.0)
            ledger.give_back(lease.id, "leases_returned", failure="bad")
        else:
            ledger.accept(lease.id, Group(ordinal, [1], one + 1, one, one, one, one, one))
    assert ledger.state()["set_aside"] == {"0": "bad"}  # 7 may be the first of a streak
    lease = ledger.grant("n", 10, 0.0)
    ledger.accept(lease.id, Group(lease.ordinal, [1], one + 1, one, one, one, one, one))
    assert [g.ordinal for g in ledger.take(0)] == [1, 2, 3, 4] and [
        g.ordinal for g in ledger.buffer
    ] == [5, 6, 8]
    ledger.num_steps, streak = 1000, []
    while ledger.set_aside_in_a_row < 8:
        lease = ledger.grant("n", 1000, 0.0)
        streak.append(lease.ordinal)
        ledger.give_back(lease.id, "leases_returned", failure="no judge")
    assert sorted(set(streak)) == list(range(9, 17))
    ledger.check()
    again = Ledger(4, 1, 100, 60.0)
    again.restore(json.loads(json.dumps(ledger.state())))
    assert again.set_aside == {0: "bad", 7: "bad"} and again.num_taken == 4
    leased = [again.grant("n", 1000, 0.0).ordinal for _ in range(12)]
    assert leased == [5, 6, *range(8, 18)]  # what was buffered, and the streak
    again.check()


def test_a_streak_that_the_frontier_has_passed_comes_back_too():
    one = torch.zeros(2)
    ledger = Ledger(2, 1, 100, 60.0, max_failures=1)
    leases = [ledger.grant("n", 10, 0.0) for _ in range(6)]
    for lease in leases[2:4]:
        ledger.accept(lease.id, Group(lease.ordinal, [1], one + 1, one, one, one, one, one))
    for lease in (leases[0], leases[1], leases[4]):
        ledger.give_back(lease.id, "leases_returned", failure="no judge")
    assert [g.ordinal for g in ledger.take(0)] == [2, 3] and ledger.frontier == 5
    again = Ledger(2, 1, 100, 60.0)
    again.restore(json.loads(json.dumps(ledger.state())))
    assert [again.grant("n", 10, 0.0).ordinal for _ in range(4)] == [0, 1, 4, 5]
    again.check()


def test_a_node_killed_between_pause_and_resume_leaves_no_process_and_loses_no_prompt(
    hub, tmp_path, fake_vllm_command
):
    command = [
        sys.executable,
        str(REPO / "rollout.py"),
        hub.url,
        "--dir",
        str(tmp_path / "node"),
        "--beat-s",
        "0.2",
        "--vllm-command",
        fake_vllm_command,
    ]
    hub.node_timeout_s = 2.0
    env = {**os.environ, "CISPO_TOKEN": "t"}

    def wait(condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, (tmp_path / "out").read_text()[-2000:]
            time.sleep(0.05)  # polling other processes

    with open(tmp_path / "out", "w") as out:
        node = subprocess.Popen(command, env=env, stdout=out, stderr=out)
        try:
            wait(lambda: len(hub.ledger.buffer) > 2)
            children = psutil.Process(node.pid).children(recursive=True)
            assert any("fake_vllm" in " ".join(p.cmdline()) for p in children)
            (port,) = re.findall(r"port (\d+)", (tmp_path / "out").read_text())

            async def stall():
                async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
                    await session.post("/fault", json={"kind": "stall_update"})

            asyncio.run(stall())
            publish(hub, 1)
            wait(lambda: "stalled in mid-update" in (tmp_path / "node/vllm.log").read_text())
            node.send_signal(signal.SIGKILL)
            node.wait()
            _, alive = psutil.wait_procs(children, timeout=20)
            assert not alive, [p.cmdline() for p in alive]
            wait(lambda: not hub.ledger.leases)  # contact is lost: handed out again
            node = subprocess.Popen(command, env=env, stdout=out, stderr=out)
            before = len(hub.ledger.buffer)
            wait(lambda: len(hub.ledger.buffer) > before + 2)
            assert hub.ledger.buffer[-1].oldest_version == 1
            # what the first one left is gone
            assert [p.name for p in (tmp_path / "node").glob("v*/")] == ["v1"]
        finally:
            node.send_signal(signal.SIGTERM)
            node.wait(30)
    hub.ledger.check()


DEAF = """
import runpy, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_vllm_deaf_to_sigterm_ends_with_a_node_that_was_killed(tmp_path):
    """So do its children, one of which a signal to it would never have reached."""
    (tmp_path / "deaf.py").write_text(DEAF)
    (tmp_path / "vllm.py").write_text("import time; print('up', flush=True); time.sleep(600)")
    node = f"""
import subprocess, sys, time
sys.path.insert(0, {str(REPO)!r})
from bridge.processes import guarded
command = guarded([sys.executable, {str(tmp_path / "deaf.py")!r}, {str(tmp_path / "vllm.py")!r}], 1.0)
subprocess.Popen(command, start_new_session=True)
time.sleep(600)
"""
    node = subprocess.Popen([sys.executable, "-c", node], stdout=subprocess.PIPE, text=True)
    assert node.stdout.readline() == "up\n"
    children = psutil.Process(node.pid).children(recursive=True)
    assert len(children) == 3  # the guard, vLLM and what that started
    node.kill()
    node.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, [p.cmdline() for p in alive]


def test_a_second_signal_does_not_break_off_the_ending_of_a_node(hub, tmp_path, fake_vllm_command):
    """A launcher signals the whole group, and then the trainer its node once more."""
    (tmp_path / "deaf.py").write_text(DEAF)
    python, fake = fake_vllm_command.split()
    command = [
        sys.executable,
        str(REPO / "rollout.py"),
        hub.url,
        "--dir",
        str(tmp_path / "node"),
        "--vllm-command",
        f"{python} {tmp_path / 'deaf.py'} {fake}",
    ]
    node = subprocess.Popen(
        command, env={**os.environ, "CISPO_TOKEN": "t"}, stdout=subprocess.PIPE, text=True
    )
    while "onto itself" not in (line := node.stdout.readline()):
        assert line, "the node has ended"
    children = psutil.Process(node.pid).children(recursive=True)
    node.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        node.wait(1.0)  # it is ending, and waits for vLLM
    node.send_signal(signal.SIGTERM)
    assert node.wait(30) == 0
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive, [p.cmdline() for p in alive]


def test_the_limit_of_prompts_in_flight_follows_vllm():
    calm, full, queued = ({"kv": kv, "waiting": w} for kv, w in ((0.3, 0), (0.95, 0), (0.3, 9)))
    assert next_limit(32, 64, 32, calm, False) == 40  # all used and room left: up
    assert next_limit(60, 64, 60, calm, False) == 64 and next_limit(64, 64, 64, calm, False) == 64
    assert next_limit(32, 64, 10, calm, False) == 32  # not what holds it back
    assert next_limit(32, 64, 32, queued, False) == 32  # more would only stand in the queue
    assert next_limit(32, 64, 32, full, False) == 24 and next_limit(32, 64, 32, calm, True) == 24
    assert next_limit(24, 64, 32, full, False) == 24  # what is in flight has yet to come down
    assert next_limit(1, 64, 1, full, True) == 1  # one prompt is always tried


def test_a_weight_update_is_not_taken_for_a_full_cache(hub, tmp_path, fake_vllm_command):
    """vLLM counts what a pause stops among its preemptions; a real one between two updates still
    lowers the limit."""

    async def scenario(node):
        await node.ready.wait()
        limit, preemptions = node.limit, lambda: node.vitals.get("preemptions", 0)
        # so that there is something in flight to preempt
        await node.vllm.post("/fault", {"kind": "slow", "s": 0.2})
        await until(lambda: node.in_vllm >= 4)
        publish(hub, 1)
        await until(lambda: node.version == 1 and preemptions() > 0)
        assert node.limit >= limit
        seen = preemptions()
        for route in ("/pause", "/resume"):  # not an update: nobody loads anything
            await node.vllm.post(route)
        await until(lambda: preemptions() > seen)
        assert node.limit < limit

    run_node(hub, tmp_path, fake_vllm_command, scenario, max_groups=32)


def test_a_lease_whose_answer_was_lost_and_one_that_is_void_are_settled_by_the_next_beat(hub):
    async def scenario():
        async with aiohttp.ClientSession(hub.url, headers={"Authorization": "Bearer t"}) as session:

            async def post(route, **body):
                async with session.post(route, json={"node": "n", **body}) as response:
                    return await response.json()

            await post("/receipts", version=0, digest=weights.digest(hub.manifest), timing={})
            first, second = [x["lease"] for x in (await post("/lease", max=2))["leases"]]
            assert (await post("/beat", leases=[first], vllm={})) == {"drop": []} and len(
                hub.ledger.leases
            ) == 2
            hub.ledger.leases[second].granted -= 11  # by now it would have arrived
            assert (await post("/beat", leases=[first, "9-9"], vllm={"running": 3})) == {
                "drop": ["9-9"]
            }
            assert hub.ledger.returned == [1] and hub.status()["in_flight"] == 3
            assert (await post("/return", lease=first, why="cannot")) == {"returned": first}
            assert hub.ledger.returned == [0, 1] and hub.ledger.failures[0] == ["cannot (n)"]
            assert "error" in await post("/return", lease=first, why="again")

    asyncio.run(scenario())
    hub.ledger.check()
