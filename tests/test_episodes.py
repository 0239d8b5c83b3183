"""Functions that play: several turns, with something between them that nobody sampled, and every
way in which that can fail."""

import asyncio
import dataclasses
import json
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from batches import unpack_batch
from test_failures import SAMPLES, groups, make_hub, run_node, until

from bridge import episodes, weights
from bridge.groups import NOT_SAMPLED
from bridge.processes import REPO
from bridge.reward_pool import RewardsEnd, RewardWorkers, check_reward
from bridge.sample import Sample, Turn, interrupted
from bridge.validation import turns_of
from config import Config
from model import ModelConfig, Qwen3MoE
from ranks import batch
from report import read_jsonl
from task import Codec
from train_cispo import micro_batch_logprobs

TWO_TURNS = """
async def play(sample, example):
    first = await sample()
    second = await sample("fgh>")
    return float(first.text == "edcba") + float(second.text == "hgf")
"""

ODDITIES = """
import asyncio, os, sys, time

async def play(sample, example):
    kind = example["kind"]
    turn = await sample()
    if kind == "raise":
        raise KeyError("no such tool")
    if kind == "hang":
        await asyncio.Event().wait()
    if kind == "block":
        time.sleep(60)
    if kind == "exit":
        os._exit(7)
    if kind == "sys.exit":
        sys.exit("enough")
    if kind == "text":
        return "1.0"
    if kind == "nan":
        return float("nan")
    while kind == "endless":
        await sample("a", max_tokens=1)
    await asyncio.sleep(0.01)
    turn = await sample("b")
    return len(turn.text)
"""

KINDS = {
    "raise": "raised",
    "hang": "timed_out",
    "block": "timed_out",
    "exit": "exited",
    "sys.exit": "exited",
    "text": "wrong_type",
    "nan": "not_finite",
    "endless": "endless",
}


class Scripted:
    """In vLLM's place: every turn is "cc", or as many of it as are asked for."""

    def __init__(self):
        self.contexts = []

    async def __call__(self, context, sampling):
        self.contexts.append(list(context))
        await asyncio.sleep(0)
        tokens = [4, 4, 1][-sampling["max_tokens"] :]
        return {
            "token_ids": tokens,
            "finish_reason": "stop" if len(tokens) == 3 else "length",
            "logprobs": {"content": [{"logprob": -0.5}] * len(tokens)},
            "weight_versions": [{"version": "3", "start": 0, "end": len(tokens)}],
        }


def played(tmp_path, checkpoint, source, examples, timeout_s=2.0, count=2, most=400):
    """All episodes at once: their results, their samples, and the counts of failures."""
    (tmp_path / "env.py").write_text(source)

    async def run():
        workers = RewardWorkers(f"{tmp_path}/env.py:play", count, timeout_s)
        players, request = episodes.Players(workers), Scripted()
        players.codec = Codec(checkpoint)
        samples = [Sample([9, 9], {}, most, request) for _ in examples]
        try:
            await workers.start()
            results = await asyncio.gather(
                *(players.play(s, s, example) for s, example in zip(samples, examples))
            )
        finally:
            await workers.close()
        return results, samples, workers.failed

    return asyncio.run(run())


def test_two_hundred_episodes_with_every_kind_of_failure_are_counted_exactly(
    tmp_path, tiny_checkpoint
):
    """Whoever blocks or ends a process is told from the others in it, which are played again."""
    every = [*KINDS, *["good"] * 17]
    examples = [{"kind": every[i % len(every)]} for i in range(200)]
    start = time.monotonic()
    results, samples, failed = played(tmp_path, tiny_checkpoint, ODDITIES, examples)
    expected = Counter(KINDS[e["kind"]] for e in examples if e["kind"] != "good")
    assert failed == expected and expected["timed_out"] == 16 and expected["exited"] == 16
    for result, sample, example in zip(results, samples, examples):
        if example["kind"] == "good":
            assert result == 2.0 and sample.turns == 2
            assert sample.token_ids == [4, 4, 1, 3, 4, 4, 1]  # "b" is 3
            assert sample.versions == [3, 3, 3, NOT_SAMPLED, 3, 3, 3]
            assert sample.logprobs == [-0.5, -0.5, -0.5, 0.0, -0.5, -0.5, -0.5]
        else:
            assert isinstance(result, str), (result, example)
    said = {e["kind"]: r for r, e in zip(results, examples)}
    assert "KeyError: 'no such tool' (env.py line 8)" in said["raise"]
    assert "status 7" in said["exit"] and "more than 100 turns" in said["endless"]
    assert time.monotonic() - start < 120


# ---- with the node, the hub and the trainer's own forward ----------------------------------------
def with_env(tmp_path, source, name="play"):
    (tmp_path / "env.py").write_text(source)
    return f"{tmp_path}/env.py:{name}"


def test_a_sample_of_several_turns_has_the_model_s_own_logprobs_around_what_was_put_in(
    tmp_path, tiny_checkpoint, fake_vllm_command
):
    """Against the trainer's forward of the whole sequence, in the trainer's own packing."""
    prompts = [{"prompt": "abcde>", "answer": "edcba"}, {"prompt": "vwxyz>", "answer": "x"}] * 100
    hub = make_hub(tmp_path, tiny_checkpoint, with_env(tmp_path, TWO_TURNS), prompts)
    hub.run |= {"plays": True, "max_new_tokens": 16}
    try:
        run_node(hub, tmp_path, fake_vllm_command, lambda node: groups(hub, 8))
        found, timing = hub.ledger.buffer, hub.take_timing()
    finally:
        hub.close(patience_s=0.0)
    put, codec, S = Codec(tiny_checkpoint).ids("fgh>"), Codec(tiny_checkpoint), SAMPLES
    assert timing["rollout/turns_per_sample"] == 2.0
    assert 0 < timing["timing/rollout/environment_s"] < 5
    for group in found:
        for ids, versions, reward in zip(
            group.token_ids.split(group.lengths.tolist()),
            group.versions.split(group.lengths.tolist()),
            group.rewards,
        ):
            at = (versions == NOT_SAMPLED).nonzero().flatten().tolist()
            if not at:  # the first turn has left no room
                assert len(ids) > 16 - len(put) - 1
                continue
            assert ids[at].tolist() == put and at == list(range(at[0], at[0] + len(put)))
            first, second = (codec.decode(x.tolist()) for x in (ids[: at[0]], ids[at[-1] + 1 :]))
            right = float(first == "edcba") + float(second == "hgf")
            assert reward == right and versions[-1] == 0
    cfg = dataclasses.replace(
        Config(),
        num_prompts_per_step=len(found),
        num_generations_per_prompt=S,
        train_global_batch_size=len(found) * S,
        logprob_chunk_size=16,
    )
    model = Qwen3MoE(ModelConfig.from_dir(tiny_checkpoint))
    weights.load_hf(model, tiny_checkpoint)
    ((mb,),), ((num_tokens, _),) = unpack_batch(
        batch.pack_batch(found, cfg), cfg, 0, 1, torch.device("cpu")
    )
    assert num_tokens == sum(int((g.versions != NOT_SAMPLED).sum()) for g in found)
    logprobs = micro_batch_logprobs(model, mb, dataclasses.replace(cfg, compile=False))[0]
    assert (logprobs - mb.gen_logprobs)[mb.mask].abs().max() < 1e-4


def test_a_vllm_that_dies_costs_a_turn_and_no_prompt(
    tmp_path, tiny_checkpoint, fake_vllm_command, capfd
):
    """Both turns are there, around the crash, and the first is not made again."""
    source = """
import asyncio, pathlib
async def play(sample, example):
    turn = await sample()
    pathlib.Path(__file__).with_name("begun").touch()
    while not pathlib.Path(__file__).with_name("crashed").exists():
        await asyncio.sleep(0.02)
    return float((await sample("fgh>")).finish in ("stop", "length"))
"""
    hub = make_hub(tmp_path, tiny_checkpoint, with_env(tmp_path, source))
    hub.run |= {"plays": True, "max_new_tokens": 20}

    async def scenario(node):
        await until((tmp_path / "begun").exists)
        node.vllm.process.kill()
        (tmp_path / "crashed").touch()
        await groups(hub, 1)

    try:
        run_node(hub, tmp_path, fake_vllm_command, scenario)
        (group, *_), counts = hub.ledger.buffer, hub.status()["counts"]
    finally:
        hub.close(patience_s=0.0)
    assert group.ordinal == 0 and len(group.lengths) == SAMPLES and group.rewards.min() == 1.0
    assert not counts.get("leases_returned") and not counts.get("samples_dropped")
    assert "vLLM is up" in capfd.readouterr().out


def test_the_run_goes_on_beside_episodes_that_fail(tmp_path, tiny_checkpoint, fake_vllm_command):
    """A failure costs its sample and is counted by kind at the hub; it is never a reward of 0."""
    source = """
import itertools, os
count = itertools.count()
async def play(sample, example):
    await sample()
    kind = next(count) % 8
    if kind == 1:
        raise ValueError("no")
    if kind == 2:
        return None
    return 1.0
"""
    hub = make_hub(tmp_path, tiny_checkpoint, with_env(tmp_path, source))
    hub.run["plays"], counts = True, hub.ledger.counts

    def told() -> int:
        return counts["reward_raised"] + counts["reward_wrong_type"]

    async def scenario(node):
        await groups(hub, 12)
        await until(lambda: told() >= counts["samples_dropped"])  # by the next beat
        return told() - counts["samples_dropped"]

    try:
        in_flight = run_node(hub, tmp_path, fake_vllm_command, scenario)
        found = list(hub.ledger.buffer)
    finally:
        hub.close(patience_s=0.0)
    assert all((g.rewards == 1.0).all() and len(g.lengths) in (2, 3, 4) for g in found)
    assert counts["samples_dropped"] >= 8 and in_flight <= SAMPLES  # of the one prompt at work
    hub.ledger.check()


def test_a_judge_of_the_whole_group_gets_all_texts_of_a_prompt(
    tmp_path, tiny_checkpoint, fake_vllm_command
):
    source = """
def score(completions, example):
    assert len(completions) == 4, completions
    order = sorted(range(4), key=lambda i: completions[i])
    return [order.index(i) / 4 for i in range(4)]
"""
    spec = with_env(tmp_path, source, "score")
    hub = make_hub(tmp_path, tiny_checkpoint, spec)
    try:
        run_node(hub, tmp_path, fake_vllm_command, lambda node: groups(hub, 4))
        found = list(hub.ledger.buffer)
    finally:
        hub.close(patience_s=0.0)
    codec = Codec(tiny_checkpoint)
    for g in found:
        texts = [codec.decode(ids.tolist()) for ids in g.token_ids.split(g.lengths.tolist())]
        assert sorted(g.rewards.tolist()) == [0.0, 0.25, 0.5, 0.75]
        assert [t for _, t in sorted(zip(g.rewards.tolist(), texts))] == sorted(texts)


@pytest.mark.parametrize(
    ("returned", "kinds", "said"),
    [
        ("[1.0, 2.0]", {"wrong_type": 3}, "expected a list of 3 numbers"),
        ("1.0", {"wrong_type": 3}, "it returned 1.0, expected a list of 3 numbers"),
        ("[1.0, None, float('nan')]", {"wrong_type": 1, "not_finite": 1}, "expected one number"),
        ("1 / 0", {"raised": 3}, "ZeroDivisionError"),
    ],
)
def test_what_a_judge_of_a_group_gets_wrong_costs_the_samples_that_it_concerns(
    tmp_path, returned, kinds, said
):
    spec = with_env(tmp_path, f"def score(completions, example):\n    return {returned}\n", "score")

    async def run():
        workers = RewardWorkers(spec, 1, 5.0)
        try:
            await workers.start()
            return await workers.score(["a", "b", "c"], {}), workers.failed
        finally:
            await workers.close()

    results, failed = asyncio.run(run())
    assert failed == kinds and any(said in r for r in results if isinstance(r, str))
    assert [isinstance(r, str) for r in results].count(True) == sum(kinds.values())


# ---- what cannot be -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def play(sample, example): return 1.0", "it plays, and has to be `async def`"),
        ("async def play(sample): return 1.0", "it is called with (sample, example)"),
        ("async def play(sample, example): retrun 1", "invalid syntax"),
    ],
)
def test_a_function_that_cannot_play_is_refused_in_one_line(tmp_path, source, said):
    with pytest.raises(RewardsEnd) as refused:
        check_reward(with_env(tmp_path, source), 60.0, 60.0)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("sample(tool={'a': 1})", "TypeError: sample(tool=...) takes text, not dict"),
        ("sample('a', user='b')", "ValueError: sample takes one of insert and user at a time"),
        ("sample(max_tokens=0)", "expected a whole number above 0"),
        ("sample(stop=[''])", "expected texts that are not empty"),
        ("sample(user='hi')", "has no chat template, or it is switched off"),
        ("asyncio.gather(sample(), sample())", "called again before it had answered"),
    ],
)
def test_a_call_that_cannot_be_answered_is_told_to_the_function(
    tmp_path, tiny_checkpoint, call, said
):
    source = (
        f"import asyncio\nasync def play(sample, example):\n    await sample()\n    await {call}"
    )
    (result,), _, failed = played(tmp_path, tiny_checkpoint, source, [{}])
    assert said in result and failed == {"raised": 1}


def test_the_clock_stands_still_while_the_policy_writes(tmp_path, tiny_checkpoint, monkeypatch):
    """The policy takes longer than the function may, twice; then the function does."""
    source = """
import asyncio
async def play(sample, example):
    await sample()
    await sample()
    await asyncio.sleep(example["s"])
    return 1.0
"""
    answer = Scripted.__call__

    async def slow(self, context, sampling):
        await asyncio.sleep(1.3)  # the policy writes
        return await answer(self, context, sampling)

    monkeypatch.setattr(Scripted, "__call__", slow)
    results, samples, failed = played(
        tmp_path, tiny_checkpoint, source, [{"s": 0.0}, {"s": 30.0}], timeout_s=1.0
    )
    assert results == [1.0, "no answer in 1 s of its own"] and failed == {"timed_out": 1}
    assert samples[0].environment_s < 1.0 < 2.6 <= samples[0].generate_s


def test_an_episode_that_leaves_no_room_is_told_so_and_counts_as_cut_off(tmp_path, tiny_checkpoint):
    """Tokens put in count; what does not fit with a token of the policy's is not put in at all."""
    source = """
async def play(sample, example):
    turns = [await sample() for _ in range(1)]
    turns.append(await sample("a" * example["put"]))
    return float([t.finish for t in turns] == ["stop", example["finish"]])
"""
    examples = [{"put": 2, "finish": "length"}, {"put": 4, "finish": "length"}]
    results, (cut, full), _ = played(tmp_path, tiny_checkpoint, source, examples, most=7)
    assert results == [1.0, 1.0]
    assert cut.token_ids == [4, 4, 1, 2, 2, 4, 1] and not cut.left
    assert full.token_ids == [4, 4, 1] and full.truncated and cut.truncated
    source = "async def play(sample, example):\n    await sample()\n    return len(await sample(max_tokens=2))"
    _, (asked_for_two,), _ = played(tmp_path, tiny_checkpoint, source, [{}], most=5)
    assert not asked_for_two.left and not asked_for_two.truncated  # it got what was asked for


def test_an_episode_is_played_again_while_the_service_that_it_asks_is_away(
    tmp_path, tiny_checkpoint
):
    source = """
import itertools
count = itertools.count()
async def play(sample, example):
    await sample()
    if next(count) < 3:
        raise ConnectionError("the sandbox is away")
    return 1.0
"""
    (result,), (sample,), failed = played(tmp_path, tiny_checkpoint, source, [{}], count=1)
    assert result == 1.0 and failed == {"away": 3} and sample.token_ids == [4, 4, 1]


def test_turns_are_readable_by_who_wrote_them():
    ids, sampled = torch.tensor([5, 6, 7, 8]), torch.tensor([True, False, False, True])
    assert turns_of(ids, sampled, json.dumps) == [
        {"policy": "[5]"},
        {"environment": "[6, 7]"},
        {"policy": "[8]"},
    ]


def test_an_interrupted_turn_is_one_turn_for_the_function():
    """Each turn's thinking is bounded; the text that ends it is part of what the function reads."""

    async def run():
        sample = Sample([9], {}, 40, Scripted())
        ask = interrupted(sample, 1, [7], lambda ids, special: "")
        return await ask(), await ask([8]), sample

    first, second, sample = asyncio.run(run())
    assert first == Turn([1, 7, 4, 4, 1], "stop") == second
    assert sample.token_ids == [1, 7, 4, 4, 1, 8, 1, 7, 4, 4, 1]
    assert [v == NOT_SAMPLED for v in sample.versions] == [x in (7, 8) for x in sample.token_ids]


@pytest.mark.slow
def test_a_task_of_several_turns_is_learned_with_a_real_vllm(tmp_path):
    """An environment's token in the loss, or a mask one place off, would show as a mismatch between
    trainer and sampler, or as a policy that writes what the environment says."""
    command = [sys.executable, REPO / "train_cispo.py", "--preset", "rounds", "--name", "r"]
    flags = ["--max-num-steps", "80", "--val-every-steps", "80"]
    subprocess.run([*command, *flags], cwd=tmp_path, check=True)
    records = read_jsonl(tmp_path / "runs/r/metrics.jsonl")
    rewards = [r["train/reward"] for r in records]
    assert sum(rewards[:5]) <= 0.6 * sum(rewards[-5:]) and sum(rewards[-5:]) > 5 * 0.75, rewards
    fresh = [r["train/gen_kl_error_same_version"] for r in records]
    assert max(x for x in fresh if x is not None) <= 1e-5
    assert {r.get("rollout/turns_per_sample", 3.0) for r in records} == {3.0}  # where groups came
    assert all(0.3 < r["train/inserted_share"] < 0.6 for r in records)
    sample = read_jsonl(tmp_path / "runs/r/samples.jsonl")[0]
    assert [next(iter(turn)) for turn in sample["turns"]][:3] == ["policy", "environment", "policy"]
