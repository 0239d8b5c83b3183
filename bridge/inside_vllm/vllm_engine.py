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
tests/test_vllm.py.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)


def tensors_by_layer(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a verified directory, by the numbers in the names: vLLM converts a layer
    when all its tensors have come, and keeps those of other layers in memory."""
    index = path / "model.safetensors.index.json"
    named = {"model.safetensors"}
    if index.exists():
        named = set(json.loads(index.read_text())["weight_map"].values())
    # one that is missing is an error
    files = [safe_open(path / file, framework="pt") for file in named]
    where = {name: file for file in files for name in file.keys()}
    for name in sorted(where, key=by_numbers):
        yield name, where[name].get_tensor(name)


def by_numbers(name: str) -> list[str | int]:
    """Sorts layer 10 behind layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


@dataclass
class InitInfo(WeightTransferInitInfo):
    pass


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    path: str  # a verified checkpoint directory on this machine


class SafetensorsEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass  # nothing to rendezvous with: weights come from a local directory

    def start_weight_update(self) -> None:
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
        self.model.load_weights(tensors_by_layer(Path(update_info.path)))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


WeightTransferEngineFactory.register_engine("safetensors", SafetensorsEngine)


class WorkerExtension:
    """Empty: vLLM wants a class to mix into its worker; importing it has run the line above."""
