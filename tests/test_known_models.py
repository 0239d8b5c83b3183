"""The models that are planned for by name: their shapes, what wins over them, and the GPUs that the
dry run says they take."""

import dataclasses
import json
import re
import shlex
from argparse import Namespace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

import prepare
from model import KNOWN_MODELS, ModelConfig
from presets import PRESETS, parse_config
from ranks import dry_run as planner
from ranks import plan, speed
from ranks.plan import GIB
from tests.test_dry_run import dry_run

# Model cards: billions of parameters, of those outside the vocabulary's two matrices, and of those
# that a token passes (of a MoE)
CARDS = {
    "0.6B": (0.6, 0.44, None),
    "1.7B": (1.7, 1.4, None),
    "4B": (4.0, 3.6, None),
    "8B": (8.2, 6.95, None),
    "14B": (14.8, 13.2, None),
    "32B": (32.8, 31.2, None),
    "30B-A3B": (30.5, 29.9, 3.3),
    "235B-A22B": (235, 234, 22),
}
# Where others have counted them in the files; a tied matrix once
COUNTED = {"0.6B": 596_049_920, "1.7B": 1_720_574_976, "30B-A3B": 30_532_122_624}


def size_of(name: str) -> str:
    """As "30B-A3B"."""
    found = [size for size in CARDS if size in name.removeprefix("Qwen/Qwen3-").split("-2507")[0]]
    return max(found, key=len)


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_a_known_model_has_the_parameters_of_its_card(name):
    m, size = KNOWN_MODELS[name], size_of(name)
    vocabulary = m.vocab_size * m.hidden_size * (1 if m.tie_word_embeddings else 2)
    idle = m.num_experts - m.num_experts_per_tok
    idle *= len(m.moe_layers) * 3 * m.hidden_size * m.moe_intermediate_size
    found = (m.num_parameters, m.num_parameters - vocabulary, m.num_parameters - idle)
    for number, card in zip(found, CARDS[size]):
        # the cards round, some down
        assert card is None or number / 1e9 == pytest.approx(card, rel=0.02)
    assert m.num_parameters == COUNTED.get(size, m.num_parameters)


def test_the_names_are_those_of_the_hub():
    sizes = ["0.6B", "1.7B", "4B", "8B", "14B", "32B", "30B-A3B", "235B-A22B"]
    later = [f"{size}-{kind}-2507" for size in ("4B", "30B-A3B", "235B-A22B")
             for kind in ("Instruct", "Thinking")]  # fmt: skip
    names = [*sizes, *later, "Coder-30B-A3B-Instruct"]
    assert set(KNOWN_MODELS) == {f"Qwen/Qwen3-{name}" for name in names}


# As they are on the Hub, less what `from_hf` does not read.
CONFIGS = {
    "Qwen/Qwen3-4B": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02,
        "intermediate_size": 9728, "max_position_embeddings": 40960, "max_window_layers": 36,
        "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 5472, "max_position_embeddings": 262144, "max_window_layers": 28,
        "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "qkv_bias": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000,
        "shared_expert_intermediate_size": 0, "sliding_window": None,
        "tie_word_embeddings": False, "use_qk_norm": True, "use_sliding_window": False,
        "vocab_size": 151936,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_known_model_is_what_its_config_json_says(name):
    assert KNOWN_MODELS[name] == ModelConfig.from_hf(CONFIGS[name])


def test_a_directory_and_the_hub_s_cache_win_over_the_table(tmp_path, monkeypatch, tiny_checkpoint):
    """The cache as huggingface_hub lays it out. What it has is not asked of the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    name, flags = "Qwen/Qwen3-8B", ["--dry-run", "--preset", "qwen3-0.6b", "--model"]
    cfg = parse_config([*flags, name])
    assert prepare.known_config(cfg) == KNOWN_MODELS[name]
    repository = tmp_path / "cache/models--Qwen--Qwen3-8B"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("c0ffee")
    (repository / "snapshots/c0ffee").mkdir(parents=True)
    cached = repository / "snapshots/c0ffee/config.json"
    cached.write_text((tiny_checkpoint / "config.json").read_text())
    tiny = ModelConfig.from_dir(tiny_checkpoint)
    assert prepare.known_config(cfg) == tiny != KNOWN_MODELS[name]
    cached.write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ValueError, match=r"^--model Qwen/Qwen3-8B: architecture 'Llama"):
        prepare.known_config(cfg)
    # of the same name as the Hub's
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen/Qwen3-8B").mkdir(parents=True)
    (tmp_path / "Qwen/Qwen3-8B/config.json").write_text(
        (tiny_checkpoint / "config.json").read_text()
    )
    assert prepare.known_config(parse_config([*flags, name])) == tiny


@pytest.mark.parametrize("name", ["nobody/x", "a/b/c", "Qwen/Qwen3-8B-"])
def test_a_name_that_nobody_knows_is_refused_with_those_that_are(name):
    cfg = parse_config(["--dry-run", "--preset", "qwen3-0.6b", "--model", name])
    with pytest.raises(ValueError, match=r"nor in the Hub's cache, nor Qwen/Qwen3-0\.6B, .*2507"):
        prepare.known_config(cfg)


# ---- which GPUs ----------------------------------------------------------------------------------
ROW = r"(\d+) GB +(\d+) +(\d+|same) +([\d.]+)  (.*)\n"


def table(monkeypatch, capsys, *flags):
    """Its rows: GB of a GPU, GPUs that train, those that sample, GiB, further flags."""
    status, report, errors = dry_run(monkeypatch, capsys, *flags)
    assert (status, errors) == (0, [])
    return re.findall(ROW, report)


@pytest.mark.parametrize("size", ["1.7B", "14B", "30B-A3B"])
def test_what_is_said_to_train_a_model_fits_and_half_as_many_gpus_do_not(size, monkeypatch, capsys):
    name = f"Qwen/Qwen3-{size}"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    rows = table(monkeypatch, capsys, "--model", name)
    assert {gb for gb, *_ in rows} == {"24", "80", "141"}
    for _, train, sample, gib, flags in rows:
        gpus = int(train) + (0 if sample == "same" else int(sample))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
        given = ["--preset", "qwen3-0.6b", "--model", name, *shlex.split(flags)]
        status, report, errors = dry_run(monkeypatch, capsys, *given, "--dry-run-ranks", train)
        assert (status, errors) == (0, []), (flags, errors)
        peak, limit = map(float, re.search(r"peak +([\d.]+)  of ([\d.]+)", report).groups())
        assert peak == pytest.approx(float(gib), abs=0.06) and peak <= 0.97 * limit
        assert ("vLLM on the same GPU" in report) == (sample == "same")
        if sample == "same":  # all samples of a prompt at once
            assert int(re.search(r"room for (\d+) samples", report)[1]) >= 16
        if int(train) > 1 and sample != "same":
            m, cfg = KNOWN_MODELS[name], parse_config([*given, "--dry-run"])
            cfg = dataclasses.replace(cfg, local_rollout=False, gpu_memory_gib=0.97 * limit)
            halved = plan.fitting(m, cfg, int(train) // 2, further=0)
            assert not [flags for _, flags, _ in halved if "grad_dtype" not in flags]


def test_a_model_without_a_preset_is_planned_with_the_lengths_of_a_real_run(monkeypatch, capsys):
    flags = ["--model", "Qwen/Qwen3-8B"]
    rows = table(monkeypatch, capsys, *flags)
    assert [row[:3] for row in rows if row[0] == "80"] == [("80", "2", "1"), ("80", "4", "same")]
    status, report, _ = dry_run(monkeypatch, capsys, *flags, "--dry-run-ranks", "8", "--tp", "2")
    assert status == 0 and "sequences of 4096" in report
    assert "Qwen/Qwen3-8B on 8 ranks: tp 2, ep 1, data parallel 4" in report
    report = dry_run(monkeypatch, capsys, *flags, "--nodes", "2")[1]
    assert "a step of 512 samples of 4096 tokens on 2 nodes" in report
    # lengths of one's own stay
    longer = ["--max-new-tokens", "12288", "--max-tokens-per-micro-batch", "16384"]
    found = table(monkeypatch, capsys, *flags, *longer)
    assert [row[:3] for row in found if row[0] == "80"] == [("80", "4", "1"), ("80", "4", "same")]


def test_the_page_shows_what_is_printed(monkeypatch, capsys):
    page = (Path(__file__).parent.parent / "docs/nodes.md").read_text()
    (name, shown) = re.search(
        r"\$ python train_cispo.py --model (\S+) --dry-run\n(.*?)```", page, re.S
    ).groups()
    assert shown in dry_run(monkeypatch, capsys, "--model", name)[1]


def test_a_235b_model_takes_64_gpus_of_80_gb(monkeypatch, capsys):
    report = dry_run(monkeypatch, capsys, "--model", "Qwen/Qwen3-235B-A22B")[1]
    assert re.search(r"24 GB +none of up to 512\n", report)
    rows = [row[:3] for row in re.findall(ROW, report)]
    assert rows == [("80", "64", "8"), ("141", "32", "4")]


def test_gradients_are_planned_as_a_whole_only_where_micro_batches_add_them_up():
    """By hand, of rank 0 of 16. Samples of 4,096 tokens, 32 an update: two a rank."""
    m, cfg = KNOWN_MODELS["Qwen/Qwen3-30B-A3B"], PRESETS["qwen3-30b-a3b"]
    head, layer = 2048 * 151936, (3623.9e6 + 906.2e6) / 48
    under_way = 4 * (head + 8 * layer / 3 + layer)
    terms = plan.memory(m, cfg, 16)
    assert terms["gradients"] * GIB == pytest.approx(under_way, rel=1e-3)
    assert "sums of gradients" not in terms  # less than the activations whose place they take
    for changed in ({"max_tokens_per_micro_batch": 8191}, {"train_global_batch_size": 65}):
        several = plan.memory(m, dataclasses.replace(cfg, **changed), 16)
        assert several["gradients"] == pytest.approx(19.19, abs=0.01)


def test_the_sums_of_the_gradients_are_counted_where_activations_leave_no_room_for_them():
    """In the optimizer's step a rank holds parameters, state and them: 40 GiB of rank 0 of 16, by
    torch's allocator on the fake GPU (STEP_GIB of test_fake_gpu.py), with what the step itself
    takes."""
    m, cfg = KNOWN_MODELS["Qwen/Qwen3-30B-A3B"], PRESETS["qwen3-30b-a3b"]
    held = plan.static_memory(m, 16, 1, 8, 2, 4)
    static = (held["parameters"] + held["optimizer state"]) / GIB + plan.OVERHEAD_GIB
    sums = plan.summed_gradients(m, cfg, 16) / GIB
    assert static + sums - plan.OVERHEAD_GIB == pytest.approx(38.1, abs=0.1)
    cfg = dataclasses.replace(cfg, max_tokens_per_micro_batch=2048, max_total_sequence_length=512)
    terms = plan.memory(m, cfg, 16)
    assert terms["sums of gradients"] == pytest.approx(4.5, abs=0.1)
    # a layer's backward, and what is under way
    assert static + sums < sum(terms.values()) < static + sums + 4
    # fp32 gradients that no other rank has are their own sums; bf16 ones are not
    dense, small = KNOWN_MODELS["Qwen/Qwen3-4B"], PRESETS["qwen3-4b"]
    assert "sums of gradients" not in plan.memory(dense, small, 1)
    narrow = dataclasses.replace(small, grad_dtype="bfloat16")
    assert plan.memory(dense, narrow, 1)["sums of gradients"] > 0


def test_vllm_s_engines_share_the_experts_and_each_has_the_rest(monkeypatch):
    """Two engines of 4 GPUs, of which each gives 0.3 of 139.8 GiB less 6; by hand."""
    m, cfg = KNOWN_MODELS["Qwen/Qwen3-30B-A3B"], PRESETS["qwen3-30b-a3b-node"]
    experts = 2 * 48 * 128 * 3 * 2048 * 768
    rest = 2 * 30_532_122_624 - experts
    keys = 2 * 48 * 4 * 128 * 2  # of a token: keys and values of 4 heads in bf16
    room = 4 * (0.3 * 139.8 - 6) * GIB - rest - experts / 2
    assert speed.cached(m, cfg, 4096, 4, 8, 0.3) == pytest.approx(room / (4096 * keys))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    cfg = dataclasses.replace(cfg, dry_run=True)
    assert planner.shared_samples(m, cfg, 8) == pytest.approx(2 * room / (4096 * keys))
    # one engine has them all
    alone = 4 * (0.3 * 139.8 - 6) * GIB - rest - experts
    assert speed.cached(m, cfg, 4096, 4, 4, 0.3) == pytest.approx(alone / (4096 * keys))


def test_a_vllm_without_room_for_one_sample_is_refused(monkeypatch, capsys):
    share = "--rollout-args=--vllm-args '--gpu-memory-utilization 0.08'"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    status, _, (error,) = dry_run(
        monkeypatch, capsys, "--preset", "qwen3-4b", share, "--gpu-memory-gib", "90"
    )
    assert status == 2 and error.endswith(
        "vLLM's 0.08 of 90 GiB do not hold its weights and the keys and values of one sample"
    )


def test_a_plan_for_larger_gpus_than_there_are_is_refused(monkeypatch):
    m, cfg = KNOWN_MODELS["Qwen/Qwen3-4B"], PRESETS["qwen3-4b"]
    gib = Namespace(total_memory=79.19 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gib)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match=r"above --gpu-memory-gib 79\.1\. .* a GPU more, which"):
        plan.check(m, cfg, 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    plan.check(m, cfg, 1)  # vLLM has the second
    gib.total_memory = 139.81 * GIB
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    plan.check(m, cfg, 1)


@pytest.mark.parametrize(
    ("preset", "visible", "culprit"),
    [
        ("qwen3-4b", "0", "vLLM on the same GPU"),
        ("qwen3-30b-a3b-node", "0,1,2,3,4,5,6,7", "vLLM on the same GPU"),
    ],
)
def test_what_shares_gpus_of_141_gb_does_not_fit_those_of_80(
    preset, visible, culprit, monkeypatch, capsys
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert dry_run(monkeypatch, capsys, "--preset", preset)[0] == 0
    small = ["--preset", preset, "--gpu-memory-gib", "79.6"]
    status, _, (error,) = dry_run(monkeypatch, capsys, *small)
    assert status == 2 and f"What breaks it: {culprit} (" in error
    rows = table(monkeypatch, capsys, "--preset", preset, "--dry-run-ranks", "0")
    of_80 = {sample: int(train) for gb, train, sample, *_ in rows if gb == "80"}
    assert of_80 == ({"1": 1, "same": 2} if preset == "qwen3-4b" else {"1": 8})


def test_the_largest_model_that_shares_a_gpu_of_80_gb_with_vllm_has_1_7b(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    flags = ["--preset", "qwen3-0.6b", "--model"]
    assert dry_run(monkeypatch, capsys, *flags, "Qwen/Qwen3-1.7B")[0] == 0
    rows = table(monkeypatch, capsys, "--model", "Qwen/Qwen3-4B")
    assert ("80", "1", "same") not in [row[:3] for row in rows]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    two = ["--preset", "qwen3-4b", "--gpu-memory-gib", "79.6"]
    assert dry_run(monkeypatch, capsys, *two)[0] == 0
