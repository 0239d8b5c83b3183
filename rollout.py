"""A rollout node: answers the trainer's prompts with vLLM, and keeps vLLM on the trainer's newest
weights.

    CISPO_TOKEN=... python rollout.py http://trainer:port

For every prompt: lease -> make its samples (bridge/sample.py) -> score -> push. Beside that, one
task follows the weights: fetch and verify while vLLM keeps generating, then pause -> load ->
resume. Requests in flight go on with the new weights, and vLLM says of every token which version
sampled it.

The node keeps nothing that matters. It only ever calls the hub, so it needs no open port, no data
set and no shared disk. It may be killed at any time: what it held is leased again. Its vLLM listens
on the loopback address alone, and is started again, on the current weights, whenever it dies.
"""

import asyncio
import contextlib
import json
import math
import os
import secrets
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import aiohttp

from bridge import receive, weights
from bridge.client import HubRefusal, RunChanged, RunOver, ask, check_url
from bridge.episodes import Players
from bridge.flags import parse_flags
from bridge.groups import pack_group
from bridge.processes import log, node_name, own_directory, why_no_gpu
from bridge.reward_pool import Away, RewardsEnd
from bridge.reward_process import reward_digest
from bridge.sample import Damaged, Sample, experts_of, interrupted, what_was_wrong
from bridge.vllm import NO_ANSWER, VLLM, VLLMUnfit
from bridge.waits import Wait, WaitOver, backoff_s
from config import RolloutConfig
from task import Codec


def next_limit(limit: int, most: int, in_flight: int, vitals: dict, preempted: bool) -> int:
    """Prompts that may be in flight, by what vLLM says of itself: up by a quarter while there is
    room and all are used; when its KV cache is full, down to three quarters of those in flight, and
    no lower until some have ended: an answer takes minutes, and a look comes each second. A
    preempted request is computed again from its start, so a full cache costs more than an idle
    place; a queue that stands means that more prompts would only stand in it."""
    if preempted or vitals["kv"] > 0.9:
        return min(limit, max(1, in_flight * 3 // 4))
    if in_flight >= limit and vitals["kv"] < 0.7 and not vitals["waiting"]:
        return min(most, limit + max(1, limit // 4))
    return limit


class NotGenerated(Exception):
    """vLLM has given no answer, as often as it was asked."""


async def all_of(coroutines) -> list:
    """Their results. When one raises, the others are cancelled and seen to end."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


# ---- the node ------------------------------------------------------------------------------------
class Node:
    """The tasks of a rollout node around one vLLM."""

    def __init__(self, cfg: RolloutConfig, hub: aiohttp.ClientSession):
        self.cfg, self.hub = cfg, hub
        self.name = node_name(
            os.getpid(), os.environ.get("CISPO_NODE_MARK") or secrets.token_hex(4)
        )
        self.root = own_directory(cfg)
        self.vllm = self.players = self.val_players = None
        self.run: dict = {}
        self.ready = asyncio.Event()  # vLLM is up on the weights of self.version, and the hub knows
        self.engine = asyncio.Lock()  # held by whoever starts vLLM or loads weights into it
        self.joined = asyncio.Event()  # the hub has a receipt, and takes the node's beats
        self.version, self.checkpoint, self.loading = -1, None, False
        self.held: dict[str, asyncio.Task] = {}  # leases, and who answers them
        self.limit, self.vitals = min(32, cfg.max_groups), {}
        self.in_vllm = 0  # samples
        # At most so many preemptions are still to be told of that were a weight update's, which say
        # nothing of the cache: vLLM counts one with the sample's next token.
        self.excused = 0
        # aiohttp keeps as many connections as were ever needed at once: few of each node are enough
        # for the hub.
        self.pushing = asyncio.Semaphore(4)
        self.idle_s, self.idle_from = 0.0, time.monotonic()  # how long vLLM had nothing to do
        self.ends = ""  # why, where another start would end the same way

    async def ask(self, method: str, route: str, **kwargs) -> bytes:
        return await ask(self.hub, method, route, self.cfg.hub_timeout_s, **kwargs)

    def serve(self, run: dict) -> None:
        """What a run needs here, not started yet: a vLLM, and the processes of its rewards."""
        self.vllm = VLLM(self.cfg, run, self.root / "vllm.log")
        self.players = self.val_players = Players.of(run["reward"], self.cfg)
        if run.get("val_reward"):
            self.val_players = Players.of(run["val_reward"], self.cfg)

    @property
    def judges(self) -> set[Players]:
        return {self.players, self.val_players}

    async def join(self) -> None:
        """Ask the hub what the run is. A vLLM that fits it is kept, its weights are not trusted."""
        self.hub.headers.pop("X-Run", None)
        try:
            run = dict(json.loads(await self.ask("GET", "/run")))
        except ValueError:
            raise RuntimeError(f"{self.cfg.hub} answers, but is no hub") from None
        try:
            for flag in ("reward", "val_reward"):
                if flag in run and reward_digest(run[flag]) != run[f"{flag}_digest"]:
                    raise ValueError(f"--reward {run[flag]!r}: the file differs from the trainer's")
        except ValueError as e:
            raise RuntimeError(f"{e}; copy it to {self.name} from where the trainer runs") from None
        fits = {**self.run, "id": ""} == {**run, "id": ""}
        if self.vllm is not None and (self.loading or not fits):
            await self.vllm.stop(kill=self.loading)
        if not fits:
            await self.close()
            self.serve(run)
        self.run = self.vllm.run = run
        self.hub.headers["X-Run"] = run["id"]
        # an answer that met the change would raise it for ever
        self.version, self.loading, self.held = -1, False, {}
        self.ready.clear()
        self.joined.clear()

    async def close(self) -> None:
        if self.vllm is not None:
            await self.vllm.stop()
            for players in self.judges:
                await players.workers.close()

    async def follow_weights(self) -> None:
        """Fetch every newer version as it is published, and load it. One that cannot be had whole
        and proven is refused: vLLM keeps what it has, the hub is told why, and the next attempt
        trusts nothing that is here."""
        refused = 0
        while True:
            body = await self.ask("GET", f"/weights/latest?after={self.version}&node={self.name}")
            if not (manifest := json.loads(body)):
                continue
            try:
                receive.check_manifest(manifest, self.run["id"], self.version)
                have, headers, start = (
                    self.checkpoint if refused == 0 else None,
                    self.hub.headers,
                    time.perf_counter(),
                )
                checkpoint, timing = await receive.fetch(
                    manifest, self.root, have, self.cfg.hub, dict(headers)
                )
            except (weights.WeightsError, WaitOver, OSError) as e:
                if self.version < 0 and isinstance(e, receive.NoRoom):
                    raise RuntimeError(str(e)) from None  # it will not get better
                mine = isinstance(e, receive.NoRoom | WaitOver | OSError)
                await self.refuse(f"v{manifest.get('version')} refused: {e}", mine)
                refused += 1
                await asyncio.sleep(backoff_s(refused))
                continue
            refused = 0
            await self.update(manifest, weights.digest(body), checkpoint, timing, start)

    async def refuse(self, why: str, mine: bool) -> None:
        """mine: the files may be whole; it is this node or its link that cannot take them."""
        log(f"weights {why}; still on v{self.version}")
        word = {
            "node": self.name,
            "version": self.version,
            "digest": "",
            "timing": {},
            "refused": why,
            "mine": mine,
        }
        await self.ask("POST", "/receipts", json=word)

    async def update(
        self, manifest: dict, digest: str, checkpoint: Path, timing: dict, start: float
    ) -> None:
        """Load a proven version into vLLM, and send the receipt."""
        # the first has a new vLLM
        version, compared = manifest["version"], self.version < 0 or manifest["compare"]
        async with self.engine:
            previous, self.checkpoint = self.checkpoint, checkpoint
            # a request sent now would run on the new weights with the old ones' cache salt
            self.ready.clear()
            self.loading = True
            if self.vllm.process is None:
                sums = await self._start(version)
            else:
                try:
                    self.excused = self.in_vllm * self.run.get("recompute_kv_cache", True)
                    timing |= await self.vllm.load(checkpoint, version)
                    sums = await self.vllm.checksums() if compared else {}
                    self.version = version
                except (RuntimeError, *NO_ANSWER) as e:
                    # A load that broke off leaves the model in an unknown state: only a fresh start
                    # is safe.
                    log(f"loading v{version} failed, vLLM is started again: {e!r}")
                    sums = await self._start(version, kill=True)
            self.loading = False
        if previous is not None and previous != checkpoint:
            shutil.rmtree(previous, ignore_errors=True)
        timing["total_s"] = time.perf_counter() - start
        receipt = {"node": self.name, "version": version, "digest": digest, "timing": timing}
        if compared:
            sums = json.dumps(sums, sort_keys=True)
            receipt |= {"checksum": weights.digest(sums.encode()), "engine": self.vllm.engine()}
        await self.ask("POST", "/receipts", json=receipt)
        self.joined.set()
        self.ready.set()  # after the receipt, since the hub leases by the version it names

    async def _start(self, version: int, kill: bool = False) -> dict[str, str]:
        """Start vLLM on self.checkpoint, and prove that the reload path is sound before anything
        depends on it: reloading the very weights that it just loaded by itself must leave every
        runtime tensor as it is. Returns the tensors' checksums. Raises: RuntimeError when it does
        not come up three times in a row, or when the proof fails."""
        for attempt in range(3):
            try:
                await self.vllm.stop(kill=kill)
                await self.vllm.start(self.checkpoint)
                fresh = await self.vllm.checksums()
                # also gives the weights their version label
                await self.vllm.load(self.checkpoint, version)
                reloaded = await self.vllm.checksums()
                break
            except (RuntimeError, *NO_ANSWER) as e:
                if attempt == 2:
                    raise RuntimeError(
                        f"vLLM did not start {attempt + 1} times in a row: {e}"
                    ) from e
                log(f"vLLM did not start, trying again: {e}")
                await asyncio.sleep(backoff_s(attempt + 2))
        if changed := [name for name in fresh if fresh[name] != reloaded.get(name)]:
            raise RuntimeError(
                f"reloading the same weights changed {len(changed)} tensors in vLLM: {changed[:3]}"
            )
        log(f"reloading v{version} onto itself leaves all {len(fresh)} tensors equal")
        self.version = version
        return fresh

    async def watch_vllm(self) -> None:
        """Once a second: is it alive, do tokens move, and how many prompts does it bear? A hang is
        a vLLM that says it is well while requests are in flight and no token moves; it is ended
        like a dead one and started again."""
        stall, last, version = Wait("vllm progress", self.cfg.stall_timeout_s), None, self.version
        while True:
            await asyncio.sleep(1.0)  # polling another process
            if not self.ready.is_set():
                await self.ready.wait()
                stall = Wait("vllm progress", self.cfg.stall_timeout_s)
            why = ""
            try:
                found = await self.vllm.vitals()
            except RuntimeError as e:
                found, why = None, str(e)
            if self.engine.locked() or not self.ready.is_set():
                stall = Wait("vllm progress", self.cfg.stall_timeout_s)
                # a weight update, with a deadline of its own, which also starts what has died
                continue
            if found:
                moved = (found["tokens"], found["prompt_tokens"])
                if moved != last or not self.in_vllm:
                    stall = Wait("vllm progress", self.cfg.stall_timeout_s)
                told = found["preemptions"] - self.vitals.get("preemptions", math.inf)
                # With an update since the last look all are excused: there may have been several.
                preempted = version == self.version and told > self.excused
                self.limit = next_limit(
                    self.limit, self.cfg.max_groups, len(self.held), found, preempted
                )
                if version == self.version:
                    self.excused -= min(max(0, told), self.excused)
                last, version, self.vitals = moved, self.version, found
            if not why and not stall.over:
                continue
            async with self.engine:
                log(
                    f"{why or stall.message(f'{self.in_vllm} samples in flight')}; starting it "
                    f"on v{self.version}"
                )
                self.ready.clear()
                self.loading = True
                await self._start(self.version, kill=True)
                self.loading = False
                stall, last, self.vitals = Wait("vllm progress", self.cfg.stall_timeout_s), None, {}
                self.ready.set()

    def in_flight(self, change: int) -> None:
        """So many samples go to vLLM or come back. While there is none, it has nothing to do."""
        now = time.monotonic()
        self.idle_s += 0.0 if self.in_vllm else now - self.idle_from
        self.in_vllm, self.idle_from = self.in_vllm + change, now

    async def beat(self) -> None:
        """A sign of life, with what this node holds: the hub leases the rest again, and says what
        is void here."""
        last, last_idle_s, tokens = time.monotonic(), self.idle_s, 0.0
        while True:
            await self.joined.wait()
            self.in_flight(0)
            now, made = time.monotonic(), self.vitals.get("tokens", 0.0)
            passed = max(1e-3, now - last)
            load = {
                "over_s": passed,
                "gpu_s": passed * self.vllm.gpus,
                "idle_s": self.idle_s - last_idle_s,
                "made": max(0.0, made - tokens),
            }
            last, last_idle_s, tokens = now, self.idle_s, made
            vitals = {n: self.vitals.get(n, 0) for n in ("running", "waiting", "kv", "preemptions")}
            held = [name for name, task in self.held.items() if not task.done()]
            body = {
                "node": self.name,
                "leases": held,
                "vllm": {**vitals, "limit": self.limit, **load},
            }
            body["failed_rewards"] = sum((p.workers.failed for p in self.judges), Counter())
            for players in self.judges:
                players.workers.failed = Counter()
            for lease in json.loads(await self.ask("POST", "/beat", json=body))["drop"]:
                if (task := self.held.get(lease)) and not task.done():
                    log(f"lease {lease} is no longer ours")
                    task.cancel()
            await asyncio.sleep(self.cfg.beat_s)

    async def answer(self, lease: dict) -> None:
        """`try_to_answer`, until the lease ends: the hub will have handed the prompt out again by
        then."""
        wait = Wait(
            "generation", lease["deadline_s"], whom=f"vLLM's answer to lease {lease['lease']}"
        )
        try:
            async with asyncio.timeout(lease["deadline_s"]):
                await self.try_to_answer(lease)
        except TimeoutError:
            log(wait.message())

    async def try_to_answer(self, lease: dict) -> None:
        """One prompt, from lease to push, or back to the hub. Where damage leaves too few samples
        all are made again, max_tries times."""
        name, why = lease["lease"], ""
        # A sample that is trained on needs a sibling to be compared with.
        trains = lease["validates"] is None
        kind, fewest = ("sampling", 2) if trains else ("val_sampling", 1)
        for attempt in range(self.cfg.max_tries):
            if attempt:
                log(f"lease {name}: {why}; trying again")
                await asyncio.sleep(backoff_s(attempt))
            request, room = self.requests_of(lease), self.run["max_model_len"]
            most = min(self.run["max_new_tokens"], room - len(lease["prompt_ids"]))
            how = (self.run[kind], most, request, trains and bool(self.run.get("experts")))
            samples = [Sample(lease["prompt_ids"], *how) for _ in range(self.run[kind]["n"])]
            try:
                scores, prompt_experts = await all_of(
                    [self.scores_of(samples, lease), self.prompt_experts(lease, request)]
                )
            except NotGenerated as e:
                why = str(e)
                break
            except Damaged as e:
                why = str(e)
                continue
            if why := what_was_wrong(scores, lease["example"]):
                log(f"lease {name}: {why}")
            scored = [(s, score) for s, score in zip(samples, scores) if isinstance(score, float)]
            failed = sum(isinstance(x, str) and not isinstance(x, Away) for x in scores)
            # here another try would cost as much, and most likely end alike
            if len(scored) < fewest and failed:
                by_reward = failed == sum(not isinstance(x, Damaged) for x in scores)
                return await self.give_back(name, why, self.cfg.hub_timeout_s, by_reward)
            if len(scored) < fewest:
                continue
            try:
                async with self.pushing:
                    await self.ask(
                        "POST", "/groups", data=pack_group(*zip(*scored), name, prompt_experts)
                    )
                return
            except HubRefusal as e:
                log(f"lease {name}: {e}")
                # expired, or it came through in an earlier attempt; the hub has counted it
                if e.status == 409:
                    return
                why = str(e)
        await self.give_back(
            name, f"{self.cfg.max_tries} tries, the last: {why}", self.cfg.hub_timeout_s
        )

    def requests_of(self, lease: dict):
        """How the samples of a prompt ask vLLM. Those that ask for the same at the same time share
        a request, which costs half of what a request each does where samples are short."""
        waiting: dict[tuple, list[asyncio.Future]] = {}

        async def request(context: list[int], sampling: dict) -> dict:
            mine, key = asyncio.get_running_loop().create_future(), (tuple(context), str(sampling))
            waiting.setdefault(key, []).append(mine)
            await asyncio.sleep(0)  # the others may ask, too; who goes on first asks for all
            if asking := waiting.pop(key, None):
                for_all = {**sampling, "n": len(asking)}
                choices = await self.generate(context, for_all, lease["lease"])
                for place, choice in zip(asking, choices + [{}] * len(asking)):
                    place.done() or place.set_result(choice)
            return await mine

        return request

    async def prompt_experts(self, lease: dict, request):
        """For router replay, vLLM's experts of the prompt's tokens but the last, (P - 1, L, K): one
        token is sampled for them. Raises: Damaged."""
        if not self.run.get("experts") or lease["validates"] is not None:
            return None
        asked = {**self.run["sampling"], "max_tokens": 1, "routed_experts_prompt_start": 0}
        choice = await request(lease["prompt_ids"], asked)
        return experts_of(choice, len(lease["prompt_ids"]))[:-1]

    async def generate(self, context: list[int], sampling: dict, lease: str) -> list[dict]:
        """vLLM's choices. A request that fails is made again, max_tries times in all: it may be
        this prompt that kills it. Raises: NotGenerated."""
        for attempt in range(1, self.cfg.max_tries + 1):
            await self.ready.wait()
            self.in_flight(+sampling["n"])
            try:
                return await self.vllm.generate(context, sampling, self.version)
            except (*NO_ANSWER, RuntimeError) as e:
                why = f"generation failed: {e!r}"[:300]
            finally:
                self.in_flight(-sampling["n"])
            if attempt < self.cfg.max_tries:
                log(f"lease {lease}: {why}; trying again")
                await asyncio.sleep(backoff_s(attempt))
        raise NotGenerated(why)

    async def scores_of(self, samples: list[Sample], lease: dict) -> list:
        """Make the samples of a prompt. Returns, of each, its reward, or why it has none: Damaged,
        Away, or another str. A sample is scored when it ends; a function that judges all of them
        waits for the last."""
        ended, scores, left = [], {}, len(samples)
        players = self.players if lease["validates"] is None else self.val_players
        workers, example = players.workers, lease["example"]
        interruption = self.run.get("interrupt_at", 0), self.run.get("interrupt_ids", [])

        async def make(sample: Sample) -> None:
            nonlocal left
            ask = interrupted(sample, *interruption, self.codec.decode)
            try:
                if workers.takes == "sample":
                    scores[sample] = await players.play(sample, ask, example)
                    return
                sample.turns = 1
                await ask()
                ended.append(sample)
            except Damaged as e:
                scores[sample] = e
            finally:
                left -= 1
            await asyncio.sleep(0)  # those that end together are scored together
            if not ended or (left and workers.takes == "completions"):
                return
            scoring, ended[:] = ended[:], []
            texts = [self.codec.decode(s.token_ids) for s in scoring]
            scores.update(zip(scoring, await workers.score(texts, example)))

        await all_of(make(sample) for sample in samples)
        return [scores[sample] for sample in samples]

    async def give_back(
        self, lease: str, why: str, patience_s: float, by_reward: bool = False
    ) -> None:
        try:
            body = {"node": self.name, "lease": lease, "why": why, "by_reward": by_reward}
            await ask(self.hub, "POST", "/return", patience_s, json=body)
        except HubRefusal as e:
            log(f"lease {lease}: {e}")  # expired meanwhile

    async def answer_prompts(self) -> None:
        await asyncio.gather(*(p.workers.start() for p in self.judges), self.ready.wait())
        self.codec = Codec(self.checkpoint, kwargs=self.run.get("chat_template_kwargs"))
        for players in self.judges:
            players.codec = self.codec
        if any(players.workers.takes == "sample" for players in self.judges):
            await asyncio.to_thread(self.codec.warm_up)
        try:
            while True:
                if len(self.held) >= self.limit:  # the second is for when the limit has grown
                    await asyncio.wait(
                        self.held.values(), timeout=1.0, return_when=asyncio.FIRST_COMPLETED
                    )
                for task in [
                    task for task in self.held.values() if task.done() and not task.cancelled()
                ]:
                    task.result()  # raises what it raised
                self.held = {lease: task for lease, task in self.held.items() if not task.done()}
                if len(self.held) >= self.limit:
                    continue
                wanted = {"node": self.name, "max": self.limit - len(self.held)}
                for lease in json.loads(await self.ask("POST", "/lease", json=wanted))["leases"]:
                    self.held[lease["lease"]] = asyncio.create_task(self.answer(lease))
        finally:
            while left := [task for task in self.held.values() if not task.done()]:
                for task in left:
                    task.cancel()
                # or they would go on beside whoever closes the node
                await asyncio.wait(left, timeout=1.0)

    async def leave(self) -> None:
        """Give back what is held, without a word against the prompts: the node ends, or has failed
        by itself."""
        if self.ends:
            word = {
                "node": self.name,
                "version": self.version,
                "digest": "",
                "timing": {},
                "ends": self.ends,
            }
            await ask(self.hub, "POST", "/receipts", 1.0, json=word)
        for lease, task in self.held.items():
            if task.cancelled() or not task.done():
                await self.give_back(lease, "", patience_s=1.0)


async def main(cfg: RolloutConfig) -> None:
    token = os.environ.get("CISPO_TOKEN", "")
    headers, timeout = (
        {"Authorization": f"Bearer {token}"},
        aiohttp.ClientTimeout(total=None, sock_read=120),
    )
    async with aiohttp.ClientSession(cfg.hub, headers=headers, timeout=timeout) as hub:
        node = Node(cfg, hub)
        loop = asyncio.get_running_loop()
        me = asyncio.current_task()
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # by nohup
        for sig in (signal.SIGTERM, signal.SIGINT, *(() if ignored else (signal.SIGHUP,))):
            # once: the next, a launcher's say, must not break off the ending
            loop.add_signal_handler(sig, lambda: me.cancelling() or me.cancel())
        try:
            while True:
                await node.join()
                try:
                    async with asyncio.TaskGroup() as tasks:
                        for work in (
                            node.follow_weights,
                            node.watch_vllm,
                            node.answer_prompts,
                            node.beat,
                        ):
                            tasks.create_task(work())
                except* RunChanged:
                    log("the trainer was started again: what was in flight is dropped")
                except* (VLLMUnfit, RewardsEnd) as failed:
                    node.ends = str(failed.exceptions[0])
                    raise
        finally:
            with contextlib.suppress(RunOver, RunChanged, RuntimeError, *NO_ANSWER):
                # a hub that is gone does not answer for any of the leases
                async with asyncio.timeout(5.0):
                    await node.leave()
            await node.close()
            if not cfg.dir:
                shutil.rmtree(node.root, ignore_errors=True)


if __name__ == "__main__":
    try:
        config = parse_flags(RolloutConfig, sys.argv[1:])
        check_url(config.hub)
    except ValueError as e:
        log(f"error: {e}")
        sys.exit(2)
    if why_not := why_no_gpu():
        log(f"warning: {why_not}; vLLM is started for the CPU")
    try:
        asyncio.run(main(config))
    except* (asyncio.CancelledError, RunOver) as why:
        log(f"stopped: {why.exceptions[0]!r}")
    except* (RuntimeError, VLLMUnfit, RewardsEnd, *NO_ANSWER) as failed:
        for error in failed.exceptions:
            log(f"error: {error}")
        sys.exit(2 if failed.subgroup((VLLMUnfit, RewardsEnd)) else 1)
