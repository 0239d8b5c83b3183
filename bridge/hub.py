"""What rank 0 serves to the rollout nodes: prompts out, groups in, weights out. One port, HTTP,
JSON or safetensors.

    POST /lease            {"node", "max"} -> prompts to answer; waits while there is none to hand out
    POST /groups           a safetensors blob: all samples of one prompt (the format is in `parse_group`)
    POST /return           {"node", "lease", "why"}: a prompt that the node could not answer comes back at once
    POST /beat             {"node", "leases", "vllm"}: the node lives, holds these leases, and its vLLM is this busy
    GET  /weights/latest   ?after=N&node=NAME: the manifest of a version newer than N; waits for one
    GET  /weights/N/FILE   a file of version N, of this node's disk; the manifest names who has the others
    POST /receipts         {"node", "version", "digest", "timing"}: a node says which weights it now samples from, and
                           with "checksum" what vLLM has made of them, or with "refused" why it
                           takes no newer ones, and with "mine" that the node itself or its link is
                           why; or with "ends" why the node ends, which another start of it would
                           not mend
    GET  /status, /run     the ledger and counters; what a rollout node must know of the run
    GET  /metrics          the first and the last step's metrics, as Prometheus reads them
 Every request carries `Authorization: Bearer TOKEN`, and a node's `X-Run: ID` too: the id is made
at each start of the trainer, so that nothing sampled for a run before a restart gets into the one
after it (412). `Hub` runs in a thread of rank 0; all state, ledger.py's too, is touched only by
that thread's event loop, so there are no locks.
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
from pathlib import Path

from aiohttp import web

from bridge.files import has_token, http_url, served_file
from bridge.groups import Group, Refused, check_group, parse_group
from bridge.ledger import Books, Lease, Ledger
from bridge.prometheus import prometheus_text
from bridge.validation import Round, Validation
from bridge.waits import Wait, WaitOver
from bridge.weights import digest

LONG_POLL_S = 20.0  # how long a request may wait for news; the client asks again
MAX_NODES = 4096  # that are remembered at once


# Samples without a reward, by kind; and "away": calls that were made again, since the service had
# not answered.
FAILED_REWARDS = ("raised", "timed_out", "exited", "not_finite", "wrong_type", "away")
LOAD = (
    "over_s",
    "idle_s",
    "made",
)  # of a beat: seconds since the one before, those in which vLLM was idle, tokens
VITALS = ("running", "waiting", "kv", "limit", "preemptions", *LOAD)
TIMING_PARTS = (
    "fetch_s",
    "patch_s",
    "verify_s",
    "pause_s",
    "load_s",
    "stopped_s",
    "total_s",
    "fetch_bytes",
)
FETCH_LIMIT_S = 1800.0  # how long files may be kept for a node that fetches them


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


# ---- server --------------------------------------------------------------------------------------
class Hub:
    """The server. `prompts[ordinal]` gives an example and `encode(example)` its token ids; `run`
    goes to the nodes as it is. `start` returns when the port is open (`self.url`); `next_batch` and
    `set_published` are for the trainer.
    """

    node_timeout_s = 30.0  # a node that is silent this long loses its leases
    hung_up_timeout_s = (
        6.0  # or this long, once the connection of its last beat is closed: its process has died
    )
    body_timeout_s = 30.0  # a request has to arrive within
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
        self.books: list[Books] = [
            self.validation,
            self.ledger,
        ]  # the first is the next to hand out a prompt
        self.run = {**run, "id": secrets.token_hex(8)}
        self.weights_dir, self.vocab_size = weights_dir, vocab_size
        self.version = 0  # the trainer's: how many steps it has finished
        self.published = -1  # the newest version on disk
        self.manifest: bytes = b""
        self.whole = 0  # the newest version that is on disk in full
        self.fetching: dict[
            str, tuple[int, float]
        ] = {}  # the oldest version that a node may be fetching, since when
        self.refused = -1  # the newest version that a node refused
        self.digests: dict[
            int, set[str]
        ] = {}  # of the manifests that a version was published under
        self.checksums: dict[
            tuple[int, str], tuple[str, str]
        ] = {}  # of a version in an engine: who said what first
        self.trouble = ""  # why no batch should be waited for any more
        self.nodes: dict[str, dict] = {}  # last receipt and time of last contact of each node
        self.beats: dict[str, asyncio.Transport] = {}  # the connection of each node's last beat
        self.record: dict = {}  # of the last step; the trainer puts a new one in its place
        self.over, self.told = False, set()  # the run has ended; nodes that know
        self.reloads: list[
            dict
        ] = []  # seconds per part of the reloads since the trainer last looked
        self.load: Counter[str] = (
            Counter()
        )  # node seconds, those in which vLLM was idle, and tokens made
        self.gen_s: list[float] = []  # and the seconds that each group took in vLLM
        self._loop, self._changed, self._news = (
            asyncio.new_event_loop(),
            asyncio.Event(),
            threading.Event(),
        )
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
        wait, future = (
            Wait("hub thread", timeout_s),
            asyncio.run_coroutine_threadsafe(coroutine, self._loop),
        )
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
            last = next(reversed(self.ledger.set_aside.items()))
            raise RuntimeError(
                f"{self.ledger.set_aside_in_a_row} prompts in a row were set aside, the last of them "
                f"{last[0]}: {last[1]}"
            )
        batch = self.ledger.take(version)
        self.ledger.check()
        if (
            batch is None
            and self.ledger.none_left
            and not (self.ledger.leases or self.ledger.returned)
        ):
            raise RuntimeError(
                f"no prompt is left to sample: {len(self.ledger.solved)} have reached "
                f"--no-resampling-pass-rate {self.ledger.pass_rate}"
            )
        if batch:
            self._notify()
        return batch

    @in_hub_thread
    def set_published(self, manifest: bytes) -> None:
        """The nodes may have this version now. Again with another manifest: more of its files are
        there."""
        found = json.loads(manifest)
        self.manifest, self.published, self.whole = (
            manifest,
            found["version"],
            found["static"]["version"],
        )
        self.version = max(
            self.version, self.published
        )  # a node may sample from it before the trainer asks for it
        self.digests.setdefault(self.published, set()).add(digest(manifest))
        recent = lambda version: version > self.published - 100
        self.digests = {v: known for v, known in self.digests.items() if recent(v)}
        self.checksums = {key: said for key, said in self.checksums.items() if recent(key[0])}
        self._notify()

    @in_hub_thread
    def oldest_in_use(self) -> float:
        """The oldest version that a node is fetching; infinity if there is none."""
        now = time.monotonic()
        lost = {
            n for n, seen in self.nodes.items() if now - seen["last_seen_s"] > self.node_timeout_s
        }
        self.fetching = {
            n: (oldest, since)
            for n, (oldest, since) in self.fetching.items()
            if n not in lost and now - since < FETCH_LIMIT_S
        }
        return min((oldest for oldest, _ in self.fetching.values()), default=math.inf)

    @in_hub_thread
    def take_timing(self) -> dict[str, float]:
        """Mean seconds of the rollout nodes' parts since the last call: reloads, and generation of
        a group."""
        rows, self.reloads, gen_s, self.gen_s = self.reloads, [], self.gen_s, []
        timing = {part: [row[part] for row in rows if part in row] for part in TIMING_PARTS}
        load, self.load = self.load, Counter()
        timing["generate_group_s"] = [s for s in gen_s if math.isfinite(s)]
        return {
            **{f"timing/rollout/{name}": sum(s) / len(s) for name, s in timing.items() if s},
            "rollout/node_s": load["over_s"],
            "rollout/idle_s": load["idle_s"],
            "rollout/tokens": load["made"],
        }

    @in_hub_thread
    def release(self, node: str) -> None:
        """A node is known to have ended: its prompts go back at once."""
        for books in self.books:
            for lease in books.held_by(node):
                books.give_back(lease.id, "leases_of_lost_nodes", failure=f"{node} ended")
        self.nodes.pop(node, None)
        self._notify()

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
        self._notify()

    @in_hub_thread
    def take_validations(self) -> list[Round]:
        """The rounds that were finished since the last call."""
        finished, self.validation.finished = self.validation.finished, []
        return finished

    @in_hub_thread
    def status(self) -> dict:
        ledger, now = self.ledger, time.monotonic()
        vllm = [seen["vllm"] for seen in self.nodes.values() if "vllm" in seen]
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
            "in_flight": sum(v.get("running", 0) for v in vllm),
            "waiting": sum(v.get("waiting", 0) for v in vllm),
            "nodes": {
                n: {
                    **seen,
                    "behind": self.published - seen["version"],
                    "last_seen_s": now - seen["last_seen_s"],
                }
                for n, seen in self.nodes.items()
            },
        }

    # -- event loop
    async def _start(self, host: str, port: int) -> str:
        soft, hard = resource.getrlimit(
            resource.RLIMIT_NOFILE
        )  # often 1,024, and every node is a few connections
        if 0 <= soft < 16_384:  # below 0: no limit
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (16_384 if hard < 0 else min(hard, 16_384), hard)
            )
        group_bytes = max(self.run["num_generations"], self.validation.num_samples) * (
            self.run["max_new_tokens"] * 12 + 16
        )
        app = web.Application(
            client_max_size=group_bytes + (1 << 20), middlewares=[self._authorize]
        )
        app.add_routes(
            [
                web.post("/lease", self._lease),
                web.post("/groups", self._groups),
                web.post("/receipts", self._receipts),
                web.post("/return", self._return),
                web.post("/beat", self._beat),
                web.get("/weights/latest", self._latest),
                web.get("/weights/{version:\\d{1,9}}/{name}", self._file),
                web.get("/status", self._get_status),
                web.get("/run", self._get_run),
                web.get("/metrics", self._get_metrics),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as e:  # nobody has this address here, or somebody has the port
            raise cannot_listen(host, port, e) from None
        self._expiry = asyncio.create_task(self._expire())
        return http_url(host, self._runner.addresses[0][1])

    async def _close(self, patience_s: float) -> None:
        self.over = True
        self._notify()
        await self._wait_for(lambda: True if self.told >= self.nodes.keys() else None, patience_s)
        self._expiry.cancel()
        await self._runner.cleanup()

    def _notify(self) -> None:
        self._news.set()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _wait_for(self, find, timeout_s: float):
        """find()'s first result that is not None, or None after timeout_s."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while (found := find()) is None:
                    await self._changed.wait()
                return found

    async def _expire(self) -> None:
        """Once a second: leases and nodes whose time is up, and connections that never made a
        request."""
        since: dict[object, float] = {}
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            for books in self.books:
                books.expire(now)
            for node, seen in self.nodes.items():
                hung_up = node in self.beats and self.beats[node].is_closing()
                limit_s = min(self.node_timeout_s, self.hung_up_timeout_s if hung_up else math.inf)
                silence = Wait("node", limit_s, whom=node, start=seen["last_seen_s"])
                for books in self.books:
                    if silence.over and (held := books.held_by(node)):
                        books.news.append(silence.message(f"{len(held)} prompts"))
                        for lease in held:
                            books.give_back(
                                lease.id, "leases_of_lost_nodes", f"contact with {node} was lost"
                            )
            self.nodes = {
                n: seen for n, seen in self.nodes.items() if now - seen["last_seen_s"] < 3600
            }
            self.beats = {n: connection for n, connection in self.beats.items() if n in self.nodes}
            # aiohttp has no limit on how long a client may take over its headers.
            silent = [
                c for c in self._runner.server.connections if c.transport and c._request_count == 0
            ]
            since = {c: since.get(c, now) for c in silent}
            for connection in [
                c for c, start in since.items() if now - start > self.body_timeout_s
            ]:
                connection.force_close()
            self._notify()

    # -- requests
    @web.middleware
    async def _authorize(self, request: web.Request, handler):
        if not has_token(request, self.token):
            return web.json_response({"error": "missing or wrong bearer token"}, status=401)
        if (
            request.headers.get("X-Run", self.run["id"]) != self.run["id"]
            and request.path != "/run"
        ):
            return web.json_response({"error": "this is another run: ask /run again"}, status=412)
        try:
            return await handler(request)
        except Refused as e:
            self.ledger.counts[f"refused_{e.status}"] += 1
            return web.json_response({"error": e.reason}, status=e.status)
        except web.HTTPRequestEntityTooLarge:
            self.ledger.counts["refused_413"] += 1
            return web.json_response(
                {"error": "body is larger than any group of this run"}, status=413
            )

    async def _json(self, request: web.Request, **fields: type) -> dict:
        """The JSON object of a request. Raises: Refused unless it has these fields, of these
        types."""
        try:
            body = json.loads(await self._body(request))
        except (ValueError, RecursionError):
            raise Refused(400, "body is not JSON") from None
        for name, kind in fields.items():
            if not isinstance(body, dict) or type(body.get(name)) is not kind:
                raise Refused(400, f"expected a JSON object with {name} of type {kind.__name__}")
        if body["node"] in self.nodes:
            self.nodes[body["node"]]["last_seen_s"] = time.monotonic()
        return body

    async def _body(self, request: web.Request) -> bytes:
        wait = Wait(
            "body", self.body_timeout_s, whom=f"the body of {request.path} from {request.remote}"
        )
        try:
            return await asyncio.wait_for(request.read(), self.body_timeout_s)
        except TimeoutError:
            raise Refused(408, wait.message()) from None

    async def _lease(self, request: web.Request) -> web.Response:
        body = await self._json(request, node=str, max=int)
        node, wanted = body["node"], body["max"]
        if node not in self.nodes or not 1 <= wanted <= 4096:
            raise Refused(
                422, f"max is {wanted}, or node {node!r} has not sent a receipt of its weights yet"
            )

        def grant():
            if (
                self.over or node not in self.nodes
            ):  # it has ended meanwhile: its prompts would wait out their leases
                return []
            # The node's version is read anew each time: a receipt that comes while this request
            # waits may admit it.
            version, now = self.nodes[node]["version"], time.monotonic()
            granted: list[Lease] = []
            while len(granted) < wanted:
                lease = self.books[0].grant(node, version, now) or self.books[1].grant(
                    node, version, now
                )
                if lease is None:
                    break
                granted.append(lease)
                # validation and training in turn, while both have prompts to hand out
                self.books.reverse()
            return granted or None

        leases = await self._wait_for(grant, LONG_POLL_S) or []
        if self.over:
            self.told.add(node)
            self._notify()
            raise Refused(410, "the run is over")
        described = [text for lease in leases if (text := self._describe(lease))]
        if len(described) < len(leases):
            self._notify()
        return web.Response(
            text=f'{{"leases": [{", ".join(described)}]}}', content_type="application/json"
        )

    def _describe(self, lease: Lease) -> str:
        """A lease as JSON. One that cannot be sent is given back as failed: nobody would answer
        it."""
        try:
            example = self._example(lease)
            return json.dumps(
                {
                    "lease": lease.id,
                    "deadline_s": lease.deadline - time.monotonic(),
                    "example": example,
                    "prompt_ids": self.encode(example),
                    "validates": lease.validates,
                }
            )
        except (TypeError, ValueError, KeyError) as e:
            books, _ = self._books_of(lease.id)
            books.give_back(lease.id, "leases_returned", failure=f"cannot be sent: {e!r:.300}")
            return ""

    def _example(self, lease: Lease) -> dict:
        return (self.prompts if lease.validates is None else self.validation.examples)[
            lease.ordinal
        ]

    def _books_of(self, lease_id: str) -> tuple[Books, Lease] | tuple[None, None]:
        return next(
            ((books, books.leases[lease_id]) for books in self.books if lease_id in books.leases),
            (None, None),
        )

    async def _return(self, request: web.Request) -> web.Response:
        body = await self._json(request, node=str, lease=str, why=str)
        books, lease = self._books_of(body["lease"])
        if lease is None or lease.node != body["node"]:
            raise Refused(409, f"lease {body['lease'][:50]!r} is not held by {body['node'][:50]!r}")
        books.give_back(
            lease.id,
            "leases_returned",
            failure=f"{body['why'][:300]} ({lease.node})",
            by_reward=body.get("by_reward") is True,
        )
        self._notify()
        return web.json_response({"returned": lease.id})

    async def _beat(self, request: web.Request) -> web.Response:
        body = await self._json(request, node=str, leases=list, vllm=dict)
        node, held = body["node"], {x for x in body["leases"] if isinstance(x, str)}
        if node not in self.nodes:
            raise Refused(422, f"node {node[:50]!r} has not sent a receipt of its weights yet")
        if request.transport is not None:
            self.beats[node] = request.transport
        vllm = self.nodes[node]["vllm"] = _numbers(body["vllm"], VITALS)
        self.load.update({name: vllm.get(name, 0.0) for name in LOAD})
        for kind, count in _numbers(body.get("failed_rewards", {}), FAILED_REWARDS).items():
            self.ledger.counts[f"reward_{kind}"] += count
        mine = {lease.id: (books, lease) for books in self.books for lease in books.held_by(node)}
        for (
            books,
            lease,
        ) in (
            mine.values()
        ):  # an answer to /lease that never arrived; some may be on their way still
            if lease.id not in held and lease.granted < time.monotonic() - 10.0:
                books.give_back(lease.id, "leases_not_held")
        self._notify()
        return web.json_response({"drop": sorted(held - mine.keys())})

    async def _groups(self, request: web.Request) -> web.Response:
        metadata, tensors = parse_group(await self._body(request))
        books, lease = self._books_of(metadata.get("lease", ""))
        if lease is None:
            raise Refused(
                409,
                f"unknown lease {metadata.get('lease')!r}: never granted, expired, or already used",
            )
        # A training sample needs a sibling to be compared with.
        num_samples = (
            (2, self.run["num_generations"])
            if books is self.ledger
            else (1, self.validation.num_samples)
        )
        check_group(
            tensors,
            num_samples,
            self.run["max_new_tokens"],
            self.vocab_size,
            (lease.version, self.version),
            len(self.run.get("interrupt_ids", ())),
        )
        prompt_ids = self.encode(self._example(lease))
        books.accept(lease.id, Group(lease.ordinal, prompt_ids, **tensors))
        books.counts["samples_dropped"] += num_samples[1] - len(tensors["lengths"])
        if books is self.ledger:
            self.gen_s.append(metadata["gen_s"])
            if lease.node in self.nodes:
                self.nodes[lease.node]["groups"] = self.nodes[lease.node].get("groups", 0) + 1
        self._notify()
        return web.json_response({"accepted": lease.id})

    async def _receipts(self, request: web.Request) -> web.Response:
        body = await self._json(request, node=str, version=int, digest=str, timing=dict)
        if isinstance(why := body.get("ends"), str):
            self.ledger.news.append(f"{body['node'][:200]} ends: {why[:500]}")
            others = [n["last_seen_s"] for name, n in self.nodes.items() if name != body["node"]]
            if (
                body["node"] in self.nodes
                and time.monotonic() - max(others, default=-math.inf) > self.node_timeout_s
            ):
                self.fail(f"the last rollout node, {body['node']}, ends: {why[:500]}")
            return web.json_response({"newest": self.published})
        if isinstance(why := body.get("refused"), str):
            self.fetching.pop(body["node"], None)
            self.refused = self.refused if body.get("mine") else self.published
            self.ledger.counts["updates_refused"] += 1
            self.ledger.news.append(
                f"{body['node'][:200]} stays on v{body['version']}: {why[:500]}"
            )
            return web.json_response({"newest": self.published})
        if not 0 <= body["version"] <= self.published:
            raise Refused(
                422,
                f"version {body['version']} was never published: the newest is {self.published}",
            )
        known = self.digests.get(body["version"])  # one that was published again has several
        if len(body["digest"]) != 64 or (known and body["digest"] not in known):
            raise Refused(
                409, f"digest of version {body['version']} differs from the published one"
            )
        node = body["node"]
        if len(node) > 200 or (node not in self.nodes and len(self.nodes) >= MAX_NODES):
            raise Refused(
                422, f"node's name is longer than 200, or there are {MAX_NODES} nodes already"
            )
        timing = _numbers(body["timing"], TIMING_PARTS)
        seen = {
            "version": body["version"],
            "digest": body["digest"],
            "timing": timing,
            "last_seen_s": time.monotonic(),
        }
        self.nodes[node] = {**self.nodes.get(node, {}), **seen}
        self.reloads.append(timing)
        self.fetching.pop(node, None)
        if isinstance(body.get("checksum"), str):
            # How vLLM lays the weights out depends on its parallelism, its flags and the hardware.
            key = (body["version"], str(body.get("engine", ""))[:1000])
            other, checksum = self.checksums.setdefault(key, (node, body["checksum"]))
            if checksum != body["checksum"]:
                self.ledger.counts["checksums_differ"] += 1
                self.ledger.news.append(
                    f"v{body['version']} is not the same in vLLM on {node} as on {other}: "
                    f"checksums {body['checksum'][:16]} and {checksum[:16]}"
                )
        alive = [
            n["version"]
            for n in self.nodes.values()
            if time.monotonic() - n["last_seen_s"] < self.node_timeout_s
        ]
        if body["version"] == self.published and min(alive) == self.published:
            self.ledger.news.append(
                f"v{self.published} landed on {len(alive)}/{len(alive)} engines, digest ok"
            )
        self._notify()
        return web.json_response({"newest": self.published})

    async def _latest(self, request: web.Request) -> web.Response:
        try:
            after = int(request.query.get("after", -1))
        except ValueError:
            raise Refused(400, f"after={request.query['after']!r} is not a version") from None
        newer = await self._wait_for(
            lambda: self.manifest if self.published > after else None, LONG_POLL_S
        )
        if (
            newer
            and (node := request.query.get("node", "")[:200])
            and len(self.fetching) < MAX_NODES
        ):
            self.fetching[node] = (
                min(after + 1, self.whole) if after >= 0 else self.whole,
                time.monotonic(),
            )
        # The digest beside it, since all other digests are in it.
        return web.Response(
            body=newer or b"{}",
            content_type="application/json",
            headers={"X-Blake3": digest(newer or b"{}")},
        )

    async def _file(self, request: web.Request) -> web.StreamResponse:
        path = served_file(self.weights_dir, **request.match_info)
        if path is None or int(request.match_info["version"]) > self.published:
            raise Refused(
                404, f"{request.path}: never published, pruned, or of another trainer node"
            )
        return web.FileResponse(path)  # sendfile; range requests included

    async def _get_status(self, request: web.Request) -> web.Response:
        return web.json_response(self.status())

    async def _get_metrics(self, request: web.Request) -> web.Response:
        text = prometheus_text(self.status(), self.record)
        return web.Response(
            body=text.encode(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def _get_run(self, request: web.Request) -> web.Response:
        return web.json_response(self.run)


def _numbers(given: dict, names) -> dict[str, float]:
    """The finite numbers of these names; whatever else a node says is not kept."""
    return {
        n: given[n] for n in names if type(given.get(n)) in (int, float) and math.isfinite(given[n])
    }
