"""What one layer of Qwen3-30B-A3B costs on a GPU, counted on the fake one: launches, waits, and
the bytes of its Triton kernels, as rank 0 of 16 (ep 8): forward, backward, forward and backward
again with what the first pass has kept (a recompute), and forward under no_grad.

    CISPO_CUDA_VENV=... python tests/fake_gpu/count.py [--eager] [--list] [--checkout DIR]

--list prints each launch. --checkout: another copy of this program. The last line is JSON.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import fake

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--eager", action="store_true", help="without torch.compile")
parser.add_argument("--list", action="store_true", help="print each launch")
parser.add_argument("--checkout", type=Path, default=fake.HERE.parent.parent)
ARGS = parser.parse_args()
TOKENS, SEQUENCES, RANKS, EP = 16384, 8, 16, 8
LOG = fake.enter(item=fake.even_rows(TOKENS, experts=128, chosen=8, ep=EP))
sys.path.insert(0, str(ARGS.checkout))

import ctypes
import dataclasses
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

from model import KNOWN_MODELS, Qwen3MoE, rope_tables
from ranks.parallel import make_mesh

mark = ctypes.CDLL("libfakecuda.so").fake_mark
section, triton_bytes = "", {}


def begin(name: str) -> None:
    global section
    section = name
    triton_bytes[name] = 0
    mark(name.encode())


def count_bytes(run):
    """Inductor's launcher of a Triton kernel, and the bytes of its tensors, each once."""

    def counted(self, *args, **kwargs):
        tensors = {(a.data_ptr(), a.numel()): a for a in args if isinstance(a, torch.Tensor)}
        triton_bytes[section] += sum(a.numel() * a.element_size() for a in tensors.values())
        return run(self, *args, **kwargs)

    return counted


def layer(mesh):
    """One layer, and its arguments."""
    cfg = dataclasses.replace(KNOWN_MODELS["Qwen/Qwen3-30B-A3B"], num_hidden_layers=1)
    with torch.device("meta"):
        model = Qwen3MoE(cfg, mesh).to(torch.bfloat16)
    model.to_empty(device=mesh.device)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("mlp.gate.weight"))
    if not ARGS.eager:
        model.compile_blocks()
    length = TOKENS // SEQUENCES
    cu_seqlens = torch.arange(0, TOKENS + 1, length, dtype=torch.int32, device=mesh.device)
    tables = rope_tables(cu_seqlens, TOKENS, cfg.head_dim, cfg.rope_theta)
    x_tD = torch.empty(TOKENS, cfg.hidden_size, device=mesh.device, dtype=torch.bfloat16)
    return model.model["layers"][0], (x_tD.requires_grad_(), *tables, cu_seqlens, length)


def main() -> None:
    store, timeout = dist.HashStore(), timedelta(seconds=60)
    dist.init_process_group("nccl", store=store, rank=0, world_size=RANKS, timeout=timeout)
    block, args = layer(make_mesh(1, EP, 4))
    gradient_tD = torch.empty_like(args[0])
    CachingAutotuner.run = count_bytes(CachingAutotuner.run)
    for name in ("compile", ""):
        for x in (args[0], *block.parameters()):
            x.grad = None
        begin(name or "forward")
        y_tD, _, kept = block(*args)
        begin(name or "backward")
        y_tD.backward(gradient_tD)
    kept = [x.detach() for x in kept]
    for name in ("compile", ""):
        begin(name or "again")
        block(*args, None, kept)[0].backward(gradient_tD)
    begin("no_grad compile")
    with torch.no_grad():
        block(*args)
        begin("no_grad")
        block(*args)
    begin("end")
    kinds, result = fake.sections(LOG), {}
    for name in ("forward", "backward", "again", "no_grad"):
        counted = kinds[name]
        result[name] = {
            "launches": sum(counted[kind] for kind in fake.LAUNCHES),
            "syncs": fake.syncs(counted),
            "triton_bytes": triton_bytes[name],
            **{kind.lower(): counted[kind] for kind in sorted(counted)},
        }
    if ARGS.list:
        print(LOG.read_text().partition("MARK\tforward")[2].partition("MARK\tend")[0])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # NCCL's threads have nothing to end
