"""plan.py: its arithmetic against published tables, the model itself, and its own advice."""

import dataclasses
import itertools
import json
import math
import re
import shlex
import sys

import pytest
import torch

import prepare
import train_cispo
from model import KNOWN_MODELS, ModelConfig, Qwen3MoE
from presets import PRESETS
from ranks import plan
from ranks.plan import (
    GIB,
    activation_memory,
    check_layout,
    collective_bytes,
    flops_per_token,
    memory,
    parameter_classes,
    ranks_of_a_token,
    static_memory,
)

QWEN = KNOWN_MODELS["Qwen/Qwen3-30B-A3B"]
PRESET = PRESETS["qwen3-30b-a3b"]
SMALL = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=12,
    intermediate_size=48,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=20,
    decoder_sparse_step=2,
)
DENSE = dataclasses.replace(SMALL, num_experts=0, tie_word_embeddings=True)


# ---- parameters ----------------------------------------------------------------------------------
def test_qwen3_30b_has_the_parameters_and_tensor_names_of_its_checkpoint():
    with torch.device("meta"):
        model = Qwen3MoE(QWEN)
    assert sum(p.numel() for p in model.parameters()) == 30_532_122_624
    names = {name for name, _ in model.hf_tensors()}
    assert len(names) == 18_867 and "model.layers.47.mlp.experts.127.down_proj.weight" in names


@pytest.mark.parametrize(
    "m", [SMALL, DENSE, dataclasses.replace(SMALL, mlp_only_layers=(1,)), QWEN]
)
def test_on_one_rank_the_classes_are_the_models_parameters(m):
    with torch.device("meta"):
        model = Qwen3MoE(m)
    classes = parameter_classes(m, 1, 1, 1)
    assert sum(c.numel for c in classes) == sum(p.numel() for p in model.parameters())
    assert sum(c.tensors for c in classes) == len(list(model.named_parameters()))


@pytest.mark.parametrize(
    ("m", "tp", "ep"), [*itertools.product([SMALL, QWEN], [1, 2, 4, 8], [1, 2, 4, 8])]
)
def test_the_slices_of_any_layout_are_the_whole_model(m, tp, ep):
    """numel * ranks / replicas of a class counts every slice once. Frozen routers have no gradient
    and no state."""
    counted = lambda layout: [
        c.numel * layout[0] // c.replicas for c in parameter_classes(m, *layout)
    ]
    assert counted((16, tp, ep)) == counted((1, 1, 1))
    frozen, all_trained = (static_memory(m, 16, tp, ep, 2, 4, freeze) for freeze in (True, False))
    routers = (
        sum(m.is_moe_layer(i) for i in range(m.num_hidden_layers)) * m.num_experts * m.hidden_size
    )
    assert all_trained["gradients"] - frozen["gradients"] == 4 * routers
    assert all_trained["optimizer state"] - frozen["optimizer state"] == 12 * routers / 16
    total = sum(counted((1, 1, 1)))
    # ZeRO-1 leaves nothing twice, whatever the layout
    assert all_trained["optimizer state"] == 12 * total / 16


TABLE = """
    1  8 1541 3624 9.6 19.2 9.6 21.3 50.2 40.6 69.9
    1 16 1541 1812 6.3 12.5 6.3 21.3 40.1 33.8 59.8
    2  8  777 3624 8.2 16.4 8.2 21.3 45.9 37.7 65.8
    2 16  777 1812 4.8  9.6 4.8 21.3 35.8 31.0 55.7
    4  8  395 3624 7.5 15.0 7.5 21.4 43.8 36.3 63.8
    4 16  395 1812 4.1  8.2 4.1 21.4 33.7 29.6 53.7
    8  8  216 3624 7.2 14.3 7.2 21.5 42.9 35.8 63.1
    8 16  216 1812 3.8  7.6 3.8 21.5 32.8 29.0 53.0
"""


@pytest.mark.parametrize("row", TABLE.strip().splitlines())
def test_memory_is_that_of_the_table_in_the_performance_notes(row):
    """facts/performance.md, section 7: tp, ep, millions of dense and expert parameters, GiB of
    parameters, gradients in fp32 and bf16, ZeRO-1, both sums, and the peak at 16k tokens a rank (so
    16k * tp a micro-batch), twice the rows, where micro-batches are added up. The peak there is 3.6
    to 4.6 lower: recompute keeps attention's output now, and fewer rows are saved."""
    tp, ep, *wanted, peak = [float(x) if "." in x else int(x) for x in row.split()]
    classes = parameter_classes(QWEN, 16, tp, ep)
    experts = sum(c.numel for c in classes if c.name == "experts") / 1e6
    wide, narrow = (
        {n: x / GIB for n, x in static_memory(QWEN, 16, tp, ep, 2, grad).items()} for grad in (4, 2)
    )
    found = [
        sum(c.numel for c in classes) / 1e6 - experts,
        experts,
        wide["parameters"],
        wide["gradients"],
        narrow["gradients"],
        wide["optimizer state"],
        sum(wide.values()),
        sum(narrow.values()),
    ]
    assert found == pytest.approx(wanted, rel=0.015)  # the bound asked for is 5 %
    cfg = dataclasses.replace(PRESET, tp=tp, ep=ep, max_tokens_per_micro_batch=16384 * tp)
    one = sum(memory(QWEN, cfg, 16).values())
    cfg = dataclasses.replace(cfg, train_global_batch_size=65)
    assert (several := sum(memory(QWEN, cfg, 16).values())) == pytest.approx(peak, rel=0.05)
    assert one < several - 0.4 * wide["gradients"]


# ---- activations, traffic, work ------------------------------------------------------------------
def test_a_layers_activations_are_cut_by_sequence_and_tensor_parallelism():
    """At 16k tokens: layer inputs 3.0 GiB and attention's outputs 6.1; MoE 131,072 rows of 2 D + 6 F
    values in bf16."""
    one, two = (activation_memory(QWEN, dataclasses.replace(PRESET, tp=tp)) for tp in (1, 2))
    assert [one[n] / GIB for n in ("kept", "MoE", "MoE, fullest rank")] == pytest.approx(
        [9.1, 2.125, 4.25], rel=0.01
    )
    for name in ("kept", "MoE", "MoE, fullest rank"):
        assert two[name] == one[name] / 2
    gathered = 16384 * 2048 * 2  # the one tensor that each tp rank has whole
    assert two["attention"] == one["attention"] / 2 + gathered
    assert two["all layers"] == one["all layers"] / 2 + 48 * gathered


def test_collectives_send_what_the_shapes_say():
    sent = {
        n: size
        for n, (size, _) in collective_bytes(QWEN, dataclasses.replace(PRESET, tp=2), 16).items()
    }
    # the other half
    assert sent["TP/SP all-gather"] == sent["TP/SP reduce-scatter"] == 16384 * 2048 * 2 / 2
    # Of 8 experts of 128, none of a rank's 16: 0.3326. A row's weights and experts go with it.
    elsewhere = math.prod((112 - i) / (128 - i) for i in range(8))
    rows = 8192 * 8 * (1 - elsewhere) * 7 / 8
    assert sent["EP dispatch"] == pytest.approx(rows * (2048 + 8 + 8) * 2)
    assert sent["EP combine"] == pytest.approx(rows * 2048 * 2)
    experts, attention, norms = (
        3 * 16 * 2048 * 768,
        (2 * 4096 + 2 * 512) * 2048 / 2,
        2 * (2048 + 128),
    )
    assert sent["gradient reduce-scatter"] == pytest.approx(
        4 * (experts / 2 + attention * 7 / 8 + (norms + 2048 / 48) * 15 / 16)
    )
    assert sent["parameter all-gather"] == sent["gradient reduce-scatter"] / 2
    alone = collective_bytes(QWEN, dataclasses.replace(PRESET, ep=1), 1)
    assert {size for size, _ in alone.values()} == {0.0}


def test_the_ranks_of_a_token_are_those_of_all_its_sets_of_experts():
    small = dataclasses.replace(QWEN, num_experts=8, num_experts_per_tok=3)
    for ep in (1, 2, 4, 8):
        sets = list(itertools.combinations(range(8), 3))
        ranks = [len({expert * ep // 8 for expert in experts}) for experts in sets]
        assert ranks_of_a_token(small, ep) == pytest.approx(sum(ranks) / len(sets))


@pytest.mark.parametrize(
    ("length", "gflops"), [(2048, 20.7), (4096, 23.1), (8192, 27.9), (16384, 37.6)]
)
def test_flops_per_token_are_those_of_the_performance_notes(length, gflops):
    assert flops_per_token(QWEN, length) / 1e9 == pytest.approx(gflops, abs=0.05)


# ---- layouts -------------------------------------------------------------------------------------
def test_layouts_that_divide_pass():
    for tp, ep in itertools.product([1, 2, 4, 8, 16], [1, 2, 4, 8, 16]):
        check_layout(QWEN, 16, tp, ep)
    check_layout(DENSE, 2, 2, 1)
    check_layout(dataclasses.replace(QWEN, intermediate_size=13), 16, 8, 8)  # it has no dense layer


@pytest.mark.parametrize(
    ("changes", "layout", "reason"),
    [
        ({}, (16, 1, 6), "--ep 6 does not divide num_experts=128"),
        ({}, (16, 1, 32), "--ep 32 does not divide the number of ranks=16"),
        ({}, (16, 3, 1), "--tp 3 does not divide num_attention_heads=32"),
        ({}, (12, 8, 1), "--tp 8 does not divide the number of ranks=12"),
        ({"vocab_size": 151937}, (16, 2, 1), "--tp 2 does not divide vocab_size=151937"),
        (
            {"mlp_only_layers": (3,), "intermediate_size": 13},
            (16, 2, 1),
            "--tp 2 does not divide intermediate_size=13",
        ),
        (
            {"num_key_value_heads": 6},
            (16, 4, 1),
            "--tp 4 neither divides num_key_value_heads=6 nor is a multiple",
        ),
        ({"num_experts": 0}, (16, 1, 2), "--ep 2: the model is dense, num_experts=0"),
        (
            {"num_experts": 1028},
            (16, 1, 4),
            "--ep 4: 257 experts on a rank are above 256, the most that a row can name in bf16 "
            "(ranks/experts.py)",
        ),
        ({}, (16, 0, 1), "--tp 0, --ep 1 and the number of ranks, 16, must be at least 1"),
    ],
)
def test_a_degree_that_does_not_divide_is_named_with_what_it_should(changes, layout, reason):
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        check_layout(dataclasses.replace(QWEN, **changes), *layout)


# ---- the command ---------------------------------------------------------------------------------
def dry_run(monkeypatch, capsys, *flags):
    """Exit status, report, and lines of error."""
    monkeypatch.setattr(sys, "argv", ["train_cispo.py", "--dry-run", *flags])
    monkeypatch.setattr(
        prepare, "resolve_model", lambda *args: pytest.fail("it wants a checkpoint")
    )
    status = 0
    try:
        train_cispo.main()
    except SystemExit as stopped:
        status = stopped.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err.strip().splitlines()


def test_the_recipe_fits_16_gpus_and_the_report_says_what_takes_the_room(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    status, report, errors = dry_run(monkeypatch, capsys, "--preset", "qwen3-30b-a3b")
    assert (status, errors) == (0, []) and not list(tmp_path.iterdir())
    for line in [
        r"on 16 ranks: tp 1, ep 8, data parallel 16",
        r"experts +3623.9  2\n",
        r"routers +12.6  16, frozen",
        r"parameters +9.62\n",
        r"gradients +2.45  those under way: an update is one micro-batch\n",
        r"optimizer state +21.32\n",
        r"EP dispatch +316.0 ",
        r"EP combine +313.5 ",
        r"30,532,122,624 parameters are 61.06 GB",
        r"experts +167.5  109 TFLOP at 650 TFLOP/s\n",
        r"sequences of 4096, 23.1 GFLOP a token\n",
    ]:
        assert re.search(line, report), line
    terms = [
        float(x)
        for x in re.findall(r"(?<=GiB\n)[\s\S]*(?=  peak)", report)[0].split()
        if re.match(r"\d+\.\d\d$", x)
    ]
    assert sum(terms) == pytest.approx(
        float(re.search(r"peak +([\d.]+)  of 79.6", report)[1]), abs=0.03
    )


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        (["--no-activation-checkpointing"], "saved activations"),
        (["--ep", "1"], "optimizer state"),
        (["--max-tokens-per-micro-batch", "65536"], "live layer or loss"),
        (["--dry-run-ranks", "4", "--ep", "4"], "optimizer state"),
        (["--gpu-memory-gib", "40"], "saved activations"),
        (["--train-global-batch-size", "128", "--gpu-memory-gib", "30"], "gradients"),
        (["--reference-policy-kl-penalty", "0.1", "--param-dtype", "float32"], "saved activations"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_advice_fits(flags, culprit, monkeypatch, capsys):
    flags = ["--preset", "qwen3-30b-a3b", *flags]
    status, report, errors = dry_run(monkeypatch, capsys, *flags)
    (line,) = errors
    assert status == 2 and "peak" in report and f"What breaks it: {culprit} (" in line, line
    advice = line.split("What fits: ")[1].split("; or ")
    for text in advice:
        changed, peak = re.fullmatch(r"(.*) \(([\d.]+)\)", text).groups()
        changed = re.sub(r"^(\d+) ranks", r"--dry-run-ranks \1", changed).split()
        status, report, errors = dry_run(monkeypatch, capsys, *flags, *changed)
        assert status == 0, (changed, errors)
        assert float(re.search(r"peak +([\d.]+)", report)[1]) == pytest.approx(
            float(peak), abs=0.06
        )


def test_the_number_of_ranks_is_torchruns_if_there_is_one(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "32")
    assert "on 32 ranks" in dry_run(monkeypatch, capsys, "--preset", "qwen3-30b-a3b")[1]
    monkeypatch.setenv("RANK", "1")
    # one report, not 32
    assert dry_run(monkeypatch, capsys, "--preset", "qwen3-30b-a3b") == (0, "", [])


def test_any_checkpoint_directory_can_be_planned_for(monkeypatch, capsys, tiny_checkpoint):
    status, report, _ = dry_run(
        monkeypatch, capsys, "--model", str(tiny_checkpoint), "--ep", "4", "--dry-run-ranks", "4"
    )
    assert status == 0 and "on 4 ranks: tp 1, ep 4, data parallel 4" in report


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            ["--model", "nobody/x"],
            "--model 'nobody/x' is neither a directory, nor in the Hub's cache, nor Qwen/",
        ),
        (["--preset", "qwen3-30b-a3b", "--ep", "6"], "--ep 6 does not divide num_experts=128"),
        (
            ["--preset", "qwen3-30b-a3b", "--tp", "3"],
            "--max-tokens-per-micro-batch 16384 is no multiple of --tp 3",
        ),
    ],
)
def test_a_plan_for_nothing_is_one_line_and_status_2(flags, reason, monkeypatch, capsys):
    status, report, errors = dry_run(monkeypatch, capsys, *flags)
    assert status == 2 and not report and len(errors) == 1 and reason in errors[0]


# ---- vLLM beside a rank --------------------------------------------------------------------------
SHARED = "vLLM on the same GPU"


@pytest.fixture
def qwen3_4b(tmp_path):
    """Its config.json alone."""
    cfg = KNOWN_MODELS["Qwen/Qwen3-4B"]
    (tmp_path / "4b").mkdir()
    (tmp_path / "4b/config.json").write_text(json.dumps(cfg.to_hf(0)))
    return str(tmp_path / "4b")


def test_a_vllm_on_the_trainer_s_gpu_is_counted_and_refused_where_both_do_not_fit(
    monkeypatch, capsys, qwen3_4b
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    flags = ["--preset", "qwen3-0.6b", "--model", qwen3_4b, "--gpu-memory-gib", "79.6"]
    status, report, errors = dry_run(monkeypatch, capsys, *flags)
    assert (
        status == 2
        and f"What breaks it: {SHARED} (" in errors[0]
        and "a GPU more, which vLLM" in errors[0]
    ), errors
    assert float(re.search(rf"{SHARED} +([\d.]+)", report)[1]) == pytest.approx(
        0.4 * 79.6, abs=0.01
    )
    advice = errors[0].split("What fits: ")[1].split("; or ")[0]
    assert dry_run(monkeypatch, capsys, *flags, *re.sub(r" \(.*", "", advice).split())[0] == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    status, report, errors = dry_run(monkeypatch, capsys, *flags)
    assert (status, errors) == (0, []) and SHARED not in report


@pytest.mark.parametrize(
    ("args", "share"),
    [
        ("", 0.92),
        ("--vllm-args '--gpu-memory-utilization 0.3 --dtype half'", 0.3),
        ("--vllm-args=--gpu_memory_utilization=.25", 0.25),
    ],
)
def test_vllm_s_share_is_what_its_flags_say(monkeypatch, capsys, args, share):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    _, report, _ = dry_run(
        monkeypatch, capsys, "--preset", "tiny", f"--rollout-args={args}", "--gpu-memory-gib", "100"
    )
    assert float(re.search(rf"{SHARED} +([\d.]+)", report)[1]) == pytest.approx(100 * share)
    assert SHARED not in dry_run(monkeypatch, capsys, "--preset", "tiny", "--no-local-rollout")[1]


def test_qwen3_06b_takes_one_gpu_of_80_gb_or_two_of_24(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert dry_run(monkeypatch, capsys, "--preset", "qwen3-0.6b")[0] == 0
    small = ["--preset", "qwen3-0.6b", "--gpu-memory-gib", "23"]
    status, _, (error,) = dry_run(monkeypatch, capsys, *small)
    assert status == 2
    advice = re.search(r"; or (--rollout-args=.*)$", error)[1]  # which can be given as it is
    assert dry_run(monkeypatch, capsys, *small, *shlex.split(advice))[0] == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert dry_run(monkeypatch, capsys, *small)[0] == 0


# ---- what a run would refuse ----------------------------------------------------------------------
@pytest.mark.parametrize("plan", [True, False])
def test_samples_longer_than_the_model_s_positions_are_refused_before_anything_starts(
    plan, monkeypatch, capsys, tiny_checkpoint
):
    positions = ModelConfig.from_dir(tiny_checkpoint).max_position_embeddings
    flags = [
        "--model",
        str(tiny_checkpoint),
        "--max-new-tokens",
        "8",
        "--max-total-sequence-length",
    ]
    monkeypatch.setattr(
        sys, "argv", ["train_cispo.py", *flags, str(positions + 1), *["--dry-run"] * plan]
    )
    monkeypatch.setattr(train_cispo, "train", lambda *args: pytest.fail("it starts"))
    with pytest.raises(SystemExit) as stopped:
        train_cispo.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert (
        f"--max-total-sequence-length {positions + 1} is above the model's "
        f"max_position_embeddings={positions}" in error
    )
    assert dry_run(monkeypatch, capsys, *flags, str(positions))[0] == 0


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("def score(completion, example):\n    return 1.0\n", ""),
        ("from .helper import x\n", "cannot be imported: ImportError: attempted relative import"),
        ("import no_such_package_of_mine\n", "cannot be imported: ModuleNotFoundError"),
        ("def other(completion, example):\n    return 1.0\n", "has no function 'score'"),
        ("def score(completion):\n    return 1.0\n", "it is called with (completion, example)"),
    ],
)
def test_a_reward_that_a_run_would_refuse_is_refused_after_the_plan(
    monkeypatch, capsys, tmp_path, source, why
):
    (tmp_path / "my.py").write_text(source)
    (tmp_path / "helper.py").write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    status, report, errors = dry_run(monkeypatch, capsys, "--reward", f"{tmp_path}/my.py:score")
    assert (status, len(errors)) == ((2, 1) if why else (0, 0)) and "to start it" in report, errors
    assert why in "".join(errors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["helper.py", "my.py"]


def test_a_plan_refuses_what_the_chat_template_of_a_model_on_this_machine_cannot_say(
    monkeypatch, capsys, tmp_path, tiny_checkpoint
):
    told = "async def play(sample, example):\n    await sample()\n    await sample(tool='3')\n"
    (tmp_path / "my.py").write_text(told)
    flags = ("--model", str(tiny_checkpoint), "--reward", f"{tmp_path}/my.py:play")
    status, report, (error,) = dry_run(monkeypatch, capsys, *flags)
    assert status == 2 and "to start it" in report
    assert f"--reward {tmp_path}/my.py:play: sample(tool=...): {tiny_checkpoint} has no" in error
    (tmp_path / "my.py").write_text(told.replace("tool", "insert"))
    assert dry_run(monkeypatch, capsys, *flags)[0] == 0
    (error,) = dry_run(monkeypatch, capsys, *flags, "--chat-template-kwargs", '{"tools": []}')[2]
    assert "--chat-template-kwargs: " in error


def test_a_model_that_is_not_known_can_be_planned_for_by_its_config_alone(
    monkeypatch, capsys, qwen3_4b
):
    (error,) = dry_run(monkeypatch, capsys, "--model", "nobody/x")[2]
    assert "a directory with the model's config.json is enough" in error
    assert (
        "on 8 ranks" in dry_run(monkeypatch, capsys, "--model", qwen3_4b, "--dry-run-ranks", "8")[1]
    )


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        ("--preset tiny", "to start it on one machine: bash launch.sh FLAGS; its vLLM gets the"),
        ("--preset tiny --dry-run-ranks 4", "machine: NPROC=4 bash launch.sh FLAGS; its vLLM"),
        ("--preset qwen3-30b-a3b", "to start it: 16 ranks on trainer nodes and rollout nodes of"),
        ("--preset tiny --no-local-rollout", "to start it: 1 rank on trainer nodes and rollout"),
    ],
)
def test_the_last_line_says_how_to_start_what_was_planned(monkeypatch, capsys, flags, start):
    status, report, _ = dry_run(monkeypatch, capsys, *flags.split())
    assert status == 0 and start in report.splitlines()[-1]


def test_what_does_not_fit_is_not_told_how_to_start(monkeypatch, capsys):
    status, report, _ = dry_run(monkeypatch, capsys, "--preset", "qwen3-30b-a3b", "--ep", "1")
    assert status == 2 and "to start it" not in report


# ---- what a GPU's kernels take -------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shape", "flags", "said"),
    [
        ({}, {"param_dtype": "float32"}, "--param-dtype float32: .* bfloat16"),
        ({"head_dim": 20}, {}, "head_dim=20: .* multiples of 8 and at most 256"),
        ({"head_dim": 512}, {}, "head_dim=512: .* at most 256"),
        ({"hidden_size": 2044}, {}, "hidden_size=2044: .* multiples of 8"),
        ({"moe_intermediate_size": 772}, {}, "moe_intermediate_size=772: .* multiples of 8"),
        ({"num_experts": 2048}, {"ep": 1}, r"experts of a rank \(--ep\)=2048: .* at most 1024"),
    ],
)
def test_what_a_gpu_s_kernels_do_not_take_is_refused_before_it_is_touched(
    shape, flags, said, monkeypatch
):
    m, cfg = dataclasses.replace(QWEN, **shape), dataclasses.replace(PRESET, **flags)
    with pytest.raises(ValueError, match=said):
        plan.check_cuda(m, cfg)
    # on a CPU it is no matter, and with a GPU it is part of all that is checked
    monkeypatch.setattr(plan, "check_memory", lambda *args: None)
    plan.check(m, cfg, 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=said):
        plan.check(m, cfg, 16)


def test_the_known_models_and_the_tiny_one_are_what_a_gpu_s_kernels_take():
    for m in KNOWN_MODELS.values():
        plan.check_cuda(m, PRESET)
