"""What rank 0 serves to the rollout nodes: prompts out, groups in, weights out. One port, HTTP, JSON or safetensors.

    POST /lease            {"node", "max"} -> prompts to answer; waits while there is none to hand out
    POST /groups           a safetensors blob: all samples of one prompt (the format is in `parse_group`)
    GET  /weights/latest   ?after=N: the manifest of a version newer than N; waits for one
    GET  /weights/N/FILE   a file of version N
    POST /receipts         {"node", "version", "digest", "timing"}: a node says which weights it now samples from
    GET  /status, /run     the ledger and counters; what a rollout node must know of the run

Every request carries `Authorization: Bearer TOKEN`. `Ledger` is the bookkeeping alone, without any I/O; `Hub` is the
server around it, in a thread of rank 0. All state is touched only by that thread's event loop, so there are no locks.
"""

import asyncio
import hmac
import json
import struct
import threading
import time
from collections import Counter
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path

import torch
from aiohttp import web
from safetensors import SafetensorError
from safetensors.torch import load

from weights import MANIFEST, digest

LONG_POLL_S = 20.0  # how long a request may wait for news; the client asks again


class Refused(Exception):
    """A request that cannot be honoured: HTTP status and one line that says why."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


# ---- groups --------------------------------------------------------------------------------------------------
@dataclass
class Group:
    """All samples of one prompt. Flat tensors over the samples' response tokens, R of them in all."""

    ordinal: int
    prompt_ids: list[int]
    lengths: torch.Tensor  # (S,) int32: response tokens of each sample
    token_ids: torch.Tensor  # (R,) int32
    logprobs: torch.Tensor  # (R,) float32: the sampler's, in nats
    versions: torch.Tensor  # (R,) int32: the policy version that sampled each token
    rewards: torch.Tensor  # (S,) float32
    truncated: torch.Tensor  # (S,) uint8: 1 where max_new_tokens cut the sample off

    @property
    def oldest_version(self) -> int:
        return int(self.versions.min())


GROUP_TENSORS = {
    "lengths": torch.int32, "token_ids": torch.int32, "logprobs": torch.float32, "versions": torch.int32,
    "rewards": torch.float32, "truncated": torch.uint8,
}  # fmt: skip


def parse_group(body: bytes) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a /groups body. Raises: Refused (400) unless it is exactly the format above."""
    try:
        tensors = load(body)
        (header_bytes,) = struct.unpack("<Q", body[:8])
        metadata = json.loads(body[8 : 8 + header_bytes]).get("__metadata__") or {}
    except (SafetensorError, struct.error, ValueError) as e:
        raise Refused(400, f"body is not safetensors: {str(e)[:200]}") from None
    for name, dtype in GROUP_TENSORS.items():
        if name not in tensors:
            raise Refused(400, f"tensor {name} is missing")
        if tensors[name].dtype != dtype or tensors[name].dim() != 1:
            raise Refused(400, f"{name} is {tensors[name].dtype} {list(tensors[name].shape)}, expected 1-D {dtype}")
    if extra := tensors.keys() - GROUP_TENSORS.keys():
        raise Refused(400, f"unexpected tensor {sorted(extra)[0]}")
    return metadata, tensors


def check_group(t: dict[str, torch.Tensor], num_generations: int, max_new_tokens: int, vocab_size: int, versions):
    """Raises: Refused (422) unless the tensors can be trained on. `versions`: (oldest, newest) that are possible."""
    samples, tokens = len(t["lengths"]), len(t["token_ids"])
    low, high = versions
    for ok, reason in [
        (2 <= samples <= num_generations, f"{samples} samples, expected 2 to {num_generations}"),
        (all(len(t[n]) == samples for n in ("rewards", "truncated")), "rewards or truncated: not one for each sample"),
        (all(len(t[n]) == tokens for n in ("logprobs", "versions")), "logprobs or versions: not one for each token"),
        (samples and int(t["lengths"].min()) >= 1, "a sample has no tokens"),
        (samples and int(t["lengths"].max()) <= max_new_tokens, f"a sample has more than {max_new_tokens} tokens"),
        (int(t["lengths"].sum()) == tokens, f"lengths add up to {int(t['lengths'].sum())}, not {tokens} tokens"),
    ]:
        if not ok:
            raise Refused(422, reason)
    for ok, reason in [  # value checks, once the shapes are known to be right
        (int(t["token_ids"].min()) >= 0 and int(t["token_ids"].max()) < vocab_size,
         f"a token id is outside the vocabulary of {vocab_size}"),
        (t["logprobs"].isfinite().all() and t["logprobs"].max() <= 1e-3, "a log-prob is not finite or above 0"),
        (t["rewards"].isfinite().all(), "a reward is not finite"),
        (low <= int(t["versions"].min()) and int(t["versions"].max()) <= high,
         f"policy versions {int(t['versions'].min())}..{int(t['versions'].max())} outside {low}..{high}"),
    ]:  # fmt: skip
        if not ok:
            raise Refused(422, reason)


# ---- ledger --------------------------------------------------------------------------------------------------
@dataclass
class Lease:
    id: str
    ordinal: int
    node: str
    version: int  # of the weights that the node held when it took the lease: no token of it can be older
    deadline: float  # time.monotonic()


class Ledger:
    """Who has which prompt. Every ordinal handed out is leased, buffered, waiting to be leased again, or taken for
    training; `num_taken` counts the last, and each ordinal gets there once.

    A lease is granted while
        taken + buffered + leased < (node's version + max_age + 1) * prompts_per_step,
    which is admission control, backpressure and staleness bound in one line: at most that many prompts are trained
    at versions up to the node's own + max_age. The other half of the bound is `take`: it waits for the leases that
    would be too old one step later. So nothing is dropped for age, unless a lease passes its deadline first.
    """

    def __init__(self, prompts_per_step: int, max_age: int, num_steps: int, lease_timeout_s: float):
        self.prompts_per_step, self.max_age, self.num_steps = prompts_per_step, max_age, num_steps
        self.lease_timeout_s = lease_timeout_s
        self.leases: dict[str, Lease] = {}
        self.buffer: list[Group] = []
        self.returned: list[int] = []  # ordinals to be leased again
        self.num_taken = self.next_ordinal = 0
        self.attempts: Counter[int] = Counter()
        self.counts: Counter[str] = Counter()  # of everything that did not go straight through

    def grant(self, node: str, node_version: int, now: float) -> Lease | None:
        outstanding = self.num_taken + len(self.buffer) + len(self.leases)
        if outstanding >= min(node_version + self.max_age + 1, self.num_steps) * self.prompts_per_step:
            return None
        if self.returned:
            ordinal = self.returned.pop(0)
        else:
            ordinal, self.next_ordinal = self.next_ordinal, self.next_ordinal + 1
        self.attempts[ordinal] += 1
        lease = Lease(f"{ordinal}-{self.attempts[ordinal]}", ordinal, node, node_version, now + self.lease_timeout_s)
        self.leases[lease.id] = lease
        return lease

    def give_back(self, lease_id: str, why: str) -> None:
        self.returned.append(self.leases.pop(lease_id).ordinal)
        self.counts[why] += 1

    def expire(self, now: float) -> None:
        for lease in [lease for lease in self.leases.values() if lease.deadline <= now]:
            self.give_back(lease.id, "leases_expired")

    def accept(self, lease_id: str, group: Group) -> None:
        del self.leases[lease_id]
        self.buffer.append(group)

    def take(self, version: int) -> list[Group] | None:
        """The groups to train at `version`, or None while they are not all there. Oldest policy first."""
        for group in [g for g in self.buffer if version - g.oldest_version > self.max_age]:
            self.buffer.remove(group)
            self.returned.append(group.ordinal)
            self.counts["groups_too_old"] += 1
        must_wait = any(version - lease.version >= self.max_age for lease in self.leases.values())
        if must_wait or len(self.buffer) < self.prompts_per_step:
            return None
        self.buffer.sort(key=lambda g: (g.oldest_version, g.ordinal))
        batch, self.buffer = self.buffer[: self.prompts_per_step], self.buffer[self.prompts_per_step :]
        self.num_taken += len(batch)
        for group in batch:
            del self.attempts[group.ordinal]
        return batch

    def check(self) -> None:
        states = self.num_taken + len(self.buffer) + len(self.leases) + len(self.returned)
        assert states == self.next_ordinal, f"ledger: {states} prompts accounted for, {self.next_ordinal} handed out"


# ---- server --------------------------------------------------------------------------------------------------
class Hub:
    """The server. `prompts[ordinal]` gives an example and `encode(example)` its token ids; `run` goes to the nodes
    as it is. `start` returns when the port is open (`self.url`); `next_batch` and `set_published` are for the trainer.
    """

    def __init__(self, ledger: Ledger, prompts, encode, weights_dir: Path, vocab_size: int, token: str, run: dict):
        self.ledger, self.prompts, self.encode, self.run, self.token = ledger, prompts, encode, run, token
        self.weights_dir, self.vocab_size = weights_dir, vocab_size
        self.version = 0  # the trainer's: how many steps it has finished
        self.published = -1  # the newest version on disk
        self.manifest: bytes = b""
        self.nodes: dict[str, dict] = {}  # last receipt and time of last contact of each node
        self.over, self.told = False, set()  # the run has ended; nodes that know
        self.reloads: list[dict] = []  # seconds per part of the reloads since the trainer last looked
        self.gen_s: list[float] = []  # and the seconds that each group took in vLLM
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hub", daemon=True)

    # -- called by the trainer's thread
    def start(self, host: str, port: int) -> None:
        self._thread.start()
        self.url = self._call(self._start(host, port), 30)

    def next_batch(self, version: int, timeout_s: float) -> list[Group] | None:
        """The groups to train at `version`; None if they are not there within timeout_s."""
        return self._call(self._next_batch(version, timeout_s), timeout_s + 30)

    def set_published(self, version: int) -> None:
        self._call(self._set_published(version), 30)

    def status(self) -> dict:
        return self._call(self._status(), 30)

    def take_timing(self) -> dict[str, float]:
        """Mean seconds of the rollout nodes' parts since the last call: reloads, and generation of a group."""
        return self._call(self._take_timing(), 30)

    def close(self, patience_s: float) -> None:
        """End the run: nodes that ask for prompts are told so (410), for patience_s at most; then the port closes."""
        self._call(self._close(patience_s), patience_s + 30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    def _call(self, coroutine, timeout_s: float):
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout_s)
        except FutureTimeout:
            raise RuntimeError(f"the hub thread did not answer within {timeout_s:.0f} s") from None

    # -- event loop
    async def _start(self, host: str, port: int) -> str:
        self._changed = asyncio.Condition()
        group_bytes = self.run["num_generations"] * (self.run["max_new_tokens"] * 12 + 16)
        app = web.Application(client_max_size=group_bytes + (1 << 20), middlewares=[self._authorize])
        app.add_routes([
            web.post("/lease", self._lease), web.post("/groups", self._groups), web.post("/receipts", self._receipts),
            web.get("/weights/latest", self._latest), web.get("/weights/{version:\\d+}/{name}", self._file),
            web.get("/status", self._get_status), web.get("/run", self._get_run),
        ])  # fmt: skip
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        self._expiry = asyncio.create_task(self._expire_leases())
        return f"http://{host}:{self._runner.addresses[0][1]}"

    async def _close(self, patience_s: float) -> None:
        self.over = True
        await self._notify()
        await self._wait_for(lambda: True if self.told >= self.nodes.keys() else None, patience_s)
        self._expiry.cancel()
        await self._runner.cleanup()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _wait_for(self, find, timeout_s: float):
        """find()'s first result that is not None, or None after timeout_s."""
        async with self._changed:
            try:
                return await asyncio.wait_for(self._until(find), timeout_s)
            except TimeoutError:
                return None

    async def _until(self, find):
        while (found := find()) is None:
            await self._changed.wait()
        return found

    async def _expire_leases(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.ledger.expire(time.monotonic())
            await self._notify()

    async def _next_batch(self, version: int, timeout_s: float):
        self.version = version
        batch = await self._wait_for(lambda: self.ledger.take(version), timeout_s)
        self.ledger.check()
        if batch:
            await self._notify()
        return batch

    async def _set_published(self, version: int) -> None:
        self.manifest = (self.weights_dir / f"v{version}" / MANIFEST).read_bytes()
        self.published = version
        self.version = max(self.version, version)  # a node may sample from it before the trainer asks for its batch
        await self._notify()

    async def _take_timing(self) -> dict[str, float]:
        rows, self.reloads, gen_s, self.gen_s = self.reloads, [], self.gen_s, []
        parts = ("fetch_s", "load_s", "stopped_s", "total_s")
        timing = {name: [row[name] for row in rows if name in row] for name in parts} | {"generate_group_s": gen_s}
        return {f"timing/rollout/{name}": sum(s) / len(s) for name, s in timing.items() if s}

    async def _status(self) -> dict:
        ledger, now = self.ledger, time.monotonic()
        return {
            "version": self.version, "published": self.published, "handed_out": ledger.next_ordinal,
            "taken": ledger.num_taken, "buffered": len(ledger.buffer), "leased": len(ledger.leases),
            "returned": len(ledger.returned), "counts": dict(ledger.counts),
            "nodes": {n: {**seen, "last_seen_s": now - seen["last_seen_s"]} for n, seen in self.nodes.items()},
        }  # fmt: skip

    # -- requests
    @web.middleware
    async def _authorize(self, request: web.Request, handler):
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            return web.json_response({"error": "missing or wrong bearer token"}, status=401)
        try:
            return await handler(request)
        except Refused as e:
            self.ledger.counts[f"refused_{e.status}"] += 1
            return web.json_response({"error": e.reason}, status=e.status)
        except web.HTTPRequestEntityTooLarge:
            self.ledger.counts["refused_413"] += 1
            return web.json_response({"error": "body is larger than any group of this run"}, status=413)

    async def _json(self, request: web.Request, **fields: type) -> dict:
        """The JSON object of a request. Raises: Refused unless it has these fields, of these types."""
        try:
            body = json.loads(await request.read())
        except ValueError:
            raise Refused(400, "body is not JSON") from None
        for name, kind in fields.items():
            if not isinstance(body, dict) or type(body.get(name)) is not kind:
                raise Refused(400, f"expected a JSON object with {name} of type {kind.__name__}")
        self.nodes.setdefault(body["node"], {})["last_seen_s"] = time.monotonic()
        return body

    async def _lease(self, request: web.Request) -> web.Response:
        body = await self._json(request, node=str, max=int)
        node, wanted = body["node"], body["max"]
        if "version" not in self.nodes[node] or wanted < 1:
            raise Refused(422, f"max is {wanted}, or node {node!r} has not sent a receipt of its weights yet")

        def grant():
            # The node's version is read anew each time: a receipt that comes while this request waits may admit it.
            version, now = self.nodes[node]["version"], time.monotonic()
            granted = (self.ledger.grant(node, version, now) for _ in range(wanted))
            return [] if self.over else [lease for lease in granted if lease] or None

        leases = await self._wait_for(grant, LONG_POLL_S) or []
        if self.over:
            self.told.add(node)
            await self._notify()
            raise Refused(410, "the run is over")
        return web.json_response({"leases": [self._describe(lease) for lease in leases]})

    def _describe(self, lease: Lease) -> dict:
        example = self.prompts[lease.ordinal]
        return {"lease": lease.id, "deadline_s": self.ledger.lease_timeout_s, "example": example,
                "prompt_ids": self.encode(example)}  # fmt: skip

    async def _groups(self, request: web.Request) -> web.Response:
        metadata, tensors = parse_group(await request.read())
        lease = self.ledger.leases.get(metadata.get("lease", ""))
        if lease is None:
            raise Refused(409, f"unknown lease {metadata.get('lease')!r}: never granted, expired, or already used")
        check_group(tensors, self.run["num_generations"], self.run["max_new_tokens"], self.vocab_size,
                    versions=(lease.version, self.version))  # fmt: skip
        prompt_ids = self.encode(self.prompts[lease.ordinal])
        self.ledger.accept(lease.id, Group(lease.ordinal, prompt_ids, **tensors))
        self.gen_s.append(float(metadata.get("gen_s", "nan")))
        self.ledger.counts["samples_dropped"] += self.run["num_generations"] - len(tensors["lengths"])
        await self._notify()
        return web.json_response({"accepted": lease.id})

    async def _receipts(self, request: web.Request) -> web.Response:
        body = await self._json(request, node=str, version=int, digest=str, timing=dict)
        if not 0 <= body["version"] <= self.published:
            raise Refused(422, f"version {body['version']} was never published: the newest is {self.published}")
        if body["version"] == self.published and body["digest"] != digest(self.manifest):
            raise Refused(409, f"digest of version {self.published} differs from the published one")
        self.nodes[body["node"]].update({key: body[key] for key in ("version", "digest", "timing")})
        self.reloads.append(body["timing"])
        await self._notify()
        return web.json_response({"newest": self.published})

    async def _latest(self, request: web.Request) -> web.Response:
        try:
            after = int(request.query.get("after", -1))
        except ValueError:
            raise Refused(400, f"after={request.query['after']!r} is not a version") from None
        newer = await self._wait_for(lambda: self.manifest if self.published > after else None, LONG_POLL_S)
        return web.Response(body=newer or b"{}", content_type="application/json")

    async def _file(self, request: web.Request) -> web.StreamResponse:
        version, name = request.match_info["version"], request.match_info["name"]
        directory = self.weights_dir / f"v{version}"
        manifest = directory / MANIFEST
        if not manifest.exists() or name not in json.loads(manifest.read_text())["files"]:
            raise Refused(404, f"version {version} has no file {name!r}: never published, or pruned")
        return web.FileResponse(directory / name)  # sendfile; range requests included

    async def _get_status(self, request: web.Request) -> web.Response:
        return web.json_response(await self._status())

    async def _get_run(self, request: web.Request) -> web.Response:
        return web.json_response(self.run)
