"""Episodes, as a rollout node sees them: functions that make a sample themselves, turn by turn,
with tools or whatever else talks back.

They run in the reward functions' processes, many at once in each (reward_process.py). The node
holds ids, log-probs and versions; an episode sees text, and cannot touch them.
"""

import asyncio
import itertools
import json
import time

from bridge.reward_pool import RewardWorkers, reward_or_why
from bridge.sample import Ask, Sample
from bridge.waits import Wait

MOST_TURNS = 100
GRACE_S = 2.0  # an episode's own clock comes first, unless its process does not run
LOST = "lost"  # the process was ended by another episode's doing
NO_TURN = {"error": "it has returned without a call of sample", "kind": "wrong_type"}


class Player:
    """A process, and the episodes that it plays."""

    def __init__(self, process: asyncio.subprocess.Process, workers: RewardWorkers):
        self.process, self.workers = process, workers
        self.inboxes: dict[int, asyncio.Queue] = {}
        self.over = False  # it takes no more episodes
        self.blames: tuple[int, dict] | None = None  # who is to blame for its end, and for what
        self.reading = asyncio.create_task(self._read())

    def say(self, **message) -> None:
        if not self.over and not self.process.stdin.is_closing():  # it may have died: `_read` tells
            self.process.stdin.write(json.dumps(message).encode() + b"\n")

    def blocked_by(self, id: int, wait: Wait) -> None:
        """Its process gives no answer to an episode: it is ended."""
        id = int.from_bytes(self.process.runs) or id
        self.over = True
        self.blames = id, {"error": f"it blocks: {wait.message()}", "kind": "timed_out"}
        self.workers.kill(self.process)

    async def _read(self) -> None:
        while line := await self.process.stdout.readline():
            message = json.loads(line)
            if inbox := self.inboxes.get(message.pop("id")):
                inbox.put_nowait(message)
        self.over = True
        # the code that ran when it ended, if any did
        runs = int.from_bytes(self.process.runs)
        status = await self.workers.ended(self.process)
        ended = f"the reward function's process ended with status {status}"
        guilty, why = self.blames or (runs, {"error": ended, "kind": "exited"})
        for id, inbox in self.inboxes.items():
            inbox.put_nowait(why if guilty in (id, 0) else {"kind": LOST})
        self.workers.free.put_nowait(None)  # another may take its place


class Players:
    """Plays the episodes of a node, in the processes of its reward functions."""

    def __init__(self, workers: RewardWorkers):
        self.workers, self.codec = workers, None
        self.players: list[Player] = []
        self.starting, self.ids = asyncio.Lock(), itertools.count(1)

    async def play(self, sample: Sample, ask: Ask, example: dict) -> float | str:
        """The reward of an episode, or a line that says why it has none. It is played again from
        its example where its process was ended by another's doing, or while the service that it
        asks is away. Raises: RewardsEnd, and what `ask` raises."""
        judged, attempt = self.workers.judged, 0
        patience = Wait("reward away", self.workers.PATIENCE_S)
        while True:
            answer = await self._episode(sample, ask, example)
            if answer.get("kind") != LOST:
                self.workers.count_answer(answer)
                if answer.get("kind") != "away":
                    return reward_or_why(answer)
                if patience.over and self.workers.judged > judged:
                    self.workers.failed["raised"] += 1
                    return reward_or_why(answer)
                await self.workers.be_patient(answer["error"], attempt)
                attempt += 1
            sample.begin()

    async def _episode(self, sample: Sample, ask: Ask, example: dict) -> dict:
        """The last that a process says of an episode: a reward, or an error and its kind."""
        player, id, left_s = await self._player(), next(self.ids), self.workers.timeout_s
        inbox = player.inboxes[id] = asyncio.Queue()
        player.say(id=id, example=example, timeout_s=left_s)
        try:
            while True:
                start, wait = time.monotonic(), Wait("reward", round(left_s + GRACE_S, 1))
                try:
                    async with asyncio.timeout(wait.deadline_s):
                        answer = await inbox.get()
                except TimeoutError:
                    player.blocked_by(id, wait)
                    answer = await inbox.get()
                waited_s = time.monotonic() - start
                left_s = max(0.0, left_s - waited_s)
                sample.environment_s += waited_s
                if "sample" not in answer:
                    return NO_TURN if "reward" in answer and not sample.token_ids else answer
                if sample.turns >= MOST_TURNS:
                    return {"error": f"more than {MOST_TURNS} turns", "kind": "endless"}
                sample.turns += 1
                player.say(id=id, **await self._turn(sample, ask, **answer["sample"]))
        finally:
            player.inboxes.pop(id, None)
            player.say(id=id)

    async def _turn(self, sample: Sample, ask: Ask, max_tokens, stop, **insert) -> dict:
        """A turn of the policy, after what the episode puts in: at most one of `insert`, text as it
        is, and "user" or "tool", a message."""
        try:
            ids = self._ids_of(sample, *next(iter(insert.items()), ("insert", "")))
        except ValueError as e:
            return {"refused": str(e)}
        turn = await ask(ids, max_tokens, stop)
        return {"text": self.codec.decode(turn.token_ids), "finish": turn.finish}

    def _ids_of(self, sample: Sample, role: str, text: str) -> list[int]:
        """Raises: ValueError for a message that the chat template cannot take there."""
        if role == "insert":
            return self.codec.ids(text)
        if not sample.token_ids:
            raise ValueError(f"sample({role}=...): it is the policy's turn; call sample() first")
        ids = self.codec.ids(self.codec.between(role, text))
        # the template ends the policy's turn, which mostly has ended itself
        return ids[1:] if ids[:1] == sample.token_ids[-1:] else ids

    async def _player(self) -> Player:
        """The one with the fewest episodes."""
        async with self.starting:
            while True:  # one may end while another starts
                self.players = [player for player in self.players if not player.over]
                if len(self.players) == self.workers.count:
                    return min(self.players, key=lambda player: len(player.inboxes))
                self.players.append(Player(await self.workers.new(), self.workers))
