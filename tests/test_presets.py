"""The presets are what they say they are; --help and --dry-run show them."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import model
import prepare
import presets
from bridge.flags import parse_flags
from bridge.processes import rollout_gpus
from config import Config, RolloutConfig
from presets import PRESET_NOTES, PRESETS, parse_config
from ranks import dry_run
from train_cispo import learning_rate

REPO = Path(__file__).resolve().parent.parent

# NeMo RL at 7ea279a, grpo-cispo-mm1-...-3n8g-megatron-cispo.yaml, resolved over its three parents:
# its key, its value, and the flag that has to have it here.
RECIPE = [
    ("policy.model_name", "Qwen/Qwen3-30B-A3B", "model"),
    ("grpo.seed", 42, "seed"),
    ("grpo.num_prompts_per_step", 32, "num_prompts_per_step"),
    ("grpo.num_generations_per_prompt", 16, "num_generations_per_prompt"),
    ("policy.train_global_batch_size", 32, "train_global_batch_size"),
    ("policy.max_total_sequence_length", 4096, "max_total_sequence_length"),
    ("policy.generation.max_new_tokens", 4096, "max_new_tokens"),
    ("grpo.max_num_steps", 10, "max_num_steps"),
    ("grpo.async_grpo.max_trajectory_age_steps", 1, "max_trajectory_age_steps"),
    (
        "grpo.async_grpo.recompute_kv_cache_after_weight_updates",
        False,
        "recompute_kv_cache_after_weight_updates",
    ),
    ("policy.generation.temperature", 1.0, "temperature"),
    ("optimizer.lr", 3e-7, "lr"),
    ("scheduler.lr_warmup_iters", 10, "lr_warmup_steps"),
    ("optimizer.weight_decay", 0.01, "weight_decay"),
    ("optimizer.adam_beta1", 0.9, "adam_beta1"),
    ("optimizer.adam_beta2", 0.999, "adam_beta2"),
    ("optimizer.adam_eps", 1e-8, "adam_eps"),
    ("optimizer.clip_grad", 1.0, "max_grad_norm"),
    ("megatron_cfg.expert_model_parallel_size", 8, "ep"),
    ("megatron_cfg.freeze_moe_router", True, "freeze_moe_router"),
    ("router_replay", "off", "router_replay"),
    ("data.dataset_name", ["nvidia/OpenMathInstruct-2"], "data"),
    ("data.split less split_validation_size, 5 %", "train_1M[5%:]", "data_split"),
    ("of which grpo.max_val_samples", "train_1M[:128]", "val_data_split"),
    ("grpo.val_period, val_at_start and val_at_end", 10, "val_every_steps"),
    ("grpo.val_num_generations_per_prompt", 1, "val_samples"),
    ("validation's temperature", 1.0, "val_temperature"),
    ("data.input_key", "problem", "prompt_column"),
    ("data.output_key", "expected_answer", "answer_column"),
    ("env.math, hf_math_verify", "math", "reward"),
    ("grpo.overlong_filtering", False, "overlong_filter"),
    ("grpo.use_dynamic_sampling", False, "drop_zero_variance"),
    ("reward_shaping.enabled", 0, "overlong_buffer_tokens"),
    ("grpo.use_leave_one_out_baseline", True, "use_leave_one_out_baseline"),
    ("grpo.normalize_rewards", True, "normalize_rewards"),
    ("loss_fn.reference_policy_kl_penalty", 0.0, "reference_policy_kl_penalty"),
    ("loss_fn.reference_policy_kl_type", "k3", "reference_policy_kl_type"),
    ("loss_fn.kl_input_clamp_value", 20.0, "kl_input_clamp_value"),
    ("loss_fn.kl_output_clamp_value", 10.0, "kl_output_clamp_value"),
    ("loss_fn.ratio_clip_min", 1.0, "ratio_clip_min"),
    ("loss_fn.ratio_clip_max", 5.0, "ratio_clip_max"),
    ("loss_fn.ratio_clip_c", None, "ratio_clip_c"),
    ("loss_fn.use_on_policy_kl_approximation", False, "use_on_policy_kl_approximation"),
    ("loss_fn.use_importance_sampling_correction", True, "use_importance_sampling_correction"),
    ("loss_fn.truncated_importance_sampling_type", None, "truncated_importance_sampling_type"),
    ("loss_fn.truncated_importance_sampling_ratio", None, "truncated_importance_sampling_ratio"),
    (
        "loss_fn.truncated_importance_sampling_ratio_min",
        None,
        "truncated_importance_sampling_ratio_min",
    ),
    ("loss_fn.sequence_level_importance_ratios", False, "sequence_level_importance_ratios"),
    ("loss_fn.token_level_loss", True, "token_level_loss"),
    ("loss_fn.force_on_policy_ratio", False, "force_on_policy_ratio"),
    ("loss_fn.use_kl_in_reward", False, "use_kl_in_reward"),
    ("loss_fn.use_cispo", True, "use_cispo"),
    ("loss_fn.disable_ppo_ratio", False, "disable_ppo_ratio"),
    ("loss_fn.positive_example_nll_weight", 0.0, "positive_example_nll_weight"),
]


def test_the_30b_preset_is_nemo_rl_s_recipe_number_by_number():
    """The dry run prints it, from one process of torchrun as well, with a layout for its 16
    ranks."""
    command = [
        sys.executable,
        "train_cispo.py",
        "--preset",
        "qwen3-30b-a3b",
        "--use-cispo",
        "--dry-run",
    ]
    # what torchrun sets for one
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    done = subprocess.run(
        command, cwd=REPO, env=env, capture_output=True, text=True, timeout=120, check=True
    )
    recipe, end = json.JSONDecoder().raw_decode(done.stdout)
    assert {key: recipe[flag] for key, _, flag in RECIPE} == {
        key: value for key, value, _ in RECIPE
    }
    assert "on 16 ranks: tp 1, ep 8" in done.stdout[end:]
    # max_input_seq_length is 4096 too; a prompt that long would leave no token for a sample
    assert (
        recipe["max_input_seq_length"] == 4095
        and PRESETS["qwen3-30b-a3b"].max_input_seq_length == 4096
    )


def test_the_30b_preset_s_schedule_is_the_recipe_s():
    """Once per RL step: 3e-8 for the 16 updates of step 1, 2.73e-7 in step 10, then 3e-7
    (lr_decay_style constant)."""
    cfg = PRESETS["qwen3-30b-a3b"]
    assert cfg.samples_per_step == 512 and cfg.samples_per_step // cfg.train_global_batch_size == 16
    found = [learning_rate(step, cfg) for step in (0, 1, 9, 10, 499)]
    assert found == pytest.approx([3e-8, 5.7e-8, 2.73e-7, 3e-7, 3e-7])


def test_the_scalerl_preset_has_all_of_scalerl_that_is_a_flag():
    cfg = PRESETS["scalerl"]
    assert (cfg.num_prompts_per_step, cfg.num_generations_per_prompt, cfg.samples_per_step) == (
        48,
        16,
        768,
    )
    assert (cfg.ratio_anchor, 1 + cfg.ratio_clip_max, 1 - cfg.ratio_clip_min) == (
        "sampler",
        5.0,
        0.0,
    )
    assert (
        cfg.use_cispo
        and cfg.prompt_level_loss
        and cfg.fp32_lm_head
        and not cfg.use_importance_sampling_correction
    )
    assert (cfg.advantage_std, cfg.use_leave_one_out_baseline) == ("batch", False)
    assert (
        cfg.drop_zero_variance
        and cfg.no_resampling_pass_rate == 0.9
        and cfg.max_trajectory_age_steps == 8
    )
    assert (
        0 < cfg.interrupt_at_tokens < cfg.max_new_tokens and cfg.max_total_sequence_length == 16384
    )


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_named_and_fits(name, capsys):
    cfg = parse_config(["--preset", name])
    assert (
        cfg == PRESETS[name] == parse_config([f"--preset={name}"])
        and cfg.preset == cfg.name == name in PRESET_NOTES
    )
    assert not cfg.warnings()
    if cfg.model:
        # raises where it does not fit
        dry_run.print_report(prepare.known_config(cfg), cfg, cfg.dry_run_ranks)


@pytest.mark.parametrize("argv", [["--preset", "qwen"], ["--preset=qwen", "--help"]])
def test_an_unknown_preset_is_refused_with_those_that_there_are(argv):
    with pytest.raises(
        ValueError, match=r"--preset 'qwen': expected tiny, add, rounds, qwen3-0\.6b, "
    ):
        parse_config(argv)


@pytest.mark.parametrize("preset", ["tiny", "scalerl"])
def test_help_shows_every_flag_once_on_one_line_with_its_value(preset, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--help", "--preset", preset])
    lines, cfg = capsys.readouterr().out.splitlines(), PRESETS[preset]
    assert stopped.value.code == 0
    for field in (f.name for f in dataclasses.fields(Config) if f.name != "preset"):
        flag, value = f"--{field.replace('_', '-')}", getattr(cfg, field)
        if isinstance(value, bool) and not value:
            flag = f"--no-{field.replace('_', '-')}"
        (line,) = [line for line in lines if line.split()[:1] == [flag]]
        assert len(line.split("  ")) > 1 and not line.endswith("  "), line
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert line.split()[1] == str(value), line
    value = lambda flag: next(line.split()[1] for line in lines if line.split()[:1] == [flag])
    # unset in tiny: resolved
    assert value("--ratio-clip-max") == {"tiny": "5.0", "scalerl": "4.0"}[preset]
    assert value("--max-input-seq-length") == {"tiny": "56", "scalerl": "2048"}[preset]
    (data,) = [line for line in lines if line.split()[:1] == ["--data"]]
    shown = {"tiny": "--data ''", "scalerl": "--data 'nvidia/OpenMathInstruct-2'"}[preset]
    assert data.split("  ")[1] == shown and "class" not in data
    groups = [line for line in lines if line and not line.startswith(" ")]
    assert {"the run", "data", "rewards", "rollouts", "loss", "training"} <= set(groups)


@pytest.mark.parametrize(
    ("visible", "ranks", "left"),
    [("0", 1, "0"), ("0,1", 1, "1"), ("3,5,7", 1, "5,7"), ("0,1", 2, "0,1")],
)
def test_the_local_vllm_has_the_gpus_that_no_rank_has(visible, ranks, left):
    assert rollout_gpus(visible, ranks) == left


def test_flags_that_hold_flags_reach_vllm_as_they_are_written():
    """tyro by itself takes the value of --vllm-args "--tensor-parallel-size 8" for a flag of its
    own."""
    page = (REPO / "docs/nodes.md").read_text()
    (example,) = re.findall(r'^ROLLOUT_ARGS="(.*?)" bash launch', page, re.M)
    given = {
        example: "--tensor-parallel-size 8",
        PRESETS["qwen3-0.6b"].rollout_args: "--gpu-memory-utilization 0.4",
        "--vllm-args=--dtype=half": "--dtype=half",
        "--max-groups 3 --vllm_args ''": "",
    }
    for text, reached in given.items():
        assert parse_flags(RolloutConfig, ["http://h:1", *shlex.split(text)]).vllm_args == reached
    assert (
        parse_config(["--rollout-args", "--vllm-args '--seed 1'"]).rollout_args
        == "--vllm-args '--seed 1'"
    )


@pytest.fixture
def real_model(tmp_path):
    """The config.json of a model of 0.6 billion parameters."""
    (tmp_path / "real").mkdir()
    cfg = model.KNOWN_MODELS["Qwen/Qwen3-0.6B"]
    (tmp_path / "real/config.json").write_text(json.dumps(cfg.to_hf(0)))
    return str(tmp_path / "real")


def test_a_real_model_is_not_trained_with_the_tiny_preset_s_values(real_model, tiny_checkpoint):
    for name in (real_model, "Qwen/Qwen3-0.6B"):
        for flags in ([], ["--lr", "1e-6"], ["--preset", "add", "--max-new-tokens=32"]):
            with pytest.raises(
                ValueError, match=r"begin with --preset qwen3-0\.6b or qwen3-30b-a3b"
            ):
                parse_config(["--model", name, *flags])
        assert not parse_config(["--model", name, "--lr=1e-6", "--max-new-tokens", "32"]).warnings()
        for flags in (
            ["--preset", "qwen3-0.6b", "--lr", "2e-05"],
            ["--lr", "0.0001", "--max_new_tokens", "8"],
        ):
            (warning,) = parse_config(["--model", name, *flags]).warnings()
            assert warning.startswith(f"--lr {flags[flags.index('--lr') + 1]} is far above")
    assert not parse_config(["--model", str(tiny_checkpoint)]).warnings()


def test_the_length_limit_grows_with_the_answers_where_it_is_not_given():
    total = lambda *flags: json.loads(parse_config([*flags]).text)["max_total_sequence_length"]
    assert [total("--max-new-tokens", n) for n in ("4", "8", "64")] == [64, 64, 120]
    assert total("--max-new-tokens", "64", "--max-total-sequence-length", "100") == 100
    assert total("--preset", "qwen3-0.6b", "--max-new-tokens", "1024") == 4096
    assert total("--preset", "qwen3-0.6b", "--max-new-tokens", "4096") == 5120


def test_own_data_has_not_the_preset_s_columns_and_validation():
    cfg = parse_config(["--preset", "qwen3-0.6b", "--data", "mine.jsonl"])
    found = (cfg.data_split, cfg.prompt_column, cfg.answer_column, cfg.val_data, cfg.val_data_split)
    assert found == ("train", "", "", (), "train") and cfg.prompt_template == presets.MATH_PROMPT
    cfg = parse_config(
        ["--preset", "qwen3-0.6b", "--data=mine.jsonl", "--data-split", "dev", "--reward", "exact"]
    )
    assert (cfg.data_split, cfg.prompt_template, cfg.lr) == ("dev", "{problem}", 1e-6)


@pytest.mark.parametrize(
    "command",
    [
        "train_cispo.py --help",
        "train_cispo.py --dry-run --preset qwen3-30b-a3b",
        "rollout.py --help",
    ],
)
def test_a_reader_that_has_seen_enough_is_no_error(command):
    """As in `python train_cispo.py --help | head -3`."""
    ends, given = os.pipe()
    os.close(ends)
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=REPO,
        stdout=given,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(given)
    assert (done.returncode, done.stderr) == (0, "")
