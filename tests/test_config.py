"""config.py, presets.py and prepare.py: what cannot work is one line before anything starts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import TINY

import data
import prepare
import task
import train_cispo
from config import Config
from prepare import load_examples, load_prompts
from train_cispo import learning_rate, main

REPO = Path(__file__).resolve().parent.parent


# ---- flags ---------------------------------------------------------------------------------------
def llama_dir(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "hidden_size": 8}'
    )
    return str(tmp_path)


def bad_data(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    return str(tmp_path / "d.jsonl")


def long_data(tmp_path):
    (tmp_path / "long.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    return str(tmp_path / "long.jsonl")


def no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf(1)))
    return str(tmp_path)


def char_model(tmp_path):
    task.write_char_tokenizer(tmp_path, "abc>")
    return no_tokenizer(tmp_path)


PPO, GSPO = ["--no-use-cispo"], ["--sequence-level-importance-ratios", "--no-token-level-loss"]


REGION = ["--trust-region"]
ANCHOR, UNCORRECTED = ["--ratio-anchor", "sampler"], ["--no-use-importance-sampling-correction"]


TIS, HIGH, LOW = (
    [f"--truncated-importance-sampling-{name}"] for name in ("type", "ratio", "ratio-min")
)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
        (["--model", "nowhere"], "--model 'nowhere': no directory "),
        (["--lr", "-1"], "--lr -1.0: must be at least 0"),
        (["--lr", "nan"], "--lr nan: must be at least 0"),
        (["--hub-port", "99999"], "--hub-port 99999: must be at least 0 and at most 65535"),
        (["--ratio-clip-max", "nan"], "--ratio-clip-max nan: must be a number"),
        (["--adam-beta2", "1"], "--adam-beta2 1.0: must be at least 0 and at most 1"),
        (["--max-grad-norm", "0"], "--max-grad-norm 0.0: must be above 0"),
        (["--lease-timeout-s", "0"], "--lease-timeout-s 0.0: must be at least 0.001"),
        (["--use-cispo", "--ratio-clip-c", "3"], "--ratio-clip-c 3.0: CISPO has no dual clip"),
        (["--no-token-level-loss"], "--no-token-level-loss: CISPO's loss is a mean over tokens"),
        (["--ratio-clip-min", "1.5"], "--ratio-clip-min 1.5: must be in 0..1"),
        (["--ratio-clip-min", "-0.1"], "--ratio-clip-min -0.1: must be in 0..1"),
        (["--ratio-clip-max", "-1"], "--ratio-clip-max -1.0: must be at least 0"),
        (["--no-use-cispo", "--ratio-clip-c", "1"], "--ratio-clip-c 1.0: must be above 1"),
        (["--disable-ppo-ratio"], "--disable-ppo-ratio: CISPO's weight is that ratio"),
        (["--force-on-policy-ratio"], "--force-on-policy-ratio: CISPO's weight would be 1"),
        (
            ["--sequence-level-importance-ratios", "--no-token-level-loss"],
            "ratios: CISPO's weight is the token's",
        ),
        ([*PPO, "--sequence-level-importance-ratios"], "ratios: needs --no-token-level-loss"),
        (
            [*PPO, "--prompt-level-loss", "--no-token-level-loss"],
            "it excludes --no-token-level-loss",
        ),
        (
            [*PPO, "--disable-ppo-ratio", "--ratio-clip-c", "3"],
            "leaves no ratio for --force-on-policy-ratio or",
        ),
        (
            [*PPO, "--disable-ppo-ratio", "--force-on-policy-ratio"],
            "leaves no ratio for --force-on-policy-ratio or",
        ),
        (
            [*PPO, "--force-on-policy-ratio"],
            "--train-global-batch-size 64 must be the step's 256 samples",
        ),
        (
            [*PPO, "--force-on-policy-ratio", "--train-global-batch-size", "256", *ANCHOR],
            "that --force-on-policy-ratio",
        ),
        ([*ANCHOR], "--ratio-anchor sampler: its ratio holds exp(prev - gen) already"),
        ([*UNCORRECTED], "--max-trajectory-age-steps 1: tokens of older weights need"),
        (
            [*ANCHOR, *UNCORRECTED, *TIS, "tis"],
            "type tis: bounds a weight that --no-use-importance-sampling-correction",
        ),
        ([*HIGH, "2"], "ratio 2.0, --truncated-importance-sampling-ratio-min None: without"),
        ([*LOW, "2"], "ratio None, --truncated-importance-sampling-ratio-min 2.0: without"),
        ([*TIS, "tis"], "--truncated-importance-sampling-ratio None: must be above 0"),
        ([*TIS, "tis", *HIGH, "0"], "--truncated-importance-sampling-ratio 0.0: must be above 0"),
        ([*TIS, "icepop", *HIGH, "5"], "ratio-min: icepop needs one"),
        ([*TIS, "seq-mask-tis", *HIGH, "5"], "ratio-min: seq-mask-tis needs one"),
        (
            [*TIS, "tis", *HIGH, "1", *LOW, "2"],
            "ratio-min 2.0: must be in 0..--truncated-importance-sampling-ratio 1.0",
        ),
        ([*TIS, "icepop", *HIGH, "1", *LOW, "-1"], "ratio-min -1.0: must be in 0.."),
        (
            [*PPO, *GSPO, *TIS, "seq-mask-tis", *HIGH, "1", *LOW, "1"],
            "it excludes --sequence-level-importance-ratios",
        ),
        (
            ["--reference-policy-kl-penalty", "-1"],
            "--reference-policy-kl-penalty -1.0: must be at least 0",
        ),
        (
            ["--kl-input-clamp-value", "0"],
            "--kl-input-clamp-value 0.0: must be above 0 and at most 20",
        ),
        (
            ["--kl-input-clamp-value", "21"],
            "--kl-input-clamp-value 21.0: must be above 0 and at most 20",
        ),
        (["--kl-output-clamp-value", "0"], "--kl-output-clamp-value 0.0: must be above 0"),
        (
            ["--positive-example-nll-weight", "-1"],
            "--positive-example-nll-weight -1.0: must be at least 0",
        ),
        (
            ["--advantage-std", "batch", "--no-normalize-rewards"],
            "--advantage-std batch: --no-normalize-rewards",
        ),
        (
            ["--advantage-std", "mean", "--no-normalize-rewards"],
            "--advantage-std mean: --no-normalize-rewards",
        ),
        (["--ratio-clip-min-negative", "1.5"], "--ratio-clip-min-negative 1.5: must be in 0..1"),
        (["--ratio-clip-max-negative", "-1"], "--ratio-clip-max-negative -1.0: must be at least 0"),
        (
            [*PPO, "--ratio-clip-max-negative", "2"],
            "--ratio-clip-min-negative None, --ratio-clip-max-negative 2.0: CISPO's",
        ),
        ([*REGION, "ratio"], "invalid choice 'ratio' for argument '--trust-region'"),
        (
            ["--trust-region-low", "0.1"],
            "--trust-region-low 0.1, --trust-region-high None: without --trust-region",
        ),
        (
            ["--trust-region-high", "0.1"],
            "--trust-region-low None, --trust-region-high 0.1: without --trust-region",
        ),
        ([*REGION, "tv", "--trust-region-low", "-0.1"], "--trust-region-low -0.1: must be above 0"),
        ([*REGION, "kl", "--trust-region-high", "0"], "--trust-region-high 0.0: must be above 0"),
        (
            [*REGION, "tv", "--trust-region-high", "1.5"],
            "--trust-region-high 1.5: must be at most 1",
        ),
        ([*REGION, "tv", "--trust-region-low", "2"], "--trust-region-low 2.0: must be at most 1"),
        ([*REGION, "tv", "--trust-region-low", "nan"], "--trust-region-low nan: must be a number"),
        (
            [*REGION, "kpop", "--trust-region-low", "0.1"],
            "--trust-region-low 0.1: kpop has one bound for both ways, --trust-region-high",
        ),
        ([*PPO, *REGION, "tv"], "--trust-region tv: CISPO's; leave it out with --no-use-cispo"),
        (
            ["--ratio-clip-mx", "4"],
            "unknown flag '--ratio-clip-mx', did you mean --ratio-clip-max?",
        ),
        (["--frobnicate"], "unknown flag '--frobnicate'"),
        (["--lr", "abc"], "Error parsing --lr: could not convert string to float: 'abc'"),
        (
            ["--name"],
            "Missing value for argument '--name'. Expected 1 values; one that begins with - is "
            "given as --FLAG=",
        ),
        (
            ["--rollout-args", "--max-groups x"],
            "--rollout-args '--max-groups x': Error parsing --max-groups: invalid lit",
        ),
        (
            ["--rollout-args", "--max-group 1"],
            "'--max-group 1': unknown flag '--max-group', did you mean --max-groups?",
        ),
        (
            ["--use-cispo", "true"],
            "unknown flag 'true', a value stands behind its flag, and a switch takes none",
        ),
        (["--task", "sort"], "--task 'sort': expected reverse or add"),
        (
            ["--preset", "qwen3-30b-a3b"],
            "--preset qwen3-30b-a3b: Qwen/Qwen3-30B-A3B needs GPUs, and torch sees none here",
        ),
        (["--data", "nowhere.jsonl", "--model", "x"], "--data 'nowhere.jsonl': no such file"),
        (["--data", bad_data, "--model", "x"], "line 2: 'answer' is missing"),
        (["--data", bad_data], "--data needs --model"),
        (
            ["--num-generations-per-prompt", "1"],
            "--num-generations-per-prompt 1: must be at least 2",
        ),
        (["--temperature", "0"], "--temperature 0.0: must be above 0"),
        (["--temperature", "-1"], "--temperature -1.0: must be above 0"),
        (["--max-trajectory-age-steps", "-1"], "--max-trajectory-age-steps -1: must be at least 0"),
        (["--train-global-batch-size", "96"], "--train-global-batch-size 96 does not divide"),
        (["--train-global-batch-size", "0"], "must be at least 1"),
        (
            ["--max-new-tokens", "64", "--max-total-sequence-length", "64"],
            "--max-new-tokens 64 leaves no room",
        ),
        (["--max-tokens-per-micro-batch", "10"], "--max-tokens-per-micro-batch 10 is below"),
        (["--model", llama_dir], "'LlamaForCausalLM' is not Qwen3ForCausalLM"),
        (["--model", "./nowhere"], "--model './nowhere': no such directory"),
        (["--data", long_data, "--model", no_tokenizer], "has no tokenizer.json"),
        (
            ["--reward", "x.py:f"],
            "--reward 'x.py:f': expected exact, numeric, math, rounds, or FILE.py:FUNCTION",
        ),
        (
            ["--prompt-template", "Solve it."],
            "--prompt-template 'Solve it.': expected {problem}, or a lone {}, once",
        ),
        (["--prompt-template", "{} in \\boxed{}"], "expected {problem}, or a lone {}, once"),
        (["--max-input-seq-length", "0"], "leaves no room for a prompt"),
        (
            ["--max-new-tokens", "65", "--max-total-sequence-length", "64"],
            "leaves no room for a prompt",
        ),
        (
            [
                "--max-new-tokens",
                "65",
                "--max-input-seq-length",
                "9",
                "--max-total-sequence-length",
                "64",
            ],
            "65 is above --max-total-sequence-length 64",
        ),
        (["--no-resampling-pass-rate", "0"], "--no-resampling-pass-rate 0.0: must be above 0"),
        (
            ["--overlong-buffer-tokens", "9"],
            "--overlong-buffer-tokens 9: must be in 0..--max-new-tokens 8",
        ),
        (["--overlong-penalty", "0"], "--overlong-penalty 0.0: must be above 0"),
        (
            ["--interrupt-at-tokens", "8"],
            "--interrupt-at-tokens 8: must be in 0..--max-new-tokens 8 less one",
        ),
        (
            ["--interrupt-at-tokens", "6", "--interrupt-text", "abc", "--model", char_model],
            "and the 3 tokens of --interr",
        ),
        (
            ["--system-prompt", "Be brief.", "--model", char_model],
            "has no chat template to take it",
        ),
        (["--model", no_tokenizer, "--ep", "3"], "--ep 3 does not divide num_experts=4"),
        (["--model", no_tokenizer, "--ep", "4"], "--ep 4 does not divide the number of ranks=2"),
        (["--model", no_tokenizer, "--tp", "4"], "--tp 4 does not divide the number of ranks=2"),
        (
            ["--model", no_tokenizer, "--tp", "0"],
            "--tp 0, --ep 1 and the number of ranks, 2, must be at least 1",
        ),
        (
            ["--model", no_tokenizer, "--gpu-memory-gib", "4"],
            "GiB are above --gpu-memory-gib 4. What breaks it: ",
        ),
        (
            ["--router-replay", "trainer", *ANCHOR, *UNCORRECTED],
            "--router-replay trainer: takes the experts of a pass at the step's start",
        ),
    ],
)
def test_bad_input_is_one_clear_line_and_status_2(flags, reason, capsys, tmp_path, monkeypatch):
    flags = [f(tmp_path) if callable(f) else f for f in flags]
    monkeypatch.setattr(sys, "argv", ["train_cispo.py", *flags])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)  # the run's lock is made in there
    with pytest.raises(SystemExit) as stopped:
        main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and reason in lines[0], lines


def test_an_end_token_outside_the_vocabulary_is_refused(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [1, 99999]}')
    examples = data.Examples([{"prompt": "abc>", "answer": "cba"}])
    with pytest.raises(
        ValueError,
        match="eos_token_id 99999 is outside the vocabulary of 32: no sample would end by it",
    ):
        load_prompts(Config(), tmp_path / "model", examples)


def test_bad_input_ends_the_program_before_anything_starts(tmp_path):
    """The same from outside: nothing on stdout, no run directory."""
    command = [sys.executable, str(REPO / "train_cispo.py"), "--temperature", "0"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert (
        done.stderr
        == "train_cispo.py: error: --temperature 0.0: must be above 0; greedy samples have no ratio\n"
    )


@pytest.mark.parametrize("of", ["TMPDIR", "TORCHINDUCTOR_CACHE_DIR", ".venv"])
def test_a_path_that_the_compiler_cannot_take_is_named_at_the_start(of, tmp_path):
    """torch gives it to the C++ compiler without quotes, which shows as a page of errors after
    minutes."""
    (bad := tmp_path / "a path").mkdir()
    (bad / "venv").symlink_to(sys.prefix)
    # torch sets it in this process
    env = {n: v for n, v in os.environ.items() if n != "TORCHINDUCTOR_CACHE_DIR"}
    env, python = env | ({} if of == ".venv" else {of: str(bad)}), sys.executable
    python = str(bad / "venv/bin/python") if of == ".venv" else python
    command = [python, str(REPO / "train_cispo.py")]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("train_cispo.py: error: --compile: ") and str(bad) in done.stderr
    ), done.stderr


def test_prompts_that_are_too_long_are_left_out_and_counted(
    tmp_path, tiny_checkpoint, capsys, monkeypatch
):
    """The limit is 64 - 8 tokens, and --max-input-seq-length in its place; none that fits is
    refused."""
    lengths = [3, 57, 56, 60, 1]
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"prompt": "a" * n, "answer": "b"}) + "\n" for n in lengths)
    )
    load = lambda **flags: (
        load_prompts(
            cfg := Config(data=(str(tmp_path / "d.jsonl"),), **flags),
            tiny_checkpoint,
            load_examples(cfg),
        )[0].skip
    )
    assert load() == {1, 3}
    said = capsys.readouterr().out
    assert (
        "2 of 5 prompts are left out: they have more than 56 tokens, --max-total-sequence-length "
        "64 less" in said
    )
    assert load(max_input_seq_length=2) == {0, 1, 2, 3}
    assert (
        "4 of 5 prompts are left out: they have more than 2 tokens, --max-input-seq"
        in capsys.readouterr().out
    )
    assert load(max_input_seq_length=60) == set() and not capsys.readouterr().out
    flags = [
        "--data",
        str(tmp_path / "d.jsonl"),
        "--model",
        str(tiny_checkpoint),
        "--max-new-tokens",
        "63",
    ]
    flags += ["--max-total-sequence-length", "64"]
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "ab>" * 20, "answer": "b"}) + "\n")
    monkeypatch.setattr(sys, "argv", ["train_cispo.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        main()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert (
        stopped.value.code == 2 and "no prompt can be used: all 1 have more than 1 tokens" in line
    )


ONE_UPDATE, NARROW = (
    ["--train-global-batch-size", "256"],
    ["--ratio-clip-min", "0.2", "--ratio-clip-max", "0.2"],
)


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        ([], []),
        (ONE_UPDATE, ["every CISPO weight is exactly 1"]),
        (NARROW, ["CISPO with PPO's bounds 0.2/0.2"]),
        (
            [*ONE_UPDATE, *NARROW],
            ["every CISPO weight is exactly 1", "CISPO with PPO's bounds 0.2/0.2"],
        ),
        ([*ONE_UPDATE, *ANCHOR, *UNCORRECTED], []),
        ([*ONE_UPDATE, *NARROW, *PPO], []),
    ],
)
def test_what_is_hardly_meant_is_warned_of_once(
    flags, warned, tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_cispo.py", "--cpu-threads", "1", *flags])
    monkeypatch.setattr(prepare, "resolve_model", lambda cfg, rank: tiny_checkpoint)
    monkeypatch.setattr(train_cispo, "train", lambda *args: None)
    main()
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning: " in line]
    assert len(lines) == len(warned) and all(text in line for text, line in zip(warned, lines)), (
        lines
    )


def test_unset_clips_are_those_of_the_algorithm():
    cispo, ppo = Config().algorithm, Config(use_cispo=False).algorithm
    assert (cispo.ratio_clip_min, cispo.ratio_clip_max) == (1.0, 5.0)  # weights in [0, 6]
    assert (ppo.ratio_clip_min, ppo.ratio_clip_max) == (0.2, 0.2)
    mixed = Config(use_cispo=False, ratio_clip_max=0.28).algorithm
    assert (mixed.ratio_clip_min, mixed.ratio_clip_max) == (0.2, 0.28)


def test_unset_bounds_of_a_trust_region_are_those_of_its_authors():
    bounds = lambda **flags: (
        (alg := Config(**flags).algorithm).trust_region_low,
        alg.trust_region_high,
    )
    assert bounds() == (None, None) and bounds(trust_region="tv") == (0.15, 0.15)
    assert bounds(trust_region="kl") == (0.05, 0.05) and bounds(trust_region="kpop") == (None, 0.1)
    # a bound above 1 is a KL that exists
    (cfg := Config(trust_region="kl", trust_region_high=1.5)).validate()
    assert (cfg.algorithm.trust_region_low, cfg.algorithm.trust_region_high) == (0.05, 1.5)
    # config.json holds what was used
    assert cfg.resolved["trust_region_low"] == 0.05


def test_bounds_where_the_advantage_is_negative_are_the_others_if_unset():
    alg = Config().algorithm
    assert alg.weight_bounds == alg.negative_weight_bounds == (0, 6)
    alg = Config(ratio_clip_max=3.0, ratio_clip_max_negative=0.5).algorithm
    assert alg.weight_bounds == (0, 4) and alg.negative_weight_bounds == (0, 1.5)
    alg = Config(ratio_clip_min_negative=0.0).algorithm
    assert alg.weight_bounds == (0, 6) and alg.negative_weight_bounds == (1, 6)


def test_the_learning_rate_warms_up_linearly_once_per_rollout_batch():
    cfg = Config(lr=3e-7, lr_warmup_steps=10)
    # NeMo RL's recipe: 3e-8 in its first step, 2.73e-7 in its tenth
    assert [learning_rate(step, cfg) for step in (0, 9, 10, 500)] == pytest.approx(
        [3e-8, 2.73e-7, 3e-7, 3e-7]
    )
    assert learning_rate(0, Config(lr=0.5)) == 0.5
