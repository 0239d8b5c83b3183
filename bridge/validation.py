"""Validation: prompts that are never trained on, answered by the rollout nodes beside the training
prompts.

A round begins under a version of the weights and hands out every held-out prompt once, to nodes
that hold this version or a newer one; how far the versions of its tokens reach is in its record. It
has books of its own, so the ledger's account, each prompt trained once, does not know of it. While
both have prompts the hub grants them in turn, and all of them from the one that still has some:
training never waits for more than its own half of vLLM.

What has no reward in the end (a sample whose reward function failed, a prompt that no node could
answer) scores 0 and is counted: a score never flatters.
"""

import json
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bridge.console import say
from bridge.groups import NOT_SAMPLED, Group, means_of_parts
from bridge.ledger import Books, Lease
from bridge.logs import read_jsonl
from bridge.token_values import TokenValues


@dataclass
class Round:
    version: int  # that it began under
    todo: list[int]  # prompts to be leased, lowest first
    start: float
    groups: dict[int, Group] = field(default_factory=dict)
    # prompts that no node could answer, and why
    failed: dict[int, str] = field(default_factory=dict)
    repeated: int = 0  # leases that ended without an answer
    seconds: float = 0.0  # from its beginning to the last answer


class Validation(Books):
    """The rounds that are open, and who has which of their prompts."""

    def __init__(
        self,
        examples=(),
        num_samples: int = 1,
        lease_timeout_s: float = 600.0,
        max_failures: int = 5,
        pass_threshold: float = 1.0,
        sets: dict[str, int] | None = None,
    ):
        """sets: the data sets that the examples are of, in their order, and how many of each."""
        super().__init__(lease_timeout_s, max_failures)
        self.pass_threshold, self.sets = pass_threshold, sets or {"": len(examples)}
        self.examples, self.num_samples = examples, num_samples
        self.rounds: dict[int, Round] = {}  # by version, oldest first
        self.begun: list[int] = []  # versions of all rounds that were ever asked for
        self.finished: list[Round] = []  # until the trainer takes them
        self.failures: Counter[tuple[int, int]] = Counter()
        self.leases_made = self.answered = 0

    def begin(self, version: int) -> None:
        self.begun.append(version)
        self.rounds[version] = Round(version, list(range(len(self.examples))), time.monotonic())

    def grant(self, node: str, node_version: int, now: float) -> Lease | None:
        for found in self.rounds.values():
            if found.todo and found.version <= node_version:
                index, self.leases_made = found.todo.pop(0), self.leases_made + 1
                name = f"v{found.version}-{index}-{self.leases_made}"
                lease = Lease(
                    name, index, node, node_version, now, now + self.lease_timeout_s, found.version
                )
                self.leases[name] = lease
                return lease
        return None

    def give_back(
        self, lease_id: str, count: str, failure: str = "", by_reward: bool = False
    ) -> None:
        """A lease that ends without an answer: its prompt is leased again, or fails for good, as in
        Ledger."""
        lease = self.leases.pop(lease_id)
        found, key = self.rounds[lease.validates], (lease.validates, lease.ordinal)
        self.counts[count] += 1
        found.repeated += 1
        self.failures[key] += bool(failure)
        if not self.give_up(self.failures[key], by_reward):
            insort(found.todo, lease.ordinal)
            return
        found.failed[lease.ordinal] = failure
        self.news.append(
            f"validation of v{found.version}: prompt {lease.ordinal} failed {self.failures[key]} "
            f"times and scores 0: {failure}"
        )
        self._settle(found)

    def accept(self, lease_id: str, group: Group) -> None:
        lease = self.leases.pop(lease_id)
        found = self.rounds[lease.validates]
        found.groups[lease.ordinal] = group
        self.answered += 1
        self._settle(found)

    def _settle(self, found: Round) -> None:
        if len(found.groups) + len(found.failed) == len(self.examples):
            found.seconds = time.monotonic() - found.start
            self.finished.append(self.rounds.pop(found.version))

    def status(self) -> dict:
        rounds = [
            {"version": r.version, "answered": len(r.groups), "of": len(self.examples)}
            for r in self.rounds.values()
        ]
        return {"rounds": rounds, "answered": self.answered, "counts": dict(self.counts)}


def due_at_start(
    start: int, validates: bool, anew: bool, unscored: list[int], scores: dict
) -> list[int]:
    """The versions whose rounds a run asks for as it starts. One that goes on, after a kill too,
    asks again for those that were open at its checkpoint, and never for one whose score is there.
    anew: the run, or its scores, start here.
    """
    begun = {start} if anew else {*unscored, *([start] if validates else [])}
    return sorted(begun - scores.keys())


# ---- scores --------------------------------------------------------------------------------------
def score(
    done: Round, num_samples: int, pass_threshold: float = 1.0, sets: dict[str, int] | None = None
) -> dict:
    """The record of a finished round. sets: as in Validation. The scores of the first have plain
    names, and tell the best checkpoint; those of another are `validation/NAME/...`."""
    groups = done.groups.values()
    versions = [int(v) for g in groups for v in (g.oldest_version, g.versions.max())]
    versions = versions or [done.version]
    record = {"version": done.version, "versions": [min(versions), max(versions)]}
    sets, first = sets or {"": len(done.groups) + len(done.failed)}, 0
    for name, num_prompts in sets.items():
        prefix = f"validation/{name}/" if first else "validation/"
        of_set = [g for i, g in done.groups.items() if first <= i < first + num_prompts]
        first += num_prompts
        record |= scores_of(of_set, num_prompts, num_samples, pass_threshold, prefix)
    record["validation/leases_repeated"] = done.repeated
    return {**record, "timing/validation/total_s": done.seconds}


def scores_of(
    groups: list[Group], prompts: int, num_samples: int, pass_threshold: float, prefix: str
) -> dict:
    """Of a data set. avg@k: mean reward of all k samples of every prompt; pass@k: share of prompts
    that one of their k solves, with a reward of at least pass_threshold."""
    rewards = torch.cat([g.rewards for g in groups]).double() if groups else torch.zeros(0)
    lengths = torch.cat([g.lengths for g in groups]).double() if groups else torch.zeros(0)
    passed = sum(bool((g.rewards >= pass_threshold).any()) for g in groups)
    truncated = sum(int(g.truncated.sum()) for g in groups)
    found = {
        f"avg@{num_samples}": rewards.sum().item() / (prompts * num_samples),
        f"pass@{num_samples}": passed / prompts,
        "prompts": prompts,
        "prompts_failed": prompts - len(groups),
        "samples_dropped": prompts * num_samples - len(rewards),
        "mean_gen_tokens_per_sample": lengths.mean().item() if groups else None,
        "truncation_rate": truncated / max(1, len(rewards)),
        **means_of_parts(groups, "reward/"),
    }
    return {f"{prefix}{name}": value for name, value in found.items()}


def log_validation(
    done: Round, validation: Validation, decode: Callable[[list[int]], str], run_dir: Path
) -> dict:
    """A finished round: its samples to validation/vN.jsonl, its record to validation.jsonl and a
    line for each data set to the console. Returns the record."""
    path = run_dir / "validation" / f"v{done.version}.jsonl"
    path.parent.mkdir(exist_ok=True)
    found = samples(done, validation.examples, decode, validation.sets)
    lines = [json.dumps(s, ensure_ascii=False) for s in found]
    path.write_text(
        "".join(f"{line}\n" for line in lines), encoding="utf-8", errors="backslashreplace"
    )
    least, k, sets = validation.pass_threshold, validation.num_samples, validation.sets
    record = score(done, k, least, sets)
    with open(run_dir / "validation.jsonl", "a") as f:
        f.write(json.dumps(record) + "\n")
    solved = "" if least == 1 else f" (reward {least:g} or more)"
    first, last = record["versions"]
    for i, name in enumerate(sets):
        r = {
            key.removeprefix(f"validation/{name}/" if i else "validation/"): x
            for key, x in record.items()
        }
        wrong = [
            f", {r[what]} {what.replace('_', ' ')}"
            for what in ("prompts_failed", "samples_dropped", "leases_repeated")
            if r.get(what)
        ]
        say(
            f"validation of v{done.version}{f', {name}' if len(sets) > 1 else ''}: avg@{k} "
            f"{r[f'avg@{k}']:.3f}, pass@{k} {r[f'pass@{k}']:.3f}{solved} on {r['prompts']} "
            f"prompts, tokens of v{first}..v{last}, {done.seconds:.1f} s{''.join(wrong)}"
        )
    return record


def samples(
    done: Round, examples, decode: Callable[[list[int]], str], sets: dict[str, int] | None = None
) -> list[dict]:
    """Every sample of a round, readable; where there are several data sets, with its own."""
    found, names = [], [name for name, count in (sets or {}).items() for _ in range(count)]
    for index, group in sorted(done.groups.items()):
        of = {"data": names[index]} if len(sets or {}) > 1 else {}
        rows = readable(group, range(len(group.rewards)), examples[index].get("answer"), decode)
        found += [{**of, **row} for row in rows]
    return found


def readable(group: Group, which, answer, decode: Callable[[list[int]], str]) -> list[dict]:
    """These samples of a group as text, with what was expected. `decode` keeps special tokens: from
    here one sees whether the chat template is the right one. turns: where something was put in,
    who wrote what."""
    ids, versions = (t.split(group.lengths.tolist()) for t in (group.token_ids, group.versions))
    found = []
    for i in which:
        sampled = versions[i] != NOT_SAMPLED
        found.append(
            {
                "prompt": decode(group.prompt_ids),
                "completion": decode(ids[i].tolist()),
                "answer": answer,
                "reward": group.rewards[i].item(),
                **({"parts": parts_of(group, i)} if group.parts else {}),
                "truncated": bool(group.truncated[i]),
                "prompt_tokens": len(group.prompt_ids),
                "tokens": len(ids[i]),
                "versions": [int(v) for v in versions[i][sampled].aminmax()],
                **({} if sampled.all() else {"turns": turns_of(ids[i], sampled, decode)}),
            }
        )
    return found


def parts_of(group: Group, i: int) -> dict[str, float]:
    """Those that this sample has."""
    return {name: x[i].item() for name, x in group.parts.items() if not x[i].isnan()}


def turns_of(ids, sampled, decode: Callable[[list[int]], str]) -> list[dict[str, str]]:
    """A sample's text in pieces, by who wrote them: the policy, or the environment."""
    edges = (sampled[1:] != sampled[:-1]).nonzero().flatten() + 1
    pieces = zip(ids.tensor_split(edges), sampled.tensor_split(edges))
    return [{"policy" if own[0] else "environment": decode(x.tolist())} for x, own in pieces]


def log_samples(
    groups: list[Group],
    step: int,
    prompts,
    decode: Callable[[list[int]], str],
    run_dir: Path,
    most: int = 4,
    values: TokenValues | None = None,
) -> list[dict]:
    """Of the step's first prompts the samples with the highest and the lowest reward, `most` in
    all, to samples.jsonl; with what is known of their tokens. Returns them."""
    kept: list[dict] = []
    # Half of a character, which UTF-8 lacks, is written as JSON's \\ud83d.
    with open(run_dir / "samples.jsonl", "a", encoding="utf-8", errors="backslashreplace") as f:
        for p, group in enumerate(groups[: (most + 1) // 2]):
            best_and_worst = dict.fromkeys(
                (int(group.rewards.argmax()), int(group.rewards.argmin()))
            )
            answer = prompts[group.ordinal].get("answer")
            shown = readable(group, best_and_worst, answer, decode)[: most - len(kept)]
            for i, sample in zip(best_and_worst, shown):
                of_tokens = {"values": values.pieces(group, p, i, decode)} if values else {}
                kept.append({"step": step, "ordinal": group.ordinal, **sample, **of_tokens})
                f.write(json.dumps(kept[-1], ensure_ascii=False) + "\n")
    return kept


def read_scores(run_dir: Path, num_samples: int) -> dict[int, float]:
    """avg@k by version, of the rounds that are in the run's validation.jsonl."""
    name = f"validation/avg@{num_samples}"
    records = read_jsonl(run_dir / "validation.jsonl")
    return {r["version"]: r[name] for r in records if name in r}
