"""Every flag, the presets, and what is refused before anything starts."""

import dataclasses
import itertools
import json
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import data
import loss
import report
import task
from bridge.flags import help_text, parse_flags, piped
from bridge.reward_process import reward_sources
from loss import LOG_RATIO_MAX
from model import ModelConfig
from ranks import plan
from rollout import RolloutConfig

# ---- config --------------------------------------------------------------------------------------
Preset = Literal["tiny", "add", "qwen3-0.6b", "qwen3-30b-a3b", "scalerl"]
Truncation = Literal["tis", "icepop", "seq-mask-tis"]
TINIEST = 1e-30  # of what must be above 0
BOUNDS = {  # of numbers that have no other rule in Config.validate
    "hub_port": (0, 65_535),
    "lr": (0, 1e30),
    "lr_warmup_steps": (0, math.inf),
    "weight_decay": (0, 1e30),
    "adam_beta1": (0, 1 - 1e-9),
    "adam_beta2": (0, 1 - 1e-9),
    "adam_eps": (TINIEST, 1e30),
    "max_grad_norm": (TINIEST, math.inf),
    "checkpoint_every_steps": (0, math.inf),
    "cpu_threads": (0, 4096),
    "warm_start_accuracy": (0, 0.99),
    "temperature": (-math.inf, 1e30),
    "val_temperature": (-math.inf, 1e30),
    "gpu_memory_gib": (TINIEST, math.inf),
    **dict.fromkeys(
        (
            "max_num_steps",
            "num_prompts_per_step",
            "train_global_batch_size",
            "max_new_tokens",
            "keep_versions",
            "full_version_every",
            "keep_checkpoints",
            "max_prompt_failures",
        ),
        (1, math.inf),
    ),
    **dict.fromkeys(
        ("lease_timeout_s", "batch_timeout_s", "collective_timeout_s", "val_timeout_s"), (1e-3, 1e9)
    ),
}


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
    model: str = (
        ""  # Qwen3 or Qwen3-MoE checkpoint: a directory or a hub id; "" makes a tiny one for --task
    )
    task: str = "reverse"  # built-in task, a name in TASKS of task.py, unless --data is given
    warm_start_accuracy: float = (
        0.36  # of the tiny model: supervised until a sample is right this often
    )
    # data
    data: str = ""  # JSONL, JSON, CSV, Parquet file, saved data set, or NAME or NAME:CONFIG on the Hub; "": --task
    data_split: str = "train"  # of it; train[:5000] is one too
    prompt_column: str = (
        ""  # text or chat; "": prompt, messages, conversations, problem or question, if it is one
    )
    answer_column: str = ""  # "": answer or expected_answer, whichever there is
    system_prompt: str = ""  # text or file: first message of every chat that has none
    prompt_template: str = (
        "{problem}"  # text or file; {problem} or {}: a prompt that is text; {NAME}: of that column
    )
    chat_template: bool = True  # text is a user's message in the tokenizer's chat template; off: raw, as where none is
    max_input_seq_length: int | None = (
        None  # longer prompts are left out; unset: what leaves room for max_new_tokens
    )
    no_resampling_pass_rate: float | None = (
        None  # a prompt whose samples have this mean reward is not sampled again
    )
    # rewards
    reward: str = "exact"  # exact, numeric, math, or FILE.py:FUNCTION(completion, example) -> float, see rewards.py
    overlong_filter: bool = (
        False  # samples that were cut off leave the loss, its denominators too (unless all were)
    )
    overlong_buffer_tokens: int = (
        0  # in the last so many tokens that a sample may have, its reward goes down (DAPO)
    )
    overlong_penalty: float = 1.0  # by so much at the very last
    interrupt_at_tokens: int = (
        0  # a sample this long that still thinks is told to answer (ScaleRL); 0: never
    )
    interrupt_text: str = (
        "\n\nI have to stop thinking and answer now.\n</think>\n\n"  # text or file; not trained on
    )
    # rollouts
    num_prompts_per_step: int = 16  # prompts in a step
    num_generations_per_prompt: int = 16  # samples of each
    max_new_tokens: int = 8  # of a sample
    max_total_sequence_length: int = (
        64  # prompt and sample, as vLLM's --max-model-len; if unset, max_new_tokens adds
    )
    temperature: float = 1.0  # of sampling; the trainer's log-probs are taken at it too
    max_trajectory_age_steps: int = (
        1  # no token trained is from weights older than this; 0 is synchronous
    )
    recompute_kv_cache_after_weight_updates: bool = (
        True  # of what is in flight; off: old keys and values stay
    )
    local_rollout: bool = (
        True  # start rollout.py on this machine; off: wait for nodes that are started elsewhere
    )
    rollout_args: str = (
        ""  # further flags for the process started here, as in `python rollout.py --help`
    )
    hub_host: str = (
        "127.0.0.1"  # address that the rollout nodes reach; they are the only ones to call it
    )
    hub_port: int = 0  # 0 picks a free one
    lease_timeout_s: float = 600.0  # a prompt not answered by then is handed out again
    max_prompt_failures: int = (
        5  # a prompt that fails this often, on whatever node, is set aside and named
    )
    batch_timeout_s: float = (
        1800.0  # longest wait for a batch before the run stops, its state saved
    )
    collective_timeout_s: float = 600.0  # longest wait of a rank for another in a collective
    # validation: held-out prompts, answered beside the training ones
    val_every_steps: int = (
        40  # and at the start and the end; 0: never. It needs --val-data or a built-in task
    )
    val_data: str = ""  # as --data; "": 64 examples of the built-in task that are not trained on
    val_data_split: str = "train"  # of it; test[:500] is one too
    val_samples: int = 4  # of each prompt: the k of avg@k and pass@k
    val_pass_threshold: float = (
        1.0  # a sample with at least this reward solves its prompt: what pass@k counts
    )
    val_temperature: float = 1.0  # of sampling; 0: greedy, with one sample
    val_timeout_s: float = 600.0  # longest wait for the last one at the end of the run
    # loss
    use_cispo: bool = True  # CISPO; --no-use-cispo is the PPO/GRPO clipped loss
    ratio_clip_min: float | None = (
        None  # ratio is clamped from 1 - this; unset: 1.0 with CISPO, else 0.2
    )
    ratio_clip_max: float | None = (
        None  # ratio is clamped to 1 + this; unset: 5.0 with CISPO, else 0.2
    )
    ratio_clip_c: float | None = (
        None  # PPO dual clip: where the advantage is negative, ratio at most this
    )
    ratio_anchor: Literal["prev", "sampler"] = (
        "prev"  # ratio against: trainer at the step's start, or vLLM (no pass)
    )
    disable_ppo_ratio: bool = False  # REINFORCE: -A * log pi, no ratio
    force_on_policy_ratio: bool = (
        False  # ratio 1 with PPO's gradient and no prev pass: one update per rollout batch
    )
    sequence_level_importance_ratios: bool = (
        False  # GSPO: geometric mean of the sequence's ratios, at each token
    )
    use_importance_sampling_correction: bool = (
        True  # weigh tokens by exp(prev - gen), trainer against sampler
    )
    truncated_importance_sampling_type: Truncation | None = (
        None  # clamp that weight; drop tokens; drop sequences
    )
    truncated_importance_sampling_ratio: float | None = (
        None  # whose weight (of sequences: geometric mean) is above
    )
    truncated_importance_sampling_ratio_min: float | None = None  # or below this; tis needs none
    reference_policy_kl_penalty: float = (
        0.0  # times KL to the starting model; as in the recipe (the seed's code: 0.01)
    )
    reference_policy_kl_type: Literal["k1", "k2", "k3"] = "k3"  # estimator of it
    kl_input_clamp_value: float = 20.0  # bound of the log-ratio in it
    kl_output_clamp_value: float = 10.0  # bound of its value
    use_on_policy_kl_approximation: bool = False  # weigh it by exp(logprob - gen)
    use_kl_in_reward: bool = (
        False  # take it from each token's advantage, once a step, rather than add it to the loss
    )
    positive_example_nll_weight: float = (
        0.0  # times -log pi, a mean over the tokens of samples with reward above 0
    )
    token_level_loss: bool = (
        True  # mean over the batch's tokens; else mean over samples of their token mean
    )
    prompt_level_loss: bool = False  # mean over prompts of their token mean (ScaleRL)
    use_leave_one_out_baseline: bool = True  # compare a sample with its siblings only
    normalize_rewards: bool = True  # divide advantages by a standard deviation
    advantage_std: Literal["group", "batch"] = (
        "group"  # which: of the sample's group, or of the step's advantages
    )
    drop_zero_variance: bool = (
        False  # groups of equal rewards leave the batch, its denominators too (unless all are)
    )
    # layout and memory: ranks = data parallel x tp, tp fastest
    tp: int = (
        1  # tensor parallel degree: attention, dense MLPs and vocabulary, with sequence parallelism
    )
    ep: int = 1  # expert parallel degree: whole experts, over ep consecutive ranks (across tp and data parallel)
    activation_checkpointing: bool = (
        False  # keep each block's input only, and run the block again in backward
    )
    param_dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of forward and backward; auto: bfloat16 on CUDA
    )
    grad_dtype: Literal["float32", "bfloat16"] = (
        "float32"  # in which micro-batches and ranks are added up
    )
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
    router_replay: bool = (
        False  # the updates of a step use the experts that the trainer chose at its start
    )
    compile: bool = (
        True  # torch.compile the model's blocks and the loss; off computes the same, eagerly
    )
    publish_dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of published weights; auto: bfloat16 on CUDA
    )
    full_version_every: int = (
        16  # versions; those between are written as what changed, where that is less
    )
    keep_versions: int = (
        4  # published versions kept on disk, at least; more where the last whole one is older
    )
    checkpoint_every_steps: int = 20  # 0: only when the run is asked to stop
    keep_checkpoints: int = (
        2  # the last ones; besides, the one with the best validation, or without it reward
    )
    resume: str = "off"  # auto: from the last whole checkpoint of runs/NAME, if there is one; or a checkpoint directory
    cpu_threads: int = (
        0  # of each trainer process on a CPU; 0: half of the cores in all, vLLM has the other half
    )

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
        """Of a prompt that is sampled from; a long one leaves its samples less than
        max_new_tokens."""
        room, most = self.max_total_sequence_length, self.max_input_seq_length
        return room - self.max_new_tokens if most is None else min(most, room - 1)

    @property
    def real_model(self) -> bool:
        """Whether --model is one of the Hub, or has more than 50 M parameters by its
        config.json."""
        if not Path(self.model).is_dir():
            return "/" in self.model
        shapes = (
            plan.parameter_classes(ModelConfig.from_dir(self.model), 1, 1, 1) if self.model else []
        )
        return sum(c.numel for c in shapes) > 50e6

    @property
    def run_dir(self) -> Path:
        return Path("runs") / self.name

    @property
    def text(self) -> str:
        """JSON, for the console and runs/NAME/config.json."""
        resolved = {
            **dataclasses.asdict(self.algorithm),
            "max_input_seq_length": self.max_prompt_tokens,
        }
        return json.dumps({**dataclasses.asdict(self), **resolved}, indent=1)

    def validates(self, version: int) -> bool:
        """Whether a validation begins under this version, the one that the run starts with
        aside."""
        every = self.val_every_steps if self.val_data or not self.data else 0
        return bool(every) and (version % every == 0 or version == self.max_num_steps)

    def warnings(self) -> list[str]:
        """What is allowed, and hardly meant."""
        alg, found = self.algorithm, []
        if (
            alg.use_cispo
            and alg.ratio_anchor == "prev"
            and self.samples_per_step == self.train_global_batch_size
        ):
            found.append(
                "one update per rollout batch, so every CISPO weight is exactly 1; "
                "lower --train-global-batch-size for several, or use --ratio-anchor sampler"
            )
        if alg.use_cispo and (alg.ratio_clip_min, alg.ratio_clip_max) == (0.2, 0.2):
            found.append(
                "CISPO with PPO's bounds 0.2/0.2 weighs no token below 0.8 or above 1.2; "
                "its own are --ratio-clip-min 1 --ratio-clip-max 5"
            )
        if self.val_every_steps and self.data and not self.val_data:
            found.append(
                "--data without --val-data: there is no validation; the reward names the best checkpoint"
            )
        if self.lr > 1e-5 and self.real_model:
            found.append(
                f"--lr {self.lr:g} is far above what a model of this size takes, about 1e-6; "
                f"{self.model} may soon answer worse than it did"
            )
        return found

    def validate(self) -> None:
        """Raises: ValueError with one line that names the value, the limit and the flag."""
        for name, value in dataclasses.asdict(self).items():
            low, high = BOUNDS.get(name, (-math.inf, math.inf))
            if (
                isinstance(value, int | float) and not low <= value <= high
            ):  # nor is nan between them
                least = (
                    "above 0"
                    if low == TINIEST
                    else f"at least {low:g}"
                    if low > -math.inf
                    else "a number"
                )
                most = f" and at most {high:g}" if high < math.inf else ""
                most += " (exclusive)" if high < math.inf and high < float(f"{high:g}") else ""
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be {least}{most}")
        batch, alg = self.train_global_batch_size, self.algorithm
        kind = self.truncated_importance_sampling_type
        low, high = (
            self.truncated_importance_sampling_ratio_min,
            self.truncated_importance_sampling_ratio,
        )
        cispo, corrected = self.use_cispo, self.use_importance_sampling_correction
        bounded = "--truncated-importance-sampling-"
        for wrong, why in [
            (
                cispo and self.disable_ppo_ratio,
                "--disable-ppo-ratio: CISPO's weight is that ratio; leave it out or use --no-use-cispo",
            ),
            (
                cispo and self.force_on_policy_ratio,
                "--force-on-policy-ratio: CISPO's weight would be 1; leave it out or use --no-use-cispo",
            ),
            (
                cispo and self.sequence_level_importance_ratios,
                "--sequence-level-importance-ratios: CISPO's weight is the token's; leave it out or use --no-use-cispo",
            ),
            (
                self.sequence_level_importance_ratios and self.token_level_loss,
                "--sequence-level-importance-ratios: needs --no-token-level-loss",
            ),
            (
                self.prompt_level_loss and not self.token_level_loss,
                "--prompt-level-loss: a mean over a prompt's tokens; it excludes --no-token-level-loss",
            ),
            (
                self.disable_ppo_ratio
                and (self.force_on_policy_ratio or self.ratio_clip_c is not None),
                "--disable-ppo-ratio: leaves no ratio for --force-on-policy-ratio or --ratio-clip-c",
            ),
            (
                self.force_on_policy_ratio and self.samples_per_step != batch,
                f"--force-on-policy-ratio: only the first update is on-policy; --train-global-batch-size {batch} must be "
                f"the step's {self.samples_per_step} samples",
            ),
            (
                self.ratio_anchor == "sampler" and self.force_on_policy_ratio,
                "--ratio-anchor sampler: a ratio that --force-on-policy-ratio sets to 1 has no anchor",
            ),
            (
                self.ratio_anchor == "sampler" and corrected,
                "--ratio-anchor sampler: its ratio holds exp(prev - gen) already; use "
                "--no-use-importance-sampling-correction, or it counts twice",
            ),
            (
                self.max_trajectory_age_steps > 0 and self.ratio_anchor == "prev" and not corrected,
                f"--max-trajectory-age-steps {self.max_trajectory_age_steps}: tokens of older weights need "
                "--use-importance-sampling-correction or --ratio-anchor sampler; without them it must be 0",
            ),
            (
                kind is not None and not corrected,
                f"{bounded}type {kind}: bounds a weight that --no-use-importance-sampling-correction turns off",
            ),
            (
                kind is None and (low, high) != (None, None),
                f"{bounded}ratio {high}, {bounded}ratio-min {low}: without {bounded}type they do nothing",
            ),
            (
                kind is not None and (high is None or high <= 0),
                f"{bounded}ratio {high}: must be above 0 with a type",
            ),
            (
                kind in ("icepop", "seq-mask-tis") and low is None,
                f"{bounded}ratio-min: {kind} needs one",
            ),
            (
                None not in (kind, low, high) and not 0 <= low <= high,
                f"{bounded}ratio-min {low}: must be in 0..{bounded}ratio {high}",
            ),
            (
                kind == "seq-mask-tis" and self.sequence_level_importance_ratios,
                f"{bounded}type seq-mask-tis: weighs tokens; it excludes --sequence-level-importance-ratios",
            ),
            (
                self.reference_policy_kl_penalty < 0,
                f"--reference-policy-kl-penalty {self.reference_policy_kl_penalty}: must be at least 0",
            ),
            (
                not 0 < self.kl_input_clamp_value <= LOG_RATIO_MAX,
                f"--kl-input-clamp-value {self.kl_input_clamp_value}: must be above 0 and at most "
                f"{LOG_RATIO_MAX:g}, or exp of it overflows",
            ),
            (
                self.kl_output_clamp_value <= 0,
                f"--kl-output-clamp-value {self.kl_output_clamp_value}: must be above 0",
            ),
            (
                self.positive_example_nll_weight < 0,
                f"--positive-example-nll-weight {self.positive_example_nll_weight}: must be at least 0",
            ),
            (
                self.router_replay and not alg.needs_prev,
                "--router-replay: takes the experts of a pass at the step's start, which this loss spares",
            ),
            (
                self.advantage_std == "batch" and not self.normalize_rewards,
                "--advantage-std batch: --no-normalize-rewards divides by none",
            ),
            (
                self.use_cispo and self.ratio_clip_c is not None,
                f"--ratio-clip-c {self.ratio_clip_c}: CISPO has no dual clip; leave it out or use --no-use-cispo",
            ),
            (
                self.use_cispo and not self.token_level_loss,
                "--no-token-level-loss: CISPO's loss is a mean over tokens; leave it out or use --no-use-cispo",
            ),
            (
                not 0 <= alg.ratio_clip_min <= 1,
                f"--ratio-clip-min {alg.ratio_clip_min}: must be in 0..1, or the weight 1 - ratio_clip_min is negative",
            ),
            (alg.ratio_clip_max < 0, f"--ratio-clip-max {alg.ratio_clip_max}: must be at least 0"),
            (
                self.ratio_clip_c is not None and self.ratio_clip_c <= 1,
                f"--ratio-clip-c {self.ratio_clip_c}: must be above 1",
            ),
            (
                self.num_generations_per_prompt < 2,
                f"--num-generations-per-prompt {self.num_generations_per_prompt}: must be at least 2, since a sample is "
                "judged against its group",
            ),
            (
                self.temperature <= 0,
                f"--temperature {self.temperature}: must be above 0; greedy samples have no ratio",
            ),
            (
                self.max_trajectory_age_steps < 0,
                f"--max-trajectory-age-steps {self.max_trajectory_age_steps}: must be at least 0",
            ),
            (
                min(self.val_every_steps, self.val_temperature) < 0 or self.val_samples < 1,
                f"--val-every-steps {self.val_every_steps}, --val-temperature {self.val_temperature} and --val-samples "
                f"{self.val_samples}: must be at least 0, 0 and 1",
            ),
            (
                self.val_temperature == 0 and self.val_samples > 1,
                f"--val-samples {self.val_samples}: --val-temperature 0 is greedy, all samples would be the same; use 1",
            ),
            (
                self.name in ("", ".", "..")
                or "/" in self.name
                or not self.name.isprintable()
                or len(self.name.encode()) > 200,
                f"--name {self.name!r}: must be the name of one directory, which will lie in runs/",
            ),
            (
                self.resume not in ("auto", "off") and not Path(self.resume).is_dir(),
                f"--resume {self.resume!r}: auto, off, or a checkpoint directory",
            ),
            (
                self.logprob_chunk_size < 0,
                f"--logprob-chunk-size {self.logprob_chunk_size}: must be at least 0",
            ),
            (
                batch > 0 and self.samples_per_step % batch != 0,
                f"--train-global-batch-size {batch} does not divide the step's {self.num_prompts_per_step} prompts x "
                f"{self.num_generations_per_prompt} samples = {self.samples_per_step}",
            ),
            (
                self.max_tokens_per_micro_batch < self.max_total_sequence_length,
                f"--max-tokens-per-micro-batch {self.max_tokens_per_micro_batch} is below --max-total-sequence-length "
                f"{self.max_total_sequence_length}: one sample would not fit",
            ),
            (
                self.tp > 0 and self.max_tokens_per_micro_batch % self.tp != 0,
                f"--max-tokens-per-micro-batch {self.max_tokens_per_micro_batch} is no multiple of --tp {self.tp}",
            ),
            (
                self.max_prompt_tokens < 1,
                f"--max-new-tokens {self.max_new_tokens} leaves no room for a prompt in --max-total-sequence-length "
                f"{self.max_total_sequence_length}; --max-input-seq-length would let long ones shorten their samples",
            ),
            (
                self.max_new_tokens > self.max_total_sequence_length,
                f"--max-new-tokens {self.max_new_tokens} is above --max-total-sequence-length "
                f"{self.max_total_sequence_length}",
            ),
            (
                not 0 <= self.overlong_buffer_tokens <= self.max_new_tokens,
                f"--overlong-buffer-tokens {self.overlong_buffer_tokens}: must be in 0..--max-new-tokens "
                f"{self.max_new_tokens}",
            ),
            (
                self.overlong_penalty <= 0,
                f"--overlong-penalty {self.overlong_penalty}: must be above 0",
            ),
            (
                not 0 <= self.interrupt_at_tokens < self.max_new_tokens,
                f"--interrupt-at-tokens {self.interrupt_at_tokens}: must be in 0..--max-new-tokens {self.max_new_tokens} "
                "less one",
            ),
            (
                self.no_resampling_pass_rate is not None and self.no_resampling_pass_rate <= 0,
                f"--no-resampling-pass-rate {self.no_resampling_pass_rate}: must be above 0, or no prompt comes back",
            ),
            (
                not self.model and self.task not in task.TASKS,
                f"--task {self.task!r}: expected {' or '.join(task.TASKS)}",
            ),
            (
                bool(self.data) and not self.model,
                "--data needs --model: the tiny model knows only its own task",
            ),
            (
                bool(self.model)
                and not Path(self.model).is_dir()
                and self.model.startswith((".", "/", "~")),
                f"--model {self.model!r}: no such directory (looked for {Path(self.model).absolute()})",
            ),
        ]:
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


# NeMo RL's nightly of CISPO (grpo-cispo-mm1-...-3n8g-megatron-cispo.yaml, commit 7ea279a), number
# by number. Its first column: what it is there, where our name differs.
NIGHTLY = Config(
    preset="qwen3-30b-a3b",
    name="qwen3-30b-a3b",
    model="Qwen/Qwen3-30B-A3B",
    seed=42,
    max_num_steps=10,
    # Its prompt file in other words; one user's message through the chat template, which lets Qwen3
    # think.
    data="nvidia/OpenMathInstruct-2",
    prompt_column="problem",
    answer_column="expected_answer",
    # train_1M less 5 %, of which 128 validate at the start, every 10 steps and at the end, one
    # sample each, not greedy
    data_split="train_1M[5%:]",
    val_data="nvidia/OpenMathInstruct-2",
    val_data_split="train_1M[:128]",
    val_every_steps=10,
    val_samples=1,
    val_temperature=1.0,
    prompt_template=MATH_PROMPT,
    reward="math",  # hf_math_verify
    num_prompts_per_step=32,
    num_generations_per_prompt=16,
    train_global_batch_size=32,  # 512 samples, 16 updates
    # Prompt and answer share 4096 tokens: a sample may have what its prompt leaves.
    max_total_sequence_length=4096,
    max_input_seq_length=4096,
    max_new_tokens=4096,
    temperature=1.0,
    max_trajectory_age_steps=1,
    recompute_kv_cache_after_weight_updates=False,
    ratio_clip_min=1.0,
    ratio_clip_max=5.0,
    use_importance_sampling_correction=True,  # and no truncation of it
    use_leave_one_out_baseline=True,
    normalize_rewards=True,
    reference_policy_kl_penalty=0.0,
    token_level_loss=True,
    # lr_warmup_iters 10 from lr_warmup_init 3e-8, then constant; once a rollout batch, not once an
    # update
    lr=3e-7,
    lr_warmup_steps=10,
    weight_decay=0.01,
    adam_beta1=0.9,
    adam_beta2=0.999,
    adam_eps=1e-8,
    max_grad_norm=1.0,
    freeze_moe_router=True,
    # From here on ours; the loss does not know of it. There: TP 2, EP 8, no recompute,
    # micro-batches of 4096 tokens, gradients added up in bfloat16 (here in float32). EP 8 stays on
    # a node's NVLink. Nodes: `python rollout.py HUB --vllm-args "--tensor-parallel-size 4
    # --data-parallel-size 2 --gpu-memory-utilization 0.7"`, as it has two engines of 4 GPUs.
    tp=1,
    ep=8,
    activation_checkpointing=True,
    max_tokens_per_micro_batch=16384,
    logprob_chunk_size=0,
    local_rollout=False,
    hub_port=8790,
    dry_run_ranks=16,
)
PRESETS = {
    "tiny": Config(),
    "add": dataclasses.replace(Config(), preset="add", name="add", task="add", max_num_steps=300),
    "qwen3-30b-a3b": NIGHTLY,
    # The recipe on what one has at hand. Sizes and learning rate are ours, nothing is tuned: a
    # fourth of the samples an update, four updates a batch. By --dry-run 15 GiB for the trainer,
    # and 32 for vLLM, which takes 0.4 of its GPU, shared or not; on two GPUs of 24 GB
    # (CUDA_VISIBLE_DEVICES=0,1 --gpu-memory-gib 23) each has one.
    "qwen3-0.6b": dataclasses.replace(
        NIGHTLY,
        preset="qwen3-0.6b",
        name="qwen3-0.6b",
        model="Qwen/Qwen3-0.6B",
        max_num_steps=200,
        lr=1e-6,
        val_every_steps=20,
        train_global_batch_size=128,
        max_input_seq_length=1024,
        max_new_tokens=3072,
        ep=1,
        dry_run_ranks=1,
        max_tokens_per_micro_batch=8192,
        hub_port=0,
        local_rollout=True,
        rollout_args="--vllm-args '--gpu-memory-utilization 0.4'",
    ),
    # arXiv:2510.13786, as far as facts about it are at hand: 48 x 16 samples, 8 steps off-policy,
    # one ratio against the sampler bounded at 5 (4, 5 or 8 are the same), means over prompts, std
    # of the batch, groups of equal rewards dropped, prompts solved to 0.9 not sampled again, fp32
    # logits on both sides, thinking ended by force. Ours: one update a batch, the split of the 16k
    # tokens, model, layout and learning rate, which are the preset's above.
    "scalerl": dataclasses.replace(
        NIGHTLY,
        preset="scalerl",
        name="scalerl",
        max_num_steps=400,
        val_every_steps=20,
        num_prompts_per_step=48,
        train_global_batch_size=768,
        max_trajectory_age_steps=8,
        ratio_anchor="sampler",
        use_importance_sampling_correction=False,
        ratio_clip_max=4.0,
        prompt_level_loss=True,
        use_leave_one_out_baseline=False,
        advantage_std="batch",
        drop_zero_variance=True,
        no_resampling_pass_rate=0.9,
        fp32_lm_head=True,
        max_total_sequence_length=16384,
        max_input_seq_length=2048,
        max_new_tokens=14336,
        interrupt_at_tokens=12288,
        lease_timeout_s=3600.0,
    ),
}


def parse_config(argv: list[str]) -> Config:
    """Flags to a valid Config. Raises: ValueError with one line that says what is wrong."""
    flags = [
        part
        for flag in argv
        for part in (flag.split("=", 1) if flag.startswith("--preset=") else [flag])
    ]
    chosen = [value for flag, value in itertools.pairwise(flags) if flag == "--preset"]
    defaults = PRESETS.get(
        chosen[-1] if chosen else "tiny", PRESETS["tiny"]
    )  # tyro refuses an unknown one
    if {"-h", "--help"} & set(argv):
        resolved = {
            **dataclasses.asdict(defaults.algorithm),
            "max_input_seq_length": defaults.max_prompt_tokens,
        }
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
    template = data.text_of(cfg.prompt_template)
    if template.count("{problem}") > 1 or not data.PLACE.search(template):
        data.split_template(template)  # raises; the rest needs the columns
    data.text_of(cfg.system_prompt)
    if Path(cfg.model).is_dir() and cfg.model:
        try:
            ModelConfig.from_dir(cfg.model)
        except (ValueError, OSError) as e:
            raise ValueError(f"--model {cfg.model}: {e}") from None
    bare = cfg.preset in ("tiny", "add") and not {"--lr", "--max-new-tokens"} <= given
    if bare and not cfg.dry_run and cfg.real_model:
        raise ValueError(
            f"--model {cfg.model}: --preset {cfg.preset} has a tiny model's --lr {cfg.lr:g} and "
            f"--max-new-tokens {cfg.max_new_tokens}; begin with --preset qwen3-0.6b or qwen3-30b-a3b, "
            "whose lr, lengths and recompute fit a real model (your flags win), or give both"
        )
    return cfg
