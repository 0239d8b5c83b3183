"""rollout.py between a real hub and a stand-in for vLLM that fails on demand; tests/test_vllm.py
has the real one."""

import asyncio
import json
import math
import socket

import aiohttp
import pytest
import torch
from published import SHARD, publish, write_version

from bridge import weights
from bridge.client import RunOver, ask
from bridge.hub import Hub
from bridge.ledger import Ledger
from config import RolloutConfig
from model import ModelConfig, Qwen3MoE
from rollout import Node
from task import Codec

SAMPLES = 4
ANSWER = [6, 5, 4, 3, 2, 1]  # "edcba" and <eos> in the tiny task's tokens


def choice(logprob=-0.5, version=0, tokens=ANSWER):
    return {
        "token_ids": tokens,
        "finish_reason": "stop",
        "logprobs": {"content": [{"logprob": -0.5}] * (len(tokens) - 1) + [{"logprob": logprob}]},
        "weight_versions": [{"version": str(version), "start": 0, "end": len(tokens)}],
    }


class StandIn:
    """Answers like rollout.VLLM. `replies`: what generate returns or raises, in turn; then good
    samples."""

    def __init__(self, replies=(), broken_loads=()):
        self.replies, self.broken_loads, self.calls = list(replies), set(broken_loads), []
        self.process, self.version, self.gpus = None, 0, 0

    async def stop(self, kill=False):
        pass

    async def start(self, checkpoint):
        self.calls.append(("start", checkpoint.name))
        self.process = object()

    async def checksums(self):
        return {"w": "1"}

    def engine(self):
        return "a stand-in"

    async def load(self, checkpoint, version):
        self.calls.append(("load", version))
        if version in self.broken_loads:
            self.broken_loads.remove(version)
            raise RuntimeError("vLLM answered /update_weights with 500")
        self.version = version
        return {"load_s": 0.0, "stopped_s": 0.0}

    async def generate(self, prompt_ids, sampling, version):
        self.calls.append(("generate", version))
        reply = self.replies.pop(0) if self.replies else [choice(version=self.version)] * SAMPLES
        if isinstance(reply, Exception):
            raise reply
        return reply


@pytest.fixture
def hub(tmp_path, tiny_checkpoint):
    weights_dir = tmp_path / "hub"
    model = Qwen3MoE(ModelConfig.from_dir(tiny_checkpoint))
    weights.load_hf(model, tiny_checkpoint)
    for version in range(3):
        tensors = [(name, t + version) for name, t in model.hf_tensors()]
        write_version(weights_dir, version, tensors, tiny_checkpoint)
    run = {
        "num_generations": SAMPLES,
        "max_new_tokens": 8,
        "sampling": {"n": SAMPLES, "max_tokens": 8},
        "max_model_len": 64,
        "reward": "exact",
        "reward_digest": "",
    }
    prompts = [{"prompt": "abcde>", "answer": "edcba"}] * 10
    hub = Hub(
        Ledger(1, 1, 4, 60.0), prompts, Codec(tiny_checkpoint).encode, weights_dir, 32, "t", run
    )
    hub.start("127.0.0.1", 0)
    publish(hub, 0)
    yield hub
    if not hub.over:
        hub.close(patience_s=0.0)


def run_node(hub, tmp_path, stand_in, scenario):
    """The node's tasks, until `scenario(node)` returns."""

    async def run():
        headers = {"Authorization": "Bearer t"}
        async with aiohttp.ClientSession(hub.url, headers=headers) as session:
            node = Node(
                RolloutConfig(hub.url, dir=str(tmp_path / "node"), max_tries=3, reward_workers=1),
                session,
            )
            await node.join()
            node.vllm = stand_in
            tasks = [
                asyncio.create_task(t())
                for t in (node.follow_weights, node.answer_prompts, node.beat)
            ]
            done = asyncio.create_task(scenario(node))
            await asyncio.wait([done, *tasks], timeout=60, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                assert not task.done(), task.exception()
                task.cancel()
            await asyncio.wait(tasks)
            await node.close()
            assert done.done(), "the scenario did not end in 60 s"
            return done.result()

    return asyncio.run(run())


async def next_batch(hub, version):
    return await asyncio.to_thread(hub.next_batch, version, 30)


@pytest.mark.parametrize("damage", [None, math.nan, -math.inf])
def test_a_sample_without_a_finite_logprob_is_dropped_and_counted(hub, tmp_path, damage):
    stand_in = StandIn(replies=[[choice(), choice(damage), choice(tokens=[3, 1]), choice()]])
    (group,) = run_node(hub, tmp_path, stand_in, lambda node: next_batch(hub, 0))
    assert group.lengths.tolist() == [6, 2, 6] and group.rewards.tolist() == [1.0, 0.0, 1.0]
    assert group.ordinal == 0 and hub.status()["counts"]["samples_dropped"] == 1


def test_a_group_left_with_one_sample_is_generated_again(hub, tmp_path):
    stand_in = StandIn(replies=[[choice(), choice(None), choice(None), choice(None)]])
    (group,) = run_node(hub, tmp_path, stand_in, lambda node: next_batch(hub, 0))
    assert len(group.lengths) == SAMPLES


def test_a_generation_that_fails_is_repeated_for_the_same_lease(hub, tmp_path):
    stand_in = StandIn(
        replies=[aiohttp.ServerDisconnectedError(), RuntimeError("vLLM answered 500")]
    )
    (group,) = run_node(hub, tmp_path, stand_in, lambda node: next_batch(hub, 0))
    assert group.ordinal in (0, 1) and hub.status()["counts"].get("leases_expired", 0) == 0


def test_the_end_of_the_run_is_told_to_a_waiting_node(hub, tmp_path):
    """The node exits on its own; the hub need not be looked for until a timeout."""

    async def run():
        async with aiohttp.ClientSession(hub.url, headers={"Authorization": "Bearer t"}) as session:
            node = Node(RolloutConfig(hub.url, dir=str(tmp_path / "node")), session)
            await node.join()
            node.vllm = StandIn()
            tasks = [asyncio.create_task(t) for t in (node.follow_weights(), node.answer_prompts())]
            await next_batch(hub, 0)
            await asyncio.to_thread(hub.close, 30.0)
            with pytest.raises(RunOver):
                await asyncio.wait_for(tasks[1], 30)
            tasks[0].cancel()
            await asyncio.wait(tasks)
            await node.close()

    asyncio.run(run())
    assert hub.told == hub.nodes.keys()


def test_a_hub_that_is_not_there_yet_is_waited_for_and_one_that_never_comes_is_an_error(hub):
    async def run(url, patience_s):
        async with aiohttp.ClientSession(url, headers={"Authorization": "Bearer t"}) as session:
            return await ask(session, "GET", "/run", patience_s)

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{s.getsockname()[1]}"
        with pytest.raises(
            RuntimeError, match="wait 'hub': rollout node waits for the hub's answer to /run since"
        ):
            asyncio.run(run(nowhere, 0.4))
    assert json.loads(asyncio.run(run(hub.url, 0.5))) == hub.run


async def until(condition):
    while not condition():
        await asyncio.sleep(0.02)  # a short poll of the node's own state; run_node has the deadline


def test_each_version_is_loaded_once_reported_and_used_as_the_salt_of_later_requests(hub, tmp_path):
    stand_in = StandIn()

    async def scenario(node):
        await next_batch(hub, 0)
        for version in (1, 2):
            await asyncio.to_thread(publish, hub, version)
            await until(
                lambda version=version: (
                    node.name in hub.nodes and hub.nodes[node.name].version == version
                )
            )
        await next_batch(hub, 1)
        return sorted(p.name for p in node.root.iterdir() if p.is_dir())

    # what is not needed any more is gone
    assert run_node(hub, tmp_path, stand_in, scenario) == ["v2"]
    assert [c for c in stand_in.calls if c[0] != "generate"] == [
        ("start", "v0"),
        ("load", 0),
        ("load", 1),
        ("load", 2),
    ]
    salts = [version for call, version in stand_in.calls if call == "generate"]
    assert salts == sorted(salts) and salts[0] == 0


def test_a_load_that_broke_off_starts_vllm_afresh_on_the_new_weights(hub, tmp_path):
    stand_in = StandIn(broken_loads=[1])

    async def scenario(node):
        await next_batch(hub, 0)
        await asyncio.to_thread(publish, hub, 1)
        await until(lambda: node.version == 1 and node.ready.is_set())

    run_node(hub, tmp_path, stand_in, scenario)
    assert [c for c in stand_in.calls if c[0] != "generate"] == [
        ("start", "v0"),
        ("load", 0),
        ("load", 1),
        ("start", "v1"),
        ("load", 1),
    ]


def test_damaged_weights_are_refused_and_the_node_stays_on_what_it_has(hub, tmp_path):
    stand_in = StandIn()
    file = hub.weights_dir / "v1" / f"{SHARD}.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8] + b"\0" * 8)

    async def scenario(node):
        await next_batch(hub, 0)
        await asyncio.to_thread(publish, hub, 1)
        await until(lambda: hub.status()["counts"].get("updates_refused"))
        assert node.version == 0 and node.ready.is_set()
        (news,) = [line for line in hub.take_news() if "refused" in line]
        assert (
            f"{node.name} stays on v0: v1 refused: " in news and "differs from the manifest" in news
        )
        file.write_bytes(whole)  # mended: the next attempt takes it
        await until(lambda: node.version == 1)

    run_node(hub, tmp_path, stand_in, scenario)
    assert ("start", "v1") not in stand_in.calls


def test_a_reload_that_changes_a_tensor_is_not_survived(hub, tmp_path):
    """The proof at start: a vLLM whose checksums differ after reloading the same weights may not
    serve."""
    stand_in = StandIn()
    sums = iter([{"w": "1"}, {"w": "2"}])

    async def checksums():
        return next(sums)

    stand_in.checksums = checksums
    with pytest.raises(
        (AssertionError, RuntimeError), match="reloading the same weights changed 1 tensors"
    ):
        run_node(hub, tmp_path, stand_in, lambda node: asyncio.Event().wait())


def test_the_answer_of_the_stand_in_is_right(tiny_checkpoint):
    """Guards the constants above."""
    assert Codec(tiny_checkpoint).decode(ANSWER) == "edcba" and torch.tensor(ANSWER).max() < 32
