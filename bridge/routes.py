"""The hub's requests: prompts out, groups in, weights out. One port, HTTP, JSON or safetensors.

    POST /lease           {"node", "max"}: prompts to answer; waits while there is none
    POST /groups          a safetensors blob: all samples of one prompt (see groups.parse_group)
    POST /return          {"node", "lease", "why"}: a prompt that the node could not answer
    POST /beat            {"node", "leases", "vllm"}: the node lives, holds these leases, and its
                          vLLM is this busy
    GET  /weights/latest  ?after=N&node=NAME: the manifest of a newer version; waits for one
    GET  /weights/N/FILE  a file of version N that is on this node's disk; the manifest says which
                          other trainer nodes have the others
    POST /receipts        {"node", "version", "digest", "timing"}: the weights that a node now
                          samples from; with "checksum" what vLLM has made of them; with "refused"
                          why it takes no newer ones, and "mine" if that is the node's own fault;
                          with "ends" why it ends, where starting it again would not help
    GET  /status, /run    the ledger and counters; what a rollout node must know of the run
    GET  /metrics         the last step's metrics, as Prometheus reads them

Every request carries `Authorization: Bearer TOKEN`, and a node's `X-Run: ID` too. The id is made at
each start of the trainer, so that nothing that was sampled before a restart gets into the run after
it (412). All of this runs in the event loop of the hub's thread, see hub.py.
"""

import asyncio
import json
import math
import time

from aiohttp import web

from bridge.files import has_token, served_file
from bridge.groups import GROUP_NUMBERS, Group, Refused, check_group, parse_group
from bridge.ledger import Lease
from bridge.prometheus import prometheus_text
from bridge.waits import Wait
from bridge.weights import digest

LONG_POLL_S = 20.0  # how long a request may wait for news; the client asks again
MAX_NODES = 4096  # that are remembered at once
# Samples without a reward, by kind. "away": calls that were made again, for want of an answer.
FAILED_REWARDS = ("raised", "timed_out", "exited", "not_finite", "wrong_type", "endless", "away")
# Of a beat: seconds since the one before, the same times vLLM's GPUs, seconds in which vLLM was
# idle, tokens made.
LOAD = ("over_s", "gpu_s", "idle_s", "made")
VITALS = ("running", "waiting", "kv", "limit", "preemptions", *LOAD)
TIMING_PARTS = ("fetch_s", "patch_s", "verify_s", "pause_s", "load_s", "stopped_s", "total_s")
TIMING_PARTS += ("fetch_bytes",)


def application(hub) -> web.Application:
    """The hub's routes. A body may be as large as the largest group of the run."""
    most_samples = max(hub.run["num_generations"], hub.validation.num_samples)
    most_tokens = most_samples * hub.run["max_new_tokens"]
    group_bytes = most_tokens * 12 + most_samples * 16
    if hub.experts:
        group_bytes += (most_tokens + hub.run["max_model_len"]) * hub.experts.bytes_per_token
    routes = Routes(hub)
    app = web.Application(client_max_size=group_bytes + (1 << 20), middlewares=[routes.authorize])
    app.add_routes(
        [
            web.post("/lease", routes.lease),
            web.post("/groups", routes.groups),
            web.post("/receipts", routes.receipts),
            web.post("/return", routes.give_back),
            web.post("/beat", routes.beat),
            web.get("/weights/latest", routes.latest),
            web.get("/weights/{version:\\d{1,9}}/{name}", routes.file),
            web.get("/status", routes.status),
            web.get("/run", routes.run),
            web.get("/metrics", routes.metrics),
        ]
    )
    return app


async def read(request: web.Request, silence_s: float) -> bytearray:
    """A body, in one piece of memory from the start: `request.read` lets it grow, and copies it at
    the end. Raises: TimeoutError when nothing of it has come for silence_s seconds, and
    HTTPRequestEntityTooLarge."""
    size, end = request.content_length, 0
    if size is None or "Content-Encoding" in request.headers:  # not what a node sends
        return bytearray(await request.read())
    if size > request.client_max_size:
        raise web.HTTPRequestEntityTooLarge(request.client_max_size, size)
    body = bytearray(size)
    while True:
        async with asyncio.timeout(silence_s):
            chunk, _ = await request.content.readchunk()
        if not chunk:
            return body
        body[end : end + len(chunk)] = chunk
        end += len(chunk)


class Routes:
    """A method for each route; what it changes is the hub's."""

    def __init__(self, hub):
        self.hub = hub

    # -- every request
    @web.middleware
    async def authorize(self, request: web.Request, handler):
        counts, run_id = self.hub.ledger.counts, self.hub.run["id"]
        if not has_token(request, self.hub.token):
            return web.json_response({"error": "missing or wrong bearer token"}, status=401)
        if request.headers.get("X-Run", run_id) != run_id and request.path != "/run":
            return web.json_response({"error": "this is another run: ask /run again"}, status=412)
        try:
            return await handler(request)
        except Refused as e:
            counts[f"refused_{e.status}"] += 1
            return web.json_response({"error": e.reason}, status=e.status)
        except web.HTTPRequestEntityTooLarge:
            counts["refused_413"] += 1
            why = "body is larger than any group of this run"
            return web.json_response({"error": why}, status=413)

    async def _body(self, request: web.Request) -> bytearray:
        whom = f"the body of {request.path} from {request.remote}"
        wait = Wait("body", self.hub.body_timeout_s, whom=whom)
        try:
            return await asyncio.wait_for(
                read(request, self.hub.silent_body_timeout_s), wait.deadline_s
            )
        except TimeoutError:
            silence = f"the last {self.hub.silent_body_timeout_s:g} s without a byte"
            raise Refused(408, wait.message("" if wait.over else silence)) from None

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
        if body["node"] in self.hub.nodes:
            self.hub.nodes[body["node"]].last_seen_s = time.monotonic()
        return body

    # -- prompts out
    async def lease(self, request: web.Request) -> web.Response:
        hub, body = self.hub, await self._json(request, node=str, max=int)
        node, wanted = body["node"], body["max"]
        if node not in hub.nodes or not 1 <= wanted <= 4096:
            raise Refused(
                422, f"max is {wanted}, or node {node!r} has not sent a receipt of its weights yet"
            )
        leases = await hub.wait_for(lambda: hub.grant(node, wanted), LONG_POLL_S) or []
        if hub.over:
            hub.told.add(node)
            hub.notify()
            raise Refused(410, "the run is over")
        described = [text for lease in leases if (text := self._describe(lease))]
        if len(described) < len(leases):
            hub.notify()
        text = f'{{"leases": [{", ".join(described)}]}}'
        return web.Response(text=text, content_type="application/json")

    def _describe(self, lease: Lease) -> str:
        """A lease as JSON. One that cannot be sent is given back as failed: nobody would answer
        it."""
        try:
            example = self.hub.example_of(lease)
            return json.dumps(
                {
                    "lease": lease.id,
                    "deadline_s": lease.deadline - time.monotonic(),
                    "example": example,
                    "prompt_ids": self.hub.encode(example),
                    "validates": lease.validates,
                }
            )
        except (TypeError, ValueError, KeyError) as e:
            books, _ = self.hub.books_of(lease.id)
            books.give_back(lease.id, "leases_returned", failure=f"cannot be sent: {e!r:.300}")
            return ""

    async def give_back(self, request: web.Request) -> web.Response:
        body = await self._json(request, node=str, lease=str, why=str)
        books, lease = self.hub.books_of(body["lease"])
        if lease is None or lease.node != body["node"]:
            raise Refused(409, f"lease {body['lease'][:50]!r} is not held by {body['node'][:50]!r}")
        failure, by_reward = f"{body['why'][:300]} ({lease.node})", body.get("by_reward") is True
        books.give_back(lease.id, "leases_returned", failure=failure, by_reward=by_reward)
        self.hub.notify()
        return web.json_response({"returned": lease.id})

    async def beat(self, request: web.Request) -> web.Response:
        hub, body = self.hub, await self._json(request, node=str, leases=list, vllm=dict)
        name, held = body["node"], {x for x in body["leases"] if isinstance(x, str)}
        if name not in hub.nodes:
            raise Refused(422, f"node {name[:50]!r} has not sent a receipt of its weights yet")
        node = hub.nodes[name]
        if request.transport is not None:
            node.beat = request.transport
        node.vllm = _numbers(body["vllm"], VITALS)
        hub.load.update({part: node.vllm.get(part, 0.0) for part in LOAD})
        for kind, count in _numbers(body.get("failed_rewards", {}), FAILED_REWARDS).items():
            hub.ledger.counts[f"reward_{kind}"] += count
        known = hub.held_by(name)
        for books, lease in known:
            # An answer to /lease that never arrived; one that is young may be on its way still.
            if lease.id not in held and lease.granted < time.monotonic() - 10.0:
                books.give_back(lease.id, "leases_not_held")
        hub.notify()
        return web.json_response({"drop": sorted(held - {lease.id for _, lease in known})})

    # -- groups in
    async def groups(self, request: web.Request) -> web.Response:
        hub = self.hub
        async with hub.reading:
            metadata, tensors = parse_group(await self._body(request))
        given = metadata.get("lease")
        books, lease = hub.books_of(given or "")
        if lease is None:
            raise Refused(409, f"unknown lease {given!r}: never granted, expired, or already used")
        trains = books is hub.ledger
        # A training sample needs a sibling to be compared with.
        fewest, most = (
            (2, hub.run["num_generations"]) if trains else (1, hub.validation.num_samples)
        )
        prompt_ids = hub.encode(hub.example_of(lease))
        inserted = len(hub.run.get("interrupt_ids", ()))
        check_group(
            tensors,
            (fewest, most),
            hub.run["max_new_tokens"],
            hub.vocab_size,
            (lease.version, hub.version),
            hub.run["max_new_tokens"] if hub.run.get("plays") else inserted,
            len(prompt_ids),
            hub.experts if trains else None,
        )
        books.accept(lease.id, Group(lease.ordinal, prompt_ids, **tensors))
        books.counts["samples_dropped"] += most - len(tensors["lengths"])
        if trains:
            hub.group_numbers.append({name: metadata[name] for name in GROUP_NUMBERS})
            if lease.node in hub.nodes:
                hub.nodes[lease.node].groups += 1
        hub.notify()
        return web.json_response({"accepted": lease.id})

    # -- weights out
    async def latest(self, request: web.Request) -> web.Response:
        hub, given = self.hub, request.query.get("after", -1)
        try:
            after = int(given)
        except ValueError:
            raise Refused(400, f"after={given!r} is not a version") from None
        newer = await hub.wait_for(
            lambda: hub.manifest if hub.published > after else None, LONG_POLL_S
        )
        node = request.query.get("node", "")[:200]
        if newer and node and len(hub.fetching) < MAX_NODES:
            oldest = min(after + 1, hub.whole) if after >= 0 else hub.whole
            hub.fetching[node] = (oldest, time.monotonic())
        text = newer or b"{}"
        # The manifest's own digest beside it, since all other digests are in it.
        headers = {"X-Blake3": digest(text)}
        return web.Response(body=text, content_type="application/json", headers=headers)

    async def file(self, request: web.Request) -> web.StreamResponse:
        path = served_file(self.hub.weights_dir, **request.match_info)
        if path is None or int(request.match_info["version"]) > self.hub.published:
            raise Refused(
                404, f"{request.path}: never published, pruned, or of another trainer node"
            )
        return web.FileResponse(path)  # sendfile; range requests included

    async def receipts(self, request: web.Request) -> web.Response:
        hub = self.hub
        body = await self._json(request, node=str, version=int, digest=str, timing=dict)
        if isinstance(why := body.get("ends"), str):
            self._node_ends(body["node"], why[:500])
        elif isinstance(why := body.get("refused"), str):
            hub.fetching.pop(body["node"], None)
            hub.refused = hub.refused if body.get("mine") else hub.published
            hub.ledger.counts["updates_refused"] += 1
            hub.ledger.news.append(f"{body['node'][:200]} stays on v{body['version']}: {why[:500]}")
        else:
            self._weights_landed(body)
            hub.notify()
        return web.json_response({"newest": hub.published})

    def _node_ends(self, name: str, why: str) -> None:
        """A node ends that another start of it would not mend. If it was the last, so does the
        run."""
        hub = self.hub
        hub.ledger.news.append(f"{name[:200]} ends: {why}")
        if name in hub.nodes and not hub.alive(but=name):
            hub.fail(f"the last rollout node, {name}, ends: {why}")

    def _weights_landed(self, body: dict) -> None:
        """A node samples from a version now."""
        hub, name, version = self.hub, body["node"], body["version"]
        if not 0 <= version <= hub.published:
            raise Refused(
                422, f"version {version} was never published: the newest is {hub.published}"
            )
        known = hub.digests.get(version)  # one that was published again has several
        if len(body["digest"]) != 64 or (known and body["digest"] not in known):
            raise Refused(409, f"digest of version {version} differs from the published one")
        if len(name) > 200 or (name not in hub.nodes and len(hub.nodes) >= MAX_NODES):
            raise Refused(
                422, f"node's name is longer than 200, or there are {MAX_NODES} nodes already"
            )
        node = hub.node(name)
        node.version, node.digest = version, body["digest"]
        node.timing = _numbers(body["timing"], TIMING_PARTS)
        hub.reloads.append(node.timing)
        hub.fetching.pop(name, None)
        if isinstance(body.get("checksum"), str):
            self._compare_checksums(version, name, str(body.get("engine", "")), body["checksum"])
        alive = hub.alive()
        if version == hub.published and min(node.version for node in alive) == version:
            hub.ledger.news.append(
                f"v{version} landed on {len(alive)}/{len(alive)} engines, digest ok"
            )

    def _compare_checksums(self, version: int, node: str, engine: str, checksum: str) -> None:
        """How vLLM lays the weights out depends on its parallelism, its flags and the hardware;
        engines of one kind must agree."""
        key = (version, engine[:1000])
        first, said = self.hub.checksums.setdefault(key, (node, checksum))
        if checksum != said:
            self.hub.ledger.counts["checksums_differ"] += 1
            self.hub.ledger.news.append(
                f"v{version} is not the same in vLLM on {node} as on {first}: "
                f"checksums {checksum[:16]} and {said[:16]}"
            )

    # -- to look at
    async def status(self, request: web.Request) -> web.Response:
        return web.json_response(self.hub.status())

    async def run(self, request: web.Request) -> web.Response:
        return web.json_response(self.hub.run)

    async def metrics(self, request: web.Request) -> web.Response:
        text = prometheus_text(self.hub.status(), self.hub.record)
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=text.encode(), headers=headers)


def _numbers(given: dict, names) -> dict[str, float]:
    """The finite numbers of these names; whatever else a node says is not kept."""
    return {
        n: given[n] for n in names if type(given.get(n)) in (int, float) and math.isfinite(given[n])
    }
