"""Who has which prompt: the book-keeping of a run, without any I/O. hub.py is the server around
it."""

from bisect import insort
from collections import Counter
from dataclasses import dataclass

from bridge.groups import Group
from bridge.waits import Wait


@dataclass
class Lease:
    id: str
    ordinal: int
    node: str
    # of the weights that the node held when it took the lease: no token of it can be older
    version: int
    granted: float  # time.monotonic()
    deadline: float
    # the version whose validation it belongs to; None: it is to be trained on
    validates: int | None = None


class Books:
    """Leases, and what became of them. Ledger has those of training, validation.Validation the
    others."""

    def __init__(self, lease_timeout_s: float, max_failures: int):
        self.lease_timeout_s, self.max_failures = lease_timeout_s, max_failures
        self.leases: dict[str, Lease] = {}
        self.counts: Counter[str] = Counter()  # of everything that did not go straight through
        self.news: list[str] = []  # what the log should say, until the trainer takes it

    def give_up(self, failures: int, by_reward: bool) -> bool:
        """Whether a prompt that failed so often is not tried again. by_reward: the last time the
        reward function had no reward for any sample, which one more try may change, and hardly
        four."""
        return failures >= (min(2, self.max_failures) if by_reward else self.max_failures)

    def held_by(self, node: str) -> list[Lease]:
        return [lease for lease in self.leases.values() if lease.node == node]

    def expire(self, now: float) -> None:
        for lease in [lease for lease in self.leases.values() if lease.deadline <= now]:
            who = f"hub (prompt {lease.id.rpartition('-')[0]})"
            late = Wait(
                "lease", self.lease_timeout_s, whom=lease.node, who=who, start=lease.granted
            )
            self.news.append(late.message())
            self.give_back(lease.id, "leases_expired", failure=f"no answer from {lease.node}")


class Ledger(Books):
    """Who has which prompt. Every ordinal handed out is leased, buffered, returned (to be leased
    again), taken for training, set aside after failing max_failures times, or skipped; it is taken
    once. `frontier` is the lowest ordinal that is not done with, `beyond` what was taken or skipped
    past it: together they are all that a checkpoint needs.

    A new ordinal is skipped when its prompt is too long (prompts.skip), or solved: its samples once
    had a mean reward of pass_rate or more (ScaleRL's no-positive-resampling). One that is leased
    again has had its turn already.

    A lease is granted while
        taken + buffered + leased < (node's version + max_age + 1) * prompts_per_step,
    which is admission control, backpressure and staleness bound in one line: at most that many
    prompts are trained at versions up to the node's own + max_age. The other half of the bound is
    `take`: it trains what becomes too old first, and waits while what is left could not all be
    trained in time. A lease is as old as the weights it was granted under. So nothing is dropped
    for age, unless a lease passes its deadline first, and an answer that takes long is trained as
    surely as a short one.
    """

    def __init__(
        self,
        prompts_per_step: int,
        max_age: int,
        num_steps: int,
        lease_timeout_s: float,
        max_failures: int = 5,
        prompts=None,
        pass_rate: float | None = None,
    ):
        super().__init__(lease_timeout_s, max_failures)
        self.prompts_per_step, self.max_age, self.num_steps = prompts_per_step, max_age, num_steps
        self.prompts, self.pass_rate = prompts, pass_rate
        self.solved: set[int] = set()  # rows of the data set
        self.num_skipped = 0
        self.buffer: list[Group] = []
        self.returned: list[int] = []  # ordinals to be leased again, lowest first
        self.num_taken = self.next_ordinal = self.frontier = 0
        self.beyond: set[int] = set()
        self.set_aside: dict[int, str] = {}  # ordinal: why
        self.set_aside_in_a_row = 0  # with no group between them: then it is not the prompts
        self.failures: dict[int, list[str]] = {}
        self.attempts: Counter[int] = Counter()

    def grant(self, node: str, node_version: int, now: float) -> Lease | None:
        outstanding = self.num_taken + len(self.buffer) + len(self.leases)
        if (
            outstanding
            >= min(node_version + self.max_age + 1, self.num_steps) * self.prompts_per_step
        ):
            return None
        if self.returned:
            ordinal = self.returned.pop(0)
        elif self.none_left:
            return None
        else:
            while self._is_out(self.next_ordinal):
                self.beyond.add(self.next_ordinal)
                self.next_ordinal, self.num_skipped = self.next_ordinal + 1, self.num_skipped + 1
            self._advance()
            ordinal, self.next_ordinal = self.next_ordinal, self.next_ordinal + 1
        self.attempts[ordinal] += 1
        name = f"{ordinal}-{self.attempts[ordinal]}"
        self.leases[name] = Lease(
            name, ordinal, node, node_version, now, now + self.lease_timeout_s
        )
        return self.leases[name]

    def _is_out(self, ordinal: int) -> bool:
        if self.prompts is None:
            return False
        row = self.prompts.row(ordinal)
        return row in self.solved or row in self.prompts.skip

    @property
    def none_left(self) -> bool:
        """Every prompt is too long or solved: the sequence has ended."""
        if self.prompts is None or len(self.solved) + len(self.prompts.skip) < len(
            self.prompts.examples
        ):
            return False
        # with another limit some are both
        return len(self.solved | self.prompts.skip) >= len(self.prompts.examples)

    def give_back(
        self, lease_id: str, count: str, failure: str = "", by_reward: bool = False
    ) -> None:
        """A lease that ends without a group: its prompt is leased again, unless this was one
        failure too many."""
        lease = self.leases.pop(lease_id)
        self.counts[count] += 1
        failures = self.failures.setdefault(lease.ordinal, [])
        failures += [failure] if failure else []
        if not self.give_up(len(failures), by_reward):
            insort(self.returned, lease.ordinal)
            return
        self.set_aside[lease.ordinal] = "; ".join(dict.fromkeys(failures))  # each reason once
        self.set_aside_in_a_row += 1
        self.news.append(
            f"prompt {lease.ordinal} failed {len(failures)} times and is set aside: "
            f"{self.set_aside[lease.ordinal]}"
        )
        self._advance(lease.ordinal)

    def accept(self, lease_id: str, group: Group) -> None:
        del self.leases[lease_id]
        self.buffer.append(group)
        self.set_aside_in_a_row = 0

    def _advance(self, *ordinals: int) -> None:
        """These are done with: taken, or set aside."""
        for ordinal in ordinals:
            self.attempts.pop(ordinal, None)
            self.failures.pop(ordinal, None)
        while self.frontier in self.beyond or self.frontier in self.set_aside:
            self.beyond.discard(self.frontier)
            self.frontier += 1

    def take(self, version: int) -> list[Group] | None:
        """The groups to train at `version`, or None while they are not all there. Oldest policy
        first."""
        for group in [g for g in self.buffer if version - g.oldest_version > self.max_age]:
            self.buffer.remove(group)
            insort(self.returned, group.ordinal)
            self.counts["groups_too_old"] += 1
            self.counts["tokens_too_old"] += int(
                (version - group.sampled_versions > self.max_age).sum()
            )
        if len(self.buffer) < self.prompts_per_step:
            return None
        self.buffer.sort(key=lambda g: (g.oldest_version, g.ordinal))
        batch, left = self.buffer[: self.prompts_per_step], self.buffer[self.prompts_per_step :]
        # Number i of what is left, by age, has its turn i // prompts_per_step steps after the next
        # one.
        ages = sorted(
            [g.oldest_version for g in left] + [lease.version for lease in self.leases.values()]
        )
        late = any(
            version + 1 + i // self.prompts_per_step - of > self.max_age
            for i, of in enumerate(ages)
        )
        if late and self.leases:
            return None
        self.buffer = left
        for group in batch:
            assert group.ordinal >= self.frontier and group.ordinal not in self.beyond, (
                f"{group.ordinal} taken twice"
            )
            self.beyond.add(group.ordinal)
            if self.pass_rate is not None and group.rewards.mean() >= self.pass_rate:
                self.solved.add(self.prompts.row(group.ordinal))
        self.num_taken += len(batch)
        self._advance(*(g.ordinal for g in batch))
        return batch

    def check(self) -> None:
        done = self.num_taken + len(self.set_aside) + self.num_skipped
        states = done + len(self.buffer) + len(self.leases) + len(self.returned)
        assert states == self.next_ordinal, (
            f"ledger: {states} prompts accounted for, {self.next_ordinal} handed out"
        )
        past = (
            self.frontier
            + len(self.beyond)
            + sum(ordinal > self.frontier for ordinal in self.set_aside)
        )
        assert done == past, (
            f"ledger: {done} prompts taken, skipped or set aside, but the frontier says {past}"
        )

    def state(self) -> dict:
        """What a checkpoint keeps, JSON: the trained frontier. What is in flight or buffered is
        generated again, and what was set aside since the last group came is tried again: if that
        stops the run, it was not the prompts."""
        kept = dict(list(self.set_aside.items())[: len(self.set_aside) - self.set_aside_in_a_row])
        frontier = min([self.frontier, *(self.set_aside.keys() - kept.keys())])
        beyond = self.beyond | (set(range(frontier, self.frontier)) - self.set_aside.keys())
        return {
            "taken": self.num_taken,
            "frontier": frontier,
            "beyond": sorted(beyond),
            "set_aside": {str(ordinal): why for ordinal, why in kept.items()},
            "counts": dict(self.counts),
            "skipped": self.num_skipped,
            "solved": sorted(self.solved),
        }

    def restore(self, state: dict) -> None:
        """Go on from a checkpoint: the holes before what was taken last are leased first, then the
        sequence goes on."""
        self.num_taken, self.frontier, self.beyond = (
            state["taken"],
            state["frontier"],
            set(state["beyond"]),
        )
        self.set_aside = {int(o): why for o, why in state["set_aside"].items()}
        self.counts, self.num_skipped = Counter(state["counts"]), state["skipped"]
        self.solved = set(state["solved"])
        self.next_ordinal = max([self.frontier - 1, *self.beyond, *self.set_aside]) + 1
        done = self.beyond | self.set_aside.keys()
        self.returned = [o for o in range(self.frontier, self.next_ordinal) if o not in done]
        self.check()
