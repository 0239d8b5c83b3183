"""speed.py: the time of an update and of a batch against figures made by other arithmetic, and what
`--dry-run --nodes` makes of them."""

import dataclasses
import re
from argparse import Namespace

import pytest
import torch

from bridge.processes import gpus_of_vllm
from model import KNOWN_MODELS
from presets import PRESETS
from ranks import dry_run, speed
from ranks.batch import trained_lengths
from tests.test_dry_run import dry_run as run_dry

QWEN = KNOWN_MODELS["Qwen/Qwen3-30B-A3B"]
PRESET = PRESETS["qwen3-30b-a3b"]
# Code as it was when the same times had been worked out by hand, and the rates assumed then.
OLD = speed.Code(256, 4.0, 1 + 15 * 0.12, *[False] * 8)
ASSUMED = {
    "dense GEMM": 650e12,
    "grouped GEMM": 550e12,
    "attention": 350e12,
    "attention backward": 300e12,
    "sort": 1.64e9,
    "top-k": 1.09e8,
    "wait": 1e4,
}


@pytest.fixture
def assumed(monkeypatch):
    for name, value in ASSUMED.items():
        monkeypatch.setitem(speed.RATES, name, speed.RATES[name]._replace(value=value))


def milliseconds(code=OLD, N=16384, length=4096, cfg=PRESET, world=16):
    terms = speed.training(QWEN, cfg, world, length, N, code)
    return terms, lambda *parts: 1e3 * speed.seconds(terms, *parts)


@pytest.mark.parametrize(
    ("length", "training", "prev"), [(2048, 1678, 469), (4096, 1864, 507), (8192, 2234, 582)]
)
def test_a_micro_batch_takes_what_was_worked_out_by_hand(length, training, prev, assumed):
    """From bytes counted in the compiled code, and all else from shapes."""
    _, of = milliseconds(length=length)
    assert of("training") == pytest.approx(training, rel=0.01)
    assert of("prev pass") == pytest.approx(prev, rel=0.01)
    assert of("update") == pytest.approx(306, rel=0.01)


def test_each_term_is_the_one_by_hand(assumed):
    terms, _ = milliseconds()
    found = {}
    for t in terms:
        if t.part == "training":
            name = t.name.removesuffix("'s backward")
            found[name] = found.get(name, 0.0) + 1e3 * t.seconds
    assert found == pytest.approx(
        {
            "projections, routers, dense MLPs": 184,
            "experts": 432,
            "attention": 371,
            "elementwise, norms, rows": 293,
            "all-to-all": 398,
            "sorts": 45 - 14.4,
            "top-k": 14.4,
            "waits for the experts' counts": 27,
            "head": 98,
            "adding up gradients": 16,
        },
        rel=0.01,
    )


@pytest.mark.parametrize(("N", "rate"), [(4096, 4500), (8192, 5500), (16384, 6100), (65536, 6700)])
def test_the_old_code_trains_at_the_rate_by_hand(N, rate, assumed):
    """3 %: there a half-full micro-batch waits half as often for its counts."""
    _, of = milliseconds(N=N)
    assert N / of() * 1e3 == pytest.approx(rate, rel=0.035)


@pytest.mark.parametrize("code", [speed.CODE, speed.PLANNED], ids=["code", "planned"])
def test_the_recipe_is_planned_to_train_at_7000_tokens_a_second(code):
    """On paper: what one GPU does is measured, the network's rates are assumed."""
    assert 8192 / milliseconds(code, 8192)[1]() * 1e3 >= 7000


@pytest.mark.parametrize("name", speed.Code._fields)
def test_every_option_of_the_code_spares_time(name):
    spared = OLD._replace(**{name: getattr(speed.PLANNED, name)})
    assert milliseconds(spared)[1]() < milliseconds()[1]() - 5


def test_gradients_that_take_longer_than_the_backward_are_not_hidden():
    after = speed.update(QWEN, PRESET, 16)
    sent = sum(t.seconds for t in after if t.name.startswith("gradients"))
    for backward_s, left in [(10.0, sent / 48), (sent / 4, sent * 3 / 4), (0.0, sent)]:
        kept = [
            t
            for t in speed._hidden(after, "gradients", backward_s, 48)
            if t.name.startswith("gradients")
        ]
        assert speed.seconds(kept) == pytest.approx(left)


@pytest.mark.parametrize(
    ("replicas", "world", "way"),
    [
        (8, 8, ("NVLink ring", 1)),
        (2, 16, ("InfiniBand", 1)),
        (4, 16, ("InfiniBand", 2)),
        (16, 16, ("NVLink ring", 1)),
    ],
)
def test_gradients_go_over_the_nics_that_their_ranks_have(replicas, world, way):
    assert speed.ring(replicas, world) == way


def test_one_rank_alone_sends_nothing():
    cfg = dataclasses.replace(PRESET, ep=1)
    sent = {t.rate for t in speed.training(QWEN, cfg, 1, 4096, 8192, OLD)}
    assert not sent & {"NVLink all-to-all", "NVLink ring", "InfiniBand"}


@pytest.mark.parametrize(("tp", "ep", "rate"), [(2, 8, "NVLink ring"), (1, 16, "InfiniBand")])
def test_what_a_layout_sends_goes_over_its_links(tp, ep, rate):
    cfg = dataclasses.replace(PRESET, tp=tp, ep=ep)
    terms = speed.training(QWEN, cfg, 16, 4096, 8192 * tp, OLD)
    assert rate in {t.rate for t in terms if t.part == "training"}


# ---- rollouts ------------------------------------------------------------------------------------
def test_a_decode_step_reads_the_weights_that_its_tokens_touch_and_their_keys():
    """1,541 M parameters without experts, less the embedding; 28,991 M of experts, of which one
    token touches 8 of 128. A token has 96 KiB of keys and values (facts/performance.md)."""
    one = speed.engine(QWEN, PRESET, 4096, 4, 1 / 4, fp8=False)
    weights, kv = one.terms[0].amount * 4, one.terms[1].amount * 4
    assert one.sequences == 1
    assert weights == pytest.approx(2 * (1.541e9 - 0.311e9 + 28.991e9 / 16), rel=0.001)
    assert kv == 96 * 1024 * (4096 + 256) / 2
    many = speed.engine(QWEN, PRESET, 4096, 4, 64, fp8=False)
    assert many.terms[0].amount * 4 == pytest.approx(2 * (1.23e9 + 28.991e9), rel=0.001)
    assert many.terms[1].amount * 4 == 256 * kv


def test_fp8_leaves_room_for_more_sequences_and_reads_less():
    wide, narrow = (speed.engine(QWEN, PRESET, 4096, 1, 1000, fp8) for fp8 in (False, True))
    assert narrow.sequences > 3 * wide.sequences and narrow.tokens_per_s > wide.tokens_per_s
    big = dataclasses.replace(PRESET, gpu_memory_gib=40)
    assert speed.engine(QWEN, big, 4096, 1, 1000, False) is None


def test_keys_are_made_again_only_where_the_flag_says_so():
    vllm = speed.best_engine(QWEN, PRESET, 1, 4096, False)
    again = dataclasses.replace(PRESET, recompute_kv_cache_after_weight_updates=True)
    more, less = (speed.generation(QWEN, cfg, 1, 4096, vllm) for cfg in (again, PRESET))
    assert [t.name for t in more if t not in less] == ["keys and values again"]


# ---- the command ---------------------------------------------------------------------------------
def test_three_nodes_are_divided_both_ways_with_either_weights(monkeypatch, capsys):
    flags = ["--preset", "qwen3-30b-a3b", "--nodes", "3"]
    status, report, errors = run_dry(monkeypatch, capsys, *flags)
    assert (status, errors) == (0, [])
    rows = re.findall(r"^(\d \+ \d)   (bf16|FP8), .* ([\d,]+)  (training|rollouts)$", report, re.M)
    assert {row[:2] for row in rows} == {
        (split, weights) for split in ("1 + 2", "2 + 1") for weights in ("bf16", "FP8")
    }
    rates = [int(row[2].replace(",", "")) for row in rows]
    assert rates == sorted(rates, reverse=True)
    assert "to fit" not in report
    report = run_dry(monkeypatch, capsys, *flags, "--gpu-memory-gib", "75")[1]
    assert "to fit on 1 node the trainer needs --tp 4" in report


def test_the_page_shows_the_table_that_the_command_prints(monkeypatch, capsys, pages):
    _, report, _ = run_dry(monkeypatch, capsys, "--preset", "qwen3-30b-a3b", "--nodes", "3")
    assert report.strip() in pages


@pytest.fixture
def pages():
    with open("docs/parallelism.md") as page:
        return page.read()


def test_synchronous_sides_take_turns():
    cfg = dataclasses.replace(PRESET, dry_run=True, nodes=2, max_trajectory_age_steps=0)
    for s in dry_run.splits(QWEN, cfg):
        assert s.step_s == s.train_s + s.rollout_s


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--nodes", "1"], "--nodes 1: at least 2, one to train and one to sample"),
        (["--nodes", "2", "--gpu-memory-gib", "20"], "--nodes 2: no split of 2 nodes of 8 GPUs"),
    ],
)
def test_nodes_that_cannot_be_divided_are_one_line(monkeypatch, capsys, flags, reason):
    status, _, errors = run_dry(monkeypatch, capsys, "--preset", "qwen3-30b-a3b", *flags)
    assert status == 2 and len(errors) == 1 and reason in errors[0]


def test_a_run_s_mfu_is_its_flops_by_the_peak_and_null_without_one():
    found = speed.trained(QWEN, [4096] * 32, 16, 1.5, "NVIDIA H100 80GB HBM3")
    assert found["train/tokens_per_s_per_gpu"] == pytest.approx(8192 / 1.5)
    assert found["train/mfu"] == pytest.approx(8192 / 1.5 * 23.1e9 / 989e12, rel=0.002)
    longer = speed.trained(QWEN, [8192, 8192], 2, 1.0, "NVIDIA H100 80GB HBM3")["train/mfu"]
    assert longer == pytest.approx(8192 * 27.9e9 / 989e12, rel=0.002)
    assert speed.trained(QWEN, [8], 1, 1.0, "cpu")["train/mfu"] is None


def test_samples_that_are_left_out_are_not_counted():
    group = Namespace(prompt_ids=[1, 2], lengths=torch.tensor([3, 5]))
    out = {"one": torch.tensor([[False, True]]), "other": torch.tensor([[False, False]])}
    assert trained_lengths([group], out) == [5]


@pytest.mark.parametrize(
    ("args", "gpus"),
    [("", 1), ("--tensor-parallel-size 4 --data-parallel-size=2", 8), ("-tp 2 --dtype half", 2)],
)
def test_vllm_has_as_many_gpus_as_its_parallel_sizes_ask_for(monkeypatch, args, gpus):
    assert gpus_of_vllm(args) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpus_of_vllm(args) == gpus


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("cpu", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_is_that_of_the_device_s_name(device, tflops):
    assert speed.peak_flops(device) == (tflops and tflops * 1e12)
