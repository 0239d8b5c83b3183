"""Checkpoints: all that a run needs to go on as if nothing had happened.

    runs/NAME/checkpoints/step-000040/
        state-00000.safetensors    rank 0's parameters, optimizer state and random state; one such file for each rank
        checkpoint.json            step, ledger, size and digest of each file; written last

It is written as `step-N.tmp` and renamed, so a directory without `.tmp` is whole, and `verify` proves it. The
tensors are copied to host memory between two steps; the rest happens in a thread while training goes on. What is in
flight at the rollout nodes is not saved: the ledger's frontier is, and the rest is generated again.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

from waits import Wait
from weights import digest, write_safetensors

MANIFEST = "checkpoint.json"


class CheckpointError(RuntimeError):
    """A checkpoint that is incomplete, damaged, or of another run. The message names the file."""


# ---- what is saved -------------------------------------------------------------------------------------------
def state_tensors(model, optimizer) -> tuple[list[tuple[str, torch.Tensor]], dict]:
    """This rank's state: copies on the host, and what of it is not a tensor (JSON)."""
    names = {p: name for name, p in model.named_parameters()}
    tensors = [(f"model.{name}", p.detach()) for p, name in names.items()]
    for p, state in optimizer.state.items():
        tensors += [(f"optimizer.{names[p]}.{key}", value) for key, value in state.items()]
    return [(name, t.to("cpu", copy=True)) for name, t in [*tensors, ("rng", torch.get_rng_state())]], {}


@torch.no_grad()
def load_state_tensors(file: Path, model, optimizer) -> None:
    """The reverse. Raises: CheckpointError when the file's tensors are not this model's."""
    with safe_open(file, framework="pt") as f:
        left = {name: f.get_tensor(name) for name in f.keys()}
    try:
        torch.set_rng_state(left.pop("rng"))
        for name, p in model.named_parameters():
            p.copy_(left.pop(f"model.{name}"))
            if any(p is trained for group in optimizer.param_groups for trained in group["params"]):
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{name}.{key}" in left]
                state = {key: left.pop(f"optimizer.{name}.{key}") for key in keys}
                optimizer.state[p] = {key: t if key == "step" else t.to(p.device) for key, t in state.items()}
    except (KeyError, RuntimeError) as e:
        raise CheckpointError(f"{file} is not of this model: {e}") from None
    if left:
        raise CheckpointError(f"{file}: {len(left)} tensors have no place here, {next(iter(left))} among them")


# ---- reading -------------------------------------------------------------------------------------------------
def verify(path: Path, rank: int | None = None) -> dict:
    """The manifest of a checkpoint whose files (or only this rank's) are what it says. Raises: CheckpointError."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, want in manifest["files"].items():
            if rank is None or name == f"state-{rank:05d}.safetensors":
                found = (path / name).read_bytes()
                if len(found) != want["bytes"] or digest(found) != want["blake3"]:
                    raise CheckpointError(f"{path / name} is damaged: size or digest differs from {MANIFEST}")
    except (OSError, ValueError, KeyError) as e:
        raise CheckpointError(f"{path} is incomplete: {e!r}") from None
    return manifest


def newest(root: Path, say: Callable[[str], None]) -> Path | None:
    """The last checkpoint that is whole; a damaged one is named and passed over."""
    for path in sorted((p for p in root.glob("step-*") if p.suffix != ".tmp"), reverse=True):
        try:
            verify(path)
            return path
        except CheckpointError as e:
            say(f"passing over a checkpoint: {e}")
    return None


# ---- writing -------------------------------------------------------------------------------------------------
class Checkpointer:
    """Writes checkpoints in a thread, one at a time. Every rank makes one and calls `save` at the same steps."""

    deadline_s = 600.0  # for all ranks' parts to be on disk

    def __init__(self, root: Path, rank: int, world_size: int, keep: int):
        self.root, self.rank, self.world_size, self.keep = root, rank, world_size, keep
        self.newest_step, self.error, self._told = -1, None, ""
        self._thread: threading.Thread | None = None

    def save(self, step: int, model, optimizer, run: dict | None) -> None:
        """run: rank 0's ledger and the like. Returns once the state is copied, and the one before is on disk."""
        self.wait()
        tensors, extra = state_tensors(model, optimizer)
        self.newest_step = step
        self._thread = threading.Thread(target=self._write, args=(step, tensors, extra, run), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until what was saved is on disk. Raises: CheckpointError when it could not be."""
        if self._thread is not None:
            self._thread.join()
        if self.error is not None:
            raise CheckpointError(f"rank {self.rank}: no checkpoint in {self.root}: {self.error}") from self.error

    def _write(self, step: int, tensors, extra: dict, run: dict | None) -> None:
        try:
            tmp, final = self.root / f"step-{step:06d}.tmp", self.root / f"step-{step:06d}"
            tmp.mkdir(parents=True, exist_ok=True)
            file = tmp / f"state-{self.rank:05d}.safetensors"
            blake3 = write_safetensors(file, tensors)
            part = {file.name: {"bytes": file.stat().st_size, "blake3": blake3, **extra}}
            manifest = self._gather(step, part, run, lambda text: self._finish(tmp, final, text))
            if self.rank != 0 and tmp.exists():  # rank 0's disk is not ours: this node keeps its own parts
                self._finish(tmp, final, manifest)
        except Exception as e:  # any: it must reach the training thread, not die with this one
            self.error = e

    def _gather(self, step: int, part: dict, run: dict | None, finish: Callable[[str], None]) -> str:
        """Every rank's part to rank 0, and the manifest back. In the store, since collectives are the main thread's."""
        store = dist.distributed_c10d._get_default_store()
        parts = [f"checkpoint/{step}/{rank}" for rank in range(self.world_size)]
        store.set(parts[self.rank], json.dumps(part))
        wait = Wait("checkpoint", self.deadline_s, who=f"trainer rank {self.rank}")
        wanted = parts if self.rank == 0 else [f"checkpoint/{step}/whole"]
        while missing := [key for key in wanted if not store.check([key])]:
            wait.check(f"missing: {', '.join(missing)}")
            time.sleep(0.05)  # polling other processes
        if self.rank != 0:
            return store.get(wanted[0]).decode()
        files = {name: entry for key in parts for name, entry in json.loads(store.get(key)).items()}
        text = json.dumps({"step": step, "world_size": self.world_size, "files": files, **run}, indent=1)
        finish(text)
        store.set(f"checkpoint/{step}/whole", text)
        # The one before was read by all, or their parts of this one would not be here.
        for key in [*parts, *([self._told] if self._told else [])]:
            store.delete_key(key)
        self._told = f"checkpoint/{step}/whole"
        return text

    def _finish(self, tmp: Path, final: Path, manifest: str) -> None:
        with open(tmp / MANIFEST, "w") as f:
            f.write(manifest)
            f.flush()
            os.fsync(f.fileno())
        shutil.rmtree(final, ignore_errors=True)  # of a run that went back and came here again
        tmp.rename(final)
        directory = os.open(self.root, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        self._prune()

    def _prune(self) -> None:
        """Keep the last ones, and the one with the best reward."""
        found = sorted(p for p in self.root.glob("step-*") if p.suffix != ".tmp")
        reward = lambda path: json.loads((path / MANIFEST).read_text()).get("reward") or 0.0
        for old in set(found) - set(found[-self.keep :]) - {max(reversed(found), key=reward)}:
            shutil.rmtree(old)
