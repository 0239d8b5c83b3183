"""Episodes whose code does what it should not, in whatever way: it costs them, and not the others or
the node."""

import asyncio
import struct
import threading
from types import SimpleNamespace

import pytest
from test_episodes import TWO_TURNS, Scripted, played, with_env

from bridge import episodes, reward_process
from bridge.reward_pool import RewardWorkers
from bridge.sample import Sample
from task import Codec

IN_TASKS = """
import asyncio, os, sys, time
from pathlib import Path

async def act(kind):
    if kind == "block":
        time.sleep(60)
    if kind == "exit":
        os._exit(7)
    if kind == "sys.exit":
        sys.exit("enough")

async def ask(sample):
    try:
        await sample()
    except asyncio.CancelledError:
        Path(__file__).with_name("ended").touch()
        raise

async def play(sample, example):
    kind = example["kind"]
    await sample()
    if kind == "gather":
        await asyncio.gather(ask(sample), ask(sample))
    while kind == "deaf":
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass
    await asyncio.gather(act(kind), asyncio.sleep(0.5))
    return 1.0
"""


@pytest.fixture
def slow(monkeypatch):
    """The policy takes a while to write."""
    answer = Scripted.__call__

    async def later(self, context, sampling):
        await asyncio.sleep(0.4)
        return await answer(self, context, sampling)

    monkeypatch.setattr(Scripted, "__call__", later)


def test_what_an_episode_s_own_tasks_do_is_its_doing(tmp_path, tiny_checkpoint, slow):
    """One that blocks or exits is told from the others, one that catches its cancellation costs
    no process, and none is left that waits for a turn."""
    kinds = ["block", "exit", "sys.exit", "deaf", "gather"]
    results, _, failed = played(
        tmp_path,
        tiny_checkpoint,
        IN_TASKS,
        [{"kind": kind} for kind in [*kinds, *["good"] * 5]],
        timeout_s=1.0,
        count=1,
    )
    assert results[5:] == [1.0] * 5 and failed == {"timed_out": 2, "exited": 2, "raised": 1}
    assert "it blocks" in results[0] and "status 7" in results[1]
    assert results[2] == "it raised SystemExit: enough (env.py line 11)"
    assert results[3] == "no answer in 1 s of its own"
    assert (tmp_path / "ended").exists()


def test_episodes_that_stand_behind_others_are_not_blocked(tmp_path, tiny_checkpoint):
    """Forty of a tenth of a second each, in one process: longer than any of them may take."""
    source = """
import time
async def play(sample, example):
    await sample()
    time.sleep(0.1)  # it computes
    return 1.0
"""
    results, samples, failed = played(
        tmp_path, tiny_checkpoint, source, [{}] * 40, timeout_s=1.0, count=1
    )
    assert results == [1.0] * 40 and not failed
    assert max(sample.environment_s for sample in samples) > 1.0 + episodes.GRACE_S


def test_a_process_that_ends_while_nobody_runs_costs_nothing_unless_it_ends_again_and_again(
    tmp_path, tiny_checkpoint
):
    source = """
import asyncio, os
from pathlib import Path
async def play(sample, example):
    await sample()
    ended = Path(__file__).with_name("ended")
    if example["always"] or (example["once"] and not ended.exists()):
        ended.touch()
        asyncio.get_running_loop().call_later(0.1, os._exit, 9)  # out of memory, say
        await asyncio.sleep(60)
    await asyncio.sleep(0.3)
    return 1.0
"""
    once = [{"once": n == 0, "always": False} for n in range(4)]
    results, _, failed = played(tmp_path, tiny_checkpoint, source, once, count=1)
    assert results == [1.0] * 4 and not failed
    (result,), _, failed = played(tmp_path, tiny_checkpoint, source, [{"always": True}], count=1)
    assert "status 9" in result and failed == {"exited": 1}


def test_many_episodes_may_wait_in_threads_at_once(tmp_path, tiny_checkpoint):
    source = """
import asyncio, threading
barrier = threading.Barrier(100)
async def play(sample, example):
    await sample()
    await asyncio.to_thread(barrier.wait, 5)
    return 1.0
"""
    results, _, _ = played(tmp_path, tiny_checkpoint, source, [{}] * 100, timeout_s=20.0, count=1)
    assert results == [1.0] * 100


@pytest.mark.parametrize("end", [b'{"id": 1, "rew', b"x" * 100])
def test_a_line_that_is_cut_off_or_too_long_ends_the_process_and_not_the_node(end):
    async def run():
        lines, free = asyncio.StreamReader(limit=16), asyncio.Queue()
        lines.feed_data(end)
        lines.feed_eof()
        ended = asyncio.sleep(0, -9)
        workers = SimpleNamespace(ended=lambda process: ended, free=free)
        process = SimpleNamespace(stdout=lines, runs=struct.pack(reward_process.RUNNING, 1, 0))
        player = episodes.Player(process, workers)
        player.inboxes |= {1: asyncio.Queue(), 2: asyncio.Queue()}
        async with asyncio.timeout(10):
            await free.get()
            return player.over, [await inbox.get() for inbox in player.inboxes.values()]

    over, (guilty, other) = asyncio.run(run())
    assert over and guilty["kind"] == "exited" and other == {"kind": episodes.LOST}


def test_nobody_waits_for_a_process_that_starts_while_there_is_another():
    async def run():
        started, workers = asyncio.Event(), SimpleNamespace(count=2, new=None)
        workers.new = lambda: started.wait()
        players, live = episodes.Players(workers), SimpleNamespace(over=False, inboxes={})
        players.players = [live]
        starter = asyncio.create_task(players._player())
        await asyncio.sleep(0)
        async with asyncio.timeout(10):
            assert await players._player() is live
        starter.cancel()

    asyncio.run(run())


def test_a_node_that_joins_again_keeps_the_processes_that_it_has(tmp_path, tiny_checkpoint):
    async def run():
        workers = RewardWorkers(with_env(tmp_path, TWO_TURNS), 2, 10.0)
        players = episodes.Players(workers)
        players.codec = Codec(tiny_checkpoint)
        try:
            for _ in range(2):
                async with asyncio.timeout(30):
                    await workers.start()
                await players.play(sample := Sample([9], {}, 40, Scripted()), sample, {})
            return len(workers.processes)
        finally:
            await workers.close()

    assert asyncio.run(run()) == 2


def test_a_call_of_sample_that_is_cancelled_costs_its_episode_at_most(
    tmp_path, tiny_checkpoint, slow
):
    source = """
import asyncio
async def play(sample, example):
    try:
        await asyncio.wait_for(sample(), 0.1)
    except TimeoutError:
        pass
    if example["then"] == "ask":
        await sample()
    if example["then"] == "hang":
        await asyncio.Event().wait()
    await asyncio.sleep(0.5)  # until the policy has answered
    return 1.0
"""
    results, _, failed = played(
        tmp_path,
        tiny_checkpoint,
        source,
        [{"then": "return"}, {"then": "ask"}, {"then": "hang"}],
        timeout_s=1.0,
        count=1,
    )
    assert results[0] == 1.0 and failed == {"raised": 1, "timed_out": 1}
    assert "the policy's turn cannot be taken back" in results[1]
    assert results[2] == "no answer in 1 s of its own"


def test_a_long_text_is_tokenized_beside_the_node_s_loop_and_only_what_may_fit_of_it(
    tmp_path, tiny_checkpoint, monkeypatch
):
    source = """
async def play(sample, example):
    await sample()
    return float((await sample("a" * example["put"])).finish == example["finish"])
"""
    seen, ids = [], Codec.ids
    here = lambda: threading.current_thread() is threading.main_thread()
    monkeypatch.setattr(episodes, "LONG", 100)
    monkeypatch.setattr(
        Codec, "ids", lambda self, text: seen.append((here(), len(text))) or ids(self, text)
    )
    for put, finish in ((50, "stop"), (200, "stop"), (3_000_000, "length")):
        (result,), _, _ = played(
            tmp_path, tiny_checkpoint, source, [{"put": put, "finish": finish}], timeout_s=10.0
        )
        assert result == 1.0
    short, long, longest = [text for text in seen if text[1]]
    assert short == (True, 50) and long == (False, 200)
    assert not longest[0] and 400 < longest[1] < 20_000


def test_half_of_a_character_is_spelled_out(tmp_path, tiny_checkpoint):
    source = """
async def play(sample, example):
    await sample(stop="\\ud83d")
    await sample("a\\ud83d")
    return 1.0
"""
    (result,), (sample,), failed = played(tmp_path, tiny_checkpoint, source, [{}])
    assert result == 1.0 and not failed
    assert sample.token_ids[3:-3] == Codec(tiny_checkpoint).ids("a\\ud83d")


def test_an_exception_that_is_no_exception_or_cannot_be_shown_is_the_episode_s(
    tmp_path, tiny_checkpoint
):
    source = """
class Panic(BaseException):
    pass
class Mute(TimeoutError):
    def __str__(self):
        raise ValueError("no words")
async def play(sample, example):
    await sample()
    raise {"Panic": Panic, "Mute": Mute, "Ctrl-C": KeyboardInterrupt}[example["kind"]]()
"""
    results, _, failed = played(
        tmp_path, tiny_checkpoint, source, [{"kind": k} for k in ("Panic", "Mute", "Ctrl-C")]
    )
    assert results[:2] == ["it raised Panic (env.py line 9)", "it raised Mute"]
    assert "KeyboardInterrupt" in results[2] and failed == {"raised": 2, "exited": 1}
