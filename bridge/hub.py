"""The hub: what rank 0 knows of the rollout nodes, and what it gives them.

Prompts go out, groups come in, weights go out; the requests themselves are in routes.py. `Hub` runs
in a thread of rank 0. All state, ledger.py's too, is touched only by that thread's event loop, so
there are no locks: methods for other threads are marked `in_hub_thread`.
"""

import asyncio
import contextlib
import functools
import json
import math
import resource
import secrets
import socket
import threading
import time
from collections import Counter
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from bridge.files import http_url
from bridge.groups import Experts, Group
from bridge.ledger import Books, Lease, Ledger
from bridge.routes import TIMING_PARTS, application
from bridge.validation import Round, Validation
from bridge.waits import Wait, WaitOver
from bridge.weights import digest

FETCH_LIMIT_S = 1800.0  # how long files may be kept for a node that fetches them
# Groups that are read at once; the senders of others wait. Side by side all would be half there at
# the deadline, and in memory: 64 nodes send up to 256, of 50 MB each with router replay.
GROUPS_AT_ONCE = 16
FORGET_S = 3600.0  # a node that is silent this long is no longer listed


def check_address(host: str, port: int) -> None:
    """Raises: ValueError when no hub can listen there. For before a model is loaded; `Hub.start`
    finds out again."""
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address, family=family).close()
    except OSError as e:
        raise cannot_listen(host, port, e) from None


def cannot_listen(host: str, port: int, why: OSError) -> ValueError:
    return ValueError(
        f"--hub-host {host} --hub-port {port}: the hub cannot listen there: {why.strerror}"
    )


def in_hub_thread(method):
    """A method for other threads: the hub's carries it out between two requests, as a whole. If
    that thread does not get to it in time, nothing of it will happen later: a batch that the
    trainer no longer waits for is not taken."""

    @functools.wraps(method)
    def call(self, *args):
        if threading.current_thread() is self._thread:
            return method(self, *args)
        wait, future = Wait("hub thread", self.call_timeout_s), Future()

        def carry_out():
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(method(self, *args))
                except Exception as e:  # any: it is the caller's
                    future.set_exception(e)

        self._loop.call_soon_threadsafe(carry_out)
        done, _ = wait_for([future], wait.deadline_s)
        if not done and future.cancel():
            raise WaitOver(wait.message(method.__name__))
        return future.result()  # it has begun, and waits for nothing

    return call


@dataclass
class Node:
    """What is known of a rollout node."""

    version: int = -1  # of the weights that it samples from
    digest: str = ""  # of their manifest
    timing: dict[str, float] = field(default_factory=dict)  # seconds of its last update, by part
    last_seen_s: float = 0.0  # time of its last request
    groups: int = 0  # that it has answered
    vllm: dict[str, float] = field(default_factory=dict)  # what its last beat said of vLLM
    beat: asyncio.Transport | None = None  # the connection of that beat

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self.last_seen_s

    @property
    def hung_up(self) -> bool:
        """Whether the connection of its last beat is closed: its process has died."""
        return self.beat is not None and self.beat.is_closing()

    def status(self, published: int) -> dict:
        """For GET /status; published: the newest version."""
        known = {"version": self.version, "digest": self.digest, "timing": self.timing}
        known |= {"behind": published - self.version, "last_seen_s": self.silent_s}
        known |= {"groups": self.groups} if self.groups else {}
        return known | ({"vllm": self.vllm} if self.vllm else {})


class Hub:
    """The server. `prompts[ordinal]` gives an example and `encode(example)` its token ids; `run`
    goes to the nodes as it is. `start` returns when the port is open (`self.url`); `next_batch` and
    `set_published` are for the trainer.
    """

    node_timeout_s = 30.0  # a node that is silent this long loses its leases,
    hung_up_timeout_s = 6.0  # or this long, once its process has died
    body_timeout_s = 30.0  # a request has to arrive within,
    silent_body_timeout_s = 5.0  # with no longer silence, since others wait for its place,
    call_timeout_s = 30.0  # and the hub's thread has to get to what another asks of it

    def __init__(
        self,
        ledger: Ledger,
        prompts,
        encode,
        weights_dir: Path,
        vocab_size: int,
        token: str,
        run: dict,
        validation: Validation | None = None,
    ):
        self.ledger, self.prompts, self.encode, self.token = ledger, prompts, encode, token
        self.validation = validation or Validation()
        self.run = {**run, "id": secrets.token_hex(8)}
        self.weights_dir, self.vocab_size = weights_dir, vocab_size
        self.experts = Experts(*run["experts"]) if run.get("experts") else None
        self.trouble = ""  # why no batch should be waited for any more
        self.over, self.told = False, set()  # the run has ended; nodes that know
        self.record: dict = {}  # of the last step; the trainer puts a new one in its place
        # Prompts: who hands out the next one.
        self.books: list[Books] = [self.validation, self.ledger]
        self.reading = asyncio.Semaphore(GROUPS_AT_ONCE)
        # Weights.
        self.version = 0  # the trainer's: how many steps it has finished
        self.published = -1  # the newest version on disk
        self.whole = 0  # the newest version that is on disk in full
        self.refused = -1  # the newest version that a node refused
        self.manifest: bytes = b""
        self.digests: dict[int, set[str]] = {}  # of the manifests of a version
        self.checksums: dict[tuple[int, str], tuple[str, str]] = {}  # of (version, kind of engine):
        # the node that was the first to say what vLLM has made of the weights, and what it said
        self.fetching: dict[str, tuple[int, float]] = {}  # node: oldest version it may fetch; since
        # Nodes, and what they have said since the trainer last looked.
        self.nodes: dict[str, Node] = {}
        self.reloads: list[dict] = []  # seconds of each weight update, by part
        self.load: Counter[str] = Counter()  # node seconds, those of an idle vLLM, tokens made
        # of each group: seconds in vLLM, turns a sample, its seconds of waiting for an environment
        self.group_numbers: list[dict[str, float]] = []
        self._loop = asyncio.new_event_loop()
        self._changed, self._news = asyncio.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hub", daemon=True)

    # -- called by the trainer's thread
    def start(self, host: str, port: int) -> None:
        """Raises: ValueError when it cannot listen there."""
        self._thread.start()
        self.url = self._call(self._start(host.strip("[]"), port), 30)

    def next_batch(self, version: int, timeout_s: float) -> list[Group] | None:
        """The groups to train at `version`; None if they are not there within timeout_s. Raises:
        RuntimeError when so many prompts in a row were set aside that no batch will ever come, or
        what `fail` was told."""
        end = time.monotonic() + timeout_s
        while True:
            self._news.clear()
            batch = self._take(version)
            if batch is not None or not self._news.wait(max(0.0, end - time.monotonic())):
                return batch

    def fail(self, why: str) -> None:
        """Something that the run cannot go on without has failed: `next_batch` raises it."""
        self.trouble = self.trouble or why

    def close(self, patience_s: float) -> None:
        """End the run: nodes that ask for prompts are told so (410), for patience_s at most; then
        the port closes."""
        self._call(self._close(patience_s), patience_s + 30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    def _call(self, coroutine, timeout_s: float):
        wait = Wait("hub thread", timeout_s)
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout_s)
        except FutureTimeout:
            future.cancel()
            raise WaitOver(wait.message(coroutine.__name__)) from None

    # -- called by the trainer's thread and by the event loop
    @in_hub_thread
    def _take(self, version: int) -> list[Group] | None:
        self.version = version
        if self.trouble:
            raise RuntimeError(self.trouble)
        if self.ledger.set_aside_in_a_row >= 2 * self.ledger.prompts_per_step:
            ordinal, why = next(reversed(self.ledger.set_aside.items()))
            raise RuntimeError(
                f"{self.ledger.set_aside_in_a_row} prompts in a row were set aside, the last of "
                f"them {ordinal}: {why}"
            )
        batch = self.ledger.take(version)
        self.ledger.check()
        on_their_way = self.ledger.leases or self.ledger.returned
        if batch is None and self.ledger.none_left and not on_their_way:
            raise RuntimeError(
                f"no prompt is left to sample: {len(self.ledger.solved)} have reached "
                f"--no-resampling-pass-rate {self.ledger.pass_rate}"
            )
        if batch:
            self.notify()
        return batch

    @in_hub_thread
    def set_published(self, manifest: bytes) -> None:
        """The nodes may have this version now. Again with another manifest: more of its files are
        there."""
        found = json.loads(manifest)
        self.manifest, self.published = manifest, found["version"]
        self.whole = found["static"]["version"]
        # A node may sample from it before the trainer asks for it.
        self.version = max(self.version, self.published)
        self.digests.setdefault(self.published, set()).add(digest(manifest))
        recent = self.published - 100
        self.digests = {v: known for v, known in self.digests.items() if v > recent}
        self.checksums = {key: said for key, said in self.checksums.items() if key[0] > recent}
        self.notify()

    @in_hub_thread
    def oldest_in_use(self) -> float:
        """The oldest version that a node is fetching; infinity if there is none."""
        now = time.monotonic()
        lost = {name for name, node in self.nodes.items() if node.silent_s > self.node_timeout_s}
        self.fetching = {
            name: (oldest, since)
            for name, (oldest, since) in self.fetching.items()
            if name not in lost and now - since < FETCH_LIMIT_S
        }
        return min((oldest for oldest, _ in self.fetching.values()), default=math.inf)

    @in_hub_thread
    def take_timing(self) -> dict[str, float]:
        """Means since the last call: seconds of the rollout nodes' parts in reloads, and the
        numbers of the groups."""
        rows, self.reloads = self.reloads, []
        groups, self.group_numbers = self.group_numbers, []
        timing = {part: [row[part] for row in rows if part in row] for part in TIMING_PARTS}
        load, self.load = self.load, Counter()
        for name in ("generate_group_s", "environment_s", "turns_per_sample"):
            timing[name] = [x for group in groups if math.isfinite(x := group[name])]
        means = {name: sum(s) / len(s) for name, s in timing.items() if s}
        turns = means.pop("turns_per_sample", None)
        return {
            **{f"timing/rollout/{name}": mean for name, mean in means.items()},
            **({} if turns is None else {"rollout/turns_per_sample": turns}),
            "rollout/node_s": load["over_s"],
            "rollout/idle_s": load["idle_s"],
            "rollout/tokens": load["made"],
            "rollout/tokens_per_s_per_gpu": load["made"] / load["gpu_s"] if load["gpu_s"] else None,
        }

    @in_hub_thread
    def release(self, node: str) -> None:
        """A node is known to have ended: its prompts go back at once."""
        for books, lease in self.held_by(node):
            books.give_back(lease.id, "leases_of_lost_nodes", failure=f"{node} ended")
        self.nodes.pop(node, None)
        self.notify()

    @in_hub_thread
    def take_news(self) -> list[str]:
        """What the log should say of the nodes and prompts since the last call."""
        news = [line for books in self.books for line in books.news]
        for books in self.books:
            books.news = []
        return news

    @in_hub_thread
    def ledger_state(self) -> dict:
        return self.ledger.state()

    @in_hub_thread
    def begin_validation(self, version: int) -> None:
        """Hand out the held-out prompts, to nodes that have this version or a newer one."""
        self.validation.begin(version)
        self.notify()

    @in_hub_thread
    def take_validations(self) -> list[Round]:
        """The rounds that were finished since the last call."""
        finished, self.validation.finished = self.validation.finished, []
        return finished

    @in_hub_thread
    def status(self) -> dict:
        ledger, nodes = self.ledger, self.nodes.values()
        return {
            "version": self.version,
            "published": self.published,
            "handed_out": ledger.next_ordinal,
            "taken": ledger.num_taken,
            "buffered": len(ledger.buffer),
            "leased": len(ledger.leases),
            "returned": len(ledger.returned),
            "set_aside": len(ledger.set_aside),
            "skipped": ledger.num_skipped,
            "counts": dict(ledger.counts),
            "validation": self.validation.status(),
            "in_flight": sum(node.vllm.get("running", 0) for node in nodes),
            "waiting": sum(node.vllm.get("waiting", 0) for node in nodes),
            "nodes": {name: node.status(self.published) for name, node in self.nodes.items()},
        }

    # -- event loop
    async def _start(self, host: str, port: int) -> str:
        # Often 1,024 files, and every node is a few connections.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < 16_384:  # below 0: no limit
            wanted = 16_384 if hard < 0 else min(hard, 16_384)
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        self._runner = web.AppRunner(application(self), access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as e:  # nobody has this address here, or somebody has the port
            raise cannot_listen(host, port, e) from None
        self._expiry = asyncio.create_task(self._expire())
        return http_url(host, self._runner.addresses[0][1])

    async def _close(self, patience_s: float) -> None:
        self.over = True
        self.notify()
        await self.wait_for(lambda: True if self.told >= self.nodes.keys() else None, patience_s)
        self._expiry.cancel()
        await self._runner.cleanup()

    def notify(self) -> None:
        self._news.set()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def wait_for(self, find, timeout_s: float):
        """find()'s first result that is not None, or None after timeout_s."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while (found := find()) is None:
                    await self._changed.wait()
                return found

    async def _expire(self) -> None:
        """Once a second: leases and nodes whose time is up, and connections without a request."""
        silent_since: dict[object, float] = {}
        while True:
            await asyncio.sleep(1.0)
            for books in self.books:
                books.expire(time.monotonic())
            for name, node in self.nodes.items():
                limit_s = self.hung_up_timeout_s if node.hung_up else math.inf
                limit_s = min(self.node_timeout_s, limit_s)
                silence = Wait("node", limit_s, whom=name, start=node.last_seen_s)
                for books in self.books if silence.over else ():
                    if held := books.held_by(name):
                        books.news.append(silence.message(f"{len(held)} prompts"))
                    for lease in held:
                        why = f"contact with {name} was lost"
                        books.give_back(lease.id, "leases_of_lost_nodes", why)
            self.nodes = {n: node for n, node in self.nodes.items() if node.silent_s < FORGET_S}
            silent_since = self._close_silent_connections(silent_since)
            self.notify()

    def _close_silent_connections(self, since: dict[object, float]) -> dict[object, float]:
        """Those that have made no request: aiohttp has no limit on how long a client may take over
        its headers. since: when each was first seen so; returned anew."""
        now, connections = time.monotonic(), self._runner.server.connections
        silent = [c for c in connections if c.transport and c._request_count == 0]
        since = {c: since.get(c, now) for c in silent}
        for connection, start in since.items():
            if now - start > self.body_timeout_s:
                connection.force_close()
        return since

    # -- called by the requests
    def grant(self, name: str, wanted: int) -> list[Lease] | None:
        """Up to `wanted` prompts for a node; None if there is none now, [] if none will come."""
        if self.over or name not in self.nodes:  # it has ended: its prompts would wait in vain
            return []
        # The node's version is read anew each time: a receipt that comes while its request waits
        # may admit it.
        version, granted = self.nodes[name].version, []
        while len(granted) < wanted and (lease := self._grant_one(name, version)):
            granted.append(lease)
        return granted or None

    def _grant_one(self, name: str, version: int) -> Lease | None:
        """Validation and training take turns while both have prompts to hand out."""
        for books in self.books:
            if lease := books.grant(name, version, time.monotonic()):
                self.books.reverse()
                return lease
        return None

    def books_of(self, lease_id: str) -> tuple[Books, Lease] | tuple[None, None]:
        for books in self.books:
            if lease_id in books.leases:
                return books, books.leases[lease_id]
        return None, None

    def held_by(self, name: str) -> list[tuple[Books, Lease]]:
        return [(books, lease) for books in self.books for lease in books.held_by(name)]

    def example_of(self, lease: Lease) -> dict:
        examples = self.prompts if lease.validates is None else self.validation.examples
        return examples[lease.ordinal]

    def alive(self, but: str = "") -> list[Node]:
        """The nodes that were heard of lately, without the one of this name."""
        return [
            node
            for name, node in self.nodes.items()
            if name != but and node.silent_s <= self.node_timeout_s
        ]

    def node(self, name: str) -> Node:
        """The node of this name, seen just now."""
        node = self.nodes.setdefault(name, Node())
        node.last_seen_s = time.monotonic()
        return node
