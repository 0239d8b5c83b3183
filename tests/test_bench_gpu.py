"""That tools/bench_gpu.py and tools/bench_vllm.py run, with small models on a CPU: what is started on
a borrowed GPU once in a while must not have rotted meanwhile. Their figures mean nothing here."""

import dataclasses

import pytest
import torch

from tools import bench_gpu, bench_vllm

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 64,
    "vocab_size": 256,
}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


class Once(bench_gpu.Bench):
    """Runs what is to be timed, once."""

    def time(self, name, f, *_, **__):
        f()
        ms = 2.0 if name.endswith("update") else 1.0  # of it the optimizer's step
        self.found[name] = {"ms": ms}
        return ms


@pytest.fixture
def bench(monkeypatch):
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**37, 2**37))
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)  # it takes a minute
    # which keeps what it has compiled, for other tests too
    monkeypatch.setattr(bench_gpu.ops, "_compiled_head_body", lambda: bench_gpu.ops._head_body)
    monkeypatch.setattr(bench_gpu.Qwen3MoE, "compile_blocks", lambda model: None)
    monkeypatch.setattr(bench_gpu, "profile", lambda b, name, f: f())  # of kernels: there are none
    for name, cfg in bench_gpu.PRESETS.items():
        eager = dataclasses.replace(cfg, compile=False)
        monkeypatch.setitem(bench_gpu.PRESETS, name, eager)
    full = dataclasses.replace(bench_gpu.FULL, **SMALL, **EXPERTS)
    for module in (bench_gpu, bench_vllm):
        monkeypatch.setattr(module, "FULL", full)
    for name in bench_gpu.KNOWN_MODELS:
        small = dataclasses.replace(bench_gpu.KNOWN_MODELS[name], **SMALL)
        monkeypatch.setitem(bench_gpu.KNOWN_MODELS, name, small)
    for name, value in {"TOKENS": 128, "LENGTH": 32, "PROMPT": 4, "BF16": torch.float32}.items():
        monkeypatch.setattr(bench_gpu, name, value)
    return Once(torch.device("cpu"))


@pytest.mark.parametrize("part", ["operations", "block", "head", "rank_of_16", "alone"])
def test_a_part_of_the_bench_runs(part, bench):
    bench_gpu.PARTS[part](bench)
    assert bench.found and not any("error" in figures for figures in bench.found.values())
    if part in ("rank_of_16", "alone"):
        assert any("update" in name for name in bench.found)


@pytest.mark.slow
def test_the_bench_of_vllm_runs(bench, monkeypatch):
    sizes = {"LAYERS": 2, "READ": (4, 512), "DECODED": ((16, 32), (32, 16))}
    sizes["RUN"] = {**bench_vllm.RUN, "dtype": "float32", "max_model_len": 1024}
    for name, value in sizes.items():
        monkeypatch.setattr(bench_vllm, name, value)
    bench_gpu.PARTS["vllm"](bench)
    assert len(bench.found) == 4 + 1 + 1 + 2 + 2  # updates, one by layer, sums, reading, decoding
