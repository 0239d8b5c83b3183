"""Inside vLLM's worker, in vllm_engine's place: what the weights are and where. The fake GPU computes
no sums, but copies are real, so it is bytes that are compared."""

import hashlib

import torch
import vllm_engine
from vllm.model_executor.layers.fused_moe import expert_map_manager

determine_expert_map = expert_map_manager.determine_expert_map


def on_the_host(*args, **kwargs):
    """Which experts a worker has: values that vLLM would have the GPU compute."""
    with torch.device("cpu"):
        local, *maps = determine_expert_map(*args, **kwargs)
    return local, *(None if m is None else m.to("cuda") for m in maps)


expert_map_manager.determine_expert_map = on_the_host

LOADED = []  # stacks of experts that went in at once
load = vllm_engine.Stack.load


def counted(self, parts):
    LOADED.append(len(parts))
    load(self, parts)


vllm_engine.Stack.load = counted


def digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu()
    return hashlib.sha256(raw.numpy()).hexdigest()


class Watched(vllm_engine.WorkerExtension):
    def seen(self) -> dict[str, list]:
        """Of each weight its address and digest."""
        model = self.model_runner.model
        return {n: [p.data_ptr(), digest(p)] for n, p in model.named_parameters()}

    def stacks_loaded(self) -> int:
        return len(LOADED)

    def copies(self) -> int | None:
        """Of which an update consists; None where vLLM loads it."""
        found = self.weight_transfer_engine.copies
        return None if found is None else len(found)
