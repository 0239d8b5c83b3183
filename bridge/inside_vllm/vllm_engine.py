"""The part that runs inside vLLM's worker: how new weights get into a live model.

vLLM imports this module there (`--worker-extension-cls vllm_engine.WorkerExtension`), which
registers the engine named in `--weight-transfer-config`. rollout.py then drives it through vLLM's
routes: start_weight_update, update_weights {"path": directory}, finish_weight_update. Only a worker
may import vllm. This folder is on vLLM's path and holds nothing else: otherwise vLLM and what it
loads could take our model.py or report.py for a module of theirs.

Two ways to corrupt a live model without any error, both of which happened to other trainers:
1. `model.load_weights` alone writes checkpoint layout over kernel layout. Layer-wise reload
   restores the loading layout first and converts afterwards, so everything here happens between
   initialize and finalize.
2. On CPU the MoE method packs its expert weights only when its kernel is built, which it does once.
   Dropping the kernel makes finalize build it again; without that the experts stay unpacked after a
   reload.
At its start rollout.py proves that reloading the same weights changes no checksum, and so does
tests/test_vllm.py. On a GPU that reload also shows whether later versions can go in by copies alone
(vllm_copies.py).
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import make_online_process_loader
from vllm.model_executor.model_loader.weight_checksum import _weights
from vllm.v1.worker import gpu_worker
from vllm_copies import Copy, Watch, copy_version
from vllm_tensors import Directory, Layout, Run, by_numbers, tensor_sum


def compute_tensor_digests(model: torch.nn.Module) -> dict[str, str]:
    """A sum of each tensor inside vLLM, made where it is. vLLM's own takes SHA-256 on the host,
    which for 61 GB is half a minute without a token."""
    return {name: tensor_sum(tensor) for name, tensor in _weights(model)}


gpu_worker.compute_tensor_digests = compute_tensor_digests


# ---- a layer's experts at once -------------------------------------------------------------------
class Stack:
    """A layer's experts inside vLLM, and the checkpoint's tensors that fill them: E experts on this
    worker, F wide, of which it has f. One by one through vLLM's loaders they cost as much Python
    each as any tensor, and Qwen3-30B-A3B has 18,432 of them."""

    def __init__(self, layer: RoutedExperts, prefix: str):
        parallel = layer.moe_config.moe_parallel_config
        self.layer, self.f_rank, self.f_parts = layer, parallel.tp_rank, parallel.tp_size
        ids = range(layer.global_num_experts)
        here = {layer._map_global_expert_id_to_local_expert_id(i): i for i in ids}
        experts = [f"{prefix}.{here[local]}" for local in sorted(here) if local >= 0]
        self.names = {  # in the order in which w13 (E, 2f, D) and w2 (E, D, f) have them
            "w13_weight": [f"{e}.{kind}_proj.weight" for e in experts for kind in ("gate", "up")],
            "w2_weight": [f"{e}.down_proj.weight" for e in experts],
        }

    def parts(self, directory: Directory) -> dict[str, list[Run]] | None:
        """What goes into each tensor; None where they are not just the checkpoint's, but padded,
        packed, quantized in the file, or have a bias. Then vLLM's loaders see to it."""
        tensors = dict(self.layer.named_parameters(recurse=False))
        if tensors.keys() != self.names.keys():
            return None
        found = {}
        for kind, names in self.names.items():
            if not all(name in directory.places for name in names):
                return None
            shape = directory.places[names[0]].shape
            cut = 0 if kind == "w13_weight" else 1  # the side that is F in the checkpoint
            mine = [side // self.f_parts if i == cut else side for i, side in enumerate(shape)]
            per_expert = len(names) // len(tensors[kind])
            if tensors[kind].shape != (len(tensors[kind]), per_expert * mine[0], mine[1]):
                return None
            found[kind] = [
                Run(first, run.narrow(cut + 1, self.f_rank * mine[cut], mine[cut]))
                for first, run in directory.runs(names)
            ]
        return found

    def load(self, parts: dict[str, list[Run]]) -> None:
        """Through vLLM's layer-wise reload, which counts what is copied, and converts the layer
        when nothing is missing."""
        params = {kind: getattr(self.layer, kind) for kind in parts}
        loaders = {kind: param.weight_loader for kind, param in params.items()}
        for param in params.values():
            param.weight_loader = copy_runs
        for kind, runs in parts.items():
            make_online_process_loader(self.layer, kind)(params[kind], runs)
        for kind, param in params.items():
            param.weight_loader = loaders[kind]


def copy_runs(param: torch.Tensor, loaded_weight: list[Run]) -> None:
    """vLLM's weight loader for a tensor that holds experts."""
    for first, run in loaded_weight:
        units = param.data.view(-1, *run.shape[1:])
        units[first : first + len(run)].copy_(run)


@dataclass
class InitInfo(WeightTransferInitInfo):
    pass


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    path: str  # a verified checkpoint directory on this machine


class SafetensorsEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    stacks: list[Stack] | None = None  # of the model, once they were asked for
    layout: Layout | None = None  # of the last version
    watch: Watch | None = None  # of an update under way
    copies: list[Copy] | None = None  # how all versions of that layout go in, where it is known

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass  # nothing to rendezvous with: weights come from a local directory

    def start_weight_update(self) -> None:
        if self.copies is None:
            self._begin_reload()

    def _begin_reload(self) -> None:
        if self.device.type == "cpu":
            for module in self.model.modules():
                method = getattr(module, "quant_method", None)
                if getattr(method, "moe_kernel", None) is not None:
                    method.moe_kernel = None  # corruption 2 above
        initialize_layerwise_reload(self.model)  # corruption 1 above

    def update_weights(self, update_info: dict) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        # the base class would synchronize an accelerator that a CPU does not have
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        directory = Directory(Path(update_info.path), self.layout)
        is_new = directory.layout is not self.layout
        if self.copies is not None:
            if not is_new:
                return copy_version(self.copies, directory)
            self.copies = None
            self._begin_reload()
        self.layout = directory.layout
        # not on a CPU, where layers pack their weights into memory beside the tensor
        self.watch = Watch(directory) if is_new and self.device.type != "cpu" else None
        with self.watch or nullcontext():
            self._reload(directory)

    def _reload(self, directory: Directory) -> None:
        left = set(directory.places)
        for stack in self._stacks():
            if parts := stack.parts(directory):
                stack.load(parts)
                left.difference_update(*stack.names.values())
        # layer by layer: vLLM keeps what it cannot convert yet
        names = sorted(left, key=by_numbers)
        self.model.load_weights((name, directory[name]) for name in names)

    def _stacks(self) -> list[Stack]:
        if self.stacks is None:
            self.stacks = [
                Stack(module, name.removesuffix(".routed_experts"))
                for name, module in self.model.named_modules()
                if isinstance(module, RoutedExperts)
            ]
        return self.stacks

    def finish_weight_update(self) -> None:
        if self.copies is not None:
            return
        with self.watch or nullcontext():
            finalize_layerwise_reload(self.model, self.model_config)
        if self.watch is not None:
            self.copies, self.watch = self.watch.proven(self.model), None

    def shutdown(self) -> None:
        pass


WeightTransferEngineFactory.register_engine("safetensors", SafetensorsEngine)


class WorkerExtension:
    """Empty: vLLM wants a class to mix into its worker; importing it has run the line above."""
