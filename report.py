"""What a run says of itself: lines on the console, a record a step in metrics.jsonl, the picture at
the end.

Metrics stay tensors on the device until a step is over; names ending in _min or _max reduce by
that over updates, micro-batches and ranks, all others by sum. Their meaning and healthy ranges are
in docs/metrics.md.
"""

import importlib.util
import itertools
import json
import math
import os
import secrets
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import watch
from bridge.console import say
from bridge.groups import NOT_SAMPLED, Group, means_of_parts
from bridge.logs import ENDED, last_line, read_jsonl, without_time
from bridge.prometheus import numbers
from bridge.validation import log_samples, log_validation
from bridge.weights import checkpoint_files, write_text
from loss import Algorithm, effective_share, ratio_quantile
from ranks.batch import left_out, trained_lengths
from ranks.checkpoint import best_step, whole
from ranks.parallel import SUM, merge, reduction_of
from ranks.speed import trained


# ---- console -------------------------------------------------------------------------------------
def say_flags(cfg) -> None:
    """Every flag's value, and what is hardly meant."""
    values = "  ".join(f"{name}={value!r}" for name, value in json.loads(cfg.text).items())
    print(textwrap.fill(values, 120, break_long_words=False, break_on_hyphens=False))
    for warning in cfg.warnings():
        say(f"warning: {warning}")


def say_something(describe: Callable[[], str], log: Path | None, stop: threading.Event) -> None:
    """A thread: a sign of life when nothing was said for 9 s, as while vLLM starts or the loss is
    compiled. `describe` says what goes on now; what another process has written to its log is added
    once, when it is new. With nothing new the next such line comes after 30 s."""
    mine = None
    while not stop.wait(0.5):
        if (quiet := time.monotonic() - say.last) > 9:
            news = without_time(last_line(log, quiet)) if log else ""
            if news or quiet > 30 or say.last != mine:
                say(describe() + (f"; {news}" if news else ""))
                mine = say.last


def name_of_loss(alg: Algorithm) -> str:
    """The loss and its bounds, in a few words."""
    bounds = "[{:g}, {:g}]".format(*alg.weight_bounds)
    if alg.use_cispo:
        if alg.negative_weight_bounds != alg.weight_bounds:
            bounds += ", [{:g}, {:g}] where A < 0".format(*alg.negative_weight_bounds)
        region = f", trust region {alg.trust_region}" if alg.trust_region else ""
        return f"CISPO, weight clamped to {bounds}{region}"
    if alg.disable_ppo_ratio:
        return "REINFORCE, no ratio"
    if alg.force_on_policy_ratio:
        return "policy gradient, ratio forced to 1"
    return f"PPO, ratio clipped to {bounds}"


# ---- metrics -------------------------------------------------------------------------------------
# a part of the step, as the console says it
DOING = {
    "compile": "compiling the update",
    "exposed_generation": "waiting for rollouts",
    "data_processing": "packing the batch",
    "policy_and_reference_logprobs": "log-probs of the batch",
    "policy_training": "updates",
    "publish_copy": "copying the weights to publish",
    "log": "log and checkpoint",
    "validation": "waiting for the last validation",
}


class Clock:
    """Seconds of each part of a step, on the host's clock. `begin` a part; it ends where the next
    begins, and with all that it has given to the GPU: else the weights' copy would be said to take
    what the updates took."""

    def __init__(self, part: str = "start"):
        self.start = self.last = time.perf_counter()
        self.doing, self.parts = part, {}

    def begin(self, part: str) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # five times a step
        now = time.perf_counter()
        self.parts[self.doing] = now - self.last
        self.doing, self.last = part, now

    def says(self) -> str:
        """What goes on and for how long."""
        return f"{DOING.get(self.doing, self.doing)}, for {time.perf_counter() - self.last:.0f} s"

    def seconds(self) -> dict[str, float]:
        self.begin("log")
        parts = {**self.parts, "total_step_time": self.last - self.start}
        return {f"timing/train/{name}": s for name, s in parts.items()}


def fetch(metrics: dict[str, torch.Tensor]) -> dict[str, float | list[float]]:
    """All values at once: the one time in a step that the host waits for the device."""
    values = iter(torch.cat([x.flatten().double() for x in metrics.values()]).tolist())
    return {
        n: list(itertools.islice(values, x.numel())) if x.ndim else next(values)
        for n, x in metrics.items()
    }


def rollout_metrics(groups: list[Group], step: int) -> dict[str, float]:
    """Of the samples as they came: rewards, lengths, ages."""
    rewards, lengths = (
        torch.cat([getattr(g, n) for g in groups]).double() for n in ("rewards", "lengths")
    )
    ages = torch.tensor([step - g.oldest_version for g in groups]).double()
    return {
        "train/reward": rewards.mean().item(),
        "train/groups_without_signal": sum(g.rewards.unique().numel() == 1 for g in groups)
        / len(groups),
        "train/num_valid_samples": len(rewards),
        "train/mean_gen_tokens_per_sample": lengths.mean().item(),
        "train/truncation_rate": torch.cat([g.truncated for g in groups]).double().mean().item(),
        "train/interrupted_rate": sum(
            int((v == NOT_SAMPLED).any())
            for g in groups
            for v in g.versions.split(g.lengths.tolist())
        )
        / len(rewards),
        "train/inserted_share": sum(int((g.versions == NOT_SAMPLED).sum()) for g in groups)
        / lengths.sum().item(),
        "train/avg_trajectory_age": ages.mean().item(),
        "train/max_trajectory_age": ages.max().item(),
        **means_of_parts(groups, "train/reward/"),
    }


def gradient_metrics(norms: list[float]) -> dict:
    """The norms of a step's updates before clipping. One that is not finite is null: that update
    was skipped."""
    found = [norm for norm in norms if math.isfinite(norm)]
    return {
        "train/grad_norm": sum(found) / len(found) if found else None,
        "train/grad_norms": [norm if math.isfinite(norm) else None for norm in norms],
        "train/updates_skipped": len(norms) - len(found),
    }


def update_metrics(values: dict[str, float], counts: list[tuple[int, int]]) -> dict:
    """Means over the updates of a step that were made, null if there was none; the drift values are
    sums over tokens, divided by their own counts here. counts: loss tokens and samples of each."""
    record = {}
    parts = ("ratio_histogram", "weight_sum", "weight_square_sum")  # others are made of them
    if not counts:
        made = ["ratio_p50", "ratio_p95", "ratio_p99", "effective_sample_size"]
        kept = [name for name in values if name not in parts]
        return dict.fromkeys([f"train/{name}" for name in kept + made])
    for name, value in values.items():
        if name in parts:
            continue
        if name.startswith("tokens_"):
            record[f"train/{name}"] = int(value)
        elif name.startswith("moe_"):
            record[f"train/{name}"] = value
        elif name.endswith("_version"):  # null where no token is of that kind
            tokens = values["tokens_" + name.split("_error_")[1]]
            record[f"train/{name}"] = value / tokens if tokens else None
        else:
            is_sum = reduction_of(name) is SUM
            record[f"train/{name}"] = value / len(counts) if is_sum else value
    for q in (50, 95, 99):
        record[f"train/ratio_p{q}"] = ratio_quantile(values["ratio_histogram"], q / 100)
    tokens, weights = sum(tokens for tokens, _ in counts), [values[name] for name in parts[1:]]
    record["train/effective_sample_size"] = effective_share(*weights, tokens)
    clipped = values["would_clip"]
    record["train/low_prob_share_of_would_clip"] = (
        values["low_prob_would_clip"] / clipped if clipped else None
    )
    record["train/global_valid_toks"] = tokens / len(counts)
    record["train/global_valid_seqs"] = sum(seqs for _, seqs in counts) / len(counts)
    return record


def log_step(record: dict, run_dir: Path) -> None:
    """Append the record of a step to metrics.jsonl, and say the gist of it."""
    with open(run_dir / "metrics.jsonl", "a") as f:
        f.write(json.dumps(record) + "\n")

    def r(name: str) -> float:
        value = record[f"train/{name}"]
        return math.nan if value is None else value

    def t(name: str) -> float:
        return record[f"timing/train/{name}"]

    say(
        f"step {record['step']:4d}  reward {r('reward'):.3f}  entropy {r('entropy'):.3f}  ratio "
        f"{r('probs_ratio_min'):.2f}..{r('probs_ratio_max'):.2f}  gen_kl {r('gen_kl_error'):.1e}  "
        f"age {r('avg_trajectory_age'):.1f}  grad {r('grad_norm'):.2f}  "
        f"{t('total_step_time'):.2f} s (waited {t('exposed_generation'):.2f})  "
        f"{r('tokens_per_s_per_gpu'):,.0f} tokens/s/GPU"
        + ("" if record["train/mfu"] is None else f" (MFU {r('mfu'):.3f})")
    )


WARN_AFTER = (3, 30, 300)  # steps in a row


def count_without_signal(record: dict, before: int, reward: str, run_dir: Path) -> int:
    """How many steps in a row had no group whose samples differ in reward."""
    steps = before + 1 if record["train/groups_without_signal"] == 1 else 0
    if steps in WARN_AFTER:
        why = (
            f"all samples of a prompt have the same reward, {record['train/reward']:.3f} on the "
            "average"
        )
        say(
            f"warning: no signal for {steps} steps: {why}, nothing is learned. Does --reward "
            f"{reward} read what is "
            f"in {run_dir / 'samples.jsonl'}? Else the task is too hard or too easy for the model"
        )
    return steps


def count_cut_off(record: dict, before: int, max_new_tokens: int) -> int:
    """How many steps in a row have cut off more than half of their samples."""
    share = record["train/truncation_rate"]
    steps = before + 1 if share > 0.5 else 0
    if steps in WARN_AFTER:
        turns = record.get("rollout/turns_per_sample") or 1
        also = ", which bounds all turns together and what is put in between," if turns > 1 else ""
        say(
            f"warning: more than half of the samples were cut off for {steps} steps, {share:.0%} "
            f"of the last one's: --max-new-tokens {max_new_tokens}{also} may be too small"
        )
    return steps


MAX_SKIPPED = 3  # updates in a row


def skipped_in_a_row(norms: list[float], step: int, before: int) -> tuple[int, str]:
    """How many updates in a row were skipped by the end of a step, given those before it, and why
    the run stops here, or "": MAX_SKIPPED in a row is no accident. Those of this step are named."""
    longest, skipped = before, []
    for update, norm in enumerate(norms, 1):
        before = 0 if math.isfinite(norm) else before + 1
        longest = max(longest, before)
        skipped += [str(update)] if before else []
    if skipped:
        say(
            f"warning: step {step}: update {', '.join(skipped)} of {len(norms)} is skipped: its "
            "gradient is not finite"
        )
    why = (
        f"the gradients of {longest} updates in a row were not finite; they were skipped, so the "
        "weights are those before them. Go on with a lower --lr, or --param-dtype float32"
    )
    return before, why if longest >= MAX_SKIPPED else ""


def log_validations(
    hub, decode: Callable[[list[int]], str], run_dir: Path, trackers
) -> dict[int, float]:
    """The scores of the validations that were finished since the last call."""
    scores = {}
    for done in hub.take_validations():
        record = log_validation(done, hub.validation, decode, run_dir)
        trackers.log(record, "version")
        scores[done.version] = record[f"validation/avg@{hub.validation.num_samples}"]
    return scores


# ---- elsewhere -----------------------------------------------------------------------------------
class Trackers:
    """Weights & Biases (--wandb-project) and TensorBoard (--tensorboard), where they are asked for.

    start: the step that the run goes on from. What comes after it is made again, and is nowhere
    twice: TensorBoard is told to drop it; W&B, which cannot, goes on as the run it was, and is not
    sent again what it has. Its id, and the last step and version that it was sent, are in
    runs/NAME/wandb.json. Raises: SystemExit when W&B cannot be started.
    """

    def __init__(self, cfg, start: int = 0):
        self.board = self.wandb = None
        if cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(cfg.run_dir / "tensorboard"), purge_step=start or None)
            for record in read_jsonl(cfg.run_dir / "validation.jsonl"):
                if record["version"] == start > 0:  # dropped as well, and it is not made again
                    self._draw(record, "version")
        if cfg.wandb_project:
            import wandb

            self.sent_path = cfg.run_dir / "wandb.json"
            known = json.loads(self.sent_path.read_text()) if self.sent_path.exists() else {}
            self.sent = {"id": secrets.token_hex(4), "step": -1, "version": -1, **known}
            try:
                self.wandb = wandb.init(
                    project=cfg.wandb_project,
                    group=cfg.name,
                    name=cfg.name,
                    id=self.sent["id"],
                    resume="allow",
                    dir=cfg.run_dir,
                    config=json.loads(cfg.text),
                )
            except wandb.errors.Error as e:
                raise SystemExit(
                    f"train_cispo.py: error: --wandb-project {cfg.wandb_project}: {e}"
                ) from None
            for names, axis in [
                ("train/*", "step"),
                ("timing/*", "step"),
                ("weights/*", "step"),
                ("rollout/*", "step"),
                ("validation/*", "version"),
            ]:
                self.wandb.define_metric(names, step_metric=axis)
            if self.sent["step"] >= start:
                say(
                    f"W&B has the steps up to {self.sent['step']} of an earlier attempt: they are "
                    "not sent again"
                )

    @staticmethod
    def check(cfg) -> None:
        """Raises: ValueError when a package or W&B's login is missing."""
        for wanted, flag, package in [
            (cfg.tensorboard, "--tensorboard", "tensorboard"),
            (cfg.wandb_project, "--wandb-project", "wandb"),
        ]:
            if wanted and importlib.util.find_spec(package) is None:
                raise ValueError(
                    f"{flag}: the package {package} is not installed; pip install '.[track]'"
                )
        if cfg.wandb_project and not cfg.dry_run and int(os.environ.get("RANK", 0)) == 0:
            import wandb

            flag = f"--wandb-project {cfg.wandb_project}"
            try:  # whether there is a key, not whether it is good: that would need the network
                if wandb.setup().settings.mode in ("offline", "disabled") or wandb.login(
                    prompt=False, verify=False
                ):
                    return
            except wandb.errors.Error as e:
                raise ValueError(f"{flag}: {e}") from None
            raise ValueError(
                f"{flag}: there is no login to Weights & Biases; `wandb login`, "
                "WANDB_API_KEY=..., or WANDB_MODE=offline"
            )

    def _draw(self, record: dict, axis: str) -> None:
        for name, value in numbers(record).items():
            self.board.add_scalar(name, value, record[axis])

    def log(self, record: dict, axis: str, kept: list[dict] | None = None) -> None:
        """axis: the field that the values are drawn over, step or version. kept: the step's
        samples, for W&B's table."""
        if self.board is not None:
            self._draw(record, axis)
        if self.wandb is not None and record[axis] > self.sent[axis]:
            table = {"samples": self._table(kept)} if kept else {}
            self.wandb.log({axis: record[axis], **numbers(record), **table})
            self.sent[axis] = record[axis]
            (tmp := self.sent_path.with_suffix(".tmp")).write_text(json.dumps(self.sent))
            tmp.replace(self.sent_path)

    @staticmethod
    def _table(kept: list[dict]):
        import wandb

        columns = ["step", "prompt", "completion", "answer", "reward", "tokens", "truncated"]
        # an answer may be of any type, a column has one
        rows = [[s[n] if n != "answer" else str(s[n]) for n in columns] for s in kept]
        return wandb.Table(columns, rows)

    def close(self) -> None:
        """Returns once everything is on disk or sent."""
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            import wandb

            self.wandb.finish()
            wandb.teardown()  # finish() returns before W&B's own process has written its file


def lost(hub: dict) -> str:
    """What of the data was not trained on, "" for nothing. hub: its books in a record."""
    counts = hub["counts"].items()
    kinds = [f"{n} {name.removeprefix('reward_')}" for name, n in counts if name[:7] == "reward_"]
    aside = f"{hub['set_aside']} of {hub['handed_out']} prompts were set aside, not trained on"
    rewards = f"samples without a reward since the last start: {', '.join(kinds)}"
    return "; ".join([aside] * bool(hub["set_aside"]) + [rewards] * bool(kinds))


def sum_up(run_dir: Path, version: int, scores: dict[int, float]) -> None:
    """The picture and the last lines. version: of the weights, which are the run's result."""
    records = watch.read_metrics(run_dir)
    first, last = ([r["train/reward"] for r in part] for part in (records[:5], records[-5:]))
    if records:
        say(
            f"mean reward of the first {len(first)} steps {sum(first) / len(first):.3f}, "
            f"of the last {len(last)} {sum(last) / len(last):.3f}"
        )
        if what := lost(records[-1]["hub"]):
            say(f"warning: {what}; {run_dir / 'rollout.log'} or the nodes' own logs name each")
    else:
        say(f"no step was left to train: --max-num-steps are done at step {version}")
    steps = [int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-??????")]
    if (best := best_step({str(v): s for v, s in scores.items()}, steps)) is not None:
        say(
            f"best checkpoint: {run_dir / 'checkpoints' / f'step-{best:06d}'} (score "
            f"{scores[best]:.3f})"
        )
    last = run_dir / "weights" / f"v{version}"
    # not where nodes share no disk
    complete = all(file.exists() for file in checkpoint_files(last))
    what = (
        "opens in transformers and vLLM as it is"
        if complete
        else "a share: the other trainer nodes have the rest"
    )
    say(f"weights: {last} ({what})")
    if records:
        say(f"curves: {watch.plot(run_dir)}")


# ---- the log of a run ----------------------------------------------------------------------------
def write_end(run_dir: Path, step: int, why: str) -> None:
    """Of a run that ends before its last step; step: the one in progress."""
    end = {"time": time.time(), "step": step, "why": " ".join(why.split())[:300]}
    write_text(run_dir / ENDED, json.dumps(end))


class Log:
    """All that a run says, on the console, in its files and to trackers. A context manager.

    It is made on every rank; those that have no data, which is all but rank 0, keep the clock and
    say nothing. `step` is the one in progress, `scores` those of the versions so far, of validation
    or else of training: they tell which checkpoint is best.
    """

    def __init__(self, cfg, rollouts, data, start):
        """start: the step to begin at, and the scores so far. data: as in `Rollouts`."""
        self.cfg, self.rollouts, self.start = cfg, rollouts, start
        self.step, self.scores, self.clock = start.step, start.scores, Clock()
        self.metrics: dict[str, torch.Tensor] = {}  # of the updates of this step
        self._norms: list[torch.Tensor] = []  # of their gradients
        self.speaks = data is not None
        self._rewards: list[float] = []  # of the steps since the last checkpoint
        self._skipped = self._without_signal = self._cut_off = 0  # updates and steps, in a row
        self._done = threading.Event()
        if self.speaks:
            self.prompts, self.codec, _ = data
            self.trackers = Trackers(cfg, start.step)

    def __enter__(self) -> "Log":
        if self.speaks:
            node_log = self.rollouts.node.log_path if self.rollouts.node else None
            args = (self._now, node_log, self._done)
            threading.Thread(target=say_something, args=args, daemon=True).start()
        return self

    def __exit__(self, kind, error, _) -> None:
        self._done.set()
        if self.speaks:
            if kind:
                why = f"{kind.__name__}: {error}".removesuffix(": ")
                write_end(self.cfg.run_dir, self.step, why)
            self.trackers.close()

    def steps(self) -> Iterator[int]:
        """The steps of the run, with a progress bar on a terminal."""
        hide = None if self.speaks else True  # None: tqdm shows it on a terminal only
        steps = range(self.start.step, self.cfg.max_num_steps)
        for self.step in tqdm(steps, desc="steps", disable=hide, dynamic_ncols=True):
            self.clock, self.metrics, self._norms = Clock("exposed_generation"), {}, []
            yield self.step

    def begin(self, part: str) -> None:
        """The next part of the step, for the clock."""
        self.clock.begin(part)

    def add(self, metrics: dict[str, torch.Tensor], grad_norm: torch.Tensor) -> None:
        """An update's partial metrics, which come to those of the step, and its gradient's norm."""
        self.metrics = merge(self.metrics, metrics)
        self._norms.append(grad_norm)

    def _now(self) -> str:
        """What goes on."""
        waiting = self.clock.doing == "exposed_generation"
        come = f": {self.rollouts.describe()}" if waiting else ""
        return f"step {self.step}, {self.clock.says()}{come}"

    def _decode(self, ids: list[int]) -> str:
        return self.codec.decode(ids, special=True)

    def begin_run(self, model) -> None:
        self._model, self._ranks = model.cfg, model.mesh.world_size
        on_gpu = model.mesh.device.type == "cuda"
        self._device = torch.cuda.get_device_name(model.mesh.device) if on_gpu else "cpu"
        if self.speaks:
            (self.cfg.run_dir / ENDED).unlink(missing_ok=True)  # of the run that this one resumes
            alg, size = self.cfg.algorithm, model.cfg.num_parameters
            say(
                f"{size / 1e6:.1f} M parameters on {model.mesh.world_size} rank(s), hub at "
                f"{self.rollouts.hub.url}, {name_of_loss(alg)}, results in {self.cfg.run_dir}"
            )

    def record(
        self, groups, lr: float, metrics: dict[str, torch.Tensor], counts, of_tokens
    ) -> None:
        """The record of a step. metrics: of all ranks; counts: loss tokens and samples of each
        update; of_tokens: for the samples' log. Where too many updates were skipped,
        `rollouts` is told that the run is to end."""
        if not self.speaks:
            return
        values = fetch({**metrics, "grad_norms": torch.stack(self._norms)})  # sync: one per step
        norms = values.pop("grad_norms")
        self._skipped, why = skipped_in_a_row(norms, self.step, self._skipped)
        self.rollouts.fail(why)
        hub, run_dir = self.rollouts.hub, self.cfg.run_dir
        counts = [count for count, norm in zip(counts, norms) if math.isfinite(norm)]
        omitted = left_out(groups, self.cfg)
        times = self.clock.seconds()
        waited_s = times["timing/train/exposed_generation"]
        busy_s = times["timing/train/total_step_time"] - waited_s
        lengths = trained_lengths(groups, omitted)
        record = {
            "step": self.step,
            "train/lr": lr,
            **gradient_metrics(norms),
            "ordinals": [g.ordinal for g in groups],
            **{f"train/{why}": int(mask_PS.sum()) for why, mask_PS in omitted.items()},
            **rollout_metrics(groups, self.step),
            **self.prompts.by_data_set(groups),
            **update_metrics(values, counts),
            **times,
            **trained(self._model, lengths, self._ranks, busy_s, self._device),
            **self.rollouts.publisher.stats,
            **hub.take_timing(),
            "hub": hub.status(),
        }
        log_step(record, run_dir)
        hub.record = record
        text = (self.prompts, self._decode)
        kept = log_samples(groups, self.step, *text, run_dir, self.cfg.log_samples, of_tokens)
        self.trackers.log(record, "step", kept)
        self._without_signal = count_without_signal(
            record, self._without_signal, self.cfg.reward, run_dir
        )
        self._cut_off = count_cut_off(record, self._cut_off, self.cfg.max_new_tokens)
        self._rewards.append(record["train/reward"])
        self._take_validations()

    def _take_validations(self) -> None:
        self.scores |= log_validations(
            self.rollouts.hub, self._decode, self.cfg.run_dir, self.trackers
        )

    def score(self, version: int) -> None:
        """The score of a version that a checkpoint is written of: without validation it is the mean
        reward since the checkpoint before."""
        if self._rewards and not self.cfg.validates(0):
            self.scores[version] = sum(self._rewards) / len(self._rewards)
            self._rewards = []

    def end(self, checkpoints: Path) -> None:
        """The last validations, and why the run ends early if it does."""
        if not self.speaks:
            return
        self._take_validations()
        if stop := self.rollouts.stop:
            state = "before any was trained, so there is no state to go on from"
            if whole(checkpoints):
                state = f"its state is in {checkpoints} (go on with --resume auto)"
            say(f"stopped at step {self.step}, {state}: {stop.why}")
            write_end(self.cfg.run_dir, self.step, stop.why)

    def sum_up(self) -> None:
        if self.speaks:
            version = max(self.start.step, self.cfg.max_num_steps)
            sum_up(self.cfg.run_dir, version, self.scores)
