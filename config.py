"""Every flag of train_cispo.py and rollout.py, in groups, each with its rules beside it; the groups
of the loss are in algorithm.py.

`Config` is all groups of the trainer in one flat object: a flag `--lr` is the field `cfg.lr`. The
comment behind a field is its help text. presets.py has the presets, and turns a command line into
a Config. Nothing here imports torch, so that --help and a wrong flag are answered at once.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from algorithm import Advantages, Loss
from bridge.flags import TINIEST, Bounds, Group

Count = Annotated[int, Bounds(1)]
CountOrZero = Annotated[int, Bounds(0)]  # 0 turns something off
Positive = Annotated[float, Bounds(TINIEST)]
NonNegative = Annotated[float, Bounds(0, 1e30)]  # and fp32 holds it
Beta = Annotated[float, Bounds(0, 1 - 1e-9)]
Temperature = Annotated[float, Bounds(-math.inf, 1e30)]
Seconds = Annotated[float, Bounds(1e-3, 1e9)]


# ---- the groups ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Run(Group):
    """the run"""

    preset: str = "tiny"  # a name in PRESETS of presets.py: where all other values come from
    name: str = "tiny"  # results go to runs/NAME
    seed: int = 0  # of the prompts' order, the warm start and vLLM's sampling
    max_num_steps: Count = 160  # rollout batches to train on
    log_samples: CountOrZero = 4  # samples of a step that are kept to be read, of two a prompt
    log_tokens: bool = False  # with each token's log-ratio and weight, for watch.py --colour
    wandb_project: str = ""  # metrics go to this project of Weights & Biases, too
    tensorboard: bool = False  # and to runs/NAME/tensorboard

    @property
    def run_dir(self) -> Path:
        return Path("runs") / self.name

    def faults(self) -> Iterator[str]:
        one_name = self.name not in ("", ".", "..") and "/" not in self.name
        if not (one_name and self.name.isprintable() and len(self.name.encode()) <= 200):
            yield (
                f"--name {self.name!r}: must be the name of one directory, which will lie in runs/"
            )


@dataclass(frozen=True)
class ModelAndTask(Group):
    """model and task"""

    model: str = ""  # Qwen3 or Qwen3-MoE: a directory or a hub id; "": a tiny one, made for --task
    task: str = "reverse"  # built-in task, a name in TASKS of task.py, unless --data is given
    warm_start_accuracy: Annotated[float, Bounds(0, 0.99)] = 0.36  # of the tiny model, supervised

    @property
    def real_model(self) -> bool:
        """Whether --model is of the Hub, or has more than 50 M parameters by its config.json."""
        if not self.model or not Path(self.model).is_dir():
            return "/" in self.model
        from model import ModelConfig  # it imports torch, for models of one's own only

        return ModelConfig.from_dir(self.model).num_parameters > 50e6

    def faults(self) -> Iterator[str]:
        from task import TASKS

        if not self.model and self.task not in TASKS:
            yield f"--task {self.task!r}: expected {' or '.join(TASKS)}"
        given, is_path = Path(self.model), self.model.startswith((".", "/", "~"))
        if self.model and is_path and not given.is_dir():
            yield f"--model {self.model!r}: no such directory (looked for {given.absolute()})"
        if (
            self.model
            and (given / "checkpoint.json").exists()
            and not (given / "config.json").exists()
        ):
            yield (
                f"--model {self.model} is a checkpoint of the trainer; export it first: python "
                f"tools/export.py {self.model} OUT"
            )


@dataclass(frozen=True)
class Data(Group):
    """data"""

    data: tuple[str, ...] = ()  # files, or NAME[:CONFIG] of the Hub; several may have :WEIGHT
    data_split: str = "train"  # of those that have splits; train[:5000] is one too
    prompt_column: str = ""  # or NAME.IN.IT; "": prompt, messages, conversations, problem, question
    answer_column: str = ""  # or NAME.IN.IT; "": answer or expected_answer, whichever there is
    system_prompt: str = ""  # text or file: first message of every chat that has none
    prompt_template: str = "{problem}"  # text or file; {problem} or {}: prompt; {NAME}: a column
    chat_template: bool = True  # text is a user's message in the model's chat template; off: raw
    chat_template_kwargs: str = ""  # JSON with variables of that template
    max_input_seq_length: int | None = None  # longer prompts are left out; unset: room for answers
    no_resampling_pass_rate: float | None = None  # a prompt of this mean reward does not return

    def faults(self) -> Iterator[str]:
        rate = self.no_resampling_pass_rate
        if rate is not None and rate <= 0:
            yield f"--no-resampling-pass-rate {rate}: must be above 0, or no prompt comes back"
        ours = {"add_generation_prompt", "messages", "tokenize"}
        try:
            found = self.template_kwargs
        except ValueError:
            found = None
        if not isinstance(found, dict) or ours & found.keys():
            yield (
                f"--chat-template-kwargs {self.chat_template_kwargs!r}: expected a JSON object, as "
                f"""{{"enable_thinking": false}}, without {", ".join(sorted(ours))}"""
            )

    @property
    def template_kwargs(self) -> dict:
        return json.loads(self.chat_template_kwargs or "{}")


@dataclass(frozen=True)
class Rewards(Group):
    """rewards"""

    reward: str = "exact"  # exact, numeric, math, or FILE.py:FUNCTION, see rewards.py
    overlong_filter: bool = False  # samples that were cut off are not trained on (unless all were)
    overlong_buffer_tokens: int = 0  # in its last so many tokens a sample's reward goes down (DAPO)
    overlong_penalty: float = 1.0  # by this much at the very last
    interrupt_at_tokens: int = 0  # a sample that still thinks then is told to answer; 0: never
    interrupt_text: str = "\n\nI have to stop thinking and answer now.\n</think>\n\n"  # or a file

    def faults(self) -> Iterator[str]:
        if self.overlong_penalty <= 0:
            yield f"--overlong-penalty {self.overlong_penalty}: must be above 0"


@dataclass(frozen=True)
class RolloutFlags(Group):
    """rollouts"""

    num_prompts_per_step: Count = 16  # prompts in a step
    num_generations_per_prompt: int = 16  # samples of each
    max_new_tokens: Count = 8  # of a sample
    max_total_sequence_length: int = 64  # prompt and sample; if unset, max_new_tokens adds to it
    temperature: Temperature = 1.0  # of sampling; the trainer's log-probs are taken at it too
    max_trajectory_age_steps: int = 1  # no token is of weights older than this; 0: synchronous
    recompute_kv_cache_after_weight_updates: bool = True  # off: keys and values of old weights stay
    local_rollout: bool = True  # start rollout.py on this machine; off: nodes are started elsewhere
    rollout_args: str = ""  # further flags for the process started here, see rollout.py --help
    hub_host: str = "127.0.0.1"  # address that the rollout nodes call; only they do
    hub_port: Annotated[int, Bounds(0, 65_535)] = 0  # 0 picks a free one
    lease_timeout_s: Seconds = 600.0  # a prompt not answered by then is handed out again
    max_prompt_failures: Count = 5  # a prompt that fails this often is set aside and named
    batch_timeout_s: Seconds = 1800.0  # longest wait for a batch before the run stops, saved
    collective_timeout_s: Seconds = 600.0  # longest wait of a rank for another in a collective

    @property
    def samples_per_step(self) -> int:
        return self.num_prompts_per_step * self.num_generations_per_prompt

    def faults(self) -> Iterator[str]:
        if self.num_generations_per_prompt < 2:
            yield (
                f"--num-generations-per-prompt {self.num_generations_per_prompt}: must be at least "
                "2, since a sample is judged against its group"
            )
        if self.temperature <= 0:
            yield f"--temperature {self.temperature}: must be above 0; greedy samples have no ratio"
        if self.max_trajectory_age_steps < 0:
            yield f"--max-trajectory-age-steps {self.max_trajectory_age_steps}: must be at least 0"


@dataclass(frozen=True)
class ValidationFlags(Group):
    """validation: held-out prompts, answered beside the training ones"""

    val_every_steps: CountOrZero = 40  # and at start and end; 0: never. Needs --val-data or a task
    val_data: tuple[str, ...] = ()  # [NAME=]DATA, the first names the best; "": 64 of the task
    val_data_split: str = "train"  # of those that have splits; test[:500] is one too
    val_reward: str = ""  # as --reward, for validation; "": that of --reward
    val_samples: Count = 4  # of each prompt: the k of avg@k and pass@k
    val_pass_threshold: float = 1.0  # a sample with at least this reward solves its prompt (pass@k)
    val_temperature: NonNegative = 1.0  # of sampling; 0: greedy, with one sample
    val_timeout_s: Seconds = 600.0  # longest wait for the last one at the end of the run

    def faults(self) -> Iterator[str]:
        if self.val_temperature == 0 and self.val_samples > 1:
            yield (
                f"--val-samples {self.val_samples}: --val-temperature 0 is greedy, all samples "
                "would be the same; use 1"
            )


@dataclass(frozen=True)
class Layout(Group):
    """layout and memory: ranks = data parallel x tp, tp fastest"""

    tp: int = 1  # tensor parallel degree: attention, dense MLPs, vocabulary; sequence parallel too
    ep: int = 1  # expert parallel degree: whole experts, over ep consecutive ranks
    activation_checkpointing: bool = False  # keep a block's input and attention; run the rest again
    flash_attention: Literal["2", "3", "4"] = "2"  # on a GPU; 3, 4: their package, unmeasured
    param_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA
    grad_dtype: Literal["float32", "bfloat16"] = "float32"  # micro-batches and ranks add up in it
    fp32_lm_head: bool = False  # fp32 logits in the trainer and in vLLM; on CUDA they always are
    max_tokens_per_micro_batch: int = 4096  # packed into one forward
    logprob_chunk_size: int = 512  # tokens of logits at once; 0: 256 MB, compiled on CUDA 2 GB
    compile: bool = True  # torch.compile the model's blocks and the loss; off: the same, eagerly
    cpu_threads: Annotated[int, Bounds(0, 4096)] = 0  # of a trainer process; 0: half of the cores

    def faults(self) -> Iterator[str]:
        if self.logprob_chunk_size < 0:
            yield f"--logprob-chunk-size {self.logprob_chunk_size}: must be at least 0"
        if self.tp > 0 and self.max_tokens_per_micro_batch % self.tp != 0:
            yield (
                f"--max-tokens-per-micro-batch {self.max_tokens_per_micro_batch} is no multiple of "
                f"--tp {self.tp}"
            )


@dataclass(frozen=True)
class Plan(Group):
    """plan"""

    dry_run: bool = False  # print all flags and a layout's memory and traffic; status 2: too big
    dry_run_ranks: CountOrZero = 1  # of that layout, or torchrun's; 0: which GPUs train the model
    gpu_memory_gib: Positive = 79.6  # of a GPU, as an H100 has; a run takes its GPU's if less
    nodes: int = 0  # compare all splits of so many into training and rollouts; 0: one layout
    mean_length: CountOrZero = 0  # tokens of a sample with its prompt; 0: the longest allowed

    def faults(self) -> Iterator[str]:
        if self.nodes and (self.nodes < 2 or not self.dry_run):
            yield (
                f"--nodes {self.nodes}: at least 2, one to train and one to sample, and with "
                "--dry-run; a run takes NODES=... of launch.sh"
            )


@dataclass(frozen=True)
class Training(Group):
    """training"""

    train_global_batch_size: Count = 64  # samples of an optimizer update
    lr: NonNegative = 1e-4  # learning rate of AdamW
    lr_warmup_steps: CountOrZero = 0  # rollout batches of linear warm-up from lr / 10
    weight_decay: NonNegative = 0.01  # of AdamW
    adam_beta1: Beta = 0.9  # AdamW
    adam_beta2: Beta = 0.95  # AdamW
    adam_eps: Annotated[float, Bounds(TINIEST, 1e30)] = 1e-8  # AdamW
    max_grad_norm: Positive = 1.0  # over all parameters
    freeze_moe_router: bool = True  # no gradient for the routers
    router_replay: Literal["off", "trainer", "sampler"] = "off"  # whose experts it uses


@dataclass(frozen=True)
class Files(Group):
    """weights and checkpoints"""

    publish_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bf16 on CUDA
    full_version_every: Count = 16  # versions; between them only changes, if under half
    keep_versions: Count = 4  # published versions kept on disk, at least
    checkpoint_every_steps: CountOrZero = 20  # 0: only when the run is asked to stop
    keep_checkpoints: Count = 2  # the last ones, and the one with the best validation or reward
    after_checkpoint: str = ""  # shell command behind a whole one; {dir}, {step} are filled in
    resume: str = "off"  # auto: from the last whole checkpoint of runs/NAME; or a directory

    def faults(self) -> Iterator[str]:
        if self.resume not in ("auto", "off") and not Path(self.resume).is_dir():
            yield f"--resume {self.resume!r}: auto, off, or a checkpoint directory"
        names = re.findall(r"(?<!\$)\{(\w+)\}", self.after_checkpoint)
        if other := [name for name in names if name not in ("dir", "step")]:
            yield (
                f"--after-checkpoint: {{{other[0]}}} is neither {{dir}} nor {{step}}; with a space "
                "after the brace it is the command's own"
            )


GROUPS = (
    Run, ModelAndTask, Data, Rewards, RolloutFlags, ValidationFlags, Loss, Advantages, Layout, Plan,
    Training, Files,
)  # fmt: skip


# ---- all of them ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config(*reversed(GROUPS)):  # reversed: the fields of the last base class come first
    """Every flag of the trainer. `--preset` gives the values; other flags override them."""

    @property
    def max_prompt_tokens(self) -> int:
        """Of a prompt that is sampled from; a long one leaves its samples less than
        max_new_tokens."""
        room, most = self.max_total_sequence_length, self.max_input_seq_length
        return room - self.max_new_tokens if most is None else min(most, room - 1)

    @property
    def resolved(self) -> dict:
        """Values of flags that may be unset."""
        clip = dataclasses.asdict(self.algorithm)
        return {**clip, "max_input_seq_length": self.max_prompt_tokens}

    @property
    def text(self) -> str:
        """JSON, for the console and runs/NAME/config.json."""
        return json.dumps({**dataclasses.asdict(self), **self.resolved}, indent=1)

    def validates(self, version: int) -> bool:
        """Whether a validation begins under this version. (The one that the run starts with is
        asked for by `due_at_start`.)"""
        every = self.val_every_steps if self.val_data or not self.data else 0
        return bool(every) and (version % every == 0 or version == self.max_num_steps)

    def warnings(self) -> list[str]:
        """What is allowed, and hardly meant."""
        alg, found = self.algorithm, []
        one_update = self.samples_per_step == self.train_global_batch_size
        if alg.use_cispo and alg.ratio_anchor == "prev" and one_update:
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
                "--data without --val-data: there is no validation; the reward names the best "
                "checkpoint"
            )
        if not self.model and self.task == "rounds" and self.reward != "rounds":
            found.append(
                f"--task rounds with --reward {self.reward} trains its first turn alone; --preset "
                "rounds plays all"
            )
        if self.lr > 1e-5 and self.real_model:
            found.append(
                f"--lr {self.lr:g} is far above what a model of this size takes, about 1e-6; "
                f"{self.model} may soon answer worse than it did"
            )
        return found

    def validate(self) -> None:
        """Raises: ValueError with one line that names the value, the limit and the flag."""
        rules = [self.out_of_bounds(), *(group.faults(self) for group in GROUPS)]
        rules += [self._algorithm_faults(), self._size_faults()]
        for fault in (fault for faults in rules for fault in faults):
            raise ValueError(fault)

    def _algorithm_faults(self) -> Iterator[str]:
        """Rules between the loss and other groups."""
        batch, samples = self.train_global_batch_size, self.samples_per_step
        age = self.max_trajectory_age_steps
        if self.use_cispo and not self.token_level_loss:
            yield (
                "--no-token-level-loss: CISPO's loss is a mean over tokens; leave it out or use "
                "--no-use-cispo"
            )
        if self.sequence_level_importance_ratios and self.token_level_loss:
            yield "--sequence-level-importance-ratios: needs --no-token-level-loss"
        if self.force_on_policy_ratio and samples != batch:
            yield (
                "--force-on-policy-ratio: only the first update is on-policy; "
                f"--train-global-batch-size {batch} must be the step's {samples} samples"
            )
        corrected = self.ratio_anchor == "sampler" or self.use_importance_sampling_correction
        if age > 0 and not corrected:
            yield (
                f"--max-trajectory-age-steps {age}: tokens of older weights need "
                "--use-importance-sampling-correction or --ratio-anchor sampler; without them it "
                "must be 0"
            )
        if self.router_replay == "trainer" and not self.needs_prev:
            pass_ = "a pass at the step's start, which this loss spares"
            yield f"--router-replay trainer: takes the experts of {pass_}; sampler does not"

    def _size_faults(self) -> Iterator[str]:
        """Rules between lengths and batches."""
        batch, total = self.train_global_batch_size, self.max_total_sequence_length
        most, tokens = self.max_new_tokens, self.max_tokens_per_micro_batch
        if self.samples_per_step % batch != 0:
            yield (
                f"--train-global-batch-size {batch} does not divide the step's "
                f"{self.num_prompts_per_step} prompts x {self.num_generations_per_prompt} samples "
                f"= {self.samples_per_step}"
            )
        if tokens < total:
            yield (
                f"--max-tokens-per-micro-batch {tokens} is below --max-total-sequence-length "
                f"{total}: one sample would not fit"
            )
        if self.max_prompt_tokens < 1:
            yield (
                f"--max-new-tokens {most} leaves no room for a prompt in "
                f"--max-total-sequence-length {total}; --max-input-seq-length would let long ones "
                "shorten their samples"
            )
        if most > total:
            yield f"--max-new-tokens {most} is above --max-total-sequence-length {total}"
        if not 0 <= self.overlong_buffer_tokens <= most:
            yield (
                f"--overlong-buffer-tokens {self.overlong_buffer_tokens}: must be in "
                f"0..--max-new-tokens {most}"
            )
        if not 0 <= self.interrupt_at_tokens < most:
            yield (
                f"--interrupt-at-tokens {self.interrupt_at_tokens}: must be in "
                f"0..--max-new-tokens {most} less one"
            )
        if self.data and not self.model:
            yield "--data needs --model: the tiny model knows only its own task"


# ---- a rollout node ------------------------------------------------------------------------------
@dataclass
class RolloutConfig:
    """Flags of a rollout node."""

    hub: Annotated[str, Positional]  # the trainer's address, as it prints it: http://host:port
    dir: str = ""  # local weights and vllm.log; "": a directory in /dev/shm, which is RAM
    max_groups: int = 64  # prompts in flight at once
    vllm_threads: int = 0  # OpenMP threads of vLLM on a CPU; 0: half of the cores
    vllm_args: str = ""  # further arguments for vLLM's server, e.g. "--tensor-parallel-size 4"
    vllm_start_timeout_s: float = 900.0  # for vLLM to load the model and answer
    vllm_command: str = ""  # instead of "python -m vllm.entrypoints.openai.api_server"
    stall_timeout_s: float = 60.0  # longest time without a token before vLLM is restarted
    load_timeout_s: float = 300.0  # for one weight update
    max_tries: int = 5  # of a prompt on this node, before it goes back to the hub
    reward_workers: int = 2  # processes that run the reward function
    reward_timeout_s: float = 60.0  # for the reward of one sample
    reward_start_timeout_s: float = 300.0  # for importing the reward function's file
    reward_away_timeout_s: float = 600.0  # how long the service that a reward asks may be away
    beat_s: float = 3.0  # between signs of life to the hub
    hub_timeout_s: float = 600.0  # the trainer may be silent this long before the node gives up
