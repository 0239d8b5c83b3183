"""What ranks say to each other: one process group, and every collective the trainer uses.

Data parallelism only, so far. The loss of a micro-batch is already divided by the global token count, so gradients
are added up over ranks (SUM, never averaged), and one process takes the same path as many.

Communication of an optimizer step: one all-reduce of the gradients, 2 * (n-1)/n * parameter bytes per rank.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Mesh:
    """This process's place among the trainer's."""

    rank: int
    world_size: int
    device: torch.device
    dp_group: dist.ProcessGroup


def init_mesh(timeout_s: float) -> Mesh:
    """Join the process group that torchrun describes; without torchrun, a group of one.

    timeout_s bounds every collective: a rank that dies must become an error of the others, not a hang.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    store = dist.HashStore()
    if "MASTER_ADDR" in os.environ:
        # torchrun's store outlives the ranks that it starts again; without a prefix they would find the addresses of
        # the dead ones in it.
        store, _, _ = next(dist.rendezvous("env://", rank, world_size))
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )
    return Mesh(rank, world_size, device, dist.group.WORLD)


def broadcast_bytes(data: bytes | None, mesh: Mesh) -> bytes:
    """Rank 0's bytes on every rank (the others pass None). A safetensors blob travels so: no pickle."""
    size = torch.tensor([len(data) if data is not None else 0], device=mesh.device)
    dist.broadcast(size, 0, group=mesh.dp_group)
    buffer = torch.empty(int(size), dtype=torch.uint8, device=mesh.device)
    if data is not None:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(buffer, 0, group=mesh.dp_group)
    return data if data is not None else buffer.cpu().numpy().tobytes()


def reduce_gradients(parameters: list[torch.nn.Parameter], mesh: Mesh) -> None:
    """SUM of every gradient over the data-parallel ranks, in one flat bucket."""
    for p in parameters:
        if p.grad is None:  # a rank whose micro-batches were all masked still takes part, with zeros
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat, group=mesh.dp_group)
    for p, reduced in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(reduced.view_as(p))


def reduce_metrics(metrics: dict[str, torch.Tensor], mesh: Mesh) -> dict[str, torch.Tensor]:
    """Add up metrics over ranks; names ending in _min and _max reduce by that."""
    reduced = {}
    for suffix, op in (("_min", dist.ReduceOp.MIN), ("_max", dist.ReduceOp.MAX), ("", dist.ReduceOp.SUM)):
        names = [n for n in metrics if n.endswith(suffix) and n not in reduced]
        if names:
            packed = torch.cat([metrics[n].double().flatten() for n in names])
            dist.all_reduce(packed, op, group=mesh.dp_group)
            parts = packed.split([metrics[n].numel() for n in names])
            reduced.update((n, part.view(metrics[n].shape)) for n, part in zip(names, parts))
    return reduced
