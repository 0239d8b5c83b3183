"""Train a Qwen3-MoE with CISPO, asynchronously, against vLLM.

    python train_cispo.py --use-cispo                            # this machine: a tiny model, two minutes
    torchrun --nproc-per-node 2 train_cispo.py --use-cispo       # the same on two ranks
    python train_cispo.py --no-use-cispo                         # the same with PPO's clip, for an A/B
    python train_cispo.py --no-local-rollout --hub-host HOST --hub-port 8790    # vLLM on other machines, where
    CISPO_TOKEN=... python rollout.py http://HOST:8790                          # this runs

One step:
    1. wait for num_prompts_per_step groups of num_generations_per_prompt samples; vLLM is already on the next ones
    2. the trainer's own log-probs of all samples ("prev"), fixed for the step; with a KL penalty the reference's too
    3. for each batch of train_global_batch_size samples: forward, CISPO loss, backward
    4. sum of gradients over ranks, clip, AdamW
    5. publish the weights: written in the background, fetched, verified and loaded by every rollout node
    6. log

CISPO: MiniMax-M1, arXiv:2506.13585. Flag and metric names are NeMo RL's where it has one.
"""

import dataclasses
import itertools
import json
import math
import os
import secrets
import shlex
import socket
import sys
import tempfile
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from tqdm import tqdm

import dry_run
import loss
import report
import task
from batch import MicroBatch, left_out, pack_batch, unpack_batch
from checkpoint import (
    Checkpointer,
    CheckpointError,
    begin,
    checkpoints_to_try,
    hold,
    load_state_tensors,
    model_digest,
    share_model,
    whole,
)
from flags import help_text, parse_flags, piped
from hub import Hub, check_address
from ledger import Group, Ledger
from metrics import LOG_RATIO_MAX, expert_load, expert_tokens
from model import ModelConfig, Qwen3MoE
from parallel import Mesh, ShardedAdamW, all_reduce, broadcast_bytes, join_ranks, make_mesh, reduce_metrics
from report import Clock, fetch, log_step, merge, rollout_metrics, say, say_something, sum_up, update_metrics
from rewards import check_answers, reward_digest, reward_sources
from rollout import RolloutConfig
from validation import Validation, due_at_start, read_scores
from waits import Signals, Wait, WaitOver, agree, stop_word
from weights import (
    INDEX,
    STATIC_FILES,
    Publisher,
    WeightsError,
    checkpoint_files,
    cores,
    digest,
    load_hf,
    stored_tensors,
)
from workers import LocalRollout, check_reward

# ---- config --------------------------------------------------------------------------------------------------
Preset = Literal["tiny", "add", "qwen3-0.6b", "qwen3-30b-a3b", "scalerl"]
Truncation = Literal["tis", "icepop", "seq-mask-tis"]


TINIEST = 1e-30  # of what must be above 0
BOUNDS = {  # of numbers that have no other rule in Config.validate
    "hub_port": (0, 65_535), "lr": (0, 1e30), "lr_warmup_steps": (0, math.inf), "weight_decay": (0, 1e30),
    "adam_beta1": (0, 1 - 1e-9), "adam_beta2": (0, 1 - 1e-9), "adam_eps": (TINIEST, 1e30),
    "max_grad_norm": (TINIEST, math.inf), "checkpoint_every_steps": (0, math.inf), "cpu_threads": (0, 4096),
    "warm_start_accuracy": (0, 0.99), "temperature": (-math.inf, 1e30), "val_temperature": (-math.inf, 1e30),
    "gpu_memory_gib": (TINIEST, math.inf),
    **dict.fromkeys(("max_num_steps", "num_prompts_per_step", "train_global_batch_size", "max_new_tokens",
                     "keep_versions", "full_version_every", "keep_checkpoints", "max_prompt_failures"), (1, math.inf)),
    **dict.fromkeys(("lease_timeout_s", "batch_timeout_s", "collective_timeout_s", "val_timeout_s"), (1e-3, 1e9)),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Every flag. `--preset` gives the values below; other flags override it."""

    # the run
    preset: Preset = "tiny"  # where the values of all other flags come from
    name: str = "tiny"  # results go to runs/NAME
    seed: int = 0  # of the prompts' order, the warm start and vLLM's sampling
    max_num_steps: int = 160  # rollout batches to train on
    wandb_project: str = ""  # metrics go to this project of Weights & Biases, too
    tensorboard: bool = False  # and to runs/NAME/tensorboard
    # model and task
    model: str = ""  # Qwen3 or Qwen3-MoE checkpoint: a directory or a hub id; "" makes a tiny one for --task
    task: str = "reverse"  # built-in task, a name in TASKS of task.py, unless --data is given
    warm_start_accuracy: float = 0.36  # of the tiny model: supervised until a sample is right this often
    # data
    data: str = ""  # JSONL, JSON, CSV, Parquet file, saved data set, or NAME or NAME:CONFIG on the Hub; "": --task
    data_split: str = "train"  # of it; train[:5000] is one too
    prompt_column: str = ""  # text or chat; "": prompt, messages, conversations, problem or question, if it is one
    answer_column: str = ""  # "": answer or expected_answer, whichever there is
    system_prompt: str = ""  # text or file: first message of every chat that has none
    prompt_template: str = "{problem}"  # text or file; {problem} or {}: a prompt that is text; {NAME}: of that column
    chat_template: bool = True  # text is a user's message in the tokenizer's chat template; off: raw, as where none is
    max_input_seq_length: int | None = None  # longer prompts are left out; unset: what leaves room for max_new_tokens
    no_resampling_pass_rate: float | None = None  # a prompt whose samples have this mean reward is not sampled again
    # rewards
    reward: str = "exact"  # exact, numeric, math, or FILE.py:FUNCTION(completion, example) -> float, see rewards.py
    overlong_filter: bool = False  # samples that were cut off leave the loss, its denominators too (unless all were)
    overlong_buffer_tokens: int = 0  # in the last so many tokens that a sample may have, its reward goes down (DAPO)
    overlong_penalty: float = 1.0  # by so much at the very last
    interrupt_at_tokens: int = 0  # a sample this long that still thinks is told to answer (ScaleRL); 0: never
    interrupt_text: str = "\n\nI have to stop thinking and answer now.\n</think>\n\n"  # text or file; not trained on
    # rollouts
    num_prompts_per_step: int = 16  # prompts in a step
    num_generations_per_prompt: int = 16  # samples of each
    max_new_tokens: int = 8  # of a sample
    max_total_sequence_length: int = 64  # prompt and sample, as vLLM's --max-model-len; if unset, max_new_tokens adds
    temperature: float = 1.0  # of sampling; the trainer's log-probs are taken at it too
    max_trajectory_age_steps: int = 1  # no token trained is from weights older than this; 0 is synchronous
    recompute_kv_cache_after_weight_updates: bool = True  # of what is in flight; off: old keys and values stay
    local_rollout: bool = True  # start rollout.py on this machine; off: wait for nodes that are started elsewhere
    rollout_args: str = ""  # further flags for the process started here, as in `python rollout.py --help`
    hub_host: str = "127.0.0.1"  # address that the rollout nodes reach; they are the only ones to call it
    hub_port: int = 0  # 0 picks a free one
    lease_timeout_s: float = 600.0  # a prompt not answered by then is handed out again
    max_prompt_failures: int = 5  # a prompt that fails this often, on whatever node, is set aside and named
    batch_timeout_s: float = 1800.0  # longest wait for a batch before the run stops, its state saved
    collective_timeout_s: float = 600.0  # longest wait of a rank for another in a collective
    # validation: held-out prompts, answered beside the training ones
    val_every_steps: int = 40  # and at the start and the end; 0: never. It needs --val-data or a built-in task
    val_data: str = ""  # as --data; "": 64 examples of the built-in task that are not trained on
    val_data_split: str = "train"  # of it; test[:500] is one too
    val_samples: int = 4  # of each prompt: the k of avg@k and pass@k
    val_pass_threshold: float = 1.0  # a sample with at least this reward solves its prompt: what pass@k counts
    val_temperature: float = 1.0  # of sampling; 0: greedy, with one sample
    val_timeout_s: float = 600.0  # longest wait for the last one at the end of the run
    # loss
    use_cispo: bool = True  # CISPO; --no-use-cispo is the PPO/GRPO clipped loss
    ratio_clip_min: float | None = None  # ratio is clamped from 1 - this; unset: 1.0 with CISPO, else 0.2
    ratio_clip_max: float | None = None  # ratio is clamped to 1 + this; unset: 5.0 with CISPO, else 0.2
    ratio_clip_c: float | None = None  # PPO dual clip: where the advantage is negative, ratio at most this
    ratio_anchor: Literal["prev", "sampler"] = "prev"  # ratio against: trainer at the step's start, or vLLM (no pass)
    disable_ppo_ratio: bool = False  # REINFORCE: -A * log pi, no ratio
    force_on_policy_ratio: bool = False  # ratio 1 with PPO's gradient and no prev pass: one update per rollout batch
    sequence_level_importance_ratios: bool = False  # GSPO: geometric mean of the sequence's ratios, at each token
    use_importance_sampling_correction: bool = True  # weigh tokens by exp(prev - gen), trainer against sampler
    truncated_importance_sampling_type: Truncation | None = None  # clamp that weight; drop tokens; drop sequences
    truncated_importance_sampling_ratio: float | None = None  # whose weight (of sequences: geometric mean) is above
    truncated_importance_sampling_ratio_min: float | None = None  # or below this; tis needs none
    reference_policy_kl_penalty: float = 0.0  # times KL to the starting model; as in the recipe (the seed's code: 0.01)
    reference_policy_kl_type: Literal["k1", "k2", "k3"] = "k3"  # estimator of it
    kl_input_clamp_value: float = 20.0  # bound of the log-ratio in it
    kl_output_clamp_value: float = 10.0  # bound of its value
    use_on_policy_kl_approximation: bool = False  # weigh it by exp(logprob - gen)
    use_kl_in_reward: bool = False  # take it from each token's advantage, once a step, rather than add it to the loss
    positive_example_nll_weight: float = 0.0  # times -log pi, a mean over the tokens of samples with reward above 0
    token_level_loss: bool = True  # mean over the batch's tokens; else mean over samples of their token mean
    prompt_level_loss: bool = False  # mean over prompts of their token mean (ScaleRL)
    use_leave_one_out_baseline: bool = True  # compare a sample with its siblings only
    normalize_rewards: bool = True  # divide advantages by a standard deviation
    advantage_std: Literal["group", "batch"] = "group"  # which: of the sample's group, or of the step's advantages
    drop_zero_variance: bool = False  # groups of equal rewards leave the batch, its denominators too (unless all are)
    # layout and memory: ranks = data parallel x tp, tp fastest
    tp: int = 1  # tensor parallel degree: attention, dense MLPs and vocabulary, with sequence parallelism
    ep: int = 1  # expert parallel degree: whole experts, over ep consecutive ranks (across tp and data parallel)
    activation_checkpointing: bool = False  # keep each block's input only, and run the block again in backward
    param_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of forward and backward; auto: bfloat16 on CUDA
    grad_dtype: Literal["float32", "bfloat16"] = "float32"  # in which micro-batches and ranks are added up
    fp32_lm_head: bool = False  # the vocabulary projection in fp32, in the trainer and in vLLM
    # plan
    dry_run: bool = False  # print all flags, and memory, traffic and FLOPs of a layout; status 2 if it does not fit
    dry_run_ranks: int = 1  # of that layout; if torchrun starts several, as many
    gpu_memory_gib: float = 79.6  # that it must fit; of an 80 GB H100
    mfu: float = 0.2  # model FLOPs utilization that its tokens/s are given for
    # training
    train_global_batch_size: int = 64  # samples of an optimizer update
    max_tokens_per_micro_batch: int = 4096  # packed into one forward
    logprob_chunk_size: int = 512  # tokens whose logits exist at once; 0: as many as fill 256 MB
    lr: float = 1e-4  # AdamW
    lr_warmup_steps: int = 0  # rollout batches of linear warm-up from lr / 10
    weight_decay: float = 0.01  # AdamW
    adam_beta1: float = 0.9  # AdamW
    adam_beta2: float = 0.95  # AdamW
    adam_eps: float = 1e-8  # AdamW
    max_grad_norm: float = 1.0  # over all parameters
    freeze_moe_router: bool = True  # no gradient for the routers
    router_replay: bool = False  # the updates of a step use the experts that the trainer chose at its start
    compile: bool = True  # torch.compile the model's blocks and the loss; off computes the same, eagerly
    publish_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of published weights; auto: bfloat16 on CUDA
    full_version_every: int = 16  # versions; those between are written as what changed, where that is less
    keep_versions: int = 4  # published versions kept on disk, at least; more where the last whole one is older
    checkpoint_every_steps: int = 20  # 0: only when the run is asked to stop
    keep_checkpoints: int = 2  # the last ones; besides, the one with the best validation, or without it reward
    resume: str = "off"  # auto: from the last whole checkpoint of runs/NAME, if there is one; or a checkpoint directory
    cpu_threads: int = 0  # of each trainer process on a CPU; 0: half of the cores in all, vLLM has the other half

    @property
    def algorithm(self) -> loss.Algorithm:
        """The loss's part of the flags, with the clip's bounds resolved."""
        low, high = (1.0, 5.0) if self.use_cispo else (0.2, 0.2)
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(loss.Algorithm)}
        values["ratio_clip_min"] = low if self.ratio_clip_min is None else self.ratio_clip_min
        values["ratio_clip_max"] = high if self.ratio_clip_max is None else self.ratio_clip_max
        return loss.Algorithm(**values)

    @property
    def samples_per_step(self) -> int:
        return self.num_prompts_per_step * self.num_generations_per_prompt

    @property
    def max_prompt_tokens(self) -> int:
        """Of a prompt that is sampled from; a long one leaves its samples less than max_new_tokens."""
        room, most = self.max_total_sequence_length, self.max_input_seq_length
        return room - self.max_new_tokens if most is None else min(most, room - 1)

    @property
    def real_model(self) -> bool:
        """Whether --model is one of the Hub, or has more than 50 M parameters by its config.json."""
        if not Path(self.model).is_dir():
            return "/" in self.model
        shapes = dry_run.parameter_classes(ModelConfig.from_dir(self.model), 1, 1, 1) if self.model else []
        return sum(c.numel for c in shapes) > 50e6

    @property
    def run_dir(self) -> Path:
        return Path("runs") / self.name

    @property
    def text(self) -> str:
        """JSON, for the console and runs/NAME/config.json."""
        resolved = {**dataclasses.asdict(self.algorithm), "max_input_seq_length": self.max_prompt_tokens}
        return json.dumps({**dataclasses.asdict(self), **resolved}, indent=1)

    def validates(self, version: int) -> bool:
        """Whether a validation begins under this version, the one that the run starts with aside."""
        every = self.val_every_steps if self.val_data or not self.data else 0
        return bool(every) and (version % every == 0 or version == self.max_num_steps)

    def warnings(self) -> list[str]:
        """What is allowed, and hardly meant."""
        alg, found = self.algorithm, []
        if alg.use_cispo and alg.ratio_anchor == "prev" and self.samples_per_step == self.train_global_batch_size:
            found.append("one update per rollout batch, so every CISPO weight is exactly 1; "
                         "lower --train-global-batch-size for several, or use --ratio-anchor sampler")  # fmt: skip
        if alg.use_cispo and (alg.ratio_clip_min, alg.ratio_clip_max) == (0.2, 0.2):
            found.append("CISPO with PPO's bounds 0.2/0.2 weighs no token below 0.8 or above 1.2; "
                         "its own are --ratio-clip-min 1 --ratio-clip-max 5")  # fmt: skip
        if self.val_every_steps and self.data and not self.val_data:
            found.append("--data without --val-data: there is no validation; the reward names the best checkpoint")
        if self.lr > 1e-5 and self.real_model:
            found.append(f"--lr {self.lr:g} is far above what a model of this size takes, about 1e-6; "
                         f"{self.model} may soon answer worse than it did")  # fmt: skip
        return found

    def validate(self) -> None:
        """Raises: ValueError with one line that names the value, the limit and the flag."""
        for name, value in dataclasses.asdict(self).items():
            low, high = BOUNDS.get(name, (-math.inf, math.inf))
            if isinstance(value, int | float) and not low <= value <= high:  # nor is nan between them
                least = "above 0" if low == TINIEST else f"at least {low:g}" if low > -math.inf else "a number"
                most = f" and at most {high:g}" if high < math.inf else ""
                most += " (exclusive)" if high < math.inf and high < float(f"{high:g}") else ""
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be {least}{most}")
        batch, alg = self.train_global_batch_size, self.algorithm
        kind = self.truncated_importance_sampling_type
        low, high = self.truncated_importance_sampling_ratio_min, self.truncated_importance_sampling_ratio
        cispo, corrected = self.use_cispo, self.use_importance_sampling_correction
        bounded = "--truncated-importance-sampling-"
        for wrong, why in [
            (cispo and self.disable_ppo_ratio,
             "--disable-ppo-ratio: CISPO's weight is that ratio; leave it out or use --no-use-cispo"),
            (cispo and self.force_on_policy_ratio,
             "--force-on-policy-ratio: CISPO's weight would be 1; leave it out or use --no-use-cispo"),
            (cispo and self.sequence_level_importance_ratios,
             "--sequence-level-importance-ratios: CISPO's weight is the token's; leave it out or use --no-use-cispo"),
            (self.sequence_level_importance_ratios and self.token_level_loss,
             "--sequence-level-importance-ratios: needs --no-token-level-loss"),
            (self.prompt_level_loss and not self.token_level_loss,
             "--prompt-level-loss: a mean over a prompt's tokens; it excludes --no-token-level-loss"),
            (self.disable_ppo_ratio and (self.force_on_policy_ratio or self.ratio_clip_c is not None),
             "--disable-ppo-ratio: leaves no ratio for --force-on-policy-ratio or --ratio-clip-c"),
            (self.force_on_policy_ratio and self.samples_per_step != batch,
             f"--force-on-policy-ratio: only the first update is on-policy; --train-global-batch-size {batch} must be "
             f"the step's {self.samples_per_step} samples"),
            (self.ratio_anchor == "sampler" and self.force_on_policy_ratio,
             "--ratio-anchor sampler: a ratio that --force-on-policy-ratio sets to 1 has no anchor"),
            (self.ratio_anchor == "sampler" and corrected,
             "--ratio-anchor sampler: its ratio holds exp(prev - gen) already; use "
             "--no-use-importance-sampling-correction, or it counts twice"),
            (self.max_trajectory_age_steps > 0 and self.ratio_anchor == "prev" and not corrected,
             f"--max-trajectory-age-steps {self.max_trajectory_age_steps}: tokens of older weights need "
             "--use-importance-sampling-correction or --ratio-anchor sampler; without them it must be 0"),
            (kind is not None and not corrected,
             f"{bounded}type {kind}: bounds a weight that --no-use-importance-sampling-correction turns off"),
            (kind is None and (low, high) != (None, None),
             f"{bounded}ratio {high}, {bounded}ratio-min {low}: without {bounded}type they do nothing"),
            (kind is not None and (high is None or high <= 0), f"{bounded}ratio {high}: must be above 0 with a type"),
            (kind in ("icepop", "seq-mask-tis") and low is None, f"{bounded}ratio-min: {kind} needs one"),
            (None not in (kind, low, high) and not 0 <= low <= high,
             f"{bounded}ratio-min {low}: must be in 0..{bounded}ratio {high}"),
            (kind == "seq-mask-tis" and self.sequence_level_importance_ratios,
             f"{bounded}type seq-mask-tis: weighs tokens; it excludes --sequence-level-importance-ratios"),
            (self.reference_policy_kl_penalty < 0,
             f"--reference-policy-kl-penalty {self.reference_policy_kl_penalty}: must be at least 0"),
            (not 0 < self.kl_input_clamp_value <= LOG_RATIO_MAX,
             f"--kl-input-clamp-value {self.kl_input_clamp_value}: must be above 0 and at most "
             f"{LOG_RATIO_MAX:g}, or exp of it overflows"),
            (self.kl_output_clamp_value <= 0,
             f"--kl-output-clamp-value {self.kl_output_clamp_value}: must be above 0"),
            (self.positive_example_nll_weight < 0,
             f"--positive-example-nll-weight {self.positive_example_nll_weight}: must be at least 0"),
            (self.router_replay and not alg.needs_prev,
             "--router-replay: takes the experts of a pass at the step's start, which this loss spares"),
            (self.advantage_std == "batch" and not self.normalize_rewards,
             "--advantage-std batch: --no-normalize-rewards divides by none"),
            (self.use_cispo and self.ratio_clip_c is not None,
             f"--ratio-clip-c {self.ratio_clip_c}: CISPO has no dual clip; leave it out or use --no-use-cispo"),
            (self.use_cispo and not self.token_level_loss,
             "--no-token-level-loss: CISPO's loss is a mean over tokens; leave it out or use --no-use-cispo"),
            (not 0 <= alg.ratio_clip_min <= 1,
             f"--ratio-clip-min {alg.ratio_clip_min}: must be in 0..1, or the weight 1 - ratio_clip_min is negative"),
            (alg.ratio_clip_max < 0, f"--ratio-clip-max {alg.ratio_clip_max}: must be at least 0"),
            (self.ratio_clip_c is not None and self.ratio_clip_c <= 1,
             f"--ratio-clip-c {self.ratio_clip_c}: must be above 1"),
            (self.num_generations_per_prompt < 2,
             f"--num-generations-per-prompt {self.num_generations_per_prompt}: must be at least 2, since a sample is "
             "judged against its group"),
            (self.temperature <= 0, f"--temperature {self.temperature}: must be above 0; greedy samples have no ratio"),
            (self.max_trajectory_age_steps < 0,
             f"--max-trajectory-age-steps {self.max_trajectory_age_steps}: must be at least 0"),
            (min(self.val_every_steps, self.val_temperature) < 0 or self.val_samples < 1,
             f"--val-every-steps {self.val_every_steps}, --val-temperature {self.val_temperature} and --val-samples "
             f"{self.val_samples}: must be at least 0, 0 and 1"),
            (self.val_temperature == 0 and self.val_samples > 1,
             f"--val-samples {self.val_samples}: --val-temperature 0 is greedy, all samples would be the same; use 1"),
            (self.name in ("", ".", "..") or "/" in self.name or not self.name.isprintable()
             or len(self.name.encode()) > 200,
             f"--name {self.name!r}: must be the name of one directory, which will lie in runs/"),
            (self.resume not in ("auto", "off") and not Path(self.resume).is_dir(),
             f"--resume {self.resume!r}: auto, off, or a checkpoint directory"),
            (self.logprob_chunk_size < 0, f"--logprob-chunk-size {self.logprob_chunk_size}: must be at least 0"),
            (batch > 0 and self.samples_per_step % batch != 0,
             f"--train-global-batch-size {batch} does not divide the step's {self.num_prompts_per_step} prompts x "
             f"{self.num_generations_per_prompt} samples = {self.samples_per_step}"),
            (self.max_tokens_per_micro_batch < self.max_total_sequence_length,
             f"--max-tokens-per-micro-batch {self.max_tokens_per_micro_batch} is below --max-total-sequence-length "
             f"{self.max_total_sequence_length}: one sample would not fit"),
            (self.tp > 0 and self.max_tokens_per_micro_batch % self.tp != 0,
             f"--max-tokens-per-micro-batch {self.max_tokens_per_micro_batch} is no multiple of --tp {self.tp}"),
            (self.max_prompt_tokens < 1,
             f"--max-new-tokens {self.max_new_tokens} leaves no room for a prompt in --max-total-sequence-length "
             f"{self.max_total_sequence_length}; --max-input-seq-length would let long ones shorten their samples"),
            (self.max_new_tokens > self.max_total_sequence_length,
             f"--max-new-tokens {self.max_new_tokens} is above --max-total-sequence-length "
             f"{self.max_total_sequence_length}"),
            (not 0 <= self.overlong_buffer_tokens <= self.max_new_tokens,
             f"--overlong-buffer-tokens {self.overlong_buffer_tokens}: must be in 0..--max-new-tokens "
             f"{self.max_new_tokens}"),
            (self.overlong_penalty <= 0, f"--overlong-penalty {self.overlong_penalty}: must be above 0"),
            (not 0 <= self.interrupt_at_tokens < self.max_new_tokens,
             f"--interrupt-at-tokens {self.interrupt_at_tokens}: must be in 0..--max-new-tokens {self.max_new_tokens} "
             "less one"),
            (self.no_resampling_pass_rate is not None and self.no_resampling_pass_rate <= 0,
             f"--no-resampling-pass-rate {self.no_resampling_pass_rate}: must be above 0, or no prompt comes back"),
            (not self.model and self.task not in task.TASKS,
             f"--task {self.task!r}: expected {' or '.join(task.TASKS)}"),
            (bool(self.data) and not self.model, "--data needs --model: the tiny model knows only its own task"),
            (bool(self.model) and not Path(self.model).is_dir() and self.model.startswith((".", "/", "~")),
             f"--model {self.model!r}: no such directory (looked for {Path(self.model).absolute()})"),
        ]:  # fmt: skip
            if wrong:
                raise ValueError(why)


MATH_PROMPT = "Solve this problem. Think step by step, and end with the final answer in \\boxed{}.\n\n{problem}"

PRESET_NOTES = {
    "tiny": "0.5 M parameters learn to reverse five letters: two minutes on a laptop's CPU",
    "add": "the same model, two-digit sums: harder",
    "qwen3-0.6b": "dense Qwen3 on math: one GPU of 80 GB, which vLLM shares, or two of 24 GB, where it has the second",
    "qwen3-30b-a3b": "NeMo RL's CISPO recipe: Qwen3-30B-A3B on math, 16 GPUs train and 8 sample",
    "scalerl": "ScaleRL's algorithm on the same model and GPUs, answers of up to 14k tokens",
}

# NeMo RL's nightly of CISPO (grpo-cispo-mm1-...-3n8g-megatron-cispo.yaml, commit 7ea279a), number by number. Its first
# column: what it is there, where our name differs.
NIGHTLY = Config(
    preset="qwen3-30b-a3b", name="qwen3-30b-a3b", model="Qwen/Qwen3-30B-A3B", seed=42, max_num_steps=10,
    # Its prompt file in other words; one user's message through the chat template, which lets Qwen3 think.
    data="nvidia/OpenMathInstruct-2", prompt_column="problem", answer_column="expected_answer",
    # train_1M less 5 %, of which 128 validate at the start, every 10 steps and at the end, one sample each, not greedy
    data_split="train_1M[5%:]", val_data="nvidia/OpenMathInstruct-2", val_data_split="train_1M[:128]",
    val_every_steps=10, val_samples=1, val_temperature=1.0,
    prompt_template=MATH_PROMPT, reward="math",  # hf_math_verify
    num_prompts_per_step=32, num_generations_per_prompt=16, train_global_batch_size=32,  # 512 samples, 16 updates
    # Prompt and answer share 4096 tokens: a sample may have what its prompt leaves.
    max_total_sequence_length=4096, max_input_seq_length=4096, max_new_tokens=4096, temperature=1.0,
    max_trajectory_age_steps=1, recompute_kv_cache_after_weight_updates=False,
    ratio_clip_min=1.0, ratio_clip_max=5.0, use_importance_sampling_correction=True,  # and no truncation of it
    use_leave_one_out_baseline=True, normalize_rewards=True, reference_policy_kl_penalty=0.0, token_level_loss=True,
    # lr_warmup_iters 10 from lr_warmup_init 3e-8, then constant; once a rollout batch, not once an update
    lr=3e-7, lr_warmup_steps=10, weight_decay=0.01, adam_beta1=0.9, adam_beta2=0.999, adam_eps=1e-8, max_grad_norm=1.0,
    freeze_moe_router=True,
    # From here on ours; the loss does not know of it. There: TP 2, EP 8, no recompute, micro-batches of 4096 tokens,
    # gradients added up in bfloat16 (here in float32). EP 8 stays on a node's NVLink. Nodes: `python rollout.py HUB
    # --vllm-args "--tensor-parallel-size 4 --data-parallel-size 2 --gpu-memory-utilization 0.7"`, as it has two
    # engines of 4 GPUs.
    tp=1, ep=8, activation_checkpointing=True, max_tokens_per_micro_batch=16384, logprob_chunk_size=0,
    local_rollout=False, hub_port=8790, dry_run_ranks=16,
)  # fmt: skip

PRESETS = {
    "tiny": Config(),
    "add": dataclasses.replace(Config(), preset="add", name="add", task="add", max_num_steps=300),
    "qwen3-30b-a3b": NIGHTLY,
    # The recipe on what one has at hand. Sizes and learning rate are ours, nothing is tuned: a fourth of the samples an
    # update, four updates a batch. By --dry-run 15 GiB for the trainer, and 32 for vLLM, which takes 0.4 of its GPU,
    # shared or not; on two GPUs of 24 GB (CUDA_VISIBLE_DEVICES=0,1 --gpu-memory-gib 23) each has one.
    "qwen3-0.6b": dataclasses.replace(
        NIGHTLY, preset="qwen3-0.6b", name="qwen3-0.6b", model="Qwen/Qwen3-0.6B", max_num_steps=200, lr=1e-6,
        val_every_steps=20, train_global_batch_size=128, max_input_seq_length=1024,
        max_new_tokens=3072, ep=1, dry_run_ranks=1,
        max_tokens_per_micro_batch=8192, hub_port=0, local_rollout=True,
        rollout_args="--vllm-args '--gpu-memory-utilization 0.4'",
    ),
    # arXiv:2510.13786, as far as facts about it are at hand: 48 x 16 samples, 8 steps off-policy, one ratio against the
    # sampler bounded at 5 (4, 5 or 8 are the same), means over prompts, std of the batch, groups of equal rewards
    # dropped, prompts solved to 0.9 not sampled again, fp32 logits on both sides, thinking ended by force. Ours: one
    # update a batch, the split of the 16k tokens, model, layout and learning rate, which are the preset's above.
    "scalerl": dataclasses.replace(
        NIGHTLY, preset="scalerl", name="scalerl", max_num_steps=400, val_every_steps=20, num_prompts_per_step=48,
        train_global_batch_size=768, max_trajectory_age_steps=8, ratio_anchor="sampler",
        use_importance_sampling_correction=False, ratio_clip_max=4.0, prompt_level_loss=True,
        use_leave_one_out_baseline=False, advantage_std="batch", drop_zero_variance=True, no_resampling_pass_rate=0.9,
        fp32_lm_head=True, max_total_sequence_length=16384, max_input_seq_length=2048, max_new_tokens=14336,
        interrupt_at_tokens=12288, lease_timeout_s=3600.0,
    ),
}  # fmt: skip


def parse_config(argv: list[str]) -> Config:
    """Flags to a valid Config. Raises: ValueError with one line that says what is wrong."""
    flags = [part for flag in argv for part in (flag.split("=", 1) if flag.startswith("--preset=") else [flag])]
    chosen = [value for flag, value in itertools.pairwise(flags) if flag == "--preset"]
    defaults = PRESETS.get(chosen[-1] if chosen else "tiny", PRESETS["tiny"])  # tyro refuses an unknown one
    if {"-h", "--help"} & set(argv):
        resolved = {**dataclasses.asdict(defaults.algorithm), "max_input_seq_length": defaults.max_prompt_tokens}
        with piped():
            print(help_text(defaults, PRESET_NOTES, resolved))
        sys.exit(0)
    cfg = parse_flags(Config, argv, defaults)
    given = {flag.split("=", 1)[0].replace("_", "-") for flag in argv}
    own = set()  # of a preset's data, whose split, columns and template another data set has not
    if "--data" in given and cfg.data != defaults.data:
        own = {"data_split", "prompt_column", "answer_column", "val_data", "val_data_split"}
        own |= {"prompt_template"} if cfg.reward != defaults.reward else set()
    own = {name for name in own if f"--{name.replace('_', '-')}" not in given}
    cfg = dataclasses.replace(cfg, **{name: getattr(PRESETS["tiny"], name) for name in own})
    if "--max-total-sequence-length" not in given and cfg.max_new_tokens > defaults.max_new_tokens:
        room = defaults.max_total_sequence_length + cfg.max_new_tokens - defaults.max_new_tokens
        cfg = dataclasses.replace(cfg, max_total_sequence_length=room)  # prompts keep theirs
    cfg.validate()
    try:
        parse_flags(RolloutConfig, ["HUB", *shlex.split(cfg.rollout_args)])
    except ValueError as e:
        raise ValueError(f"--rollout-args {cfg.rollout_args!r}: {e}") from None
    report.Trackers.check(cfg)
    reward_sources(cfg.reward)
    template = task.text_of(cfg.prompt_template)
    if template.count("{problem}") > 1 or not task.PLACE.search(template):
        task.split_template(template)  # raises; the rest needs the columns
    task.text_of(cfg.system_prompt)
    if Path(cfg.model).is_dir() and cfg.model:
        try:
            ModelConfig.from_dir(cfg.model)
        except (ValueError, OSError) as e:
            raise ValueError(f"--model {cfg.model}: {e}") from None
    bare = cfg.preset in ("tiny", "add") and not {"--lr", "--max-new-tokens"} <= given
    if bare and not cfg.dry_run and cfg.real_model:
        raise ValueError(f"--model {cfg.model}: --preset {cfg.preset} has a tiny model's --lr {cfg.lr:g} and "
                         f"--max-new-tokens {cfg.max_new_tokens}; begin with --preset qwen3-0.6b or qwen3-30b-a3b, "
                         "whose lr, lengths and recompute fit a real model (your flags win), or give both")  # fmt: skip
    return cfg


def fetch_model(name: str, files: list[str]) -> Path:
    """A model's directory: the one of that name, or what the Hugging Face Hub has of these files."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError) as e:
        where = f"--model {name!r}: no directory {Path(name).absolute()}, nor to be had from the Hub"
        raise task.hub_error(where, e) from None
    if not (path / "config.json").exists():
        raise ValueError(f"--model {name!r}: the repository has no config.json")
    return path


def resolve_model(cfg: Config, rank: int) -> Path:
    """The checkpoint directory to start from: --model, or the tiny one, which rank 0 makes when it is missing.
    Raises: ValueError for one that cannot be trained."""
    if cfg.model:
        # The small files first, since they may be of a model that is not for here; of the large ones the weights alone.
        path = fetch_model(cfg.model, [*STATIC_FILES, INDEX])
        ModelConfig.from_dir(path)
        fetch_model(cfg.model, [*STATIC_FILES, INDEX, *(file.name for file in checkpoint_files(path))])
        return path
    digest = task.task_digest(cfg.task)
    path = Path("checkpoints") / f"tiny-{cfg.task}-{digest}-{cfg.warm_start_accuracy}-seed{cfg.seed}"
    if rank == 0 and not path.exists():
        task.warm_start(path, cfg.task, cfg.seed, cfg.warm_start_accuracy, say)
    return path


def load_examples(cfg: Config) -> task.Examples:
    """The run's data set. Raises: ValueError for one that cannot be read, or has not what the template names."""
    if cfg.data:
        examples = task.read_data(cfg.data, cfg.data_split, cfg.prompt_column, cfg.answer_column)
    else:
        examples = task.Examples(task.task_examples(cfg.task, 20_000, cfg.seed), name=f"--task {cfg.task}")
    examples.template(task.text_of(cfg.prompt_template))
    return examples


def load_held_out(cfg: Config, examples: task.Examples) -> task.Examples | None:
    """The data set of validation. Raises: ValueError as `load_examples` does."""
    if not cfg.validates(0):
        return None
    if not cfg.val_data:
        found = task.held_out_examples(cfg.task, 64, cfg.seed, examples)
        if len(found) < 64:
            say(f"--task {cfg.task}: all but {len(found)} of its prompts are trained on; these validate")
        return task.Examples(found, name=f"--task {cfg.task}")
    held_out = task.read_data(cfg.val_data, cfg.val_data_split, cfg.prompt_column, cfg.answer_column, "--val-data")
    held_out.template(examples.template(task.text_of(cfg.prompt_template)))
    return held_out


def origin_of(cfg: Config, checkpoint: Path, examples: task.Examples, held_out: task.Examples | None) -> dict[str, str]:
    """Digests of what a run is made from, mostly by flag: a resumed run must have the same or say what changed."""
    texts = {name: task.text_of(getattr(cfg, name)) for name in ("system_prompt", "prompt_template", "interrupt_text")}
    files = [checkpoint / name for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")]
    return {
        "data": examples.digest(), "val_data": held_out.digest() if held_out else "", "model": model_digest(checkpoint),
        "reward": reward_digest(cfg.reward), **{name: digest(text.encode()) for name, text in texts.items()},
        "tokenizer": " ".join(digest(file.read_bytes()) for file in files if file.exists()),
    }  # fmt: skip


def load_prompts(cfg: Config, checkpoint: Path, examples: task.Examples, held_out: task.Examples | None = None):
    """The run's prompts, their tokenizer, and the list of held-out examples. Raises: ValueError when none of a data
    set is short enough to be answered, or the checkpoint's tokenizer or its template cannot do it."""
    template = examples.template(task.text_of(cfg.prompt_template))
    codec = task.Codec(checkpoint, task.text_of(cfg.system_prompt), template, cfg.chat_template)
    vocab_size = ModelConfig.from_dir(checkpoint).vocab_size
    if outside := [i for i in task.eos_token_ids(checkpoint) if not 0 <= i < vocab_size]:
        raise ValueError(f"{checkpoint}: eos_token_id {outside[0]} is outside the vocabulary of {vocab_size}: no "
                         "sample would end by it; mend generation_config.json or config.json")  # fmt: skip
    for rows in filter(None, (examples, held_out)):
        for note in rows.notes:
            say(note)
        if rows.num_chats and template != "{problem}":
            say(f"{rows.name}: --prompt-template is for prompts that are text, and {rows.num_chats} are chats")
    interruption(cfg, codec)  # raises what it raises before there is a run
    limit = f"--max-total-sequence-length {cfg.max_total_sequence_length} less --max-new-tokens {cfg.max_new_tokens}"
    if cfg.max_input_seq_length is not None:
        limit = f"--max-input-seq-length {cfg.max_input_seq_length}"
    limit = f"more than {cfg.max_prompt_tokens} tokens, {limit}"

    def too_long(rows: task.Examples, what: str) -> set[int]:
        skip = rows.too_long(codec, cfg.max_prompt_tokens)
        if len(skip) == len(rows):
            raise ValueError(f"no {what} can be used: all {len(skip)} have {limit}")
        if skip:
            say(f"{len(skip)} of {len(rows)} {what}s are left out: they have {limit}")
        return skip

    skip = too_long(examples, "prompt")
    left_out = too_long(held_out, "held-out prompt") if held_out else set()
    val_examples = [held_out[i] for i in range(len(held_out)) if i not in left_out] if held_out else []
    return task.Prompts(examples, cfg.seed, skip), codec, val_examples


def interruption(cfg: Config, codec: task.Codec) -> dict:
    """What a rollout node must know of --interrupt-at-tokens. Raises: ValueError when it leaves no room to answer."""
    if not cfg.interrupt_at_tokens:
        return {}
    ids = codec.tokenizer.encode(task.text_of(cfg.interrupt_text), add_special_tokens=False).ids
    if cfg.interrupt_at_tokens + len(ids) >= cfg.max_new_tokens:
        raise ValueError(f"--interrupt-at-tokens {cfg.interrupt_at_tokens} and the {len(ids)} tokens of "
                         f"--interrupt-text leave nothing of --max-new-tokens {cfg.max_new_tokens}")  # fmt: skip
    return {"interrupt_at": cfg.interrupt_at_tokens, "interrupt_ids": ids}


# ---- one update ----------------------------------------------------------------------------------------------
def micro_batch_logprobs(model, mb: MicroBatch, cfg: Config):
    """log pi and entropy of the sampled tokens, (N padded,), and the experts used, (L, t, K)."""
    hidden_TD, expert_ids = model(mb.tokens_T, mb.cu_seqlens, mb.max_seqlen, mb.expert_ids)
    logprobs, entropy = loss.token_logprobs(
        hidden_TD[mb.rows_N], model.head_weight, mb.targets_N, cfg.temperature, cfg.logprob_chunk_size, cfg.compile,
        model.mesh.tp_group,
    )  # fmt: skip
    return logprobs, entropy, expert_ids


@torch.no_grad()
def fix_for_the_step(updates: list[list[MicroBatch]], step: int, model, reference, cfg: Config) -> None:
    """Fill in what stays as it is during all updates of a step: the tokens' ages, the trainer's own log-probs ("prev"),
    the reference's, and, for router replay, the experts that this pass chose."""
    for mb in (mb for micro_batches in updates for mb in micro_batches):
        mb.age = step - mb.versions
        mb.prev_logprobs = mb.gen_logprobs  # keeps its place where the loss has no use for prev, and the pass is spared
        if cfg.algorithm.needs_prev:
            mb.prev_logprobs, _, expert_ids = micro_batch_logprobs(model, mb, cfg)
        if reference is not None:
            own_experts = dataclasses.replace(mb, expert_ids=None)  # those that are given are the policy's
            mb.ref_logprobs, *_ = micro_batch_logprobs(reference, own_experts, cfg)
            if cfg.use_kl_in_reward:
                kl = loss.kl_estimate(mb.prev_logprobs, mb.ref_logprobs, cfg.algorithm)
                mb.advantages = mb.advantages - cfg.reference_policy_kl_penalty * kl
        mb.expert_ids = expert_ids if cfg.router_replay else None


def train_update(model, optimizer, micro_batches: list[MicroBatch], counts, cfg: Config, policy_loss):
    """One optimizer update on this rank's micro-batches. counts: loss tokens and samples of the update, all ranks.
    Returns metrics as tensors, partial over the dp ranks but for grad_norm; those of an update that was skipped, since
    its gradient is not finite, count for nothing. Without experts nothing waits for the device."""
    num_tokens, num_seqs = counts
    metrics: dict[str, torch.Tensor] = {}
    alg, head, tp_group = cfg.algorithm, model.head_weight, model.mesh.tp_group
    objective = lambda logprobs, *aux: loss.token_loss(logprobs, *aux[:5], alg, *aux[5:])[0]
    optimizer.zero_grad()
    # In fp32 the head's gradient is added to the main one chunk by chunk; else autograd hands it over, as all others.
    head_grad = head.main_grad if head.requires_grad and head.main_grad.dtype.itemsize >= 4 else None
    for mb in micro_batches:
        ref = mb.gen_logprobs if mb.ref_logprobs is None else mb.ref_logprobs  # without a penalty it is not read
        aux = (mb.prev_logprobs, mb.gen_logprobs, mb.advantages, mb.mask, mb.weights)
        rest = (num_tokens, alg, ref, mb.nll_weights, mb.sequence, num_seqs, mb.age, cfg.max_trajectory_age_steps)
        if alg.needs_sequences:  # two passes: the gradient of a token waits for the log-probs of its sequence
            logprobs, entropy, expert_ids = micro_batch_logprobs(model, mb, cfg)
            value, stats = policy_loss(logprobs, *aux, *rest)
            value.backward()
        else:
            hidden_TD, expert_ids = model(mb.tokens_T, mb.cu_seqlens, mb.max_seqlen, mb.expert_ids)
            value, logprobs, entropy = loss.fused_head_loss(
                hidden_TD[mb.rows_N], head, mb.targets_N, objective, (*aux, ref, mb.nll_weights), cfg.temperature,
                cfg.logprob_chunk_size, cfg.compile, tp_group, weight_grad=head_grad,
            )  # fmt: skip
            value.backward()
            _, stats = policy_loss(logprobs, *aux, *rest)
        stats["entropy"] = torch.where(mb.mask, entropy, 0.0).sum() / num_tokens
        if expert_ids is not None:
            stats["expert_tokens"] = expert_tokens(expert_ids, mb.num_tokens, model)
        metrics = merge(metrics, stats)
    if "expert_tokens" in metrics:  # each rank of a tp group has routed its own slice of the tokens
        all_reduce(metrics["expert_tokens"], tp_group)
    grad_norm, nothing = optimizer.step(), {"_min": math.inf, "_max": -math.inf}
    counted = grad_norm.isfinite()
    return {n: torch.where(counted, x, nothing.get(n[-4:], 0)) for n, x in metrics.items()}, grad_norm


MAX_SKIPPED = 3  # updates in a row


def skipped_in_a_row(norms: list[float], step: int, before: int) -> tuple[int, str]:
    """How many updates in a row were skipped by the end of a step, given those before it, and why the run stops here,
    or "": MAX_SKIPPED in a row is no accident. Those of this step are named."""
    longest, skipped = before, []
    for update, norm in enumerate(norms, 1):
        before = 0 if math.isfinite(norm) else before + 1
        longest = max(longest, before)
        skipped += [str(update)] if before else []
    if skipped:
        say(f"warning: step {step}: update {', '.join(skipped)} of {len(norms)} is skipped: its gradient is not finite")
    why = (f"the gradients of {longest} updates in a row were not finite; they were skipped, so the weights are those "
           "before them. Go on with a lower --lr, or --param-dtype float32")  # fmt: skip
    return before, why if longest >= MAX_SKIPPED else ""


# ---- the run -------------------------------------------------------------------------------------------------
def build_model(cfg: Config, model_cfg: ModelConfig, mesh: Mesh, checkpoint: Path) -> Qwen3MoE:
    """This rank's part of the model, with the checkpoint's weights."""
    dtype = resolve_dtype(cfg.param_dtype, mesh.device)
    with torch.device("meta"):  # no memory yet, and no initial values that the checkpoint would replace
        model = Qwen3MoE(model_cfg, mesh, cfg.activation_checkpointing).to(dtype)
        if cfg.fp32_lm_head:
            head = model.model["embed_tokens"] if model_cfg.tie_word_embeddings else model.lm_head
            head.to(torch.float32)
    model.to_empty(device=mesh.device)
    load_hf(model, checkpoint)
    if cfg.freeze_moe_router:
        for name, p in model.named_parameters():
            p.requires_grad_(not name.endswith("mlp.gate.weight"))
    if cfg.compile:
        model.compile_blocks()
    return model


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    return getattr(torch, {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(name, name))


def wait_for_batch(hub: Hub, version: int, cfg: Config, rollout: LocalRollout | None) -> tuple[list[Group] | None, str]:
    """The groups of a step and the word "train", or None and why the run stops here: the deadline, a signal, or
    rollouts that cannot be kept alive."""
    wait, status = Wait("batch", cfg.batch_timeout_s), {}
    try:
        while not (stop := Signals.stop or stop_word()):
            batch = hub.next_batch(version, timeout_s=0.5)
            for line in hub.take_news():
                say(line)
            if batch:
                # The hub never hands over a token older than the bound; this is where it would do harm.
                oldest = min(g.oldest_version for g in batch)
                assert version - oldest <= cfg.max_trajectory_age_steps, f"a token of v{oldest} at step {version}"
                return batch, "train"
            status = hub.status()
            if rollout is not None:
                rollout.keep(status["taken"] + status["buffered"], say)
            wait.check(f"step {version}, hub: {json.dumps(status)}")
    except RuntimeError as e:
        return None, str(e)
    return None, stop


def wait_for_validation(hub: Hub, cfg: Config, rollout: LocalRollout | None) -> None:
    """At the end of the run: until the last held-out prompt is answered, or it takes too long."""
    wait, why = Wait("validation", cfg.val_timeout_s), ""
    try:
        while (status := hub.status())["validation"]["rounds"] and not (why := Signals.stop):
            wait.check(json.dumps(status["validation"]))
            if rollout is not None:
                rollout.keep(status["taken"] + status["validation"]["answered"], say)
            time.sleep(0.1)  # polling another thread
    except RuntimeError as e:  # the training is done and saved: it is not lost for want of a score
        why = str(e)
    if why:
        say(f"the last validation is not finished: {why}")


def about(cfg: Config, hub: Hub, scores: dict[int, float], origin: dict) -> dict:
    """Rank 0's part of a checkpoint. The scores, of validation or else of training, say which checkpoint is best."""
    unscored = [version for version in hub.validation.begun if version not in scores]
    return {"ledger": hub.ledger_state(), "config": dataclasses.asdict(cfg), "scores": scores, "unscored": unscored,
            "origin": origin}  # fmt: skip


def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up from lr / 10 over lr_warmup_steps rollout batches, then constant. It moves once per batch, not
    per update, as in the seed system."""
    done = min(1.0, step / cfg.lr_warmup_steps) if cfg.lr_warmup_steps else 1.0
    return cfg.lr * (0.1 + 0.9 * done)


def start_hub(cfg: Config, checkpoint: Path, data, vocab_size: int, device) -> Hub:
    """The hub with the run's prompts."""
    prompts, codec, held_out = data
    dtype = str(resolve_dtype(cfg.publish_dtype, device)).removeprefix("torch.")
    run = {
        "num_generations": cfg.num_generations_per_prompt, "max_new_tokens": cfg.max_new_tokens, "seed": cfg.seed,
        "max_model_len": cfg.max_total_sequence_length, "dtype": dtype,
        "fp32_lm_head": cfg.fp32_lm_head, **interruption(cfg, codec),
        "recompute_kv_cache": cfg.recompute_kv_cache_after_weight_updates,
        "reward": cfg.reward, "reward_digest": reward_digest(cfg.reward),
        "sampling": {
            "n": cfg.num_generations_per_prompt, "temperature": cfg.temperature, "top_p": 1.0, "top_k": 0,
            "max_tokens": cfg.max_new_tokens, "logprobs": 0, "detokenize": False,
            "stop_token_ids": task.eos_token_ids(checkpoint),
        },
    }  # fmt: skip
    run["val_sampling"] = {**run["sampling"], "n": cfg.val_samples, "temperature": cfg.val_temperature}
    ledger = Ledger(cfg.num_prompts_per_step, cfg.max_trajectory_age_steps, cfg.max_num_steps, cfg.lease_timeout_s,
                    cfg.max_prompt_failures, prompts, cfg.no_resampling_pass_rate)  # fmt: skip
    token = os.environ.get("CISPO_TOKEN") or secrets.token_urlsafe(32)
    validation = Validation(held_out, cfg.val_samples, cfg.lease_timeout_s, cfg.max_prompt_failures,
                            cfg.val_pass_threshold)  # fmt: skip
    hub = Hub(ledger, prompts, codec.encode, cfg.run_dir / "weights", vocab_size, token, run, validation)
    hub.start(cfg.hub_host, cfg.hub_port)
    return hub


def train(cfg: Config, checkpoint: Path, data: tuple[task.Prompts, task.Codec, list[dict]] | None,
          checkpoints: list[Path] | None = None, origin: dict | None = None) -> None:  # fmt: skip
    """The run. Rank 0 alone has data (`load_prompts`), the checkpoints that it may go on from, and `origin_of`."""
    # ---- processes and seeds
    join_ranks(cfg.collective_timeout_s)  # the wait for a batch is not one of them: see waits.agree
    share_model(checkpoint, handed_out=not cfg.model)
    model_cfg = ModelConfig.from_dir(checkpoint)
    mesh = make_mesh(cfg.tp, cfg.ep, model_cfg.num_key_value_heads, cfg.collective_timeout_s)
    rank = mesh.rank
    torch.manual_seed(cfg.seed)

    # ---- model and optimizer
    if cfg.logprob_chunk_size == 0:
        cfg = dataclasses.replace(cfg, logprob_chunk_size=loss.chunk_rows(model_cfg.vocab_size // cfg.tp))
    model = build_model(cfg, model_cfg, mesh, checkpoint)
    # The KL penalty's reference is a frozen copy of the model that the run starts from.
    reference = build_model(cfg, model_cfg, mesh, checkpoint) if cfg.reference_policy_kl_penalty else None
    optimizer = ShardedAdamW(
        model, cfg.max_grad_norm, getattr(torch, cfg.grad_dtype), lr=cfg.lr, betas=(cfg.adam_beta1, cfg.adam_beta2),
        eps=cfg.adam_eps, weight_decay=cfg.weight_decay,
    )  # fmt: skip
    policy_loss = torch.compile(loss.policy_loss, dynamic=True) if cfg.compile else loss.policy_loss
    resume, saved = begin(cfg, checkpoints or [], mesh, say, origin)
    start = saved["step"] if resume else 0
    if resume:
        load_state_tensors(resume, model, optimizer, updates=next(iter(saved["files"].values()))["updates"])
    saver = Checkpointer(cfg.run_dir / "checkpoints", rank, mesh.world_size, cfg.keep_checkpoints, start)

    # ---- hub and rollout
    hub = rollout = None
    if rank == 0:
        hub = start_hub(cfg, checkpoint, data, model_cfg.vocab_size, mesh.device)
        prompts, codec, _ = data
        show = lambda ids: codec.decode(ids, special=True)
        trackers, validating = report.Trackers(cfg, start), cfg.validates(0)
        scores = read_scores(cfg.run_dir, cfg.val_samples) if validating else {}
        if resume:
            hub.ledger.restore(saved["ledger"])  # before there are weights to lease a prompt for
            scores = {v: score for v, score in scores.items() if v >= origin["scored_since"]}
            scores = scores if validating else {int(at): score for at, score in saved["scores"].items()}
            say(f"going on from {resume}: step {start}, {saved['ledger']['taken']} prompts trained")
        anew = not resume or resume.parent.parent.resolve() != cfg.run_dir.resolve() or start == origin["scored_since"]
        due = due_at_start(start, cfg.validates(start), anew, saved.get("unscored", []), scores)
        for version in due if validating else []:
            hub.begin_validation(version)
        if cfg.local_rollout:
            rollout = LocalRollout(hub, cfg.run_dir / "rollout", cfg.rollout_args, cfg.run_dir / "rollout.log")
        num_parameters = sum(shape.numel() for shape in model.checkpoint_shapes().values())
        say(f"{num_parameters / 1e6:.1f} M parameters on {mesh.world_size} rank(s), "
            f"hub at {hub.url}, weight clamped to [{1 - cfg.algorithm.ratio_clip_min:g}, "
            f"{1 + cfg.algorithm.ratio_clip_max:g}], results in {cfg.run_dir}")  # fmt: skip
    publisher = Publisher(
        model, resolve_dtype(cfg.publish_dtype, mesh.device), cfg.run_dir / "weights", checkpoint,
        cfg.full_version_every, cfg.keep_versions, torch.distributed.distributed_c10d._get_default_store(),
        deadline_s=cfg.collective_timeout_s / 2, hub=hub, port=cfg.hub_port,
    )  # fmt: skip
    publisher.publish(start)

    # ---- loop
    step, clock, done, word, rewards, silent = start, Clock(), threading.Event(), "train", [], 0
    skipped, stuck = 0, ""  # updates in a row, on rank 0, and why they are too many
    Signals.in_loop = True  # from here on the first signal is a word, not an exception
    if rank == 0:
        here = lambda: (f": {len(hub.ledger.buffer)} of {cfg.num_prompts_per_step} prompts, {len(hub.nodes)} rollout "
                        "node(s)" if clock.doing == "exposed_generation" else "")  # fmt: skip
        now = lambda: f"step {step}, {clock.says(compiles=cfg.compile and step == start)}{here()}"
        log_path = rollout.log_path if rollout else None
        threading.Thread(target=say_something, args=(now, log_path, done), daemon=True).start()
    try:
        hide_bar = True if rank != 0 else None  # None: tqdm shows a bar on a terminal only; the lines come anyway
        for step in tqdm(range(start, cfg.max_num_steps), desc="steps", disable=hide_bar, dynamic_ncols=True):
            clock = Clock("exposed_generation")
            lr = learning_rate(step, cfg)
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr

            # 1 wait for a batch: rank 0 has it, says so, and every rank gets it
            ask = rank == 0 and not stuck
            groups, word = wait_for_batch(hub, step, cfg, rollout) if ask else (None, stuck)
            word = agree(step, word, rank, cfg.batch_timeout_s + 60, stop=lambda: Signals.stop)
            if word != "train":
                break
            clock.begin("data_processing")
            blob = broadcast_bytes(pack_batch(groups, cfg) if rank == 0 else None, mesh)
            updates, counts = unpack_batch(blob, cfg, mesh.dp_rank, mesh.dp, mesh.device, mesh.tp)

            # 2 the trainer's own log-probs at the start of the step, fixed for all its updates
            clock.begin("policy_and_reference_logprobs")
            fix_for_the_step(updates, step, model, reference, cfg)

            # 3, 4 the updates: forward, loss, backward, reduce, step
            clock.begin("policy_training")
            metrics: dict[str, torch.Tensor] = {}
            grad_norms = []
            for micro_batches, update_counts in zip(updates, counts):
                stats, grad_norm = train_update(model, optimizer, micro_batches, update_counts, cfg, policy_loss)
                metrics = merge(metrics, stats)
                grad_norms.append(grad_norm)
            metrics = expert_load(reduce_metrics(metrics, mesh.dp_group))

            # 5 publish: copies the weights; writing, fetching and loading go on while the next step runs
            clock.begin("publish_copy")
            publisher.publish(step + 1, last=step + 1 == cfg.max_num_steps)
            if rank == 0 and cfg.validates(step + 1):
                hub.begin_validation(step + 1)

            # 6 log and checkpoint
            if rank == 0:
                values = fetch({**metrics, "grad_norms": torch.stack(grad_norms)})  # sync: one per step
                skipped, stuck = skipped_in_a_row(norms := values.pop("grad_norms"), step, skipped)
                counts = [count for count, norm in zip(counts, norms) if math.isfinite(norm)]
                record = {
                    "step": step, "train/lr": lr, **report.gradient_metrics(norms),
                    "ordinals": [g.ordinal for g in groups],
                    **{f"train/{why}": int(torch.cat(m).sum()) for why, m in left_out(groups, cfg).items()},
                    **rollout_metrics(groups, step), **update_metrics(values, counts), **clock.seconds(),
                    **publisher.stats, **hub.take_timing(), "hub": hub.status(),
                }  # fmt: skip
                log_step(record, cfg.run_dir)
                hub.record = record
                trackers.log(record, "step")
                report.log_samples(groups, step, prompts, show, cfg.run_dir)
                silent = report.count_without_signal(record, silent, cfg.reward, cfg.run_dir)
                rewards.append(record["train/reward"])
                scores |= report.log_validations(hub, show, cfg.run_dir, trackers)
            every = cfg.checkpoint_every_steps
            if every and ((step + 1) % every == 0 or cfg.validates(step + 1) or step + 1 == cfg.max_num_steps):
                if rank == 0 and not validating:  # without validation: the mean reward since the one before
                    scores[step + 1], rewards = sum(rewards) / len(rewards), []
                saver.save(step + 1, model, optimizer, about(cfg, hub, scores, origin) if rank == 0 else None)
        if Signals.asked(word):
            saver.deadline_s = min(saver.deadline_s, Signals.save_within_s())
        if word != "train" and saver.newest_step != step:  # asked to stop before this step: all before it is whole
            saver.save(step, model, optimizer, about(cfg, hub, scores, origin) if rank == 0 else None)
        saver.wait()
        publisher.close()
        finished = word == "train"
        if finished and publisher.error:
            word = str(publisher.error)
        if rank == 0:
            if word == "train":
                clock.begin("validation")
                wait_for_validation(hub, cfg, rollout)
            scores |= report.log_validations(hub, show, cfg.run_dir, trackers)
            if word != "train":
                state = f"its state is in {saver.root} (go on with --resume auto)"
                state = state if whole(saver.root) else "before any was trained, so there is no state to go on from"
                say(f"stopped at step {step}, {state}: {word}")
        if finished:  # every node's files are served until rank 0 needs no more answers from the rollout nodes
            # Rank 0 may be as late as its own waits since the last step allow, one after the other.
            rank_0_may_take = saver.deadline_s + publisher.deadline_s + cfg.val_timeout_s + 60
            agree(cfg.max_num_steps, "over", rank, rank_0_may_take, stop=lambda: Signals.stop)
        if word != "train" and not Signals.asked(word):
            raise SystemExit(f"train_cispo.py: rank {rank}: stopped at step {step}: {word}")
    finally:
        done.set()
        if rollout is not None:
            rollout.stop()
        if hub is not None:
            trackers.close()
            hub.close(patience_s=0.0 if cfg.local_rollout else 5.0)
    if rank == 0 and word == "train":
        sum_up(cfg.run_dir, max(start, cfg.max_num_steps), scores)
    torch.distributed.destroy_process_group()


def uncompilable_path() -> str:
    """A path that torch gives to the C++ compiler without quotes, and that needs them; "" if there is none."""
    paths = (str(Path(torch.__file__).parent), os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir())
    return next((path for path in paths if set(path) & set(" \t\n\"'\\")), "")


def use_cpu(cfg: Config, local_world_size: int) -> None:
    """For a machine without a GPU. Raises: ValueError for what it cannot train or compile."""
    if cfg.preset not in ("tiny", "add") and not Path(cfg.model).is_dir():  # a directory may hold a small one
        raise ValueError(f"--preset {cfg.preset}: {cfg.model} needs GPUs, and torch sees none here; "
                         "--dry-run prints the plan")  # fmt: skip
    if cfg.compile and (path := uncompilable_path()):
        raise ValueError(f"--compile: torch's compiler cannot use {path!r}, for the space or quote in it; use "
                         "--no-compile, or other places (.venv, TORCHINDUCTOR_CACHE_DIR, TMPDIR)")  # fmt: skip
    torch.set_num_threads(cfg.cpu_threads or max(1, cores() // (2 * local_world_size)))


def prepare(cfg: Config, rank: int, world_size: int, local_rank: int) -> tuple:
    """What `train` takes beside its flags. All that can be refused is refused here, before ranks meet and before
    anything that takes long. Raises: ValueError, CheckpointError, WeightsError."""
    if model_cfg := dry_run.known_config(cfg):
        dry_run.check(model_cfg, cfg, world_size)
    if rank == 0:
        check_address(cfg.hub_host, cfg.hub_port)
        hold(cfg.run_dir)
    if rank == 0 and reward_sources(cfg.reward):
        node = parse_flags(RolloutConfig, ["HUB", *shlex.split(cfg.rollout_args)])
        check_reward(cfg.reward, node.reward_start_timeout_s, node.reward_away_timeout_s)
    examples = load_examples(cfg) if rank == 0 else None  # before a model is downloaded
    held_out = load_held_out(cfg, examples) if rank == 0 else None
    for rows, name in ((examples, "--data"), (held_out, "--val-data")):
        if rows and (warning := check_answers(cfg.reward, rows, name)):
            say(f"warning: {warning}")
    checkpoint = resolve_model(cfg, rank)
    if model_cfg is None:
        dry_run.check(ModelConfig.from_dir(checkpoint), cfg, world_size)
    data = load_prompts(cfg, checkpoint, examples, held_out) if rank == 0 else None
    if cfg.model and local_rank == 0:  # raises what loading would; the others of this node have the same files
        with torch.device("meta"):
            shapes = Qwen3MoE(ModelConfig.from_dir(checkpoint)).checkpoint_shapes()
        stored_tensors(checkpoint, shapes)
    origin = origin_of(cfg, checkpoint, examples, held_out) if rank == 0 else None
    return checkpoint, data, checkpoints_to_try(cfg, origin) if rank == 0 else [], origin


def main() -> None:
    Signals.install()
    of_torchrun = lambda name, default: int(os.environ.get(name, default))
    rank, world_size = of_torchrun("RANK", 0), of_torchrun("WORLD_SIZE", 1)
    try:
        cfg = parse_config(sys.argv[1:])
        if cfg.dry_run:
            if rank == 0:  # one process plans for others
                with piped():
                    dry_run.print_report(cfg, world_size if world_size > 1 else cfg.dry_run_ranks)
            return
        if not torch.cuda.is_available():
            use_cpu(cfg, of_torchrun("LOCAL_WORLD_SIZE", 1))
        what_to_train = prepare(cfg, rank, world_size, of_torchrun("LOCAL_RANK", 0))
    except (ValueError, CheckpointError, WeightsError) as e:
        if of_torchrun("LOCAL_RANK", 0) == 0:  # once on each node: it may be about this one's disk
            where = f"rank {rank} on {socket.gethostname()}: " if rank else ""
            print(f"train_cispo.py: error: {where}{e}", file=sys.stderr)
        sys.exit(2)
    if rank == 0:
        values = "  ".join(f"{name}={value!r}" for name, value in json.loads(cfg.text).items())
        print(textwrap.fill(values, 120, break_long_words=False, break_on_hyphens=False))
        for warning in cfg.warnings():
            say(f"warning: {warning}")
    try:
        train(cfg, *what_to_train)
    except (CheckpointError, WeightsError, WaitOver, OSError, torch.OutOfMemoryError, dist.DistError) as e:
        # What a machine, a disk or another process can do; anything else is ours, and shows where it comes from.
        advice = {torch.OutOfMemoryError: "; lower --max-tokens-per-micro-batch, or see --dry-run",
                  dist.DistError: "; another rank has ended or cannot be reached: its own error says why"}  # fmt: skip
        text = " ".join(str(e).split())[:600] + next((a for kind, a in advice.items() if isinstance(e, kind)), "")
        raise SystemExit(f"train_cispo.py: error: rank {rank} on {socket.gethostname()}: {text}") from None
    if Signals.stop == "Ctrl-C":
        sys.exit(130)


if __name__ == "__main__":
    main()
