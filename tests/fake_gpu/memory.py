"""The memory of rank 0 of 16 in a whole update of --preset qwen3-30b-a3b, all 48 layers, by torch's
own allocator on the fake GPU, beside what ranks/plan.py says. Experts get equally many rows.

    CISPO_CUDA_VENV=... python tests/fake_gpu/memory.py [FLAGS OF train_cispo.py]

The last line is JSON, in GiB.
"""

import dataclasses
import json
import os
import sys
from datetime import timedelta

import fake

RANKS, LENGTH, SAMPLES, EP, TOP_K = 16, 4096, 64, 8, 8  # of a rank: 4 samples, one micro-batch
fake.enter(item=SAMPLES // RANKS * LENGTH * TOP_K // EP)
sys.path[:0] = [str(fake.HERE.parent.parent), str(fake.HERE.parent)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from batches import unpack_batch  # noqa: E402

import loss  # noqa: E402
import train_cispo  # noqa: E402
from bridge.groups import Group  # noqa: E402
from model import KNOWN_MODELS  # noqa: E402
from prepare import with_chunk_size  # noqa: E402
from presets import parse_config  # noqa: E402
from ranks import plan  # noqa: E402
from ranks.batch import pack_batch  # noqa: E402
from ranks.parallel import make_mesh  # noqa: E402

FLAGS = f"--preset qwen3-30b-a3b --no-compile --train-global-batch-size {SAMPLES} --ep {EP}"


def group(ordinal: int, samples: int, prompt: int = 200) -> Group:
    """Samples of LENGTH tokens with their prompt; one is rewarded."""
    tokens = samples * (LENGTH - prompt)
    rewards = torch.zeros(samples)
    rewards[0] = 1.0
    return Group(
        ordinal,
        [0] * prompt,
        torch.full((samples,), LENGTH - prompt, dtype=torch.int32),
        torch.zeros(tokens, dtype=torch.int32),
        torch.zeros(tokens),
        torch.zeros(tokens, dtype=torch.int32),
        rewards,
        torch.zeros(samples, dtype=torch.uint8),
    )


def peak_gib() -> float:
    """Since the last call."""
    peak = torch.cuda.max_memory_allocated() / plan.GIB
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 2)


def main() -> None:
    cfg = parse_config([*FLAGS.split(), *sys.argv[1:]])
    cfg = dataclasses.replace(cfg, num_prompts_per_step=SAMPLES // cfg.num_generations_per_prompt)
    model_cfg = KNOWN_MODELS[cfg.model]
    cfg = with_chunk_size(cfg, model_cfg)
    store, timeout = dist.HashStore(), timedelta(seconds=60)
    dist.init_process_group("nccl", store=store, rank=0, world_size=RANKS, timeout=timeout)
    mesh = make_mesh(cfg.tp, cfg.ep, model_cfg.num_key_value_heads)
    train_cispo.load_hf = lambda model, checkpoint: None  # weights of any value
    model = train_cispo.build_model(cfg, model_cfg, mesh, None)
    optimizer = train_cispo.build_optimizer(cfg, model)
    step, found = optimizer.step, {}

    def measured_step():
        found["forward and backward"] = peak_gib()
        norm = step()
        found["optimizer step"] = peak_gib()
        return norm

    optimizer.step = measured_step
    groups = [group(i, cfg.num_generations_per_prompt) for i in range(cfg.num_prompts_per_step)]
    # The second update is as all later ones: the first has made the optimizer's state.
    for _ in range(2):
        updates, counts = unpack_batch(pack_batch(groups, cfg), cfg, 0, mesh.dp, mesh.device)
        peak_gib()
        train_cispo.fix_for_the_step(updates, 1, model, None, cfg)
        found["prev"] = peak_gib()
        train_cispo.train_update(model, optimizer, updates[0], counts[0], cfg, loss.policy_loss)
    plan.IMBALANCE = 1.0
    terms = plan.memory(model_cfg, cfg, RANKS)
    del terms["CUDA and NCCL"]
    print(json.dumps({**found, "plan": round(sum(terms.values()), 2)}))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # NCCL's threads have nothing to end
