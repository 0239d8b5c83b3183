"""Several ranks on one machine, for the tests: processes over gloo, each running the same
function."""

import faulthandler
import multiprocessing
import os
import socket
import traceback

import torch


def _rank(rank, world_size, port, queue, function, args):
    """Runs in a process of its own."""
    faulthandler.enable()  # a crash says where
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        queue.put((rank, True, function(*args)))
    except Exception:  # the parent must see it, not wait for it
        queue.put((rank, False, traceback.format_exc()))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def forks():
    """Makes processes that have all imports of a trainer."""
    context = multiprocessing.get_context("forkserver")
    # AdamW imports torch._dynamo, which takes each rank two seconds if it is not there already
    context.set_forkserver_preload(["torch", "torch._dynamo", "train_cispo"])
    return context


def on_ranks(world_size: int, function, *args, timeout_s: float = 300) -> list:
    """function(*args) in world_size processes with torchrun's environment; their results by rank.
    function is of a module's top level, and its results are plain Python. A rank that fails fails
    the caller, with its traceback."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = forks()
    queue = context.Queue()
    workers = [
        context.Process(
            target=_rank, args=(rank, world_size, port, queue, function, args), daemon=True
        )
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    try:
        results = []
        for _ in workers:
            rank, ok, result = queue.get(timeout=timeout_s)
            # at once: the others may wait for it until a timeout
            assert ok, f"rank {rank} of {world_size}:\n{result}"
            results.append((rank, result))
        for worker in workers:
            worker.join(60)
        return [result for _, result in sorted(results, key=lambda r: r[0])]
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
