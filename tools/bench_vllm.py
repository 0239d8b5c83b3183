"""`python tools/bench.py gpu --only vllm`: what a real vLLM takes on one GPU, beside what the
planner assumes (ranks/speed.py).

1. 8 of Qwen3-30B-A3B's layers with their 128 experts, from a file: how long a weight update stops
   vLLM, and its sums of all weights
2. all 48 layers with made-up weights: prompts read, and tokens made at several batches
"""

import asyncio
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import torch

import task
from bridge.vllm import VLLM
from bridge.weights import write_safetensors
from config import RolloutConfig
from model import KNOWN_MODELS, Qwen3MoE
from presets import PRESETS
from ranks import plan, speed
from ranks.parallel import Mesh

FULL = KNOWN_MODELS["Qwen/Qwen3-30B-A3B"]
RUN = {"dtype": "bfloat16", "max_model_len": 8192, "seed": 0}
LAYERS = 8  # whose weights are updated
READ = (32, 4096)  # prompts and their tokens
DECODED = ((16, 256), (128, 512), (512, 512))  # sequences at once, 16 of a prompt, and their tokens


def write_checkpoint(path: Path, cfg, device: torch.device | None) -> None:
    """A directory that vLLM starts on: config, tokenizer and, made on this device if one is given,
    weights."""
    eos = task.write_char_tokenizer(path, "abc")[task.EOS]
    (path / "config.json").write_text(json.dumps({**cfg.to_hf(eos), "dtype": RUN["dtype"]}))
    if device is None:
        return
    model = Qwen3MoE(cfg, Mesh(device=device)).to(device, getattr(torch, RUN["dtype"]))
    model.init_weights(torch.Generator(device).manual_seed(0))
    tensors = [(name, tensor.cpu()) for name, tensor in model.hf_tensors()]
    write_safetensors(path / "model.safetensors", tensors)


async def generate(vllm: VLLM, prompts: int, length: int, n: int, tokens: int) -> float:
    """Seconds for n samples of each of these prompts, none of which vLLM has seen."""
    sampling = {"n": n, "max_tokens": tokens, "logprobs": 0, "detokenize": False}
    sampling |= {"ignore_eos": True, "temperature": 1.0}
    ids = torch.randint(2, FULL.vocab_size, (prompts, length)).tolist()
    begin = time.perf_counter()
    found = await asyncio.gather(*(vllm.generate(p, sampling, 0) for p in ids))
    assert sum(len(choice["token_ids"]) for group in found for choice in group) == (
        prompts * n * tokens
    )
    return time.perf_counter() - begin


async def updates(b, vllm: VLLM, path: Path) -> None:
    for i in range(4):
        took = await vllm.load(path, i)
        b.say(f"vLLM, {LAYERS} layers: update {i} stops it for", took["stopped_s"], "s")
    name = f"vLLM: update, a layer and {FULL.num_experts} experts"
    b.say(name, took["load_s"] / LAYERS * 1e3, "ms")
    sums = []
    for _ in range(2):
        begin = time.perf_counter()
        sums.append(await vllm.checksums())
        b.say(f"vLLM, {LAYERS} layers: sums of all weights", time.perf_counter() - begin, "s")
    assert sums[0] == sums[1]


async def decoding(b, vllm: VLLM) -> None:
    await generate(vllm, 4, 64, 4, 16)
    prompts, length = READ
    rate = prompts * length / await generate(vllm, prompts, length, 1, 1)
    b.say(f"vLLM: prompts of {length:,} read, tokens/s", rate, "tokens/s")
    teraflops = plan.flops_per_token(FULL, length) / 3 * rate / 1e12
    b.say("vLLM: the same", teraflops, "TFLOP/s", speed.RATES["prefill"].value / 1e12)
    gib = torch.cuda.mem_get_info()[1] / plan.GIB
    cfg = dataclasses.replace(PRESETS["qwen3-30b-a3b"], gpu_memory_gib=gib)
    for n, tokens in DECODED:
        seconds = await generate(vllm, n // 16, 256, 16, tokens)
        planned = speed.engine(FULL, cfg, 256 + tokens, 1, n, False)
        expected = planned and planned.tokens_per_s
        b.say(f"vLLM: {n} sequences decoded at once", n * tokens / seconds, "tokens/s", expected)


def bench(b) -> None:
    some = dataclasses.replace(FULL, num_hidden_layers=LAYERS)
    parts = (
        (some, b.device, "--gpu-memory-utilization 0.4 --max-num-seqs 64"),
        (FULL, None, "--load-format dummy --max-num-seqs 512"),
    )
    for cfg, device, args in parts:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory)
            write_checkpoint(path, cfg, device)
            torch.cuda.empty_cache()  # what made the weights
            asyncio.run(with_vllm(b, path, args, device is not None))


async def with_vllm(b, path: Path, args: str, weights: bool) -> None:
    vllm = VLLM(RolloutConfig(hub="", vllm_args=args), RUN, path / "vllm.log")
    try:
        await vllm.start(path)
        await (updates(b, vllm, path) if weights else decoding(b, vllm))
    finally:
        await vllm.stop()
