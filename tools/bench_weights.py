"""`python tools/bench.py weights`: what a version costs, in bytes and seconds; `--landed`: by part,
until vLLM has it.

The state dict is one layer of Qwen3-30B-A3B at full width with a 48th of its embedding and head:
1.27 GB in bf16, in the whole model's proportions. fp32 master weights start on the bf16 grid
(normal, std 0.02; norms at 1). They take --steps real steps of torch.optim.AdamW with the trainer's
betas, epsilon and weight decay. The last step is coded, whose moments are like those of a run.
Gradients are independent normal numbers, without drift, of the size they have when the whole
model's norm is 1. Every weight of experts, attention, router and head has one in each step (in a
batch of 2 M tokens no expert is idle), and 30 % of the embedding's rows.

The codecs take the tensors in turns on --threads threads. Times are the best of --runs. GB/s are of
the full state: by the clock, and per second of CPU time, which other work on the machine changes
little. xor + zstd is at level 1, one tensor at a time, as ours.
"""

import contextlib
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import zstandard
from safetensors.torch import save_file
from torch.distributed import HashStore

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the program
import task
from bridge import delta, publish, weights
from bridge.hub import Hub
from bridge.ledger import Ledger
from bridge.processes import LocalRollout
from model import ModelConfig, Qwen3MoE

LAYERS, VOCAB, D, EXPERTS, F, HEADS, KV_HEADS, HEAD = 48, 151936, 2048, 128, 768, 32, 4, 128
GRADIENT = 30.5e9**-0.5  # an element's, when the norm of all 30.5 G is 1


def shapes() -> dict[str, tuple[int, ...]]:
    layer = "model.layers.0."
    attention = {
        "q_proj": (HEADS * HEAD, D),
        "k_proj": (KV_HEADS * HEAD, D),
        "v_proj": (KV_HEADS * HEAD, D),
        "o_proj": (D, HEADS * HEAD),
    }
    names = {
        "model.embed_tokens.weight": (VOCAB // LAYERS, D),
        "lm_head.weight": (VOCAB // LAYERS, D),
    }
    names |= {f"{layer}self_attn.{name}.weight": shape for name, shape in attention.items()}
    names |= {f"{layer}self_attn.{name}.weight": (HEAD,) for name in ("q_norm", "k_norm")}
    names |= {
        f"{layer}{name}.weight": (D,) for name in ("input_layernorm", "post_attention_layernorm")
    }
    names[f"{layer}mlp.gate.weight"] = (EXPERTS, D)
    for e in range(EXPERTS):
        names |= {f"{layer}mlp.experts.{e}.{name}_proj.weight": (F, D) for name in ("gate", "up")}
        names[f"{layer}mlp.experts.{e}.down_proj.weight"] = (D, F)
    return names


def last_step(lr: float, steps: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Every tensor in bf16 before and after the last of some steps of AdamW; one tensor's optimizer
    at a time."""
    g = torch.Generator().manual_seed(0)
    noise, pairs = torch.randn(1 << 24, generator=g) * GRADIENT, {}
    for name, shape in shapes().items():
        start = torch.ones(shape) if "norm" in name else torch.randn(shape, generator=g) * 0.02
        p = torch.nn.Parameter(start.bfloat16().float())
        optimizer = torch.optim.AdamW(
            [p], lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, fused=True
        )
        for _ in range(steps):
            # a gradient is a window of the noise
            at = int(torch.randint(len(noise) - p.numel(), (), generator=g))
            p.grad = noise[at : at + p.numel()].view(shape)
            if "embed" in name:
                p.grad = p.grad * (torch.rand(shape[0], 1, generator=g) < 0.3)
            old = p.detach().bfloat16()
            optimizer.step()
        pairs[name] = old, p.detach().bfloat16()
    return pairs


# ---- other codes, for comparison -----------------------------------------------------------------
def xor_zstd(old, new):
    return zstandard.ZstdCompressor(level=1).compress(delta._bits(old) ^ delta._bits(new))


def overwrite_zstd(old, new):
    """Our gaps with the new values in place of steps: idempotent, and larger."""
    a, b = delta._bits(old), delta._bits(new)
    where = np.flatnonzero(a != b)
    planes = delta._planes((np.diff(where, prepend=-1) - 1).astype("<u2")) + delta._planes(
        b.take(where)
    )
    zstd = zstandard.ZstdCompressor(compression_params=delta._ZSTD)
    return b"".join(zstd.compress(plane) for plane in planes)


# ---- the measurement -----------------------------------------------------------------------------
def timed(work) -> tuple[float, float]:
    """Seconds by the clock, and of all threads' CPU time."""
    start, cpu_start = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu_start


def fastest(size: int, runs: list[tuple[float, float]]) -> list[float]:
    """GB/s by the clock and per CPU second, each of the run where it is best."""
    return [size / min(seconds) / 1e9 for seconds in zip(*runs)]


def measure(args, pairs, pool) -> dict:
    size = sum(new.nbytes for _, new in pairs.values())

    def best(work, columns=lambda: zip(*pairs.values())):
        """Both GB/s, and what came out; the columns are made again for each run, outside its
        time."""
        results, runs = [], []
        for _ in range(args.runs):
            given = list(columns())
            runs.append(timed(lambda given=given: results.append(list(pool.map(work, *given)))))
        return fastest(size, runs), results[0]

    def describe(old, new):
        return weights.describe(new)

    speed, codes = {}, {}
    speed["encode"], codes["ours"] = best(delta.encode)
    speed["encode and digest"], _ = best(
        lambda old, new: (delta.encode(old, new), describe(old, new))
    )
    speed["xor + zstd"], codes["xor + zstd"] = best(xor_zstd)
    speed["digest"], _ = best(describe)
    codes["overwrite"] = list(pool.map(overwrite_zstd, *zip(*pairs.values())))
    patched = []

    def bases():
        patched[:] = [old.clone() for old, _ in pairs.values()]
        return codes["ours"], patched

    speed["apply"], _ = best(delta.apply, bases)
    for base, (_, new) in zip(patched, pairs.values()):
        assert np.array_equal(delta._bits(base), delta._bits(new)), "apply is not bit-exact"
    changed = sum(int((delta._bits(old) != delta._bits(new)).sum()) for old, new in pairs.values())
    total = {name: sum(map(len, found)) for name, found in codes.items()}
    total |= {"int32 index + value": changed * 6, "full": size}
    return {"changed": changed / (size // 2), "bytes": total, "gb_per_s": speed}


def measure_write(args, tensors, root) -> dict:
    """Both GB/s of a file that is safe on the disk (fsync), ours and save_file in turns."""
    size, runs = sum(t.nbytes for t in tensors.values()), {"ours": [], "save_file": []}
    with tempfile.TemporaryDirectory(dir=root) as directory:
        path = Path(directory, "model.safetensors")
        write = {
            "ours": lambda: weights.write_safetensors(path, list(tensors.items())),
            "save_file": lambda: (save_file(tensors, path), weights.fsync(path)),
        }
        for _ in range(args.runs):
            for name, times in runs.items():
                times.append(timed(write[name]))
                path.unlink()
    return {name: fastest(size, times) for name, times in runs.items()}


def run(args) -> dict:
    torch.set_num_threads(args.threads)
    result = {
        "threads": args.threads,
        "steps": args.steps,
        "load": os.getloadavg()[0],
        "lr": {},
        "write": {},
    }
    with ThreadPoolExecutor(args.threads) as pool:
        for lr in (1e-6, 3e-6, 1e-5):
            pairs = last_step(lr, args.steps)
            torch.set_num_threads(1)  # the pool's threads are the parallelism
            result["lr"][f"{lr:.0e}"] = measure(args, pairs, pool)
            torch.set_num_threads(args.threads)
    tensors = {name: new for name, (_, new) in pairs.items()}
    for name, root in (("disk", None), ("/dev/shm", "/dev/shm")):
        result["write"][name] = measure_write(args, tensors, root)
    return result


def show(result) -> None:
    print(f"threads={result['threads']}, steps={result['steps']}, load {result['load']:.1f}")
    for lr, found in result["lr"].items():
        size, base = found["bytes"], found["bytes"]["xor + zstd"]
        print(f"lr {lr}: {found['changed']:.2%} of {size['full'] / 2e6:,.0f} M weights changed")
        for name, count in size.items():
            ratio = f"{count / base:6.2f} x xor + zstd {size['full'] / count:6.1f}x less than full"
            print(f"  {name:22} {count / 1e6:9,.1f} MB {ratio}")
        speeds = (
            f"{name} {clock:.2f} ({cpu:.2f})" for name, (clock, cpu) in found["gb_per_s"].items()
        )
        print(f"  GB/s of full state (per CPU second): {', '.join(speeds)}")
    for where, found in result["write"].items():
        ours, theirs = found["ours"], found["save_file"]
        print(
            f"write to {where}, with fsync, GB/s (per CPU second): "
            f"ours {ours[0]:.2f} ({ours[1]:.2f}), save_file {theirs[0]:.2f} ({theirs[1]:.2f}), "
            f"{ours[0] / theirs[0]:.2f}x ({ours[1] / theirs[1]:.2f}x)"
        )


# ---- from step to landed -------------------------------------------------------------------------
def small_step(p: torch.Tensor, lr: float, g: torch.Generator) -> None:
    """What a step of AdamW does to a bf16 weight: the fp32 master that was rounded to it is drawn
    anew, moved by a normal number of the size that a step has when the gradient is noise (a mean
    over 10 of them), and rounded."""
    bits = p.detach().float().view(torch.int32)
    master = (bits + torch.randint(-32767, 32768, bits.shape, generator=g, dtype=torch.int32)).view(
        torch.float32
    )
    p.detach().copy_(master.add_(torch.randn(p.shape, generator=g), alpha=0.23 * lr))


def landed_model() -> Qwen3MoE:
    """2 GB in bf16, with values as a trained model has them."""
    cfg = ModelConfig(
        vocab_size=32,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        intermediate_size=4 * F,
        num_experts=104,
        num_experts_per_tok=8,
        moe_intermediate_size=F,
        norm_topk_prob=True,
        rope_theta=1e6,
        max_position_embeddings=512,
    )
    g, model = torch.Generator().manual_seed(0), Qwen3MoE(cfg)
    for p in model.parameters():
        start = torch.ones(p.shape) if p.dim() == 1 else torch.randn(p.shape, generator=g) * 0.02
        p.data = start.bfloat16()
    return model


RUN = {
    "num_generations": 1,
    "max_new_tokens": 8,
    "max_model_len": 64,
    "dtype": "bfloat16",
    "seed": 0,
    "reward": "exact",
    "reward_digest": "",
    "sampling": {
        "n": 1,
        "max_tokens": 8,
        "stop_token_ids": [1],
        "logprobs": 0,
        "detokenize": False,
    },
}


def landed(args) -> dict:
    """Seconds of each part from the end of a step to the receipt, of a 2 GB model on one machine:
    the publisher, the hub, rollout.py and a real vLLM that has nothing else to do. The median of
    --runs versions at lr 3e-6."""
    model, g = landed_model(), torch.Generator().manual_seed(1)
    with contextlib.ExitStack() as started:
        here = Path(started.enter_context(tempfile.TemporaryDirectory()))
        there = Path(started.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        static, log = here / "checkpoint", here / "rollout.log"
        eos = task.write_char_tokenizer(static, "abc")[task.EOS]
        config = {**model.cfg.to_hf(eos), "dtype": "bfloat16"}
        (static / "config.json").write_text(json.dumps(config))
        ledger, token = Ledger(1, 1, 0, 60.0), secrets.token_urlsafe(16)
        hub = Hub(ledger, [], None, here / "weights", model.cfg.vocab_size, token, RUN)
        hub.start("127.0.0.1", 0)
        started.callback(hub.close, patience_s=0.0)
        publisher = started.enter_context(
            publish.Publisher(
                model, torch.bfloat16, hub.weights_dir, static, 100, 2, HashStore(), 600.0, hub
            )
        )
        # few CPUs multiply in bf16
        node = LocalRollout(hub, there, "--vllm-args='--dtype float32'", log)
        started.callback(node.stop)
        rows = []
        for version in range(args.runs + 1):  # the first is whole, and vLLM starts on it
            for p in model.parameters() if version else ():
                small_step(p, 3e-6, g)
            rows.append(land(version, publisher, hub, node, log))
    return {key: statistics.median(row[key] for row in rows[1:]) for key in rows[1]}


def land(version: int, publisher, hub: Hub, node: LocalRollout, log: Path) -> dict[str, float]:
    """Publish a version and wait for its receipt. Returns the seconds of each part."""
    start = time.perf_counter()
    publisher.publish(version)
    copied = time.perf_counter() - start
    while not any(seen["version"] == version for seen in hub.status()["nodes"].values()):
        alive = node.process.poll() is None and not hub.trouble
        assert alive, f"{hub.trouble}\n{log.read_text()}"
        time.sleep(0.01)  # polling another process
    total = time.perf_counter() - start
    (seen,) = hub.status()["nodes"].values()
    return {"copy": copied, **publisher.stats, **seen["timing"], "landed": total}


def main(args) -> None:
    result = landed(args) if args.landed else run(args)
    if args.json or args.landed:
        print(json.dumps(result, indent=None if args.json else 1))
    else:
        show(result)
