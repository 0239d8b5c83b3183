"""The reward functions' processes, as a rollout node sees them."""

import ast
import asyncio
import contextlib
import functools
import json
import mmap
import os
import signal
import struct
import sys
import time
from collections import Counter

from bridge.processes import REPO, guarded, log
from bridge.reward_process import KEPT, RUNNING, RUNS, reward_sources
from bridge.waits import Wait, backoff_s

TRIAL_S = 10.0  # for a reward that is called before there is a run


class RewardsEnd(ValueError):
    """The reward function cannot be loaded, or its service is away for too long: the run cannot go
    on."""


class Away(str):
    """Why a sample has no reward, where the service that judges it did not answer."""


def _each(job: dict, answer: dict) -> list[dict]:
    """The answers for the samples of a job, of which a judge of a whole group has several."""
    return answer.get("each") or [answer] * len(job.get("completions", [""]))


class Judged(float):
    """A reward, and its parts by name, where the function returned a dict."""

    parts: dict[str, float] = {}  # noqa: RUF012


def reward_or_why(answer: dict) -> float | str:
    """Of a sample: its reward, or the line that says why it has none."""
    if "reward" in answer:
        reward = Judged(answer["reward"])
        reward.parts = answer.get("parts", {})
        return reward
    return (Away if answer["kind"] == "away" else str)(answer["error"])


class RewardWorkers:
    """Reward functions in processes of their own (reward_process.py): one that raises, hangs, exits
    or prints costs a sample, and not the node. Each runs the sources as they were when this was
    made, and ends with all that it has started. `failed` counts such samples by kind, and by "away"
    the calls that were made again, until somebody takes the counts. Raises: ValueError when there
    is no such file; from `start` and `score`: RewardsEnd."""

    PATIENCE_S = 60.0  # with a service that answers others, and this sample not

    def __init__(
        self,
        spec: str,
        count: int,
        timeout_s: float,
        start_timeout_s: float = 300.0,
        away_timeout_s: float = 600.0,
    ):
        self.spec, self.count, self.timeout_s = spec, count, timeout_s
        self.start_timeout_s, self.away_timeout_s = start_timeout_s, away_timeout_s
        self.processes: set[asyncio.subprocess.Process] = set()
        self.starting: set[asyncio.Task] = set()
        self.free: asyncio.Queue = asyncio.Queue()
        self.takes = "completion"  # what the function judges, once a process has told it
        self.failed: Counter[str] = Counter()
        # rewards; the wait for a service; when that was last told
        self.judged, self.away, self.said = 0, None, 0.0
        for _ in range(count):
            self.free.put_nowait(None)  # a worker that is started when it is first needed
        # a file that no kill -9 leaves behind
        self.kept = os.fdopen(os.memfd_create("rewards"), "w")
        json.dump(
            {path: text.decode("latin-1") for path, text in reward_sources(spec).items()}, self.kept
        )
        self.kept.flush()

    async def start(self) -> None:
        """All workers, so that a file that cannot be imported is known before the first sample."""
        # those that play are the caller's of `new`: a node that joins again has them already
        await asyncio.gather(*(self._score([]) for _ in range(self.free.qsize())))

    async def score(self, completions: list[str], example: dict) -> list[float | str]:
        """A reward for each completion, or a line that says why it has none (Away: not for want of
        a good function). While the service that the function asks is away, one of them asks again
        and again; then the others follow."""
        judged, patience, attempt = self.judged, Wait("reward away", self.PATIENCE_S), 0
        jobs = [{"completion": completion, "example": example} for completion in completions]
        if self.takes == "completions" and completions:
            jobs = [{"completions": completions, "example": example}]
        answers = await self._score(jobs)
        while again := [i for i, answer in enumerate(answers) if answer.get("kind") == "away"]:
            if patience.over and self.judged > judged:
                self.failed["raised"] += len(again)
                break
            await self.be_patient(answers[again[0]]["error"], attempt)
            again, attempt = again[:1] if self.away else again, attempt + 1
            for i, answer in zip(again, await self._score([jobs[i] for i in again])):
                answers[i] = answer
        each = [one for job, answer in zip(jobs, answers) for one in _each(job, answer)]
        return [reward_or_why(answer) for answer in each]

    async def be_patient(self, why: str, attempt: int) -> None:
        """Before a service is asked again. Raises: RewardsEnd when it has answered nobody for too
        long."""
        if self.away and self.away.over:
            raise RewardsEnd(self.away.message(why))
        if self.away and self.away.waited_s > 1 and time.monotonic() > self.said + 10:
            self.said = time.monotonic()
            log(
                f"the reward function's service is away for {self.away.waited_s:.0f} s, asking it "
                f"again: {why}"
            )
        await asyncio.sleep(min(backoff_s(attempt), max(0.05, self.away_timeout_s / 4)))

    async def new(self) -> asyncio.subprocess.Process:
        """A worker that is the caller's. When it ends, `free` has to get a None in its place."""
        worker = await self.free.get()
        try:
            return worker or await self._start()
        except BaseException:
            self.free.put_nowait(None)
            raise

    async def _score(self, jobs: list[dict]) -> list[dict]:
        worker = await self.free.get()
        try:
            answers: list[dict] = []
            worker = worker or await self._start()
            while left := jobs[len(answers) :]:
                worker = worker or await self._start()
                # All at once: worker and node would else wait for each other's turn on the CPU at
                # every sample.
                # it has died; its silence is dealt with below
                with contextlib.suppress(ConnectionError):
                    for job in left:
                        worker.stdin.write(json.dumps(job).encode() + b"\n")
                while worker is not None and len(answers) < len(jobs):
                    answer, worker = await self._answer(worker)
                    for one in _each(jobs[len(answers)], answer):
                        self.count_answer(one)
                    answers.append(answer)
            return answers
        except asyncio.CancelledError:
            self.kill(worker)  # its answer would be taken for the next one's
            worker = None
            raise
        finally:
            self.free.put_nowait(worker)

    async def _start(self) -> asyncio.subprocess.Process:
        """A worker that has loaded the function."""
        files = f"/proc/{os.getpid()}/fd"
        env = {**os.environ, KEPT: f"{files}/{self.kept.fileno()}"}
        env.pop("CISPO_TOKEN", None)
        # -P: this directory is not on its path, or a module of ours would be in the place of a
        # user's or a library's.
        command = guarded(
            [sys.executable, "-P", str(REPO / "bridge/reward_process.py"), self.spec], grace_s=0.0
        )
        attempt = 0
        while True:
            runs = os.memfd_create("runs")
            os.ftruncate(runs, struct.calcsize(RUNNING))
            start = asyncio.create_task(
                asyncio.create_subprocess_exec(
                    *command,
                    env={**env, RUNS: f"{files}/{runs}"},
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    start_new_session=True,
                    limit=1 << 28,  # of a line
                )
            )
            self.starting.add(start)
            wait = Wait("reward start", self.start_timeout_s)
            try:
                # cancelled here, it would be a process nobody knows
                worker = await asyncio.shield(start)
                self.starting.discard(start)
                self.processes.add(worker)
                worker.runs = mmap.mmap(runs, struct.calcsize(RUNNING))
                said = await self._line(worker, wait)
            except asyncio.CancelledError:
                if start not in self.starting:
                    self.kill(worker)
                raise
            except OSError:  # there is no process: no memory, or too many of something
                self.starting.discard(start)
                raise
            finally:
                os.close(runs)
            if isinstance(said, dict) and "takes" in said:
                self.takes = said["takes"]
                return worker
            await self._end(worker)
            if said is None:
                raise RewardsEnd(f"--reward {self.spec!r}: {wait.message()}")
            if isinstance(said, int):
                raise RewardsEnd(
                    f"--reward {self.spec!r}: its process ended with status {said} while it was "
                    "imported"
                )
            self.count_answer(said)
            if said["kind"] != "away":
                raise RewardsEnd(said["error"])
            await self.be_patient(said["error"], attempt)
            attempt += 1

    async def _line(self, worker, wait: Wait) -> dict | int | None:
        """The worker's next line; its status if it has ended; None if it takes too long."""
        try:
            # not wait_for: in Python 3.11 it may swallow a cancellation
            async with asyncio.timeout(wait.deadline_s):
                line = await worker.stdout.readline()
        except TimeoutError:
            return None
        return json.loads(line) if line else await self.ended(worker)

    async def ended(self, worker) -> int:
        """The status of a worker that has closed its end: its own, if it has one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                await worker.wait()
        self.kill(worker)
        return await worker.wait()

    async def _answer(self, worker) -> tuple[dict, asyncio.subprocess.Process | None]:
        """The worker's answer to a job, or why there is none; and the worker, None if it is
        gone."""
        wait = Wait("reward", self.timeout_s)
        answer = await self._line(worker, wait)
        if not isinstance(answer, dict):
            await self._end(worker)  # before the next one, which may need what it has
            ended = f"the reward function's process ended with status {answer}"
            kind, why = ("timed_out", wait.message()) if answer is None else ("exited", ended)
            answer, worker = {"kind": kind, "error": why}, None
        return answer, worker

    def count_answer(self, answer: dict) -> None:
        if kind := answer.get("kind"):
            self.failed[kind] += 1
        if "reward" in answer:
            self.judged, self.away = self.judged + 1, None
        elif kind == "away" and self.away is None:
            self.away = Wait("reward away", self.away_timeout_s)

    def kill(self, worker) -> None:
        self.processes.discard(worker)
        if worker is None:
            return
        worker.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            if worker.returncode is None:
                worker.terminate()  # its guard ends it, and all that it has started
            else:
                os.killpg(worker.pid, signal.SIGKILL)  # a guard that was killed itself

    async def _end(self, worker) -> None:
        """Kill a worker and see it gone."""
        self.kill(worker)
        try:
            async with asyncio.timeout(15.0):  # its guard has 10
                await worker.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)

    async def close(self) -> None:
        workers = [*self.processes, *[await start for start in self.starting]]
        for worker in workers:
            self.kill(worker)
        for worker in workers:
            await self._end(worker)
        self.processes, self.starting = set(), set()
        self.kept.close()


async def _tried(workers: RewardWorkers, examples: list[dict]) -> list[dict]:
    """Start and end them; between the two, a made-up sample of each example is judged."""
    found = []
    try:
        await workers.start()
        for example in examples if workers.takes != "sample" else []:
            text = str(example.get("answer") or "")
            many = workers.takes == "completions"
            job = {"completions": [text] * 2} if many else {"completion": text}
            (answer,) = await workers._score([{**job, "example": example}])
            found.append(next((one for one in _each(job, answer) if "error" in one), {}))
    finally:
        await workers.close()
    return found


@functools.cache
def check_reward(spec: str, start_timeout_s: float, away_timeout_s: float) -> str:
    """Load a reward function once, in a process of its own. Returns what it judges: a "completion",
    all "completions" of a prompt, or a "sample" that it makes itself. Raises: ValueError that says
    why it cannot be."""
    workers = RewardWorkers(spec, 1, 0.0, start_timeout_s, away_timeout_s)
    asyncio.run(_tried(workers, []))
    return workers.takes


def try_reward(
    spec: str, examples: list[dict], start_timeout_s: float, away_timeout_s: float
) -> list[dict]:
    """Call a reward function once for each example, in a process of its own, with the example's
    answer as the sample. Returns its answers: {} for a reward, else "error" and "kind". There are
    none of a function that makes its samples itself. Raises: ValueError as `check_reward` does."""
    workers = RewardWorkers(spec, 1, TRIAL_S, start_timeout_s, away_timeout_s)
    return asyncio.run(_tried(workers, examples))


def roles_asked_for(sources: dict[str, bytes], function: str) -> set[str]:
    """Who speaks between two turns, as far as it can be read: the roles in calls `sample(ROLE=` of
    a function and of what it names. sources: of `reward_sources`."""
    defined: dict[str, list] = {}  # at the top of a file
    for source in sources.values():
        with contextlib.suppress(SyntaxError, ValueError):  # who loads it says so
            for node in ast.parse(source).body:
                names = [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
                for name in (*names, getattr(node, "name", None)):
                    defined.setdefault(name, []).append(node)
    found, todo = set(), [function]
    while todo:
        for node in (n for top in defined.pop(todo.pop(), []) for n in ast.walk(top)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "sample":
                found |= {keyword.arg for keyword in node.keywords} & {"user", "tool"}
            todo += [getattr(node, "id", ""), getattr(node, "attr", "")]
    return found
