"""Validation: every held-out prompt is answered once under its version or a newer one, and the
ledger is untouched."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import pytest
import torch
from published import publish, write_version
from safetensors.torch import save

from bridge import weights
from bridge.groups import Group
from bridge.hub import Hub
from bridge.ledger import Ledger
from bridge.validation import Round, Validation, due_at_start, samples, score
from config import Config
from prepare import load_held_out
from presets import parse_config
from ranks.resume import about
from task import held_out_examples, task_examples

REPO = Path(__file__).resolve().parent.parent


def answer(index, version, rewards):
    """Two tokens a sample, all of one version."""
    n = len(rewards)
    return Group(
        index,
        [7],
        torch.full((n,), 2, dtype=torch.int32),
        torch.arange(2 * n, dtype=torch.int32),
        torch.zeros(2 * n),
        torch.full((2 * n,), version, dtype=torch.int32),
        torch.tensor(rewards),
        torch.zeros(n, dtype=torch.uint8),
    )


def test_the_score_counts_what_has_no_reward_as_0_and_names_the_versions():
    done = Round(
        3, [], 0.0, groups={0: answer(0, 3, [1.0, 0.0]), 1: answer(1, 5, [0.5])}, failed={2: "why"}
    )
    found = score(done, num_samples=2)
    assert found["validation/avg@2"] == pytest.approx(1.5 / 6)  # three prompts, two samples each
    assert found["validation/pass@2"] == pytest.approx(1 / 3) and found["versions"] == [3, 5]
    assert (found["validation/prompts_failed"], found["validation/samples_dropped"]) == (1, 3)
    graded = score(done, num_samples=2, pass_threshold=0.5)  # as --val-pass-threshold says
    assert graded == {**found, "validation/pass@2": pytest.approx(2 / 3)}
    rows = samples(done, [{"answer": "a"}, {"answer": "b"}, {}], decode=str)
    assert [r["reward"] for r in rows] == [1.0, 0.0, 0.5] and rows[1]["completion"] == "[2, 3]"
    assert rows[2] == {
        "prompt": "[7]",
        "completion": "[0, 1]",
        "reward": 0.5,
        "answer": "b",
        "truncated": False,
        "versions": [5, 5],
        "prompt_tokens": 1,
        "tokens": 2,
    }


def test_a_reward_of_a_tenth_solves_nothing():
    """A reward that gives 0.1 for the form: the best sample of a prompt has it, and no prompt is
    solved."""
    done = Round(0, [], 0.0, groups={i: answer(i, 0, [0.0, 0.1, 0.1]) for i in range(4)})
    assert score(done, num_samples=3)["validation/pass@3"] == 0.0
    done.groups[0] = answer(0, 0, [0.1, 1.1, 0.0])
    assert score(done, num_samples=3)["validation/pass@3"] == 0.25
    done = Round(0, [], 0.0, groups={0: answer(0, 0, [0.7, 0.7, 0.7])})
    # in float32 it is below 0.7
    assert score(done, num_samples=3, pass_threshold=0.7)["validation/pass@3"] == 1.0


def test_under_random_delays_and_losses_every_prompt_of_every_round_is_answered_once():
    """Nodes lag behind, leases expire, some prompts fail everywhere; no answer is of a version
    before the round's."""
    rng, now, version, held, done = random.Random(0), 0.0, 0, [], []
    books = Validation([{}] * 20, num_samples=1, lease_timeout_s=30.0, max_failures=3)
    while len(done) < 5:
        now += 1.0
        books.expire(now)
        if version < 50:
            if version % 10 == 0:
                books.begin(version)
            version += 1
        while lease := books.grant(
            "n", node_version := rng.randint(max(0, version - 5), version), now
        ):
            assert node_version >= lease.validates
            held.append(lease)
        rng.shuffle(held)
        for lease in held[:4]:
            if lease.id in books.leases and lease.ordinal == 13:
                books.give_back(lease.id, "leases_returned", failure="it never works")
            elif lease.id in books.leases:
                books.accept(lease.id, answer(lease.ordinal, lease.version, [1.0]))
        # the others are lost with their node
        held = [lease for lease in held[4:] if rng.random() < 0.95]
        done += books.finished
        books.finished = []
        assert now < 5000, "the simulated rounds got stuck"
    assert sorted(r.version for r in done) == [0, 10, 20, 30, 40]
    for r in done:
        assert r.groups.keys() | r.failed.keys() == set(range(20)) and 13 in r.failed and not r.todo
        assert r.repeated >= 3 and all(g.oldest_version >= r.version for g in r.groups.values())
    assert not books.leases and books.counts["leases_expired"] > 0


def test_held_out_prompts_are_not_among_those_trained_on():
    for name in ("reverse", "add"):
        trained = task_examples(name, 20_000, seed=0)
        held_out = held_out_examples(name, 64, 0, trained)
        prompts = {e["prompt"] for e in held_out}
        assert len(prompts) == 64 and prompts.isdisjoint(e["prompt"] for e in trained)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--val-temperature 0", "--val-samples 4: --val-temperature 0 is greedy"),
        ("--val-samples 0", "--val-samples 0: must be at least"),
        ("--val-every-steps -1", "--val-every-steps -1"),
        ("--val-data nowhere.jsonl", "--val-data 'nowhere.jsonl': no such file"),
    ],
)
def test_validation_flags_that_mean_nothing_are_refused_in_one_line(flags, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        load_held_out(parse_config(flags.split()), None)


@pytest.fixture
def hub(tmp_path):
    """A hub with versions 0 and 1 on disk, 0 published; three held-out prompts, two samples
    each."""
    (tmp_path / "config.json").write_text("{}")
    for version in range(2):
        write_version(tmp_path / "weights", version, [("w", torch.ones(4))], static=tmp_path)
    run = {"num_generations": 4, "max_new_tokens": 8}
    held_out = [{"prompt": f"held out {i}"} for i in range(3)]
    hub = Hub(
        Ledger(2, 1, 10, 600.0),
        [{"prompt": "trained"}] * 100,
        lambda e: [2],
        tmp_path / "weights",
        32,
        "t",
        run,
        Validation(held_out, num_samples=2),
    )
    hub.start("127.0.0.1", 0)
    publish(hub, 0)
    yield hub
    hub.close(patience_s=0.0)


def test_the_hub_hands_out_validation_and_training_in_turn_once_a_node_has_the_version(hub):
    async def scenario():
        async with aiohttp.ClientSession(hub.url, headers={"Authorization": "Bearer t"}) as session:

            async def post(route, **kwargs):
                async with session.post(route, **kwargs) as response:
                    return await response.json()

            lease = lambda: post("/lease", json={"node": "n", "max": 9})
            holds = lambda v: {
                "node": "n",
                "version": v,
                "digest": weights.digest(hub.manifest),
                "timing": {},
            }
            receipt = lambda v: post("/receipts", json=holds(v))
            await receipt(0)
            await asyncio.to_thread(hub.begin_validation, 1)
            assert [x["validates"] for x in (await lease())["leases"]] == [
                None
            ] * 4  # not under version 0
            await asyncio.to_thread(hub.next_batch, 1, 0.01)
            await asyncio.to_thread(publish, hub, 1)
            await receipt(1)
            leases = (await lease())["leases"]  # admission: 2 more of training under version 1
            assert sorted(x["validates"] or 0 for x in leases) == [0, 0, 1, 1, 1]
            assert [x["validates"] for x in leases[:4]] in ([1, None, 1, None], [None, 1, None, 1])
            mine = [x for x in leases if x["validates"]]
            assert [x["example"]["prompt"] for x in mine] == [
                "held out 0",
                "held out 1",
                "held out 2",
            ]
            one = tensors_of(rewards=[1.0])
            for i, x in enumerate(mine):
                refused = await post("/groups", data=pack(tensors_of([1.0], version=0), x["lease"]))
                # of older weights than the round's
                assert "versions 0..0 outside 1..1" in refused["error"]
                if i < 2:
                    assert "accepted" in await post("/groups", data=pack(one, x["lease"]))
            assert (
                "unknown lease"
                in (await post("/groups", data=pack(one, mine[0]["lease"])))["error"]
            )
            await post("/return", json={"node": "n", "lease": mine[2]["lease"], "why": "cannot"})
            (again,) = (await lease())["leases"]
            await post("/groups", data=pack(tensors_of([1.0, 0.0]), again["lease"]))

    asyncio.run(scenario())
    (done,) = hub.take_validations()
    assert score(done, 2)["validation/avg@2"] == pytest.approx(3 / 6) and done.repeated == 1
    status = hub.status()
    assert status["validation"] == {
        "rounds": [],
        "answered": 3,
        "counts": {"leases_returned": 1, "samples_dropped": 2},
    }
    # the ledger knows of none of it
    assert (status["leased"], status["handed_out"], status["buffered"]) == (6, 6, 0)
    hub.ledger.check()


def tensors_of(rewards, version=1):
    g = answer(0, version, rewards)
    names = ("lengths", "token_ids", "logprobs", "versions", "rewards", "truncated")
    return {name: getattr(g, name) for name in names}


def pack(tensors, lease):
    return save(tensors, metadata={"lease": lease})


# ---- whole runs on the fake vLLM -----------------------------------------------------------------
def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for(cwd, condition, process, within_s=120):
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, (cwd / "out").read_text()[
            -3000:
        ]
        time.sleep(0.05)  # polling what other programs write


@pytest.mark.parametrize("kill", range(3, 13))
def test_the_validations_of_an_interrupted_run_are_those_of_an_uninterrupted_one(kill, tmp_path):
    """Every 4 steps a round, every 3 a checkpoint; the trainer is killed after any step while the
    newest round is open or its score is just written. `about` says what a checkpoint keeps,
    `due_at_start` what is asked for after it."""
    cfg = Config(val_every_steps=4, max_num_steps=12, checkpoint_every_steps=3)

    class Books:  # what a hub answers with
        def __init__(self):
            self.validation = Validation([{}], lease_timeout_s=1.0)
            self.ledger_state = dict  # of no matter here

    for written in (False, True):
        hub, scores, saved = Books(), {}, None
        hub.validation.begin(0)
        for step in range(1, kill + 1):
            # each takes more than a step
            scores |= {v: 1.0 for v in hub.validation.begun if v < step - 1}
            if cfg.validates(step):
                hub.validation.begin(step)
            if step % 3 == 0 or cfg.validates(step):
                saved = {"step": step, **about(cfg, hub, dict(scores), {})}
        scores |= dict.fromkeys(hub.validation.begun, 1.0) if written else {}
        finished = [v for v in scores if v <= saved["step"]]  # begin_run_dir keeps these records
        start = saved["step"]
        asked = due_at_start(
            start, cfg.validates(start), False, saved["unscored"], dict.fromkeys(finished)
        )
        asked += [v for v in range(start + 1, 13) if cfg.validates(v)]
        assert sorted(finished + asked) == [0, 4, 8, 12], (kill, written)
    # another run's checkpoint: this one is scored at its start
    assert due_at_start(3, False, True, [0], {}) == [3]


@pytest.mark.slow
def test_a_node_killed_and_a_trainer_killed_in_mid_validation_lose_no_score(
    tmp_path, tiny_checkpoint, fake_vllm_command
):
    """Greedy validation of a file, every 4 steps: the node dies by kill -9 in the first round, the
    trainer in the second; after --resume auto each due version has its score, on every prompt, and
    the best checkpoint is kept."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    held_out = held_out_examples("reverse", 40, 1, [])
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(e) + "\n" for e in held_out))
    train = [
        sys.executable,
        str(REPO / "train_cispo.py"),
        "--model",
        str(tiny_checkpoint),
        "--max-num-steps",
        "12",
        "--num-prompts-per-step",
        "8",
        "--num-generations-per-prompt",
        "8",
        "--train-global-batch-size",
        "32",
        "--cpu-threads",
        "1",
        "--no-compile",
        "--no-local-rollout",
        "--hub-port",
        port,
        "--val-every-steps",
        "4",
        "--val-data",
        "val.jsonl",
        "--val-samples",
        "1",
        "--val-temperature",
        "0",
        "--checkpoint-every-steps",
        "3",
        "--keep-checkpoints",
        "1",
        "--resume",
        "auto",
    ]
    node = [
        sys.executable,
        str(REPO / "rollout.py"),
        f"http://127.0.0.1:{port}",
        "--beat-s",
        "0.2",
        "--max-groups",
        "4",
        "--vllm-command",
        fake_vllm_command,
    ]
    env = {
        **os.environ,
        "CISPO_TOKEN": "t",
        "FAKE_VLLM_FAULT": json.dumps({"kind": "slow", "s": 0.05}),
    }
    out, run = tmp_path / "out", tmp_path / "runs/tiny"
    started = []

    def start(command):
        with open(out, "a") as f:
            started.append(subprocess.Popen(command, cwd=tmp_path, env=env, stdout=f, stderr=f))
        return started[-1]

    def answered(version):  # of the round of this version, by the hub's own word
        headers = {"Authorization": "Bearer t"}

        async def ask():
            async with aiohttp.ClientSession(
                f"http://127.0.0.1:{port}", headers=headers
            ) as session:
                async with session.get("/status") as response:
                    return (await response.json())["validation"]

        try:
            rounds = asyncio.run(ask())["rounds"]
        except aiohttp.ClientError:
            return 0  # not up yet
        return next((r["answered"] for r in rounds if r["version"] == version), 0)

    try:
        trainer, first = start(train), start(node)
        wait_for(tmp_path, lambda: answered(0) >= 5, trainer)
        first.send_signal(signal.SIGKILL)
        first.wait()
        start(node)
        # the score of v0, written with a step's record
        wait_for(tmp_path, (run / "validation.jsonl").exists, trainer)
        wait_for(tmp_path, lambda: answered(4) >= 5, trainer)
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
        before = {r["version"]: r for r in records(run / "validation.jsonl")}
        assert before.keys() == {0} and before[0]["validation/leases_repeated"] > 0
        trainer = start(train)
        assert trainer.wait(150) == 0, out.read_text()[-3000:]
    finally:
        for process in started:
            process.kill()
    (resumed,) = re.findall(r"going on from runs/tiny/checkpoints/step-0+(\d+)", out.read_text())
    found = {r["version"]: r for r in records(run / "validation.jsonl")}
    assert found.keys() == {0, 4, 8, 12} and int(resumed) in (3, 4)  # as without the interruption
    assert len(records(run / "validation.jsonl")) == 4
    for version, r in found.items():
        rows = records(run / f"validation/v{version}.jsonl")
        assert [row["prompt"] for row in rows] == [e["prompt"] for e in held_out]
        assert (
            r["validation/avg@1"]
            == r["validation/pass@1"]
            == pytest.approx(sum(x["reward"] for x in rows) / 40)
        )
        assert all(
            version <= low <= high <= r["versions"][1]
            for low, high in (row["versions"] for row in rows)
        )
        assert r["versions"][0] >= version
    trained = records(run / "metrics.jsonl")
    assert [r["step"] for r in trained] == list(range(12))
    # exactly once, validation or not
    assert sorted(o for r in trained for o in r["ordinals"]) == list(range(96))
    scores = {v: r["validation/avg@1"] for v, r in found.items() if v}
    best = max(scores, key=lambda v: (scores[v], v))
    kept = {int(p.name[5:]) for p in (run / "checkpoints").iterdir()}
    assert (
        best in kept
        and 12 in kept
        and f"best checkpoint: runs/tiny/checkpoints/step-{best:06d}" in out.read_text()
    )
