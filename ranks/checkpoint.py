"""Checkpoints: all that a run needs to go on as if nothing had happened.

    runs/NAME/checkpoints/step-000040/
        state-00000.safetensors  rank 0's share of weights and AdamW's moments; each rank has a file
        checkpoint.json          step, ledger, size and digest of each file; written last

It is written as `step-N.tmp` and renamed, so a directory without `.tmp` is whole, and `verify`
proves it. The tensors are copied to host memory between two steps; the rest happens in a thread
while training goes on. What is in flight at the rollout nodes is not saved: the ledger's frontier
is, and the rest is generated again.

Nodes need not share a disk: each then keeps its own ranks' files and the manifest, so that a run
goes on where the same nodes come in the same order, and stops with the name of the file that is
missing where they do not.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import math
import os
import secrets
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load, save

from bridge.processes import REPO, program_files
from bridge.reward_process import relative, reward_sources
from bridge.waits import Wait, await_keys
from bridge.weights import digest, fsync, write_safetensors
from ranks.parallel import Mesh, all_reduce, broadcast_bytes

MANIFEST = "checkpoint.json"


class CheckpointError(RuntimeError):
    """A checkpoint that is incomplete, damaged, or of another run. The message names the file."""


# ---- what is saved -------------------------------------------------------------------------------
KINDS = ("weight", "exp_avg", "exp_avg_sq")  # master weights and AdamW's moments


def _parts_in(model, name: str, low: int, high: int):
    """A flat range of a parameter as (HF name, split, flat range in that tensor's part, range in
    the range)."""
    start = 0
    for hf_name, view, split in model.hf_parts(name):
        first, last = max(low, start), min(high, start + view.numel())
        if first < last:
            yield hf_name, split, (first - start, last - start), (first - low, last - low)
        start += view.numel()


@torch.no_grad()
def state_tensors(model, optimizer) -> tuple[list[tuple[str, torch.Tensor]], dict]:
    """Copies of this rank's share of the training state, and what of it is not a tensor (JSON): its
    ZeRO shards and the frozen parameters. In pieces named `KIND/HF NAME/DIM.INDEX.COUNT/FIRST
    ELEMENT`: which part of the whole tensor (parallel.Split) the flat piece lies in, and where. All
    ranks' pieces together are the model, whatever the layout, so any other layout can read them."""
    found, updates = [], 0
    for bucket in optimizer.buckets:
        state = optimizer.state[bucket.master]
        updates = int(state["step"]) if "step" in state else 0
        moments = {
            kind: state[kind] if state else torch.zeros_like(bucket.master) for kind in KINDS[1:]
        }
        flats = {"weight": bucket.master.detach(), **moments}
        for name, (low, high), (shard_low, _) in bucket.pieces():
            for hf_name, split, (first, _), (a, b) in _parts_in(model, name, low, high):
                key = f"{hf_name}/{split.dim}.{split.index}.{split.count}/{first}"
                for kind, flat in flats.items():
                    found.append(
                        (f"{kind}/{key}", flat[shard_low + a : shard_low + b].to("cpu", copy=True))
                    )
    for name, p in model.named_parameters():
        if not p.requires_grad:
            for hf_name, view, split in model.hf_parts(name):
                key = f"weight/{hf_name}/{split.dim}.{split.index}.{split.count}/0"
                found.append((key, view.flatten().to("cpu", copy=True)))
    return found, {"updates": updates}


class Pieces:
    """The pieces of the state that are here: of all ranks, or on a disk that is not shared, of this
    node's."""

    def __init__(self, path: Path, shapes: dict[str, torch.Size]):
        """Raises: CheckpointError for a tensor that is not the model's."""
        self.path, self.shapes, self.pieces = path, shapes, {}
        here = [
            path / name for name in sorted(read_manifest(path)["files"]) if (path / name).exists()
        ]
        self.files = {file.name: safe_open(file, framework="pt") for file in here}
        for file_name, file in self.files.items():
            for key in file.keys():
                kind, hf_name, split, start = key.split("/")
                size, (dim, index, count) = (
                    file.get_slice(key).get_shape()[0],
                    (int(n) for n in split.split(".")),
                )
                if hf_name not in shapes:
                    raise CheckpointError(
                        f"{path} has a {kind} of {hf_name}, which this model has no place for"
                    )
                if int(start) + size > shapes[hf_name].numel() // count:
                    raise CheckpointError(
                        f"{path}: {kind} of {hf_name} is larger than in this model"
                    )
                where = (dim, index, count, int(start), size, file_name, key)
                self.pieces.setdefault((kind, hf_name), []).append(where)

    def part(self, kind: str, hf_name: str, split, first: int, last: int) -> torch.Tensor:
        """A flat range of a rank's part of a tensor."""
        wanted = (split.dim, split.index, split.count)
        for *found, start, size, file_name, key in self.pieces.get((kind, hf_name), []):
            # saved under the same layout
            if tuple(found) == wanted and start <= first and last <= start + size:
                return self.files[file_name].get_slice(key)[first - start : last - start]
        whole = self.whole(kind, hf_name)
        return whole[split.of(whole.shape)].flatten()[first:last]

    def whole(self, kind: str, hf_name: str) -> torch.Tensor:
        """A whole tensor. Raises: CheckpointError when a piece is not here."""
        pieces = sorted(self.pieces.get((kind, hf_name), []))
        if not pieces:
            raise CheckpointError(f"{self.path} has no {kind} of {hf_name}")
        dim, _, count, *_ = pieces[0]
        shape = list(self.shapes[hf_name])
        shape[dim] //= count
        flats: list[list[torch.Tensor]] = [[] for _ in range(count)]
        for _, index, _, start, _, file_name, key in pieces:
            # else it is there already, or there is a gap, which is seen below
            if start == sum(map(len, flats[index])):
                flats[index].append(self.files[file_name].get_tensor(key))
        for index, flat in enumerate(flats):
            if (found := sum(map(len, flat))) != math.prod(shape):
                raise CheckpointError(
                    f"{self.path}: {kind} of {hf_name}, part {index + 1} of {count}, ends at "
                    "element "
                    f"{found} of {math.prod(shape)}: a rank's file is missing"
                )
        return torch.cat([torch.cat(flat).view(shape) for flat in flats], dim=dim)


@torch.no_grad()
def load_state_tensors(path: Path, model, optimizer, updates: int) -> None:
    """Weights and moments from the state files, of this layout or another, bit for bit. updates: of
    the optimizer so far, for AdamW's bias correction. Raises: CheckpointError naming the tensor
    that is not all there."""
    pieces = Pieces(path, model.checkpoint_shapes())
    for bucket in optimizer.buckets:
        moments = {kind: torch.zeros_like(bucket.master) for kind in KINDS[1:]}
        optimizer.state[bucket.master] = {"step": torch.tensor(float(updates)), **moments}
        flats = {"weight": bucket.master.detach(), **moments}
        for name, (low, high), (shard_low, _) in bucket.pieces():
            for hf_name, split, (first, last), (a, b) in _parts_in(model, name, low, high):
                for kind, flat in flats.items():
                    flat[shard_low + a : shard_low + b] = pieces.part(
                        kind, hf_name, split, first, last
                    )
        bucket.gather_values()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            for hf_name, view, split in model.hf_parts(name):
                view.copy_(pieces.part("weight", hf_name, split, 0, view.numel()).view_as(view))


# ---- reading -------------------------------------------------------------------------------------
def whole(root: Path) -> list[Path]:
    """The checkpoints in a directory, newest first. One with a suffix is still being written, or
    was passed over."""
    return sorted((p for p in root.glob("step-*") if not p.suffix), reverse=True)


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
    """The manifest of a checkpoint. Of its state files, rank r of n ranks checks those numbered r,
    r + n, r + 2n, ... Raises: CheckpointError when one is not what the manifest says."""
    manifest = read_manifest(path)
    try:
        for name in sorted(manifest["files"])[rank::world_size]:
            want, file = manifest["files"][name], path / name
            # Mapped, not read: at 30 B parameters the files of a node are more than its memory
            # should hold.
            if (
                file.stat().st_size != want["bytes"]
                or blake3().update_mmap(file).hexdigest() != want["blake3"]
            ):
                raise CheckpointError(f"{file} is damaged: size or digest differs from {MANIFEST}")
            with safe_open(file, framework="pt") as f:
                for key in f.keys():
                    if not f.get_tensor(key).isfinite().all():
                        raise CheckpointError(f"{file}: {key} is not finite throughout")
    except (OSError, KeyError) as e:
        raise CheckpointError(f"{path} is incomplete: {e!r}") from None
    return manifest


def checkpoints_to_try(cfg, origin: dict) -> list[Path]:
    """What the run may go on from, best first, by the manifests alone. A job that torchrun has
    started again goes on by itself. origin: digests of what the run is made from, by flag. Raises:
    CheckpointError for a checkpoint of another run."""
    auto = cfg.resume == "auto" or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    found = whole(cfg.run_dir / "checkpoints") if auto else []
    if cfg.resume not in ("auto", "off"):
        found.append(Path(cfg.resume).resolve())  # may be a link or lie in what is moved aside
        if not (found[-1] / MANIFEST).exists():
            raise CheckpointError(f"--resume {cfg.resume}: {NO_MANIFEST}")
    for path in found:
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            continue  # `choose` says so and passes it over
        saved, made_from = manifest["config"], manifest.get("origin", {})
        # of an older program: it holds no digests
        by_name = () if made_from else ("task", "data", "data_split")
        for name in ("seed", "num_prompts_per_step", *by_name):
            if saved.get(name) != getattr(cfg, name):
                raise CheckpointError(
                    f"{path} was made with {name} = {saved.get(name)!r}, this run has "
                    f"{getattr(cfg, name)!r}: the sequence of prompts would be another"
                )
        if made_from and made_from["data"] != origin["data"]:
            raise CheckpointError(
                f"{path} was made with other rows than {cfg.data or cfg.task!r} has now, or in "
                "another order: the sequence of prompts would be another"
            )
        if made_from and made_from["model"] != origin["model"] and (cfg.model or saved["model"]):
            raise CheckpointError(
                f"{path} was made from another model than --model {cfg.model!r} (it was "
                f"{saved['model']!r}): config.json or weights differ"
            )
    return found


def differences(cfg, origin: dict, saved: dict) -> list[str]:
    """What a run goes on with that is not what its checkpoint was made with, a line each."""
    was, now, found, made_from = (
        saved["config"],
        dataclasses.asdict(cfg),
        [],
        saved.get("origin", origin),
    )
    for name in (name for name in now if name in was and name not in ("name", "resume")):
        flag = f"--{'no-' if now[name] is False else ''}{name.replace('_', '-')}"
        if was[name] != now[name]:
            change = "" if isinstance(now[name], bool) else f" {now[name]!r}, was {was[name]!r}"
            found.append(f"{flag}{change}")
        elif origin.get(name) != made_from.get(name):
            found.append(f"{flag} {now[name]!r}, which has another content now")
    if origin["tokenizer"] != made_from["tokenizer"]:
        found.append("another tokenizer or chat template than before")
    if "origin" not in saved:
        found.append(
            "a checkpoint of an older program: whether data and model are still the same cannot "
            "be checked"
        )
    return [f"resumes with {what}" for what in found]


# What a score depends on, beside the weights: those of before and after a change of it are not
# compared.
SCORED_BY = (
    "reward",
    "val_data",
    "val_data_split",
    "val_temperature",
    "overlong_buffer_tokens",
    "overlong_penalty",
)


def scores_as_before(cfg, origin: dict, saved: dict) -> bool:
    was, made_from = saved["config"], saved.get("origin", origin)
    return all(
        was.get(name) == getattr(cfg, name) and made_from.get(name) == origin.get(name)
        for name in SCORED_BY
    )


def choose(paths: list[Path], mesh: Mesh, say: Callable[[str], None]) -> tuple[Path | None, dict]:
    """The first of these checkpoints that is whole on every rank, and its manifest: where nodes
    have disks of their own, what is damaged on one is passed over by all. Each rank reads its part,
    once."""
    for path in paths:
        try:
            saved, mine = (
                verify(path, mesh.rank, mesh.world_size),
                digest((path / MANIFEST).read_bytes()),
            )
        except CheckpointError as e:
            saved, mine = {}, "0"
            say(f"rank {mesh.rank}: passing over a checkpoint: {e}")
        # of the manifest: two nodes may hold the same step of different runs
        number = int(mine[:15], 16)
        ends = all_reduce(
            torch.tensor([number, -number], device=mesh.device), mesh.world_group, dist.ReduceOp.MAX
        )
        if saved and ends[0] == -ends[1]:
            return path, saved
        if saved and mesh.rank == 0:
            say(f"passing over {path}: on another rank it is damaged, missing or of another run")
    return None, {}


def share_model(path: Path, handed_out: bool, model_digest: Callable[[Path], str]) -> None:
    """All ranks start from the weights that rank 0 has: the tiny ones are handed out to nodes that
    do not share its disk, `--model` has to be there. Raises: SystemExit, naming rank and host,
    where they are others."""
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    if rank == 0:
        store.set("model", model_digest(path))
        if handed_out:
            blobs = {
                p.name: torch.frombuffer(bytearray(p.read_bytes()), dtype=torch.uint8)
                for p in path.iterdir()
            }
            store.set("model files", save(blobs))
    wanted = store.get("model").decode()
    if handed_out and int(os.environ.get("LOCAL_RANK", 0)) == 0 and model_digest(path) != wanted:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        for name, blob in load(store.get("model files")).items():
            (path / name).write_bytes(blob.numpy().tobytes())
    dist.barrier()
    if model_digest(path) != wanted:
        here = f"rank {rank} on {socket.gethostname()}: {path}"
        raise SystemExit(
            f"train_cispo.py: error: {here} is not what rank 0 has under that name; compare "
            "config.json "
            "and the weight files"
        )


_held = {}  # this process's lock files by run directory, open until it ends


def hold(run_dir: Path) -> None:
    """Take a run's directory for as long as this process lives: the kernel lets go of it, however
    the process ends. The lock lies beside the directory, which may be moved aside. Raises:
    CheckpointError when another process has it, or when it is no run's, and so must not be
    moved."""
    if (run_dir := run_dir.resolve()) in _held:
        return
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    lock = open(run_dir.with_name(f".{run_dir.name}.lock"), "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise CheckpointError(
            f"--name {run_dir.name}: {run_dir} is in use by {lock.read()}; wait for its end, or "
            "take "
            "another --name"
        ) from None
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    _held[run_dir] = lock
    if (
        run_dir.exists()
        and not (run_dir / "code").is_dir()
        and not (run_dir.is_dir() and not any(run_dir.iterdir()))
    ):
        raise CheckpointError(
            f"--name {run_dir.name}: {run_dir} is there and is no run's directory; take another "
            "name"
        )


def keep_config(run_dir: Path, step: int, text: str) -> None:
    """config.json is of the newest steps; what those up to a step were made with goes to
    config-STEP.json."""
    newest, until = run_dir / "config.json", run_dir / f"config-{step:06d}.json"
    later = [path for path in sorted(run_dir.glob("config-*.json")) if path.name >= until.name]
    made_with = (later or [newest])[0]
    same = lambda text: {**json.loads(text), "resume": ""}
    if made_with.exists() and same(made_with.read_text()) != same(text):
        made_with.replace(until)
    for path in later:  # of steps that will be made again
        if path != until:
            path.unlink(missing_ok=True)


def begin_run_dir(
    cfg, found: Path | None, saved: dict, say: Callable[[str], None], rescore: bool = False
) -> Path | None:
    """The run's directory; nobody's results are overwritten. Returns where `found`, to go on from,
    is now. rescore: the checkpoint's own validation is made again, too."""
    if found is not None and found.resolve().parent.parent == cfg.run_dir.resolve():
        # Steps and validations after the checkpoint will be made again.
        for name, made in [
            ("metrics", lambda r: r["step"] < saved["step"]),
            ("samples", lambda r: r["step"] < saved["step"]),
            ("validation", lambda r: r["version"] <= saved["step"] - rescore),
        ]:
            path = cfg.run_dir / f"{name}.jsonl"
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            replaced = path.with_suffix(".tmp")
            replaced.write_text(
                "".join(line for line in lines if line.endswith("\n") and made(json.loads(line)))
            )
            replaced.replace(path)
        keep_config(cfg.run_dir, saved["step"], cfg.text)
    elif cfg.run_dir.exists():
        was = cfg.run_dir.resolve()
        aside = next(
            p for i in itertools.count(1) if not (p := Path(f"{cfg.run_dir}.{i}")).exists()
        )
        cfg.run_dir.rename(aside)
        say(f"{cfg.run_dir} exists: moved to {aside}")
        if found is not None and not found.exists():  # it was in there
            found = aside / found.relative_to(was)
    (cfg.run_dir / "code").mkdir(parents=True, exist_ok=True)
    (cfg.run_dir / "config.json").write_text(cfg.text)
    code = cfg.run_dir / "code"
    for file in program_files():  # a forked loss is no flag: `diff -r` shows it
        (code / file.relative_to(REPO)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, code / file.relative_to(REPO))
    sources = {
        code / "reward" / name: source
        for name, source in relative(reward_sources(cfg.reward)).items()
    }
    if saved and any(
        path.exists() and path.read_bytes() != source for path, source in sources.items()
    ):
        shutil.rmtree(before := code / f"reward-before-step-{saved['step']}", ignore_errors=True)
        (code / "reward").rename(before)  # what the steps so far were rewarded by
    for path, source in sources.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source)
    return found


def begin(
    cfg, paths: list[Path], mesh: Mesh, say: Callable[[str], None], origin: dict | None = None
) -> tuple[Path | None, dict]:
    """The run's directory, and the checkpoint that it goes on from with its manifest, on every
    rank. `paths` and `origin` are rank 0's; the latter learns from which version on scores may be
    compared. Raises: SystemExit when a checkpoint was asked for by name and is not whole."""
    tell = lambda what: json.loads(
        broadcast_bytes(json.dumps(what).encode() if mesh.rank == 0 else None, mesh)
    )
    found, saved = choose([Path(path) for path in tell([str(path) for path in paths])], mesh, say)
    if found is None and cfg.resume not in ("auto", "off"):
        raise SystemExit(f"train_cispo.py: error: --resume {cfg.resume}: not whole on every rank")
    mark, word, rescore = cfg.run_dir / ".begun", secrets.token_hex(8), False
    if mesh.rank == 0:
        if found is not None:
            for line in differences(cfg, origin, saved):
                say(line)
            origin["scored_since"] = saved.get("origin", {}).get("scored_since", 0)
            if rescore := not scores_as_before(cfg, origin, saved):
                origin["scored_since"], saved["scores"] = saved["step"], {}
                say(
                    f"scores of checkpoints before step {saved['step']} are of another reward or "
                    "validation: the best "
                    "one is looked for from here on"
                )
        elif cfg.resume == "auto":
            say(
                f"--resume auto: no whole checkpoint in {cfg.run_dir / 'checkpoints'}, so the run "
                "starts anew"
            )
        found = begin_run_dir(cfg, found, saved, say, rescore)
        mark.write_text(word)
    found, word, rescore = tell([str(found or ""), word, rescore])
    found = Path(found) if found else None
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not (
        mark.exists() and mark.read_text() == word
    ):
        hold(cfg.run_dir)  # a disk of this node's own: what an earlier run left there goes aside
        begin_run_dir(cfg, found, saved, say, rescore)
    return found, saved


# ---- writing -------------------------------------------------------------------------------------
class Checkpointer:
    """Writes checkpoints in a thread, one at a time. Every rank makes one and calls `save` at the
    same steps."""

    deadline_s = 600.0  # for all ranks' parts to be on disk

    def __init__(self, root: Path, rank: int, world_size: int, keep: int, start: int = 0):
        self.root, self.rank, self.world_size, self.keep = root, rank, world_size, keep
        self.newest_step, self.error, self._told = start, None, ""
        self._thread: threading.Thread | None = None
        # Those of later steps were passed over, or the run was told to go back: it must not go on
        # from them next time, nor prune its own for their sake. Ranks that share a disk do this at
        # once. What a killed run, of more ranks perhaps, had begun to write must not end up among
        # what this one writes. Every save comes after an update, and so after this on all ranks.
        for path in root.glob("step-*.tmp") if int(os.environ.get("LOCAL_RANK", rank)) == 0 else ():
            shutil.rmtree(path)
        for path in (p for p in whole(root) if int(p.name.removeprefix("step-")) > start):
            with contextlib.suppress(FileNotFoundError):
                path.rename(
                    next(
                        p
                        for i in itertools.count(1)
                        if not (p := path.with_suffix(f".passed{i}")).exists()
                    )
                )

    def save(self, step: int, model, optimizer, run: dict | None) -> None:
        """run: rank 0's ledger and the like. Returns once the state is copied, and the one before
        is on disk."""
        self.wait()
        tensors, extra = state_tensors(model, optimizer)
        self.newest_step = step
        self._thread = threading.Thread(
            target=self._write, args=(step, tensors, extra, run), name="checkpoint"
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

    def _write(self, step: int, tensors, extra: dict, run: dict | None) -> None:
        try:
            tmp, final = self.root / f"step-{step:06d}.tmp", self.root / f"step-{step:06d}"
            tmp.mkdir(parents=True, exist_ok=True)
            file = tmp / f"state-{self.rank:05d}.safetensors"
            if broken := next(
                (name for name, tensor in tensors if not tensor.isfinite().all()), None
            ):
                raise CheckpointError(f"{broken} is not finite throughout")
            write_safetensors(file, tensors, hasher=(hasher := blake3()))
            part = {
                file.name: {"bytes": file.stat().st_size, "blake3": hasher.hexdigest(), **extra}
            }
            manifest = self._gather(step, part, run, lambda text: self._finish(tmp, final, text))
            # Where rank 0's disk is not ours, this node keeps its own parts.
            if self.rank != 0 and int(os.environ.get("LOCAL_RANK", 0)) == 0 and tmp.exists():
                self._finish(tmp, final, manifest)
        except Exception as e:  # any: it must reach the training thread, not die with this one
            self.error = e
            with contextlib.suppress(RuntimeError):  # the store's; the others need not wait in vain
                store = dist.distributed_c10d._get_default_store()
                store.set(
                    f"checkpoint/{step}/{self.rank or 'whole'}", json.dumps({"error": str(e)})
                )

    def _gather(
        self, step: int, part: dict, run: dict | None, finish: Callable[[str], None]
    ) -> str:
        """Every rank's part to rank 0, and the manifest back. In the store, since collectives are
        the main thread's."""
        store = dist.distributed_c10d._get_default_store()
        parts = [f"checkpoint/{step}/{rank}" for rank in range(self.world_size)]
        store.set(parts[self.rank], json.dumps(part))
        wait = Wait("checkpoint", self.deadline_s, who=f"trainer rank {self.rank}")
        wanted = parts if self.rank == 0 else [f"checkpoint/{step}/whole"]
        await_keys(store, wanted, wait)
        found = [json.loads(store.get(key)) for key in wanted]
        for rank, said in enumerate(found):
            if "error" in said:
                raise CheckpointError(f"rank {rank}: {said['error']}")
        if self.rank != 0:
            return json.dumps(found[0], indent=1)
        files = {name: entry for part in found for name, entry in part.items()}
        text = json.dumps(
            {"step": step, "world_size": self.world_size, "files": files, **run}, indent=1
        )
        finish(text)
        store.set(f"checkpoint/{step}/whole", text)
        # The one before was read by all, or their parts of this one would not be here.
        for key in [*parts, *([self._told] if self._told else [])]:
            store.delete_key(key)
        self._told = f"checkpoint/{step}/whole"
        return text

    def _finish(self, tmp: Path, final: Path, manifest: str) -> None:
        (tmp / MANIFEST).write_text(manifest)
        fsync(tmp / MANIFEST)
        shutil.rmtree(final, ignore_errors=True)  # of a run that went back and came here again
        tmp.rename(final)
        fsync(self.root)
        self._prune(json.loads(manifest))

    def _prune(self, newest: dict) -> None:
        """Keep the last ones, the one with the best score by the newest manifest, and those whose
        score is still awaited. Every node's disk does as rank 0's."""
        found = {int(p.name.removeprefix("step-")): p for p in whole(self.root)}
        keep = {*list(found)[: self.keep], *newest["unscored"], best_step(newest["scores"], found)}
        for step in found.keys() - keep:
            shutil.rmtree(found[step])


def best_step(scores: dict, among) -> int | None:
    """The step with the best score, the latest of equals."""
    return max(
        (step for step in among if str(step) in scores),
        key=lambda s: (scores[str(s)], s),
        default=None,
    )
