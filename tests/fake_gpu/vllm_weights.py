"""Weight updates of vLLM's CUDA build on the fake GPU: what is in its memory after them, beside a
vLLM that has started on those weights.

    CISPO_CUDA_VENV=... python tests/fake_gpu/vllm_weights.py [--gpus N] [--dense] [--args JSON]

--args: further arguments of vllm.LLM. The last line is JSON.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import fake

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--gpus", type=int, default=1, help="of one engine")
parser.add_argument("--dense", action="store_true", help="a model without experts")
parser.add_argument("--args", default="{}", help="further arguments of vllm.LLM")
ARGS = parser.parse_args()
LOG = fake.enter(devices=ARGS.gpus)
REPO = fake.HERE.parent.parent
PATHS = [str(REPO), str(fake.HERE.parent), str(REPO / "bridge/inside_vllm"), str(fake.HERE)]
sys.path[:0] = PATHS
os.environ |= {
    "PYTHONPATH": os.pathsep.join(PATHS[2:]),  # of vLLM's processes
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is in this process,
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # and workers, where there are several, are not
    "VLLM_DISABLE_PYNCCL": "1",  # it would load the real NCCL
    "VLLM_NO_USAGE_STATS": "1",
    # FlashInfer is another gigabyte, and its sampler is not for processed log-probs.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}

from published import two_checkpoints

from model import ModelConfig

MOE = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=512,
    num_experts=0 if ARGS.dense else 16,
    num_experts_per_tok=0 if ARGS.dense else 4,
    moe_intermediate_size=0 if ARGS.dense else 128,
    norm_topk_prob=True,
    mlp_only_layers=() if ARGS.dense else (1,),
    tie_word_embeddings=ARGS.dense,
)


def start(checkpoint: str):
    from vllm import LLM

    return LLM(
        checkpoint,
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=8,
        num_gpu_blocks_override=64,
        gpu_memory_utilization=0.3,
        tensor_parallel_size=ARGS.gpus,
        worker_extension_cls="watched.Watched",
        weight_transfer_config={"backend": "safetensors"},
        logprobs_mode="processed_logprobs",
        hf_overrides={"head_dtype": "float32"},
        **{"enforce_eager": True, **json.loads(ARGS.args)},
    )


def update(llm, checkpoint: str) -> float:
    """Its milliseconds."""
    begin = time.perf_counter()
    llm.collective_rpc("start_weight_update")
    llm.collective_rpc("update_weights", args=({"path": checkpoint},))
    llm.collective_rpc("finish_weight_update")
    return (time.perf_counter() - begin) * 1e3


def digests(seen: list[dict]) -> list[dict]:
    return [{name: digest for name, (_, digest) in worker.items()} for worker in seen]


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        first, second = map(str, two_checkpoints(Path(directory), MOE))
        llm = start(first)
        before = llm.collective_rpc("seen")
        update(llm, first)
        again = llm.collective_rpc("seen")
        milliseconds = [update(llm, second) for _ in range(3)]
        after, stacks = llm.collective_rpc("seen"), llm.collective_rpc("stacks_loaded")
        copies = llm.collective_rpc("copies")
        del llm
        wanted = start(second).collective_rpc("seen")
    found = {
        "weights": [len(worker) for worker in after],
        "changed": [sum(a[name] != w[name] for name in a) for a, w in zip(before, after)],
        "reload changes nothing": again == before,
        "as a vLLM that starts on them": digests(after) == digests(wanted),
        "stay where they are": all(
            a[name][0] == w[name][0] for a, w in zip(before, after) for name in a
        ),
        "stacks": stacks,
        "copies": copies,
        "ms": [round(x, 1) for x in milliseconds],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
