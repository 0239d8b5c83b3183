"""The memory of rank 0 in a whole update of a preset, all layers, by torch's own allocator on the
fake GPU, beside what ranks/plan.py says; and how often that update waits for the device. Each
expert gets the same number of rows.

    CISPO_CUDA_VENV=... python tests/fake_gpu/memory.py --preset NAME [--compile]

The last line is JSON; memory in GiB.
"""

import ctypes
import json
import os
import sys
from datetime import timedelta

import fake

LOG = fake.enter(item=fake.even_rows(16384, experts=128, chosen=8, ep=8))
sys.path.insert(0, str(fake.HERE.parent.parent))

import torch
import torch.distributed as dist

import loss
import train_cispo
from model import KNOWN_MODELS
from prepare import with_chunk_size
from presets import parse_config
from ranks import plan
from ranks.batch import Batch, pack_batch
from ranks.parallel import make_mesh
from tools.bench_gpu import full_batch


def peak_gib() -> float:
    """Since the last call."""
    peak = torch.cuda.max_memory_allocated() / plan.GIB
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 2)


def main() -> None:
    cfg = parse_config(["--no-compile", *sys.argv[1:]])
    ranks = cfg.dry_run_ranks
    model_cfg = KNOWN_MODELS[cfg.model]
    cfg, groups = full_batch(cfg, model_cfg, ranks)
    store, timeout = dist.HashStore(), timedelta(seconds=60)
    dist.init_process_group("nccl", store=store, rank=0, world_size=ranks, timeout=timeout)
    mesh = make_mesh(cfg.tp, cfg.ep, model_cfg.num_key_value_heads)
    cfg = with_chunk_size(cfg, model_cfg, mesh.device)
    train_cispo.load_hf = lambda model, checkpoint: None  # weights of any value
    model = train_cispo.build_model(cfg, model_cfg, mesh, None)
    optimizer = train_cispo.build_optimizer(cfg, model)
    step, found, mark = optimizer.step, {}, ctypes.CDLL("libfakecuda.so").fake_mark

    def measured_step():
        found["forward and backward"] = peak_gib()
        norm = step()
        found["optimizer step"] = peak_gib()
        return norm

    optimizer.step = measured_step
    # The second update is as all later ones: the first has made the optimizer's state.
    for _ in range(2):
        batch = Batch.unpack(pack_batch(groups, cfg))
        updates, counts = train_cispo.my_share(groups, batch, cfg, model)
        peak_gib()
        train_cispo.fix_for_the_step(updates, 1, model, None, cfg)
        found["prev"] = peak_gib()
        mark(b"update")
        train_cispo.train_update(model, optimizer, updates[0], counts[0], cfg, loss.policy_loss)
        mark(b"end")
    found["syncs"] = fake.syncs(fake.sections(LOG)["update"]) // 2
    plan.IMBALANCE = 1.0
    terms = plan.memory(model_cfg, cfg, ranks)
    for name in ("CUDA and NCCL", "vLLM on the same GPU"):  # not of torch's allocator
        terms.pop(name, None)
    print(json.dumps({**found, "plan": round(sum(terms.values()), 2)}))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # NCCL's threads have nothing to end
