"""What fetching and verifying weights costs the vLLM beside it: tokens/s with and without.

    python tools/throughput.py   about four minutes on two cores; 0.2 B parameters, 0.8 GB a version

A server process has a chain of versions, whole and as deltas. The node here works as rollout.py
does: one process whose event loop keeps vLLM busy while `receive.fetch` brings one version after
the other, patched and verified. None is loaded.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the program
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from published import manifest_of, write_version

import task
from bridge import receive
from bridge.files import FileServer
from bridge.vllm import VLLM
from config import RolloutConfig
from model import ModelConfig, Qwen3MoE

WINDOW_S, TURNS, SEQUENCES = 12.0, 4, 8
RUN = {"dtype": "float32", "max_model_len": 2048, "seed": 0}
SAMPLING = {
    "n": SEQUENCES,
    "temperature": 1.0,
    "max_tokens": 2000,
    "logprobs": 0,
    "ignore_eos": True,
    "detokenize": False,
}


def write_versions(root: Path, count: int) -> None:
    """Version 0 whole, and then deltas of 2 % of the elements."""
    cfg = ModelConfig(
        vocab_size=32,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=1024,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=512,
        norm_topk_prob=True,
        max_position_embeddings=2048,
    )
    static = root / "static"
    vocab = task.write_char_tokenizer(static, task.TASKS["reverse"][1])
    (static / "config.json").write_text(json.dumps(cfg.to_hf(vocab[task.EOS])))
    model = Qwen3MoE(cfg)
    model.init_weights(torch.Generator().manual_seed(0))
    before, tensors = None, {name: t.clone() for name, t in model.hf_tensors()}
    for version in range(count):
        write_version(root, version, tensors, static, before=before, full=version == 0)
        before = tensors
        tensors = {name: t.clone() for name, t in before.items()}
        for t in tensors.values():
            t.view(-1)[torch.randint(t.numel(), (t.numel() // 50 + 1,))] *= 1.00001


async def measure(root: Path, url: str, whole: bool) -> dict:
    """Tokens/s alone and beside updates (deltas, or whole versions), and the mean seconds of an
    update's parts."""
    node, headers = root / "node", {"Authorization": "Bearer t"}
    manifests = [manifest_of(root / f"v{version}") for version in range(3)]
    first, _ = await receive.fetch(manifests[0], node, None, url, headers)
    vllm = VLLM(RolloutConfig(hub=""), RUN, root / "vllm.log")
    await vllm.start(first)
    await vllm.load(first, 0)

    async def generate():
        while True:
            await vllm.generate([5, 9, 2, 7, 3, 28], SAMPLING, 0)

    async def update():
        while True:
            _, timing = await receive.fetch(
                manifests[0 if whole else 1], node / "new", None if whole else first, url, headers
            )
            timings.append(timing)

    async def window() -> float:
        start, before = time.perf_counter(), (await vllm.vitals())["tokens"]
        await asyncio.sleep(WINDOW_S)  # the measurement itself
        return ((await vllm.vitals())["tokens"] - before) / (time.perf_counter() - start)

    timings, alone, beside = [], [], []
    work = asyncio.create_task(generate())
    await window()  # to warm up
    for _ in range(TURNS):
        alone.append(await window())
        updates = asyncio.create_task(update())
        beside.append(await window())
        updates.cancel()
        await asyncio.wait([updates])
    work.cancel()
    await vllm.stop()
    mean = {name: statistics.mean(t[name] for t in timings) for name in timings[0]}
    return {
        "tokens_per_s_alone": alone,
        "beside": beside,
        "updates": len(timings),
        "share": statistics.mean(beside) / statistics.mean(alone),
        **mean,
    }


if __name__ == "__main__":
    if len(sys.argv) == 3:  # the trainer's side, in a process of its own
        torch.set_num_threads(1)
        write_versions(Path(sys.argv[2]), 3)
        with FileServer(Path(sys.argv[2]), "t", "127.0.0.1", 0) as server:
            print(server.url, flush=True)
            sys.stdin.read()
    else:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
            server = subprocess.Popen(
                [sys.executable, __file__, "serve", directory],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            url = server.stdout.readline().strip()
            for whole in (False, True):
                found = asyncio.run(measure(Path(directory), url, whole))
                print("whole versions" if whole else "deltas", json.dumps(found), flush=True)
            server.stdin.close()
            server.wait()
