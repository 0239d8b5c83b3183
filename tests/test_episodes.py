"""Functions that play: several turns, with something between them that nobody sampled, and every
way in which that can fail."""

import asyncio
import time
from collections import Counter

from bridge import episodes
from bridge.groups import NOT_SAMPLED
from bridge.reward_pool import RewardWorkers
from bridge.sample import Sample
from task import Codec

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


def played(tmp_path, checkpoint, source, examples, timeout_s=1.5, count=2, most=400):
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
