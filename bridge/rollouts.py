"""The trainer's end of the rollouts: prompts go out, groups and scores come in, weights go out.

Rank 0 has the hub, which the rollout nodes call, and the rollout node on this machine. Every rank
has a publisher, for its share of the weights. `Rollouts` is made on every rank and has the same
methods there; what is rank 0's does nothing on the others.
"""

import contextlib
import json
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from bridge.console import say
from bridge.groups import Group
from bridge.hub import Hub
from bridge.ledger import Ledger
from bridge.processes import LocalRollout
from bridge.publish import Publisher
from bridge.validation import Validation
from bridge.waits import Signals, Wait, agree, stop_word

GO = "train"  # rank 0's word for "there is a batch"


@dataclass(frozen=True)
class Stop:
    """Why a run ends before its last step: a signal asked for it, or something failed."""

    kind: Literal["signal", "failure"]
    why: str


class Rollouts:
    """All that a run has to do with its rollout nodes. A context manager: it ends what it starts.

    `stop` says why the run is to end; it is the same on every rank after `next_groups`.
    `vllm_on_trainers_gpus`, on every rank: the node started here has no GPUs of its own.
    """

    def __init__(self, cfg, model, dtype: torch.dtype, checkpoint: Path, data, run: dict, start):
        """data: prompts, codec and held-out examples by name on rank 0, None elsewhere; run: what a
        node must know of the run; start: the step to begin at, the saved state, the validations
        due; dtype: of the weights that are sent; checkpoint: where config and tokenizer are."""
        self.cfg, self.rank, self.stop = cfg, model.mesh.rank, None
        self.hub: Hub | None = None
        self.node: LocalRollout | None = None
        self._model, self._dtype, self._checkpoint = model, dtype, checkpoint
        self._data, self._run, self._start = data, run, start
        self._failure = ""  # told to the other ranks at the next step

    def __enter__(self) -> "Rollouts":
        cfg, store = self.cfg, dist.distributed_c10d._get_default_store()
        with contextlib.ExitStack() as started:  # ended at once where a later one does not start
            if self._data is not None:
                self.hub = start_hub(cfg, self._data, self._model.cfg.vocab_size, self._run)
                # Nodes on other machines are given time to hear that the run is over.
                started.callback(self.hub.close, patience_s=0.0 if cfg.local_rollout else 5.0)
                if self._start.saved:  # before there are weights to lease a prompt for
                    self.hub.ledger.restore(self._start.saved["ledger"])
                for version in self._start.due:
                    self.hub.begin_validation(version)
                if cfg.local_rollout:
                    log = cfg.run_dir / "rollout.log"
                    self.node = LocalRollout(
                        self.hub, cfg.run_dir / "rollout", cfg.rollout_args, log
                    )
                    started.callback(self.node.stop)
                shared = self.node is not None and "CISPO_GPUS_SHARED" in self.node.env
                store.set("vllm_on_trainers_gpus", str(int(shared)))
            self.vllm_on_trainers_gpus = store.get("vllm_on_trainers_gpus") == b"1"
            publisher = Publisher(
                self._model,
                self._dtype,
                cfg.run_dir / "weights",
                self._checkpoint,
                cfg.full_version_every,
                cfg.keep_versions,
                store,
                deadline_s=cfg.collective_timeout_s / 2,
                hub=self.hub,
                port=cfg.hub_port,
            )
            self.publisher = started.enter_context(publisher)
            self._started = started.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._started.__exit__(*error)

    # ---- a step
    def next_groups(self, step: int) -> list[Group] | None:
        """The groups of a step on rank 0, None on the other ranks; they wait here until rank 0 has
        them. Where the run is to end, `stop` says so on every rank, and there are none."""
        groups, word = None, self._failure
        if self.hub and not word:
            groups, word = wait_for_batch(self.hub, step, self.cfg, self.node)
        deadline_s = self.cfg.batch_timeout_s + 60
        word = agree(step, word, self.rank, deadline_s, stop=lambda: Signals.stop)
        if word != GO:
            self.stop = Stop("signal" if Signals.asked(word) else "failure", word)
        return groups

    def fail(self, why: str) -> None:
        """The run ends before its next step (rank 0). An empty `why` changes nothing."""
        self._failure = self._failure or why

    def publish(self, version: int) -> None:
        """Copy the weights; they are written, fetched and loaded while the next step runs."""
        self.publisher.publish(version, last=version == self.cfg.max_num_steps)
        if self.hub and version > self._start.step and self.cfg.validates(version):
            self.hub.begin_validation(version)

    def describe(self) -> str:
        """What has come in for the next step (rank 0)."""
        have, want = len(self.hub.ledger.buffer), self.cfg.num_prompts_per_step
        return f"{have} of {want} prompts, {len(self.hub.nodes)} rollout node(s)"

    # ---- the end
    def finish_publishing(self) -> None:
        """Until the last version is on disk. A run that was to end well fails if it cannot be."""
        self.publisher.close()
        if self.publisher.error and not self.stop:
            self.stop = Stop("failure", str(self.publisher.error))

    def finish_validation(self) -> None:
        """Until the last validation is answered, unless the run was stopped."""
        if self.hub and not self.stop:
            wait_for_validation(self.hub, self.cfg, self.node)

    def wait_for_rank_0(self, saving_s: float) -> None:
        """A node's files are served until rank 0 needs no more answers from the rollout nodes.
        saving_s: how long the last checkpoint may have taken there."""
        # Rank 0 may be as late as its own waits since the last step allow, one after the other.
        late_s = saving_s + self.publisher.deadline_s + self.cfg.val_timeout_s + 60
        agree(self.cfg.max_num_steps, "over", self.rank, late_s, stop=lambda: Signals.stop)


def start_hub(cfg, data, vocab_size: int, run: dict) -> Hub:
    """The hub with the run's prompts."""
    prompts, codec, held_out = data
    ledger = Ledger(
        cfg.num_prompts_per_step,
        cfg.max_trajectory_age_steps,
        cfg.max_num_steps,
        cfg.lease_timeout_s,
        cfg.max_prompt_failures,
        prompts,
        cfg.no_resampling_pass_rate,
    )
    validation = Validation(
        [example for examples in held_out.values() for example in examples],
        cfg.val_samples,
        cfg.lease_timeout_s,
        cfg.max_prompt_failures,
        cfg.val_pass_threshold,
        {name: len(examples) for name, examples in held_out.items()},
    )
    weights_dir, token = cfg.run_dir / "weights", os.environ.get("CISPO_TOKEN")
    token = token or secrets.token_urlsafe(32)
    hub = Hub(ledger, prompts, codec.encode, weights_dir, vocab_size, token, run, validation)
    hub.start(cfg.hub_host, cfg.hub_port)
    return hub


def wait_for_batch(
    hub: Hub, version: int, cfg, node: LocalRollout | None
) -> tuple[list[Group] | None, str]:
    """The groups of a step and the word GO, or None and why the run stops here: the deadline, a
    signal, or rollouts that cannot be kept alive."""
    wait, status = Wait("batch", cfg.batch_timeout_s), {}
    try:
        while not (stop := Signals.stop or stop_word()):
            batch = hub.next_batch(version, timeout_s=0.5)
            for line in hub.take_news():
                say(line)
            if batch:
                # The hub never hands over a token older than the bound; here it would do harm.
                oldest = min(g.oldest_version for g in batch)
                assert version - oldest <= cfg.max_trajectory_age_steps, (
                    f"a token of v{oldest} at step {version}"
                )
                return batch, GO
            status = hub.status()
            if node is not None:
                node.keep(status["taken"] + status["buffered"], say)
            wait.check(f"step {version}, hub: {json.dumps(status)}")
    except RuntimeError as e:
        return None, str(e)
    return None, stop


def wait_for_validation(hub: Hub, cfg, node: LocalRollout | None) -> None:
    """At the end of the run: until the last held-out prompt is answered, or it takes too long."""
    wait, why = Wait("validation", cfg.val_timeout_s), ""
    try:
        while (status := hub.status())["validation"]["rounds"] and not (why := Signals.stop):
            wait.check(json.dumps(status["validation"]))
            if node is not None:
                node.keep(status["taken"] + status["validation"]["answered"], say)
            time.sleep(0.1)  # polling another thread
    except RuntimeError as e:  # the training is done and saved: it is not lost for want of a score
        why = str(e)
    if why:
        say(f"the last validation is not finished: {why}")
