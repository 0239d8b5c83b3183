"""The presets, and how a command line becomes a Config."""

import contextlib
import dataclasses
import itertools
import os
import shlex
import socket
import sys
from pathlib import Path

from bridge.flags import Flags, parse_flags, piped
from config import GROUPS, Config, RolloutConfig

MATH_PROMPT = (
    "Solve this problem. Think step by step, and end with the final answer in "
    "\\boxed{}.\n\n{problem}"
)
PRESET_NOTES = {
    "tiny": "0.5 M parameters learn to reverse five letters: two minutes on a laptop's CPU",
    "add": "the same model, two-digit sums: harder",
    "rounds": "the same model, over several turns: the next word is shown when one is reversed",
    "qwen3-0.6b": "dense Qwen3 on math: a GPU of 80 GB with vLLM on it too, or two of 24 GB",
    "qwen3-4b": "the same, 4B: a GPU of 141 GB with vLLM on it too, or two of 80 GB",
    "qwen3-30b-a3b": "NeMo RL's CISPO recipe: Qwen3-30B-A3B on math, 16 GPUs train, 8 sample",
    "qwen3-30b-a3b-node": "the same on one node: 8 GPUs of 141 GB train, with vLLM on all of them",
    "scalerl": "ScaleRL's algorithm on that model, 16 + 8 GPUs, answers of up to 14k tokens",
}

# NeMo RL's nightly test of CISPO (grpo-cispo-mm1-...-3n8g-megatron-cispo.yaml, commit 7ea279a),
# number by number. Comments give its name for a flag where ours differs.
NIGHTLY = Config(
    preset="qwen3-30b-a3b", name="qwen3-30b-a3b", model="Qwen/Qwen3-30B-A3B", seed=42,
    max_num_steps=10,
    # Its prompt file in other words: one user's message through the chat template, so Qwen3 thinks.
    data=("nvidia/OpenMathInstruct-2",), prompt_column="problem", answer_column="expected_answer",
    # train_1M less 5 %, of which 128 validate at the start, every 10 steps and at the end, with one
    # sample each, not greedy.
    data_split="train_1M[5%:]", val_data=("nvidia/OpenMathInstruct-2",),
    val_data_split="train_1M[:128]", val_every_steps=10, val_samples=1, val_temperature=1.0,
    prompt_template=MATH_PROMPT, reward="math",  # hf_math_verify
    # 512 samples, 16 updates.
    num_prompts_per_step=32, num_generations_per_prompt=16, train_global_batch_size=32,
    # Prompt and answer share 4096 tokens: a sample may have what its prompt leaves.
    max_total_sequence_length=4096, max_input_seq_length=4096, max_new_tokens=4096, temperature=1.0,
    max_trajectory_age_steps=1, recompute_kv_cache_after_weight_updates=False,
    ratio_clip_min=1.0, ratio_clip_max=5.0,
    use_importance_sampling_correction=True,  # and no truncation of it
    use_leave_one_out_baseline=True, normalize_rewards=True, reference_policy_kl_penalty=0.0,
    token_level_loss=True,
    # lr_warmup_iters 10 from lr_warmup_init 3e-8, then constant; a rollout batch counts as one.
    lr=3e-7, lr_warmup_steps=10, weight_decay=0.01, adam_beta1=0.9, adam_beta2=0.999, adam_eps=1e-8,
    max_grad_norm=1.0, freeze_moe_router=True,
    # From here on ours; the loss does not know of it. There: TP 2, EP 8, no recompute,
    # micro-batches of 4096 tokens, gradients added up in bfloat16 (here in float32). EP 8 stays on
    # a node's NVLink. Nodes: `python rollout.py HUB --vllm-args "--tensor-parallel-size 4
    # --data-parallel-size 2 --gpu-memory-utilization 0.7"`, as it has two engines of 4 GPUs.
    tp=1, ep=8, activation_checkpointing=True, max_tokens_per_micro_batch=16384,
    logprob_chunk_size=0, local_rollout=False, hub_port=8790, dry_run_ranks=16,
)  # fmt: skip

# The recipe on what one has at hand. Sizes and learning rate are ours, nothing is tuned: a fourth
# of the samples an update, four updates a batch. By --dry-run the trainer takes 17 GiB; vLLM takes
# 0.4 of its GPU, 32 GiB, shared or not. On two GPUs of 24 GB (CUDA_VISIBLE_DEVICES=0,1
# --gpu-memory-gib 23) each has one.
SMALL = dataclasses.replace(
    NIGHTLY, preset="qwen3-0.6b", name="qwen3-0.6b", model="Qwen/Qwen3-0.6B", max_num_steps=200,
    lr=1e-6, val_every_steps=20, train_global_batch_size=128, max_input_seq_length=1024,
    max_new_tokens=3072, ep=1, dry_run_ranks=1, max_tokens_per_micro_batch=8192, hub_port=0,
    local_rollout=True, rollout_args="--vllm-args '--gpu-memory-utilization 0.4'",
)  # fmt: skip

PRESETS = {
    "tiny": Config(),
    "add": dataclasses.replace(Config(), preset="add", name="add", task="add", max_num_steps=300),
    # Three turns of four tokens, and twice five between them.
    "rounds": dataclasses.replace(
        Config(), preset="rounds", name="rounds", task="rounds", reward="rounds", max_new_tokens=22,
        warm_start_accuracy=0.2,
    ),
    "qwen3-30b-a3b": NIGHTLY,
    "qwen3-0.6b": SMALL,
    # The trainer takes 77 GiB, of which 45 are AdamW's state and 15 gradients: a GPU of 80 GB has
    # no room for vLLM too. It has with --preset qwen3-0.6b --model Qwen/Qwen3-1.7B.
    "qwen3-4b": dataclasses.replace(
        SMALL, preset="qwen3-4b", name="qwen3-4b", model="Qwen/Qwen3-4B", gpu_memory_gib=139.8,
    ),
    # AdamW's state over 8 GPUs is 43 GiB of each, and with all else the trainer takes 79. On 80 GB
    # it takes at least 70 (--tp 8), and vLLM 7 for its share of the weights, 6 of its own and 2 for
    # the samples of a prompt: 85. There 8 GPUs train and others sample: the preset above, or
    # --dry-run --model Qwen/Qwen3-30B-A3B. Two engines of 4 GPUs, as the recipe has them. Of host
    # RAM the node needs 610 GB, by README's count while a checkpoint is written.
    "qwen3-30b-a3b-node": dataclasses.replace(
        NIGHTLY, preset="qwen3-30b-a3b-node", name="qwen3-30b-a3b-node", max_num_steps=200,
        val_every_steps=20, dry_run_ranks=8, gpu_memory_gib=139.8, hub_port=0, local_rollout=True,
        rollout_args="--vllm-args '--gpu-memory-utilization 0.3 --tensor-parallel-size 4 "
        "--data-parallel-size 2'",
    ),
    # arXiv:2510.13786, as far as facts about it are at hand: 48 x 16 samples, 8 steps off-policy,
    # one ratio against the sampler bounded at 5 (4, 5 or 8 are the same), means over prompts, std
    # of the batch, groups of equal rewards dropped, prompts solved to 0.9 not sampled again, fp32
    # logits on both sides, thinking ended by force. Ours: one update a batch, the split of the 16k
    # tokens, model, layout and learning rate, which are the preset's above.
    "scalerl": dataclasses.replace(
        NIGHTLY, preset="scalerl", name="scalerl", max_num_steps=400, val_every_steps=20,
        num_prompts_per_step=48, train_global_batch_size=768, max_trajectory_age_steps=8,
        ratio_anchor="sampler", use_importance_sampling_correction=False, ratio_clip_max=4.0,
        prompt_level_loss=True, use_leave_one_out_baseline=False, advantage_std="batch",
        drop_zero_variance=True, no_resampling_pass_rate=0.9, fp32_lm_head=True,
        max_total_sequence_length=16384, max_input_seq_length=2048, max_new_tokens=14336,
        interrupt_at_tokens=12288, lease_timeout_s=3600.0,
    ),
}  # fmt: skip

FOR_REAL = "qwen3-0.6b"  # whose lengths a model is planned with that is given without a preset


# ---- from flags to a Config ----------------------------------------------------------------------
MATTER_FIRST = (  # the flags that --help shows first
    "name", "model", "data", "reward", "max_num_steps", "num_prompts_per_step",
    "num_generations_per_prompt", "train_global_batch_size", "max_new_tokens", "lr", "use_cispo",
    "ratio_clip_max", "resume",
)  # fmt: skip


def preset_of(argv: list[str]) -> Config:
    """The values that the other flags override. Raises: ValueError for an unknown preset."""
    chosen = "tiny"
    for flag, following in itertools.zip_longest(argv, argv[1:]):
        name, equals, value = flag.partition("=")
        if name == "--preset":
            chosen = value if equals else following
    if chosen and chosen not in PRESETS:  # tyro says that a value is missing
        raise ValueError(f"--preset {chosen!r}: expected {', '.join(PRESET_NOTES)}")
    return PRESETS[chosen or "tiny"]


def parse_config(argv: list[str]) -> Config:
    """Flags to a valid Config. Raises: ValueError with one line that says what is wrong."""
    defaults = preset_of(argv)
    if {"-h", "--help"} & set(argv):
        with piped():
            print_help(defaults)
        sys.exit(0)
    cfg = parse_flags(Config, argv, defaults)
    none = {name: tuple(filter(None, getattr(cfg, name))) for name in ("data", "val_data")}
    cfg = dataclasses.replace(cfg, **none)  # --val-data "" is none
    given = {flag.split("=", 1)[0].replace("_", "-") for flag in argv}
    bare = not PRESETS[cfg.preset].model and not {"--lr", "--max-new-tokens"} <= given
    if bare and cfg.dry_run and is_real(cfg):  # planned for the lengths of a real run
        ranks = [] if "--dry-run-ranks" in given else ["--dry-run-ranks", "0"]
        return parse_config([*argv, *ranks, "--preset", FOR_REAL])
    cfg = with_own_data(cfg, defaults, given)
    if "--max-total-sequence-length" not in given and cfg.max_new_tokens > defaults.max_new_tokens:
        more = cfg.max_new_tokens - defaults.max_new_tokens  # prompts keep their room
        total = defaults.max_total_sequence_length + more
        cfg = dataclasses.replace(cfg, max_total_sequence_length=total)
    cfg.validate()
    check_what_flags_name(cfg)
    if bare and not cfg.dry_run and cfg.real_model:
        raise ValueError(
            f"--model {cfg.model}: --preset {cfg.preset} has a tiny model's --lr {cfg.lr:g} and "
            f"--max-new-tokens {cfg.max_new_tokens}; begin with --preset qwen3-0.6b or "
            "qwen3-30b-a3b, whose lr, lengths and recompute fit a real model (your flags win), or "
            "give both"
        )
    return cfg


def is_real(cfg: Config) -> bool:
    """`cfg.real_model`, or no where its config.json cannot be read, which is told later."""
    with contextlib.suppress(ValueError, OSError):
        return cfg.real_model
    return False


def with_own_data(cfg: Config, defaults: Config, given: set[str]) -> Config:
    """Another data set than the preset's has not its split, columns, template and validation."""
    if "--data" not in given or cfg.data == defaults.data:
        return cfg
    names = ["data_split", "prompt_column", "answer_column", "val_data", "val_data_split"]
    names += ["prompt_template"] if cfg.reward != defaults.reward else []
    unset = [name for name in names if f"--{name.replace('_', '-')}" not in given]
    return dataclasses.replace(cfg, **{name: getattr(PRESETS["tiny"], name) for name in unset})


def check_what_flags_name(cfg: Config) -> None:
    """Files, packages and further flags. Raises: ValueError. What is imported here is not needed
    for --help."""
    from bridge.reward_process import reward_sources
    from data import PLACE, mix_of, named, split_template, text_of

    try:
        parse_flags(RolloutConfig, ["HUB", *shlex.split(cfg.rollout_args)])
    except ValueError as e:
        raise ValueError(f"--rollout-args {cfg.rollout_args!r}: {e}") from None
    if cfg.tensorboard or cfg.wandb_project:
        from report import Trackers

        Trackers.check(cfg)
    reward_sources(cfg.reward)
    try:
        cfg.val_reward and reward_sources(cfg.val_reward)
    except ValueError as e:
        raise ValueError(str(e).replace("--reward", "--val-reward", 1)) from None
    mix_of(cfg.data)
    named(cfg.val_data)
    template = text_of(cfg.prompt_template)
    if template.count("{problem}") > 1 or not PLACE.search(template):
        split_template(template)  # raises; the rest needs the columns
    text_of(cfg.system_prompt)
    if cfg.model and Path(cfg.model).is_dir():
        from model import ModelConfig

        try:
            ModelConfig.from_dir(cfg.model)
        except (ValueError, OSError) as e:
            raise ValueError(f"--model {cfg.model}: {e}") from None


def print_help(cfg: Config) -> None:
    """Every flag on one line with its value under the chosen preset, those that matter first."""
    usage = "usage: train_cispo.py [--preset NAME] [--flag VALUE ...]"
    print(f"{usage}      values shown: --preset {cfg.preset}\n")
    for name, what in PRESET_NOTES.items():
        print(f"  --preset {name:18} {what}")
    print("\nA switch that is on is turned off by --no-NAME, and the other way round.")
    flags = Flags(cfg, cfg.resolved)
    print("\nwhat one sets first")
    for name in MATTER_FIRST:
        print(flags.line(name))
    for group in GROUPS:
        print(f"\n{group.__doc__}")
        for field in group.__annotations__:
            if field not in (*MATTER_FIRST, "preset"):
                print(flags.line(field))


def config_or_exit(argv: list[str]) -> Config:
    """As `parse_config`; what is wrong ends the process with one line, once on each node."""
    try:
        return parse_config(argv)
    except ValueError as e:
        refuse(e)


def refuse(error: Exception) -> None:
    """End the process with status 2 and the error as one line, said once on each node: it may be
    about this node's disk."""
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    if local_rank == 0:
        where = f"rank {rank} on {socket.gethostname()}: " if rank else ""
        print(f"train_cispo.py: error: {where}{error}", file=sys.stderr)
    sys.exit(2)
