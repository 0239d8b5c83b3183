"""Checkpoints: all that a run needs to go on as if nothing had happened.

    runs/NAME/checkpoints/step-000040/
        state-00000.safetensors  rank 0's share of weights and AdamW's moments; each rank has a file
        checkpoint.json          step, ledger, size and digest of each file; written last

A checkpoint is written as `step-N.tmp` and renamed: a directory without `.tmp` is whole, and
`verify` proves it. The tensors are copied to host memory between two steps; a thread does the rest
while training goes on. Prompts that are in flight at the rollout nodes are not saved: the ledger's
frontier is, and they are generated again.

Nodes need not share a disk. Each then keeps the manifest and its own ranks' files. Such a run goes
on if the same nodes come in the same order; otherwise it stops and names the missing file.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from blake3 import blake3
from safetensors import safe_open

from bridge.waits import Wait, await_keys, gather_json
from bridge.weights import digest, fsync, write_safetensors
from ranks.parallel import Mesh, Split, all_reduce

MANIFEST = "checkpoint.json"


class CheckpointError(RuntimeError):
    """A checkpoint that is incomplete, damaged, or of another run. The message names the file."""


# ---- what is saved -------------------------------------------------------------------------------
KINDS = ("weight", "exp_avg", "exp_avg_sq")  # master weights and AdamW's moments


class Piece(NamedTuple):
    """A flat range of a tensor's part: what a state file holds under a name. All ranks' pieces
    together are the model, whatever the layout, so any other layout can read them."""

    kind: str  # of KINDS
    hf_name: str
    part: tuple[int, int, int]  # of the tensor: dim, index, count, as in parallel.Split
    first: int  # elements first .. last - 1 of the part, flattened
    last: int

    @property
    def name(self) -> str:
        """KIND/HF NAME/DIM.INDEX.COUNT/FIRST ELEMENT"""
        return f"{self.kind}/{self.hf_name}/{'.'.join(map(str, self.part))}/{self.first}"

    @classmethod
    def parse(cls, name: str, size: int) -> "Piece":
        kind, hf_name, part, first = name.split("/")
        dim, index, count = map(int, part.split("."))
        return cls(kind, hf_name, (dim, index, count), int(first), int(first) + size)

    def covers(self, other: "Piece") -> bool:
        """Whether `other`, of the same tensor, is in this piece: it was saved under this layout."""
        return self.part == other.part and self.first <= other.first and other.last <= self.last


def own_pieces(model, optimizer) -> Iterator[tuple[Piece, torch.Tensor]]:
    """This rank's training state: each piece, and the flat tensor that holds it. Saving reads these
    tensors, loading writes them. They are its ZeRO shards and the frozen parameters."""
    for bucket in optimizer.buckets:
        state = optimizer.state.get(bucket.master)
        moments = {
            kind: state[kind] if state else torch.zeros_like(bucket.master) for kind in KINDS[1:]
        }
        flats = {"weight": bucket.master.detach(), **moments}
        for name, (low, high), (shard_low, _) in bucket.pieces():
            start = 0  # of the Hugging Face tensor, in the parameter
            for hf_name, view, split in model.hf_parts(name):
                first, last = max(low, start), min(high, start + view.numel())
                at = shard_low + first - low  # in the shard
                part = (split.dim, split.index, split.count)
                for kind in KINDS if first < last else ():
                    piece = Piece(kind, hf_name, part, first - start, last - start)
                    yield piece, flats[kind][at : at + last - first]
                start += view.numel()
    for name, p in model.named_parameters():
        for hf_name, view, split in model.hf_parts(name) if not p.requires_grad else ():
            part = (split.dim, split.index, split.count)
            yield Piece("weight", hf_name, part, 0, view.numel()), view.view(-1)


@torch.no_grad()
def state_tensors(model, optimizer) -> tuple[list[tuple[str, torch.Tensor]], dict]:
    """Copies of this rank's pieces, by name, and the state that is not a tensor (JSON)."""
    found = [
        (piece.name, flat.to("cpu", copy=True)) for piece, flat in own_pieces(model, optimizer)
    ]
    # as many for each bucket
    updates = max((int(state["step"]) for state in optimizer.state.values() if state), default=0)
    return found, {"updates": updates}


class Pieces:
    """The pieces in a checkpoint: of all ranks, or of this node's where disks are not shared."""

    def __init__(self, path: Path, shapes: dict[str, torch.Size]):
        """shapes: of the model's whole tensors. Raises: CheckpointError for a tensor that is not
        the model's."""
        self.path, self.shapes = path, shapes
        # by kind and name: each piece, and the file that holds it
        self.pieces: dict[tuple[str, str], dict[Piece, safe_open]] = {}
        for file_path in (path / name for name in sorted(read_manifest(path)["files"])):
            if not file_path.exists():
                continue
            file = safe_open(file_path, framework="pt")
            for name in file.keys():
                piece = Piece.parse(name, file.get_slice(name).get_shape()[0])
                self._check(piece)
                self.pieces.setdefault(piece[:2], {}).setdefault(piece, file)

    def _check(self, piece: Piece) -> None:
        what = f"{piece.kind} of {piece.hf_name}"
        if piece.hf_name not in self.shapes:
            raise CheckpointError(f"{self.path} has a {what}, which this model has no place for")
        *_, count = piece.part
        if piece.last > self.shapes[piece.hf_name].numel() // count:
            raise CheckpointError(f"{self.path}: {what} is larger than in this model")

    def part(self, wanted: Piece) -> torch.Tensor:
        """The flat tensor of a piece of any layout. Raises: CheckpointError, as `whole`."""
        for piece, file in self.pieces.get(wanted[:2], {}).items():
            if piece.covers(wanted):
                low, high = wanted.first - piece.first, wanted.last - piece.first
                return file.get_slice(piece.name)[low:high]
        whole = self.whole(wanted.kind, wanted.hf_name)
        part = whole[Split(*wanted.part, replicas=None).of(whole.shape)]
        return part.flatten()[wanted.first : wanted.last]

    def whole(self, kind: str, hf_name: str) -> torch.Tensor:
        """A whole tensor. Raises: CheckpointError when a piece is not here."""
        found = self.pieces.get((kind, hf_name), {})
        if not found:
            raise CheckpointError(f"{self.path} has no {kind} of {hf_name}")
        dim, _, count = min(found).part
        shape = list(self.shapes[hf_name])
        shape[dim] //= count
        flats: list[list[torch.Tensor]] = [[] for _ in range(count)]
        for piece in sorted(found):
            flat = flats[piece.part[1]]
            # else it is there already, or there is a gap, which is seen below
            if piece.first == sum(map(len, flat)):
                flat.append(found[piece].get_tensor(piece.name))
        for index, flat in enumerate(flats):
            if (end := sum(map(len, flat))) != math.prod(shape):
                raise CheckpointError(
                    f"{self.path}: {kind} of {hf_name}, part {index + 1} of {count}, ends at "
                    f"element {end} of {math.prod(shape)}: a rank's file is missing"
                )
        return torch.cat([torch.cat(flat).view(shape) for flat in flats], dim=dim)


@torch.no_grad()
def load_state_tensors(path: Path, model, optimizer, updates: int) -> None:
    """Weights and moments from the state files, of this layout or another, bit for bit. updates: of
    the optimizer so far, for AdamW's bias correction. Raises: CheckpointError naming the tensor
    that is not all there."""
    pieces = Pieces(path, model.cfg.checkpoint_shapes())
    for bucket in optimizer.buckets:
        moments = {kind: torch.zeros_like(bucket.master) for kind in KINDS[1:]}
        # on a GPU the fused kernel wants the number of steps there
        step = torch.tensor(float(updates), device=bucket.master.device)
        optimizer.state[bucket.master] = {"step": step, **moments}
    for piece, flat in own_pieces(model, optimizer):
        flat.copy_(pieces.part(piece))
    for bucket in optimizer.buckets:
        bucket.gather_values()


# ---- reading -------------------------------------------------------------------------------------
def whole(root: Path) -> list[Path]:
    """The checkpoints in a directory, newest first. One with a suffix is still being written, or
    was passed over."""
    return sorted((p for p in root.glob("step-*") if not p.suffix), reverse=True)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


NO_MANIFEST = (
    f"no {MANIFEST} in it; the directory of a checkpoint is like runs/NAME/checkpoints/step-000040"
)


def read_manifest(path: Path) -> dict:
    """Raises: CheckpointError when there is none."""
    try:
        return json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is incomplete: {NO_MANIFEST}") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} is incomplete: {e!r}") from None


def verify(path: Path, rank: int, world_size: int) -> dict:
    """The manifest of a checkpoint. Of n ranks, rank r checks the state files r, r + n, r + 2n, ...
    Raises: CheckpointError when one is not what the manifest says."""
    manifest = read_manifest(path)
    try:
        for name in sorted(manifest["files"])[rank::world_size]:
            want, file = manifest["files"][name], path / name
            # Mapped, not read: at 30 B parameters a node's files are larger than its free memory.
            right = file.stat().st_size == want["bytes"]
            if not right or blake3().update_mmap(file).hexdigest() != want["blake3"]:
                raise CheckpointError(f"{file} is damaged: size or digest differs from {MANIFEST}")
            with safe_open(file, framework="pt") as f:
                for key in f.keys():
                    if not f.get_tensor(key).isfinite().all():
                        raise CheckpointError(f"{file}: {key} is not finite throughout")
    except (OSError, KeyError) as e:
        raise CheckpointError(f"{path} is incomplete: {e!r}") from None
    return manifest


def choose(paths: list[Path], mesh: Mesh, say: Callable[[str], None]) -> tuple[Path | None, dict]:
    """The first of these checkpoints that is whole on every rank, and its manifest; None and {} if
    there is none. Where each node has its own disk, all ranks pass over what is damaged on one.
    Each rank reads its share of the files, once."""
    for path in paths:
        saved, number = {}, 0
        try:
            saved = verify(path, mesh.rank, mesh.world_size)
            # of the manifest: two nodes may hold the same step of different runs
            number = int(digest((path / MANIFEST).read_bytes())[:15], 16)
        except CheckpointError as e:
            say(f"rank {mesh.rank}: passing over a checkpoint: {e}")
        ends = torch.tensor([number, -number], device=mesh.device)
        highest, minus_lowest = all_reduce(ends, mesh.world_group, dist.ReduceOp.MAX)
        if saved and highest == -minus_lowest:
            return path, saved
        if saved and mesh.rank == 0:
            say(f"passing over {path}: on another rank it is damaged, missing or of another run")
    return None, {}


# ---- writing -------------------------------------------------------------------------------------
class Checkpointer:
    """Writes checkpoints in a thread, one at a time. Every rank makes one and calls `save` at the
    same steps. As a context manager it ends with `wait`."""

    deadline_s = 600.0  # for all ranks' parts to be on disk

    def __init__(
        self, root: Path, rank: int, world_size: int, keep: int, start: int = 0, then=None
    ):
        """keep: how many of the last checkpoints; start: the step that the run begins at; then:
        called on rank 0 with the directory and the step of each that is whole."""
        self.then = then
        self.root, self.rank, self.world_size, self.keep = root, rank, world_size, keep
        self.newest_step, self.error, self._told = start, None, ""
        self._thread: threading.Thread | None = None
        # A killed run, of more ranks perhaps, may have left a part; it must not get into a
        # checkpoint of this one. Every save comes after an update, and so after this on all ranks.
        if int(os.environ.get("LOCAL_RANK", rank)) == 0:
            for path in root.glob("step-*.tmp"):
                shutil.rmtree(path)
        # Later steps were passed over, or the run was told to go back: the next start must not take
        # them, nor may they push this run's own out. Ranks that share a disk do this at once.
        for path in (p for p in whole(root) if step_of(p) > start):
            names = (path.with_suffix(f".passed{i}") for i in itertools.count(1))
            with contextlib.suppress(FileNotFoundError):
                path.rename(next(p for p in names if not p.exists()))

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:  # the error that ends the run counts, and what is begun ends
            self._thread.join()

    def save(self, step: int, model, optimizer, run: dict | None) -> None:
        """run: rank 0's part of the manifest, the ledger among it. Returns once the state is
        copied, and the checkpoint before this one is on disk."""
        self.wait()
        tensors, extra = state_tensors(model, optimizer)
        self.newest_step = step
        self._thread = threading.Thread(
            target=self._run, args=(step, tensors, extra, run), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Until what was saved is on disk. Raises: CheckpointError when it could not be."""
        if self._thread is not None:
            self._thread.join()
        if self.error is not None:
            raise CheckpointError(
                f"rank {self.rank}: no checkpoint in {self.root}: {self.error}"
            ) from self.error

    # ---- the checkpoint's thread: the ranks meet in the store, collectives are the main thread's
    def _run(self, step: int, *state) -> None:
        try:
            self._write(step, *state)
        except Exception as e:  # any: it must reach the training thread, not die with this one
            self.error = e
            with contextlib.suppress(RuntimeError):  # the store's; the others need not wait in vain
                store = dist.distributed_c10d._get_default_store()
                said = json.dumps({"error": str(e)})
                store.set(f"checkpoint/{step}/{self.rank or 'whole'}", said)

    def _write(self, step: int, tensors, extra: dict, run: dict | None) -> None:
        store = dist.distributed_c10d._get_default_store()
        tmp, final = self.root / f"step-{step:06d}.tmp", self.root / f"step-{step:06d}"
        part = self._write_part(tmp, tensors, extra)
        wait = Wait("checkpoint", self.deadline_s, who=f"trainer rank {self.rank}")
        parts = gather_json(store, f"checkpoint/{step}", self.rank, self.world_size, part, wait)
        word = f"checkpoint/{step}/whole"  # rank 0's: the manifest
        if self.rank == 0:
            files = {name: entry for part in parts for name, entry in part.items()}
            manifest = {"step": step, "world_size": self.world_size, "files": files, **run}
            self._commit(tmp, final, manifest)
            if self.then is not None:
                self.then(final, step)
            store.set(word, json.dumps(manifest))
            if self._told:  # the word before: read by all, or their parts would not be here
                store.delete_key(self._told)
            self._told = word
            return
        await_keys(store, [word], wait)
        manifest = json.loads(store.get(word))
        if "error" in manifest:
            raise CheckpointError(f"rank 0: {manifest['error']}")
        # Where this node has its own disk, it keeps its own parts.
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 and tmp.exists():
            self._commit(tmp, final, manifest)

    def _write_part(self, tmp: Path, tensors, extra: dict) -> dict:
        """This rank's file. Returns its entry in the manifest."""
        tmp.mkdir(parents=True, exist_ok=True)
        file, hasher = tmp / f"state-{self.rank:05d}.safetensors", blake3()
        for name, tensor in tensors:
            if not tensor.isfinite().all():
                raise CheckpointError(f"{name} is not finite throughout")
        write_safetensors(file, tensors, hasher=hasher)
        return {file.name: {"bytes": file.stat().st_size, "blake3": hasher.hexdigest(), **extra}}

    def _commit(self, tmp: Path, final: Path, manifest: dict) -> None:
        """What has the manifest and its name is a checkpoint."""
        (tmp / MANIFEST).write_text(json.dumps(manifest, indent=1))
        fsync(tmp / MANIFEST)
        shutil.rmtree(final, ignore_errors=True)  # of a run that went back and came here again
        tmp.rename(final)
        fsync(self.root)
        self._prune(manifest)

    def _prune(self, newest: dict) -> None:
        """Keep the last ones, the best by the newest manifest's scores, and those whose score is
        still awaited. Every node's disk does as rank 0's."""
        found = {step_of(p): p for p in whole(self.root)}
        scores = {str(step): score for step, score in newest["scores"].items()}
        keep = {*list(found)[: self.keep], *newest["unscored"], best_step(scores, found)}
        for step in found.keys() - keep:
            shutil.rmtree(found[step])


def best_step(scores: dict, among) -> int | None:
    """The step with the best score, the latest of equals. scores: by the step as text."""
    scored = [step for step in among if str(step) in scores]
    return max(scored, key=lambda step: (scores[str(step)], step), default=None)
