"""Every wait of a run: who waits for whom, and how long at most. A wait that nobody named is a
hang.

`WAITS` is the whole list. Where one of them is entered a `Wait` is made; when its deadline passes,
`check` raises (or `message` is logged, where the waiter can mend it) one line that says who waits
for whom, since when, and what is known of the other side.
"""

import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch.distributed as dist

WAITS = {  # name: who waits, for whom, and what happens when the deadline passes
    "batch": (
        "trainer rank 0",
        "groups from the rollout nodes",
        "the run stops with its state saved",
    ),
    "turn": (
        "a trainer rank",
        "rank 0's word on the next step",
        "the rank fails, and torchrun starts the job again",
    ),
    "hub thread": ("trainer rank 0", "the hub's thread", "the run stops with its state saved"),
    "rollout end": ("trainer rank 0", "its rollout process to end", "it is killed"),
    "publish": (
        "a trainer rank",
        "its publisher to be done with a version",
        "the run stops with its state saved",
    ),
    "version": (
        "trainer rank 0's publisher",
        "every rank's share",
        "the run stops with its state saved",
    ),
    "validation": (
        "trainer rank 0",
        "answers to the last validation",
        "the run ends without its score",
    ),
    "checkpoint": (
        "trainer rank 0",
        "every rank's part of a checkpoint",
        "the run stops; the one before it is whole",
    ),
    "lease": ("hub", "a node's answer to a prompt", "the prompt is handed out again"),
    "node": ("hub", "a sign of life from a node", "its prompts are handed out again"),
    "body": ("hub", "the rest of a request", "the request is refused with 408"),
    "hub": ("rollout node", "the hub's answer", "the node ends"),
    "vllm start": ("rollout node", "vLLM to come up", "it is started again, then the node ends"),
    "generation": ("rollout node", "vLLM's answer to a prompt", "the hub hands it out again"),
    "vllm progress": ("rollout node", "a token from vLLM", "vLLM is killed and started again"),
    "weights fetch": (
        "rollout node",
        "bytes of new weights",
        "the update is refused, and vLLM keeps what it has",
    ),
    "weight update": ("rollout node", "vLLM to load weights", "vLLM is killed and started on them"),
    "reward": (
        "rollout node",
        "the reward function",
        "its worker is killed and the sample dropped",
    ),
    "reward start": ("rollout node", "the reward function's file to be imported", "the run stops"),
    "reward away": (
        "rollout node",
        "the service that the reward function asks",
        "the run stops with its state saved",
    ),
}


def in_utf8(text: str) -> str:
    """Half of a character, as a reward function or a cut emoji may bring, has no form in UTF-8: it
    is spelled out."""
    return text.encode(errors="backslashreplace").decode()


class WaitOver(RuntimeError):
    """The deadline of a wait has passed."""


@dataclass
class Wait:
    """One wait, from now on."""

    name: str  # a key of WAITS
    deadline_s: float
    whom: str = ""  # whom exactly, where the table can only say the kind
    who: str = ""
    start: float = field(default_factory=time.monotonic)

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self.start

    @property
    def over(self) -> bool:
        return self.waited_s > self.deadline_s

    def message(self, known: str = "") -> str:
        who, whom, then = WAITS[self.name]
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - self.waited_s))
        message = (
            f"wait {self.name!r}: {self.who or who} waits for {self.whom or whom} since {since}, "
        )
        message += f"{self.waited_s:.1f} s of {self.deadline_s:g} s; {then}"
        return f"{message}; {known}" if known else message

    def check(self, known: str = "") -> None:
        """Raises: WaitOver once the deadline has passed."""
        if self.over:
            raise WaitOver(self.message(known))


def await_keys(store: dist.Store, keys: list[str], wait: Wait) -> None:
    """Until all keys are in the store: how threads of several ranks meet, since collectives are the
    main threads'. Raises: WaitOver, which names the missing ones."""
    while missing := [key for key in keys if not store.check([key])]:
        wait.check(f"missing: {', '.join(missing)}")
        time.sleep(0.02)  # polling other processes; the store's own wait would hold its connection


class RankFailed(RuntimeError):
    """What another rank said instead of its part: that it has failed, and why."""


def gather_json(
    store: dist.Store, what: str, rank: int, world_size: int, mine: dict, wait: Wait
) -> list[dict]:
    """Every rank's `mine` on rank 0, by rank; the others get an empty list at once. A rank that has
    failed sets {"error": why} under its key, WHAT/RANK. Raises: WaitOver; RankFailed, which names
    the rank."""
    store.set(f"{what}/{rank}", json.dumps(mine))
    if rank != 0:
        return []
    keys = [f"{what}/{rank}" for rank in range(world_size)]
    await_keys(store, keys, wait)
    found = [json.loads(store.get(key)) for key in keys]
    for key in keys:
        store.delete_key(key)
    for rank, said in enumerate(found):
        if "error" in said:
            raise RankFailed(f"rank {rank}: {said['error']}")
    return found


# ---- what ranks agree upon before a collective starts --------------------------------------------
def agree(
    step: int, word: str | None, rank: int, deadline_s: float, stop: Callable[[], str]
) -> str:
    """Rank 0's word on what comes at this step, on every rank; the others pass None and wait in the
    process group's store rather than in a collective. An unmatched collective is killed by a
    watchdog that knows nothing of why.

    `stop()` gives a reason to stop that reached this rank alone, as a signal may: it is passed on
    to rank 0.
    """
    store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        store.set(f"word/{step}", in_utf8(word))
        if step >= 2:  # nobody is two steps behind: a step has collectives
            store.delete_key(f"word/{step - 2}")
        return word
    wait = Wait("turn", deadline_s, who=f"trainer rank {rank}")
    while not store.check([f"word/{step}"]):
        if why := stop():
            store.set("stop", f"{why} on rank {rank}")
        wait.check(f"step {step}")
        time.sleep(0.005)  # polling another process; the store's own wait cannot be interrupted
    return store.get(f"word/{step}").decode()


def stop_word() -> str:
    """Why another rank wants the run to stop, or ""."""
    store = dist.distributed_c10d._get_default_store()
    return store.get("stop").decode() if store.check(["stop"]) else ""


class Signals:
    """SIGTERM, as preemption sends it, Ctrl-C and a closed terminal ask the loop to stop where its
    state is whole and saved. A second one, or any before the loop runs, ends the process as an
    exception, so that what was started is ended."""

    NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C", signal.SIGHUP: "SIGHUP"}  # noqa: RUF012
    stop, since = "", 0.0  # the word that asks for it, and when it came
    in_loop = False

    @classmethod
    def install(cls) -> None:
        for number in cls.NAMES:
            # nohup's word counts
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, cls._handle)

    @classmethod
    def asked(cls, word: str) -> bool:
        """Whether the run stops at this word because a signal asked for it, on whatever rank."""
        return word.startswith(tuple(cls.NAMES.values()))

    @classmethod
    def _handle(cls, number, frame) -> None:
        if first := cls.in_loop and not cls.stop:
            cls.stop, cls.since = cls.NAMES[number], time.monotonic()
        # written past Python's buffers, whose lock may be held by what it interrupts
        if number == signal.SIGINT:
            os.write(
                2,
                b"\ninterrupted: the run stops after this step, its state saved; "
                b"once more ends it at once\n"
                if first
                else b"\ninterrupted: ending what was started\n",
            )
        if not first:
            sys.exit(128 + number)

    @classmethod
    def save_within_s(cls) -> float:
        """How long a save may take once a signal has come. torchrun passes it on to its ranks, and
        kills them after TORCH_ELASTIC_SHUTDOWN_TIMEOUT (30 s; launch.sh sets more), of which the
        step in progress has taken its part; a third is left for the ending. Without torchrun there
        is no such limit."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return math.inf
        limit_s = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
        return max(1.0, limit_s * 2 / 3 - (time.monotonic() - cls.since if cls.since else 0.0))


def backoff_s(attempt: int, most: float = 10.0) -> float:
    """Seconds before the next attempt: they double, and differ between those that failed at the
    same moment."""
    return min(most, 0.25 * 2**attempt) * random.uniform(0.5, 1.5)
