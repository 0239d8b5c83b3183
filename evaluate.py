"""How good are these models on these prompts? Starts vLLM by itself, without a trainer:

    python evaluate.py MODEL [MODEL ...] --data FILE [FILE ...] --reward math --preset qwen3-0.6b

Each model answers each data set as in a validation of training: the same prompts, chat template,
rewards, environments and sampling, by the same code. Every other flag is one of train_cispo.py and
means what it means there. MODEL is a directory or a hub id, `runs/NAME/weights/vN` for one.

All that can be refused is refused before the first vLLM starts. In the directory --out are then
samples.jsonl, each sample as text with its reward, and scores.jsonl, a record for each model and
data set. The table comes at the end.
"""

import asyncio
import contextlib
import json
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import Positional

from bridge.flags import flag_of, joined, parse_flags
from bridge.groups import Group, parse_group
from bridge.processes import log
from bridge.reward_pool import RewardsEnd
from bridge.validation import Round, Validation, samples, score
from bridge.vllm import NO_ANSWER, VLLMUnfit
from bridge.weights import WeightsError
from prepare import (
    check_rewards,
    label_and_data,
    load_examples,
    load_prompts,
    node_config,
    resolve_model,
    run_for_nodes,
)
from prepare import resolve_dtype as dtype_of
from presets import PRESETS, parse_config
from rollout import Node


@dataclass(frozen=True)
class Evaluation:
    """How good are these models on these prompts? Every further flag is one of train_cispo.py:
    --preset, --reward, --prompt-template, --max-new-tokens, --rollout-args and so on."""

    models: Annotated[tuple[str, ...], Positional]  # directories or hub ids
    data: tuple[str, ...]  # one or more [NAME=]DATA, each as --data of train_cispo.py
    like: str = ""  # a run's directory, runs/NAME: its flags for prompts, rewards, lengths and vLLM
    samples: int = 8  # of each prompt: the k of avg@k and pass@k
    temperature: float = 1.0  # of these samples
    pass_threshold: float = 1.0  # a sample with at least this reward solves its prompt (pass@k)
    greedy: bool = True  # one more sample of each prompt, at temperature 0
    out: str = ""  # a new directory for the results; "": evaluations/DATE-TIME


@dataclass
class Prompts:
    """A data set as a model reads it."""

    name: str  # in the table
    cfg: object  # of train_cispo.py: this model and these prompts
    checkpoint: Path
    codec: object
    examples: list[dict]
    run: dict  # as a rollout node gets it from a trainer


def parse(argv: list[str]) -> tuple[Evaluation, list[str]]:
    """Our flags, and those for train_cispo.py. Raises: ValueError with one line."""
    own, rest, names = [], [], {f"--{n.replace('_', '-')}" for n in Evaluation.__annotations__}
    into = own  # what comes before the first flag is a model
    for word in joined(argv):
        if word.startswith("--"):
            flag = word.split("=", 1)[0].replace("_", "-").replace("--no-", "--")
            into = own if flag in {*names, "--help"} else rest
        into.append(word)
    found = parse_flags(Evaluation, own)
    for name in ("models", "data"):
        given = getattr(found, name)
        called = [label_and_data(text)[0] for text in given] if name == "data" else given
        if not given or len(set(called)) < len(given):
            said = f"--{name}" if name == "data" else name
            raise ValueError(f"{said} {' '.join(given)!r}: one or more, each once")
    return found, rest


# The flags of a run by which a model gets its prompts there, and its answers their rewards. --lr,
# since a real model is refused without one or a preset of its own.
LIKE = (
    "preset", "task", "system_prompt", "prompt_template", "chat_template", "chat_template_kwargs",
    "prompt_column", "answer_column", "reward", "val_reward", "max_input_seq_length",
    "max_new_tokens", "max_total_sequence_length", "interrupt_at_tokens", "interrupt_text",
    "rollout_args", "publish_dtype", "lr",
)  # fmt: skip


def flags_of(run: str) -> list[str]:
    """LIKE of a run, as words of a command line. Raises: ValueError."""
    path, words = Path(run) / "config.json", []
    try:
        values = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as e:
        raise ValueError(f"--like {run}: no directory of a run, {path}: {e}") from None
    preset = PRESETS.get(values.get("preset"), PRESETS["tiny"])
    for name in (n for n in LIKE if values.get(n) is not None):
        is_switch = isinstance(values[name], bool)
        flag = flag_of(name) if values[name] is not False else flag_of(f"no_{name}")
        words.append(flag if is_switch else f"{flag}={values[name]}")
        if values[name] != getattr(preset, name):
            log(
                f"as in {run}, unless given here: {flag}{'' if is_switch else f' {values[name]!r}'}"
            )
    return words


def read(ev: Evaluation, rest: list[str]) -> list[list[Prompts]]:
    """Of each model, every data set. Raises: ValueError, WeightsError, OSError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sampling = ["--val-samples", str(ev.samples), "--val-temperature", str(ev.temperature)]
    sampling += ["--val-pass-threshold", str(ev.pass_threshold)]
    like, found = flags_of(ev.like) if ev.like else [], []
    for model in ev.models:
        found.append([])
        for name, what in map(label_and_data, ev.data):
            try:
                cfg = parse_config([*like, *rest, "--model", model, "--data", what, *sampling])
            except ValueError as e:  # it knows these three by longer names
                said = re.sub(r"--val-(samples|temperature|pass-threshold)\b", r"--\1", str(e))
                raise ValueError(said) from None
            examples = load_examples(cfg)
            if model == ev.models[0]:
                check_rewards(cfg, [], examples.parts)
            checkpoint = resolve_model(cfg, rank=0)
            prompts, codec, _ = data = load_prompts(cfg, checkpoint, examples)
            kept = [examples[i] for i in range(len(examples)) if i not in prompts.skip]
            run = run_for_nodes(cfg, checkpoint, data, dtype_of(cfg.publish_dtype, device))
            run |= {"id": "evaluation", "experts": False}
            found[-1].append(Prompts(name, cfg, checkpoint, codec, kept, run))
    return found


class Evaluator(Node):
    """A rollout node without a hub: it keeps the books of its prompts itself."""

    def __init__(self, prompts: Prompts):
        super().__init__(node_config(prompts.cfg), hub=None)
        self.run, self.checkpoint = dict(prompts.run), prompts.checkpoint
        self.serve(self.run)

    async def begin(self) -> None:
        """Raises: VLLMUnfit, RewardsEnd, RuntimeError."""
        await self.val_players.workers.start()
        await self._start(0)
        self.ready.set()
        self.watching = asyncio.create_task(self.watch_vllm())

    async def ask(self, method: str, route: str, **kwargs) -> bytes:
        """What a node tells its hub of a prompt: here, its samples."""
        assert route == "/groups", route
        metadata, tensors = parse_group(bytearray(kwargs["data"]))  # what is read-only warns
        lease = self.books.leases[metadata["lease"]]
        prompt_ids = self.codec.encode(self.books.examples[lease.ordinal])
        self.books.accept(lease.id, Group(lease.ordinal, prompt_ids, **tensors))
        return b""

    async def give_back(self, lease, why, patience_s, by_reward=False) -> None:
        self.books.give_back(lease, "leases_returned", failure=why, by_reward=by_reward)

    async def round(self, p: Prompts, num_samples: int, temperature: float) -> Round:
        """Every prompt answered, or given up as in a validation."""
        self.codec = self.val_players.codec = p.codec
        how = {"n": num_samples, "temperature": temperature}
        self.run["val_sampling"] = {**p.run["val_sampling"], **how}
        cfg = p.cfg
        self.books = Validation(
            p.examples, num_samples, cfg.lease_timeout_s, cfg.max_prompt_failures
        )
        self.books.begin(0)
        while not self.books.finished:
            while len(self.held) < self.limit and (lease := self.next_lease()):
                self.held[lease["lease"]] = asyncio.create_task(self.answer(lease))
            waits = {self.watching, *self.held.values()}
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises what it raised
            for name in [name for name, task in self.held.items() if task in done]:
                del self.held[name]
                if name in self.books.leases:  # it has passed its deadline
                    await self.give_back(name, "no answer in time", 0.0)
            for news in self.books.news:
                log(news)
            self.books.news.clear()
        return self.books.finished[0]

    def next_lease(self) -> dict | None:
        lease = self.books.grant(self.name, 0, time.monotonic())
        if lease is None:
            return None
        example = self.books.examples[lease.ordinal]
        return {
            "lease": lease.id,
            "prompt_ids": self.codec.encode(example),
            "example": example,
            "validates": 0,
            "deadline_s": self.books.lease_timeout_s,
        }

    async def end(self) -> None:
        tasks = [*self.held.values(), *filter(None, [getattr(self, "watching", None)])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.close()
        if not self.cfg.dir:
            shutil.rmtree(self.root, ignore_errors=True)


async def evaluate(ev: Evaluation, prompts: list[list[Prompts]], out: Path) -> list[dict]:
    """The records of all models on all data sets."""
    loop, me, records = asyncio.get_running_loop(), asyncio.current_task(), []
    loop.add_signal_handler(signal.SIGTERM, me.cancel)
    for model, sets in zip(ev.models, prompts):
        node = Evaluator(sets[0])
        try:
            await node.begin()
            for p in sets:
                record = {"model": model, "data": p.name, "pass_threshold": ev.pass_threshold}
                done = await node.round(p, ev.samples, ev.temperature)
                found = score(done, ev.samples, ev.pass_threshold)
                record |= {key.removeprefix("validation/"): x for key, x in found.items()}
                write_samples(out, model, p, done, greedy=False)
                if ev.greedy:
                    done = await node.round(p, 1, 0.0)
                    record["greedy"] = score(done, 1, ev.pass_threshold)["validation/avg@1"]
                    write_samples(out, model, p, done, greedy=True)
                for of_versions in ("version", "versions"):
                    del record[of_versions]
                with open(out / "scores.jsonl", "a") as f:
                    f.write(json.dumps(record) + "\n")
                records.append(record)
                log(f"{p.name}: {row(ev, record)}")
        finally:
            await node.end()
    return records


def write_samples(out: Path, model: str, p: Prompts, done: Round, greedy: bool) -> None:
    of = {"model": model, "data": p.name, "greedy": greedy}
    with open(out / "samples.jsonl", "a", encoding="utf-8", errors="backslashreplace") as f:
        for sample in samples(done, p.examples, partial(p.codec.decode, special=True)):
            del sample["versions"]
            f.write(json.dumps({**of, **sample}, ensure_ascii=False) + "\n")


def row(ev: Evaluation, record: dict) -> str:
    names = [f"avg@{ev.samples}", f"pass@{ev.samples}", *(["greedy"] if ev.greedy else [])]
    wrong = [
        f"{record[name]} {name.replace('_', ' ')}"
        for name in ("prompts_failed", "samples_dropped")
        if record[name]
    ]
    names += [name for name in record if name.startswith("reward/")]
    scores = "  ".join(f"{name} {record[name]:.3f}" for name in names)
    return ", ".join([f"{scores}  on {record['prompts']} prompts", *wrong])


def table(ev: Evaluation, records: list[dict]) -> str:
    """Models down, data sets below each."""
    lines = [f"solved (pass@{ev.samples}): a reward of at least {ev.pass_threshold:g}"]
    width = max(len(record["data"]) for record in records)
    for model in ev.models:
        lines.append(model)
        lines += [
            f"  {record['data']:{width}}  {row(ev, record)}"
            for record in records
            if record["model"] == model
        ]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    log.who = ""  # no rollout node of a trainer
    try:
        ev, rest = parse(argv)
        prompts = read(ev, rest)
        out = Path(ev.out or time.strftime("evaluations/%Y%m%d-%H%M%S"))
        if (out / "scores.jsonl").exists():
            raise ValueError(f"--out {out}: it has scores already; name another directory")
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, WeightsError, OSError) as e:
        log(f"error: {e}")
        sys.exit(2)
    try:
        records = asyncio.run(evaluate(ev, prompts, out))
    except (RuntimeError, VLLMUnfit, RewardsEnd, *NO_ANSWER) as e:
        log(f"error: {e}")
        sys.exit(1)
    except (asyncio.CancelledError, KeyboardInterrupt):
        log("stopped")
        sys.exit(1)
    with contextlib.suppress(BrokenPipeError):
        print(f"\n{table(ev, records)}\n\n{out}/scores.jsonl, {out}/samples.jsonl", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
