"""Rewards that fail: counted by kind, named, and never a reward of 0."""

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from test_failures import REPO, SAMPLES, groups, make_hub, run_node, until
from test_failures import hub as hub  # the fixture
from test_watch import run_of, step_record

import report
from bridge import reward_pool
from bridge.groups import Group
from bridge.ledger import Ledger

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
            (file.unlink, f"there is no file {file}"),
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


def test_the_last_lines_say_what_of_the_data_was_not_trained_on(tmp_path, capsys):
    run, whole = run_of(tmp_path, [0, 1]), step_record(1)
    report.sum_up(run, 2, {})
    assert "warning" not in capsys.readouterr().out
    whole["hub"] |= {"handed_out": 58, "set_aside": 10}
    whole["hub"]["counts"] |= {"reward_raised": 284, "reward_timed_out": 2, "leases_returned": 20}
    (run / "metrics.jsonl").write_text(json.dumps(whole) + "\n")
    report.sum_up(run, 2, {})
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "10 of 58 prompts were set aside, not trained on; samples without a reward" in line
    assert "last start: 284 raised, 2 timed_out; " in line and f"{run / 'rollout.log'}" in line
