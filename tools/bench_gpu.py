"""What one GPU says of the CUDA path's speed, beside what the arithmetic of the plan says.

    CISPO_TEST_GPU=1 python -m pytest tests/test_gpu.py    # first that it is right
    python tools/bench.py gpu            # three minutes on one H100 or H200; vLLM's part more

1. the device's own ceilings, and the operations of a Qwen3-30B-A3B layer as a rank of 16 has them
2. one of its blocks, and the head with the loss
3. a whole update of rank 0 of 16, tp 1, ep 8: all 48 layers, with its memory. No other rank is
   there, so no collective has a duration: what it takes is the rank's own work. Its experts get
   the rows that this rank sends to all, as many as they get from 8 ranks that route evenly.
4. Qwen3-0.6B, which one GPU trains alone: here nothing is left out
5. a real vLLM (tools/bench_vllm.py)

A line a figure; last a JSON line with all. Times are medians of CUDA events after three warm-ups.
"""

import dataclasses
import gc
import json
import statistics
from unittest import mock

import torch
import torch.distributed as dist

import loss
import train_cispo
from bridge.groups import Group
from config import Config
from model import KNOWN_MODELS, Qwen3MoE
from prepare import with_chunk_size
from presets import PRESETS
from ranks import experts, ops, parallel, plan
from ranks.batch import Batch, pack_batch
from ranks.parallel import Mesh
from tools import bench_vllm

GIB = 2**30
BF16 = torch.bfloat16
FULL = KNOWN_MODELS["Qwen/Qwen3-30B-A3B"]
TOKENS, LENGTH, PROMPT = 16384, 4096, 200  # of a micro-batch, each of its sequences, their prompt


class Bench:
    def __init__(self, device):
        self.device, self.found = device, {}
        self.g = torch.Generator().manual_seed(0)

    def rand(self, *shape, std=1.0, grad=False):
        x = (torch.randn(*shape, device=self.device) * std).to(BF16)
        return x.requires_grad_(grad)

    def ids(self, high: int, n: int):
        return torch.randint(high, (n,), generator=self.g).to(self.device)

    def time(self, name: str, f, predicted_ms=None, flops=0.0, nbytes=0.0, runs=10, warm_up=3):
        """Milliseconds; in the table with what is done a second."""
        for _ in range(warm_up):
            f()
        times = []
        for _ in range(runs):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            f()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        ms = statistics.median(times)
        rate = f"{flops / ms / 1e9:6.0f} TFLOP/s" if flops else ""
        rate = f"{nbytes / ms / 1e9:6.2f} TB/s" if nbytes else rate
        expected = "" if predicted_ms is None else f"predicted {predicted_ms:8.2f}"
        print(f"{name:58} {ms:9.3f} ms  {expected:19} {rate}".rstrip(), flush=True)
        self.found[name] = {"ms": round(ms, 4), "predicted_ms": predicted_ms}
        return ms

    def say(self, name: str, value: float, unit: str, predicted=None):
        expected = "" if predicted is None else f"predicted {predicted:.2f}"
        print(f"{name:58} {value:9.3f} {unit}  {expected}".rstrip(), flush=True)
        self.found[name] = {unit: round(value, 4), "predicted": predicted}


def ceilings(b: Bench) -> None:
    source, target = (torch.empty(GIB, dtype=torch.uint8, device=b.device) for _ in range(2))
    b.time("copy, 1 GiB, device to device", lambda: target.copy_(source), 0.72, nbytes=2 * GIB)
    x, w = b.rand(8192, 8192), b.rand(8192, 8192)
    b.time("GEMM 8192 x 8192 x 8192, bf16", lambda: x @ w, 1.69, flops=2 * 8192**3)
    host = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    b.time(
        "copy, 1 GiB, to pinned host memory",
        lambda: host.copy_(source, non_blocking=True),
        21.5,
        nbytes=GIB,
    )


def operations(b: Bench) -> None:
    """Of a layer, on a rank of 16 with tp 1, ep 8."""
    D, F, K, T = FULL.hidden_size, FULL.moe_intermediate_size, FULL.num_experts_per_tok, TOKENS
    H, G, C, e, rows = 32, 4, 128, FULL.num_experts // 8, TOKENS * FULL.num_experts_per_tok
    x, w = b.rand(T, D), b.rand(H * C, D, std=0.02)
    b.time("q projection", lambda: x @ w.t(), 0.42, flops=2 * T * D * H * C)
    x, w, down = b.rand(rows, D), b.rand(e, 2 * F, D, std=0.02), b.rand(e, D, F, std=0.02)
    middle, upstream = b.rand(rows, F), b.rand(rows, 2 * F)
    ends = torch.arange(1, e + 1, device=b.device, dtype=torch.int32) * (rows // e)
    flops = 2 * rows * D * F
    b.time(
        "grouped GEMM, gate and up",
        lambda: ops.grouped_mm(x, w.transpose(1, 2), ends),
        1.5,
        2 * flops,
    )
    b.time(
        "grouped GEMM, down",
        lambda: ops.grouped_mm(middle, down.transpose(1, 2), ends),
        0.75,
        flops,
    )
    b.time(
        "grouped GEMM, their weight gradient",
        lambda: ops.grouped_outer(upstream, x, ends),
        1.5,
        2 * flops,
    )
    q, k, v = b.rand(T, H, C, grad=True), b.rand(T, G, C, grad=True), b.rand(T, G, C, grad=True)
    cu = torch.arange(0, T + 1, LENGTH, device=b.device, dtype=torch.int32)
    flops = 4 * T * H * C * LENGTH / 2
    b.time("attention, forward", lambda: ops.attend(q, k, v, cu, LENGTH)[0], 1.57, flops)
    out, _ = ops.attend(q, k, v, cu, LENGTH)
    b.time(
        "attention, backward",
        lambda: out.backward(out.detach(), retain_graph=True),
        4.6,
        2.5 * flops,
    )
    ids = b.ids(FULL.num_experts, rows)
    b.time(
        "order of 131,072 int64 and its inverse, by two sorts",
        lambda: ids.argsort(stable=True).argsort(),
        0.16,
    )
    b.time(
        "the same of uint8, and by scatter", lambda: experts.sort_rows(ids, FULL.num_experts), 0.04
    )
    (order, places), tokens = experts.sort_rows(ids.view(T, K), FULL.num_experts), b.rand(T, D)
    b.time("copies of tokens by expert", lambda: tokens[order // K], 0.2, nbytes=2 * 2 * rows * D)
    combine = torch.compile(experts.add_rows)
    b.time(
        "sum of a token's copies, compiled",
        lambda: combine(x, order // K, places),
        0.2,
        nbytes=2 * (rows + T) * D,
    )
    numbers = torch.zeros(2, 8, dtype=torch.int64, device=b.device)
    b.time("16 counts to the host one by one", lambda: [n.item() for n in numbers.flatten()], 0.2)
    b.time("16 counts to the host at once", lambda: numbers.cpu(), 0.02)


def block(b: Bench) -> None:
    model_cfg = dataclasses.replace(FULL, num_hidden_layers=1, vocab_size=512)
    model = Qwen3MoE(model_cfg, Mesh(device=b.device)).to(b.device, BF16)
    model.init_weights(torch.Generator(b.device).manual_seed(0))
    model.compile_blocks()
    tokens = b.ids(512, TOKENS)
    cu = torch.arange(0, TOKENS + 1, LENGTH, device=b.device, dtype=torch.int32)
    upstream = b.rand(TOKENS, FULL.hidden_size)

    def forward():
        return model(tokens, cu, LENGTH)[0]

    def both():
        for p in model.parameters():
            p.grad = None
        forward().backward(upstream)

    b.time("compiled block with 128 experts, forward", forward, 6.4)
    b.time("the same, forward and backward", both, 20.0)


def head(b: Bench) -> None:
    for chunk, predicted in {256: 98, 1024: 55, 2048: 50}.items():
        head_in_chunks(b, chunk, predicted)


def head_in_chunks(b: Bench, chunk: int, predicted: float) -> None:
    N, D, V = TOKENS, FULL.hidden_size, FULL.vocab_size
    hidden, weight = b.rand(N, D, grad=True), b.rand(V, D, std=0.02, grad=True)
    added = torch.zeros(weight.shape, device=b.device)
    args = (hidden, weight, b.ids(V, N), negative, (torch.ones(N, device=b.device),))

    def run():
        return ops.fused_head_loss(*args, 1.0, chunk, True, None, added)

    name = f"head and loss of {N:,} tokens, chunks of {chunk}"
    b.time(name, run, predicted, 6 * N * D * V, runs=5)


def negative(logprobs, advantages):
    return -advantages * logprobs


# ---- whole updates -------------------------------------------------------------------------------
def full_batch(cfg, m, ranks: int) -> tuple[Config, list[Group]]:
    """A step of one update that fills one micro-batch of every rank with sequences of LENGTH
    tokens, PROMPT of them a prompt's: the configuration with these sizes, and its groups."""
    samples = ranks * cfg.max_tokens_per_micro_batch // LENGTH
    sizes = {"num_prompts_per_step": 1, "num_generations_per_prompt": samples}
    cfg = dataclasses.replace(cfg, train_global_batch_size=samples, **sizes)
    g, tokens = torch.Generator().manual_seed(0), samples * (LENGTH - PROMPT)
    group = Group(
        ordinal=0,
        prompt_ids=torch.randint(m.vocab_size, (PROMPT,), generator=g).tolist(),
        lengths=torch.full((samples,), LENGTH - PROMPT, dtype=torch.int32),
        token_ids=torch.randint(m.vocab_size, (tokens,), generator=g).int(),
        logprobs=-12 + torch.randn(tokens, generator=g),
        versions=torch.zeros(tokens, dtype=torch.int32),
        rewards=torch.rand(samples, generator=g),
        truncated=torch.zeros(samples, dtype=torch.uint8),
    )
    return cfg, [group]


def update(b: Bench, name: str, cfg, model_cfg, mesh: Mesh, ranks: int) -> None:
    """A whole update of one micro-batch: the pass for prev, forward, loss, backward, AdamW."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    cfg, groups = full_batch(with_chunk_size(cfg, model_cfg, b.device), model_cfg, ranks)
    with mock.patch.object(train_cispo, "load_hf", fresh_weights):
        model = train_cispo.build_model(cfg, model_cfg, mesh, None)
    optimizer = train_cispo.build_optimizer(cfg, model)
    batch = Batch.unpack(pack_batch(groups, cfg))
    updates, (counts,) = train_cispo.my_share(groups, batch, cfg, model)
    policy_loss = torch.compile(loss.policy_loss, dynamic=True)
    T = cfg.max_tokens_per_micro_batch

    def prev():
        train_cispo.fix_for_the_step(updates, 0, model, None, cfg)

    def whole():
        train_cispo.train_update(model, optimizer, updates[0], counts, cfg, policy_loss)

    prev_ms = b.time(f"{name}: pass for prev", prev, runs=3, warm_up=2)
    whole_ms = b.time(f"{name}: update", whole, runs=4, warm_up=2)
    step_ms = b.time(f"{name}: of it the optimizer's step", optimizer.step, runs=3, warm_up=1)
    peak = torch.cuda.max_memory_allocated() / GIB
    b.say(f"{name}: peak of memory", peak, "GiB", sum(plan.memory(model_cfg, cfg, ranks).values()))
    b.say(f"{name}: reserved", torch.cuda.max_memory_reserved() / GIB, "GiB")
    flops = plan.flops_per_token(model_cfg, LENGTH) * T
    passes_ms = whole_ms - step_ms
    for what, ms in (("forward and backward", passes_ms), ("all", whole_ms + prev_ms)):
        b.say(f"{name}: {what}, tokens/s", T / ms * 1e3, "tokens/s")
        b.say(f"{name}: {what}, MFU of 989 TFLOP/s", flops / ms / 1e9 / 989, "")
    profile(b, name, whole)


def fresh_weights(model, checkpoint) -> None:
    """In load_hf's place: there is no checkpoint."""
    model.init_weights(torch.Generator(model.mesh.device).manual_seed(0))


def profile(b: Bench, name: str, f) -> None:
    """Where the device's time goes in one call: the costliest kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        f()
        torch.cuda.synchronize()
    kernels = sorted(found.key_averages(), key=lambda k: -k.self_device_time_total)
    total = sum(k.self_device_time_total for k in kernels)
    print(f"{name}: {total / 1e3:.1f} ms of kernels, {sum(k.count for k in kernels)} launches")
    rows = [(k.key[:100], k.self_device_time_total / 1e3, k.count) for k in kernels[:30]]
    for key, ms, count in rows:
        print(f"    {ms:9.2f} ms {ms / total * 1e5:5.1f} % {count:6} x {key}")
    b.found[f"{name}: kernels"] = rows


def rank_of_16(b: Bench) -> None:
    """The grid's groups are of torch's fake backend, whose collectives do nothing; dispatch and
    combine leave rows where they are, and the sum over replicas is this rank's own."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cfg = dataclasses.replace(PRESETS["qwen3-30b-a3b"], max_tokens_per_micro_batch=TOKENS)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
    mesh = parallel.make_mesh(cfg.tp, cfg.ep, FULL.num_key_value_heads)
    mesh = dataclasses.replace(mesh, ep_group=None)
    with mock.patch.object(parallel, "_begin_reduce_scatter", own_share):
        update(b, "rank 0 of 16", cfg, FULL, mesh, 16)
    dist.destroy_process_group()


def own_share(x, group):
    return x[: len(x) // dist.get_world_size(group)].clone()


def alone(b: Bench) -> None:
    cfg = PRESETS["qwen3-0.6b"]
    small = KNOWN_MODELS["Qwen/Qwen3-0.6B"]
    cfg = dataclasses.replace(cfg, max_tokens_per_micro_batch=TOKENS)
    update(b, "Qwen3-0.6B alone", cfg, small, Mesh(device=b.device), 1)
    cfg = dataclasses.replace(cfg, activation_checkpointing=False)
    update(b, "Qwen3-0.6B alone, nothing recomputed", cfg, small, Mesh(device=b.device), 1)


PARTS = {f.__name__: f for f in (ceilings, operations, block, head, rank_of_16, alone)}
PARTS["vllm"] = bench_vllm.bench


def main(only: str) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("bench.py gpu: torch sees no GPU")
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    b = Bench(device)
    what = {
        "device": torch.cuda.get_device_name(),
        "GiB": round(torch.cuda.mem_get_info()[1] / GIB, 1),
        "torch": torch.__version__,
    }
    print(", ".join(map(str, what.values())))
    for name in only.split("/") if only else PARTS:
        try:
            PARTS[name](b)
        except Exception as e:  # what comes after it still tells something
            print(f"{name}: {type(e).__name__}: {str(e)[:600]}", flush=True)
            b.found[name] = {"error": str(e)[:300]}
        gc.collect()
        torch.cuda.empty_cache()
    print(json.dumps({**what, "found": b.found}))
