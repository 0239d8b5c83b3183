"""Episodes, as a rollout node sees them: functions that make a sample themselves, turn by turn,
with tools or whatever else talks back.

They run in the reward functions' processes, many at once in each (reward_process.py). The node
holds ids, log-probs and versions; an episode sees text, and cannot touch them.
"""

import asyncio
import contextlib
import itertools
import json
import struct
import time

from bridge.reward_pool import RewardWorkers, reward_or_why
from bridge.reward_process import RUNNING
from bridge.sample import Ask, Sample
from bridge.waits import Wait, in_utf8

MOST_TURNS = 100
GRACE_S = 2.0  # an episode's own clock comes first, unless its process does not run
LOST = "lost"  # the process was ended by another episode's doing, or by nobody knows what
MOST_ENDS = 3  # that nobody is to blame for: an episode that meets one more may be the cause
LONG = 100_000  # characters, which take a tenth of a second to tokenize
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

    def runs(self) -> tuple[int, float]:
        """The episode whose code runs there, 0 for none, and for how many seconds that is so."""
        id, since_ns = struct.unpack(RUNNING, self.process.runs)
        return id, (time.monotonic_ns() - since_ns) / 1e9

    def blocked_by(self, id: int, wait: Wait) -> None:
        """Its process gives no answer to an episode: it is ended."""
        id = self.runs()[0] or id
        self.over = True
        self.blames = id, {"error": f"it blocks: {wait.message()}", "kind": "timed_out"}
        self.workers.kill(self.process)

    async def _read(self) -> None:
        # a line that its end has cut off, or that is too long, ends it as well
        with contextlib.suppress(ValueError):
            while line := await self.process.stdout.readline():
                message = json.loads(line)
                if inbox := self.inboxes.get(message.pop("id")):
                    inbox.put_nowait(message)
        self.over = True
        # the code that ran when it ended, if any did
        runs, _ = self.runs()
        status = await self.workers.ended(self.process)
        ended = f"the reward function's process ended with status {status}"
        guilty, why = self.blames or (runs, {"error": ended, "kind": "exited"})
        # nobody is known who did it: memory ran out while none ran, or by an episode that is over
        lost = {"kind": LOST} if guilty in self.inboxes else {"kind": LOST, "why": why}
        for id, inbox in self.inboxes.items():
            inbox.put_nowait(why if id == guilty else lost)
        self.workers.free.put_nowait(None)  # another may take its place


class Players:
    """Plays the episodes of a node, in the processes of its reward functions."""

    @classmethod
    def of(cls, spec: str, node) -> "Players":
        """With processes of a reward function, not started yet. node: the flags of rollout.py."""
        limits = (node.reward_timeout_s, node.reward_start_timeout_s, node.reward_away_timeout_s)
        return cls(RewardWorkers(spec, node.reward_workers, *limits))

    def __init__(self, workers: RewardWorkers):
        self.workers, self.codec = workers, None
        self.players: list[Player] = []
        self.starting, self.ids = asyncio.Lock(), itertools.count(1)

    async def play(self, sample: Sample, ask: Ask, example: dict) -> float | str:
        """The reward of an episode, or a line that says why it has none. It is played again from
        its example where its process was ended by another's doing, or while the service that it
        asks is away. Raises: RewardsEnd, and what `ask` raises."""
        judged, attempt, ends = self.workers.judged, 0, 0
        patience = Wait("reward away", self.workers.PATIENCE_S)
        while True:
            answer = await self._episode(sample, ask, example)
            if "why" in answer:
                ends += 1
                answer = answer["why"] if ends > MOST_ENDS else answer
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
                    answer = None
                waited_s = time.monotonic() - start
                left_s = max(0.0, left_s - waited_s)
                sample.environment_s += waited_s
                if answer is None and player.runs()[1] < GRACE_S:
                    continue  # it runs, and others are before this one
                if answer is None:
                    player.blocked_by(id, wait)
                    answer = await inbox.get()
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
        role, text = next(iter(insert.items()), ("insert", ""))
        # the rest can never fit; NFC joins up to four characters in one
        text = text[: 4 * self.codec.longest * (sample.left + 1)]
        try:
            if len(text) < LONG:
                ids = self._ids_of(sample, role, text)
            else:
                ids = await asyncio.to_thread(self._ids_of, sample, role, text)
        except ValueError as e:
            return {"refused": str(e)}
        turn = await ask(ids, max_tokens, [in_utf8(text) for text in stop])
        return {"text": self.codec.decode(turn.token_ids), "finish": turn.finish}

    def _ids_of(self, sample: Sample, role: str, text: str) -> list[int]:
        """Raises: ValueError for a message that the chat template cannot take there."""
        text = in_utf8(text)  # the policy may have written half of a character, in JSON say
        if role == "insert":
            return self.codec.ids(text)
        if not sample.token_ids:
            raise ValueError(f"sample({role}=...): it is the policy's turn; call sample() first")
        ids = self.codec.ids(self.codec.between(role, text))
        # the template ends the policy's turn, which mostly has ended itself
        return ids[1:] if ids[:1] == sample.token_ids[-1:] else ids

    async def _player(self) -> Player:
        """The one with the fewest episodes. Where one has ended, an episode sees another start; the
        rest do not wait for it while there are others."""
        while True:
            self.players = [player for player in self.players if not player.over]
            if len(self.players) == self.workers.count or (self.players and self.starting.locked()):
                return min(self.players, key=lambda player: len(player.inboxes))
            async with self.starting:
                if sum(not player.over for player in self.players) < self.workers.count:
                    process = await self.workers.new()
                    self.players.append(Player(process, self.workers))
