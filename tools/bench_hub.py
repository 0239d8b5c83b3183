"""`python tools/bench.py hub`: what rank 0 takes in from many rollout nodes, and what gives first.

Rank 0's process has the real hub and ledger, and a trainer that takes a batch as soon as there is
one, unpacks it as a step does, and publishes the next version. This process is all nodes. They
speak rollout.py's protocol without a vLLM: each holds its share of --in-flight leases, and pushes 4
groups at once, which `pack_group` packs once for each version. So groups come as fast as rank 0
takes them, and latencies are those of a full hub. Not in it: files of weights, a tokenizer (a
prompt is 256 ids), experts to other ranks, a network.

With router replay a token has 48 x 8 bytes more, a group of 16 x 8k tokens 52 MB, and a step a 16th
of the prompts: 128 are 6.7 GB. A case ends after --seconds, or when rank 0 has --max-gib. CPU is
per group; "hub" is rank 0's process without the trainer's thread, which has "unpack". -1: never.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import logging
import multiprocessing
import os
import struct
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the program
from bridge.client import HubRefusal, ask
from bridge.groups import pack_group
from bridge.hub import Hub
from bridge.ledger import Ledger
from bridge.weights import digest
from config import Config, RolloutConfig
from ranks.batch import Batch, pack_batch

EXPERTS, VOCAB, PROMPT = (48, 8, 128), 151_936, 256  # Qwen3-30B-A3B's; tokens of a prompt
START_S, END_S = 20.0, 12.0  # for rank 0 to come up; to answer, and again to end
HEADERS, SPAWN = {"Authorization": "Bearer bench"}, multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Case:
    """One column of the table; all but `replay` are flags."""

    nodes: int = 64
    in_flight: int = 4096  # prompts that the nodes hold
    samples: int = 16  # of a prompt
    tokens: int = 8192  # of a sample
    prompts_per_step: int = 128
    seconds: float = 10.0
    max_gib: float = 8.0  # of rank 0's process
    replay: bool = False


# ---- the nodes' process --------------------------------------------------------------------------
@functools.lru_cache(2)
def packed(case: Case, version: int) -> tuple[dict, memoryview]:
    """A group's header, with no lease yet, and its tensors."""
    experts = np.random.randint(EXPERTS[2], size=(case.tokens, *EXPERTS[:2]), dtype=np.uint8)
    one = {"generate_s": 1.0, "turns": 1, "environment_s": 0.0, "truncated": False}
    one |= {"token_ids": [7] * case.tokens, "logprobs": [-0.5] * case.tokens}
    one = SimpleNamespace(**one, versions=[version] * case.tokens, experts=[experts])
    prompt_experts = experts[:1].repeat(PROMPT - 1, 0) if case.replay else None
    rewards = [float(i % 2) for i in range(case.samples)]
    body = memoryview(pack_group([one] * case.samples, rewards, "", prompt_experts))
    start = 8 + struct.unpack("<Q", body[:8])[0]
    return json.loads(bytes(body[8:start])), body[start:]


async def slices(head: bytes, tensors: memoryview):
    """So that the nodes' process holds one group, and not one for each push."""
    yield head
    for at in range(0, len(tensors), 1 << 18):
        yield tensors[at : at + (1 << 18)]


class SimulatedNode:
    """rollout.py's `Node` with a vLLM that answers at once."""

    def __init__(self, number: int, case: Case, seen: dict[str, list]):
        self.case, self.seen, self.limit = case, seen, case.in_flight // case.nodes
        self.name, self.version, self.held, self.joined = f"n{number}", -1, {}, asyncio.Event()
        self.pushing = asyncio.Semaphore(4)  # as rollout.py

    async def ask(self, method: str, route: str, **kwargs) -> dict:
        start = time.perf_counter()
        body = json.loads(await ask(self.hub, method, route, 30.0, **kwargs))
        self.seen[route].append(time.perf_counter() - start)
        return body

    async def live(self, url: str) -> None:
        async with aiohttp.ClientSession(url, headers=HEADERS) as self.hub:
            self.hub.headers["X-Run"] = (await self.ask("GET", "/run"))["id"]
            async with asyncio.TaskGroup() as self.tasks:
                for work in (self.follow_weights, self.beat, self.answer_prompts):
                    self.tasks.create_task(work())

    async def follow_weights(self) -> None:
        while True:
            route = f"/weights/latest?after={self.version}&node={self.name}"
            body = await ask(self.hub, "GET", route, 30.0)
            if manifest := json.loads(body):
                self.version = manifest["version"]
                receipt = {"version": self.version, "digest": digest(body), "timing": {}}
                await self.ask("POST", "/receipts", json={"node": self.name, **receipt})
                self.joined.set()

    async def beat(self) -> None:
        await self.joined.wait()
        while True:
            held = {"node": self.name, "leases": list(self.held), "vllm": {}}
            await self.ask("POST", "/beat", json=held)
            await asyncio.sleep(RolloutConfig.beat_s)

    async def answer(self, lease: str) -> None:
        try:
            async with self.pushing:
                header, tensors = packed(self.case, self.version)
                header["__metadata__"]["lease"] = lease
                text = json.dumps(header).encode()
                text += b" " * (-len(text) % 8)
                head = struct.pack("<Q", len(text)) + text
                size = {"Content-Length": str(len(head) + len(tensors))}
                await self.ask("POST", "/groups", data=slices(head, tensors), headers=size)
        except HubRefusal as e:  # the hub hands the prompt out again, as it is not in the next beat
            self.seen["refused"].append(str(e))

    async def answer_prompts(self) -> None:
        await self.joined.wait()
        while True:
            self.held = {name: task for name, task in self.held.items() if not task.done()}
            if len(self.held) >= self.limit:
                await asyncio.wait(self.held.values(), return_when=asyncio.FIRST_COMPLETED)
                continue
            wanted = {"node": self.name, "max": self.limit - len(self.held)}
            answer = await self.ask("POST", "/lease", json=wanted)
            for name in (lease["lease"] for lease in answer["leases"]):
                self.held[name] = self.tasks.create_task(self.answer(name))


async def simulate(url: str, case: Case, seen: dict[str, list]) -> None:
    """All nodes, for a little longer than rank 0 looks. seen: seconds of requests, by route."""
    nodes = (SimulatedNode(number, case, seen).live(url) for number in range(case.nodes))
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.gather(*nodes), case.seconds + 0.5)


# ---- rank 0's process ----------------------------------------------------------------------------
def gib(field: str) -> float:
    """Of this process. VmRSS: now; VmHWM: the most it was."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 2**20


def ms(seconds: list[float], percent: int) -> float:
    return sorted(seconds)[(len(seconds) - 1) * percent // 100] * 1e3 if seconds else -1.0


def manifest(version: int) -> bytes:
    return json.dumps({"version": version, "static": {"version": version}}).encode()


def train(hub: Hub, case: Case) -> dict[str, float]:
    """Take batches for --seconds, as train_cispo.py does; the updates take no time."""
    cfg = replace(Config(), num_generations_per_prompt=case.samples)
    P, take_s, unpack_s = case.prompts_per_step, [], []
    deadline = time.monotonic() + START_S
    while len(hub.nodes) < case.nodes and time.monotonic() < deadline:
        time.sleep(0.01)  # polling another thread, here and below
    before, start, cpu_s, own_s = gib("VmRSS"), time.monotonic(), time.process_time(), 0.0
    while time.monotonic() < start + case.seconds and gib("VmRSS") < case.max_gib:
        if len(hub.ledger.buffer) < P:
            time.sleep(0.02)
            continue
        began, own_began = time.perf_counter(), time.thread_time()
        groups = hub.next_batch(len(take_s), timeout_s=END_S)
        take_s.append(time.perf_counter() - began)
        batch = Batch.unpack(pack_batch(groups, cfg))  # both are kept until the next, as in a step
        assert len(batch.token_ids) == sum(len(g.token_ids) for g in groups)
        unpack_s.append(time.perf_counter() - began - take_s[-1])
        hub.set_published(manifest(len(take_s)))
        own_s += time.thread_time() - own_began
    wall_s, hub_s = time.monotonic() - start, time.process_time() - cpu_s - own_s
    count = hub.ledger.num_taken + len(hub.ledger.buffer)
    mb = case.samples * case.tokens * (12 + case.replay * EXPERTS[0] * EXPERTS[1]) / 1e6
    return {
        "nodes": case.nodes,
        "MB a group": mb,
        "groups": count,
        "groups/s": count / wall_s,
        "MB/s": count * mb / wall_s,
        "hub CPU, % of a core": hub_s / wall_s * 100,
        "hub CPU ms": hub_s / max(1, count) * 1e3,
        "unpack CPU ms": own_s / max(1, P * len(take_s)) * 1e3,
        "GiB at first": before,
        "GiB, peak": gib("VmHWM"),
        "take ms, most": ms(take_s, 100),
        "unpack s, p50": ms(unpack_s, 50) / 1e3,
    }


def rank_0(case: Case, pipe) -> None:
    """Sends the hub's address, and then what `train` says."""
    torch.set_num_threads(1)
    run = {"num_generations": case.samples, "max_new_tokens": case.tokens}
    run |= {"max_model_len": PROMPT + case.tokens, "experts": EXPERTS if case.replay else None}
    # Room for the leases, and for some steps that the trainer has not got to.
    age = case.in_flight // case.prompts_per_step + 3
    ledger, prompt_ids = Ledger(case.prompts_per_step, age, 10**6, 600.0), [7] * PROMPT
    hub = Hub(ledger, defaultdict(dict), lambda _: prompt_ids, Path("none"), VOCAB, "bench", run)
    logging.getLogger("aiohttp.server").disabled = True  # the nodes end in the middle of a push
    hub.start("127.0.0.1", 0)
    hub.set_published(manifest(0))
    pipe.send(hub.url)
    try:
        pipe.send(train(hub, case))
        pipe.poll(END_S)  # until the nodes have ended
    finally:
        hub.close(patience_s=0.0)


def received(pipe, timeout_s: float):
    if not pipe.poll(timeout_s):
        raise SystemExit(f"rank 0 has said nothing for {timeout_s:.0f} s")
    return pipe.recv()


def measure(case: Case, start=SPAWN.Process) -> dict[str, float]:
    """One column: the nodes are here, rank 0 is in what `start` makes, and ends with this."""
    here, there = multiprocessing.Pipe()
    other, load = start(target=rank_0, args=(case, there), daemon=True), os.getloadavg()[0]
    other.start()
    url, seen, cpu_s = received(here, START_S), defaultdict(list), time.process_time()
    asyncio.run(simulate(url, case, seen))
    cpu_s, found = time.process_time() - cpu_s, received(here, END_S)
    here.send("over")
    other.join(END_S)
    found["nodes' CPU ms"] = cpu_s / max(1, found["groups"]) * 1e3
    for route in ("/lease", "/beat", "/groups"):
        found |= {f"{route} ms, p{p}": ms(seen[route], p) for p in (50, 99)}
    return found | {"refused": len(seen["refused"]), "load before": load}


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags = parser.add_argument_group("hub")
    for f in fields(Case)[:-1]:
        flags.add_argument(f"--{f.name.replace('_', '-')}", type=f.type, default=f.default)


def main(args) -> None:
    if not (0 < args.seconds <= 45 and 1 <= args.nodes <= args.in_flight):
        raise SystemExit("hub: --seconds must be in 0 to 45, --nodes in 1 to --in-flight")
    many = Case(**{f.name: getattr(args, f.name) for f in fields(Case)[:-1]})
    with_experts = {"replay": True, "prompts_per_step": max(1, args.prompts_per_step // 16)}
    cases = [replace(many, nodes=n, **more) for more in ({}, with_experts) for n in (1, many.nodes)]
    torch.set_num_threads(1)
    found = [measure(case) for case in cases]
    if args.json:
        return print(json.dumps({"cases": found}))
    for name in found[0]:
        print(f"{name:22}" + "".join(f"{one[name]:>10.4g}" for one in found))
