"""Weights on their way: from a Hugging Face checkpoint into the trainer, and out again to the rollout nodes, whose end
is receive.py.

Every rank owns a share of the checkpoint's tensors (`own_hf`), copies it to host memory between two steps, and encodes,
writes and serves it in the background. A version is a directory `v{N}` on the disk of each trainer node:

    model-00001-of-00004.delta          rank 0's share as what changed since version N-1 (delta.py); of each rank one
    model-00001-of-00004.safetensors    the same share whole: every K-th version, the first of a run and the last, and
                                        where the delta would be larger
    model.safetensors.index.json, config.json, tokenizer.json, ...      where all shares are whole: v{N} opens in
                                        transformers and vLLM as it is
    manifest.json                       on rank 0's node, written last: without it there is no version

The manifest says what every tensor of the version must be (digests taken from the trainer's memory, so a match on the
far side covers codec, disks and wire), and which files of this and earlier versions lead there, of what size and where:

    {"run": id, "version": 12, "base": 11, "full": false,
     "static": {"version": 0, "files": {name: {"bytes", "blake3"}}},
     "shards": [{"name": "model-00001-of-00004", "tensors": {name: {"dtype", "shape", "blake3"}},
                 "files": [{"version": 12, "kind": "delta", "bytes", "blake3", "url"}, ...]}]}
"""

import asyncio
import hmac
import json
import os
import queue
import re
import shutil
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from aiohttp import web
from blake3 import blake3
from safetensors import SafetensorError, safe_open

import delta
from waits import Wait, WaitOver, await_keys

MANIFEST, INDEX = "manifest.json", "model.safetensors.index.json"
# What makes a checkpoint directory complete besides its weights; copied to every version that is whole.
STATIC_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
                "merges.txt", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json")  # fmt: skip
SUFFIX = {"full": ".safetensors", "delta": ".delta"}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I32": torch.int32, "I64": torch.int64,
          "U8": torch.uint8}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class WeightsError(RuntimeError):
    """Weights that are incomplete, damaged or not the ones expected. The message names the file or tensor."""


def cores() -> int:
    """The cores that this process may use: by its affinity, and by its cgroup's quota, as a container has one."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):  # none, or "max"
        return allowed


# ---- safetensors ---------------------------------------------------------------------------------------------
def tensor_bytes(tensor: torch.Tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def digest(data) -> str:
    return blake3(data).hexdigest()


def describe(tensor: torch.Tensor) -> dict:
    """A tensor's entry in the manifest."""
    return {"dtype": _NAMES.get(tensor.dtype), "shape": list(tensor.shape), "blake3": digest(tensor_bytes(tensor))}


def safetensors_header(tensors: dict[str, tuple[str, list[int], int]], metadata: dict[str, str]) -> bytes:
    """What a safetensors file starts with, for tensors of (dtype, shape, bytes) that lie end to end."""
    header, offset = {"__metadata__": {"format": "pt", **metadata}}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return struct.pack("<Q", len(text)) + text


def write_safetensors(path: Path, tensors: list[tuple[str, torch.Tensor]], metadata: dict | None = None,
                      hasher: blake3 | None = None) -> None:  # fmt: skip
    """Write CPU tensors: header, then buffers, then fsync; what is written the safetensors library reads. The room is
    taken first, so a full disk shows before anything is written, and ext4 needs less time per byte.

    hasher: is given what the file is given, and takes as long again.
    """
    entries = {n: (_NAMES[t.dtype], list(t.shape), t.numel() * t.element_size()) for n, t in tensors}
    header = safetensors_header(entries, metadata or {})
    with open(path, "wb") as f:
        os.posix_fallocate(f.fileno(), 0, len(header) + sum(size for _, _, size in entries.values()))
        started = 0
        for data in (header, *(tensor_bytes(t) for _, t in tensors)):
            f.write(data)
            if hasher is not None:
                hasher.update(data)
            if f.tell() - started >= 32 << 20:
                # "Not needed" makes the disk start on these while the next are copied, and not at the fsync.
                os.posix_fadvise(f.fileno(), started, f.tell() - started, os.POSIX_FADV_DONTNEED)
                started = f.tell()
        f.flush()
        os.fsync(f.fileno())


def layer_order(name: str) -> tuple:
    """Sorts tensors as a model uses them: embedding, the layers by number, then norm and head."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return (1, int(layer[1]), name) if layer else (0 if "embed" in name else 2, 0, name)


def checkpoint_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory: those its index names, else model.safetensors.
    Raises: WeightsError for an index that cannot be read."""
    if not (index := path / INDEX).exists():
        return [path / "model.safetensors"]
    try:
        return [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise WeightsError(f"{index}: no index of safetensors files: {e!r}") from None


class Expert:
    """One expert's projection in a tensor that holds a layer's experts; to be read like a safetensors slice."""

    def __init__(self, fused, expert: int, rows: slice):
        self.fused, self.expert, self.rows, self.get_dtype = fused, expert, rows, fused.get_dtype

    def get_shape(self) -> list[int]:
        return [self.rows.stop - self.rows.start, *self.fused.get_shape()[2:]]

    def __getitem__(self, index) -> torch.Tensor:
        return self.fused[self.expert, self.rows][index]


def stored_tensors(path: Path, shapes: dict[str, torch.Size]) -> dict:
    """What a checkpoint directory has for each tensor of a model (`checkpoint_shapes`), in layer order, as safetensors
    slices: only headers have been read. It may hold what a model has no parameter for: rotary tables, and beside tied
    embeddings the head, if it is the same, or the head alone. A layer's experts may lie in one tensor, as transformers
    has them in memory: gate and up (E, 2F, D), down (E, D, F).

    Raises: WeightsError when a tensor is missing, left over, quantized or of another shape; the message names it.
    """
    found, head, embedding = {}, "lm_head.weight", "model.embed_tokens.weight"
    for file in checkpoint_files(path):
        if not file.exists():
            raise WeightsError(f"{file}: no such file; weights are read from it or from the files that {INDEX} names")
        try:
            f = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as e:
            raise WeightsError(f"{file}: not a safetensors file: {e}") from None
        for name in f.keys():
            if name in found:
                raise WeightsError(f"{path}: tensor {name} is in two files")
            found[name] = f.get_slice(name)
    for name in list(found):
        if name.endswith((".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")):
            del found[name]  # computed here, as everywhere
        elif name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            fused, (prefix, projection) = found.pop(name), name.rsplit(".", 1)
            experts, rows, _ = fused.get_shape()
            parts = {"down_proj": slice(0, rows)}
            if projection == "gate_up_proj":
                parts = {"gate_proj": slice(0, rows // 2), "up_proj": slice(rows // 2, rows)}
            for part, where in parts.items():
                found |= {f"{prefix}.{e}.{part}.weight": Expert(fused, e, where) for e in range(experts)}
    if head in found and head not in shapes:  # tied: the head is the embedding
        stored = found.pop(head)
        whole = found.setdefault(embedding, stored)
        if stored.get_shape() != whole.get_shape() or any(
            not torch.equal(stored[at : at + 4096].float(), whole[at : at + 4096].float())
            for at in range(0, stored.get_shape()[0], 4096)
        ):
            raise WeightsError(f"{path}: {head} differs from {embedding}, and config.json says tie_word_embeddings: "
                               "true; if the head is one of its own, it must say false")  # fmt: skip
    for name, stored in found.items():
        shape, wanted = tuple(stored.get_shape()), shapes.get(name)
        if wanted is None:
            raise WeightsError(f"{path}: tensor {name} has no place in this model")
        if shape != tuple(wanted):
            raise WeightsError(f"{path}: {name} is {shape}, config.json makes it {tuple(wanted)}")
        if stored.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise WeightsError(f"{path}: {name} is {stored.get_dtype()}: quantized weights cannot be trained")
    if missing := shapes.keys() - found.keys():
        raise WeightsError(f"{path}: {len(missing)} tensors are missing, {min(missing, key=layer_order)} among them")
    return {name: found[name] for name in sorted(found, key=layer_order)}


def read_tensors(path: Path) -> Iterable[tuple[str, torch.Tensor]]:
    """(name, tensor) of a whole checkpoint directory, one mapped tensor at a time, layer by layer: vLLM converts a
    layer when all of it has come, and holds back what has come of the others."""
    files = [safe_open(file, framework="pt") for file in checkpoint_files(path)]
    where = {name: file for file in files for name in file.keys()}
    for name in sorted(where, key=layer_order):
        yield name, where[name].get_tensor(name)


@torch.no_grad()
def load_hf(model, path: str | Path) -> int:
    """Copy a Hugging Face checkpoint into the model: of each tensor, the bytes of this rank's slice and no others.
    Returns how many those were.

    Raises: WeightsError for what `stored_tensors` refuses, and for values that are not finite.
    """
    path, bytes_read = Path(path), 0
    stored = stored_tensors(path, model.checkpoint_shapes())
    mine = {hf: (view, split) for name, _ in model.named_parameters() for hf, view, split in model.hf_parts(name)}
    for name in (name for name in stored if name in mine):
        view, split = mine[name]
        part = stored[name][split.of(stored[name].get_shape())]
        bytes_read += part.nbytes
        if not view.copy_(part).isfinite().all():
            raise WeightsError(f"{path}: {name} is not finite throughout")
    return bytes_read


@torch.no_grad()
def own_hf(model, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor on the device) of this rank's share of the checkpoint, one at a time. Every tensor is
    one rank's, so that all ranks and nodes take part in copying, writing and serving. All ranks must exhaust it.

    An expert is never gathered: of the ranks that have it, the replicas take turns by layer. Dense tensors go around
    all ranks; each is gathered over its owner's tp group, and the others do nothing for it.
    """
    mesh, dense = model.mesh, 0
    for name, p in model.named_parameters():
        split = model.split_of(name)
        if ".experts." in name:
            replicas, (_, layer, _) = mesh.world_size // mesh.ep, layer_order(name)
            if layer % replicas == mesh.rank // mesh.ep:
                views = model.hf_views(name, p.detach(), first_expert=split.index * len(p))
                yield from ((hf_name, view.to(dtype)) for hf_name, view in views)
            continue
        owner, dense = dense % mesh.world_size, dense + 1
        if owner // mesh.tp != mesh.dp_rank:
            continue
        whole = p.detach().to(dtype)
        if split.count > 1:
            parts = [torch.empty_like(whole) for _ in range(mesh.tp)] if mesh.rank == owner else None
            dist.gather(whole, parts, dst=owner, group=mesh.tp_group)
            whole = torch.cat(parts[:: mesh.tp // split.count], dim=split.dim) if parts else None
        if mesh.rank == owner:
            yield name, whole


# ---- files of a version ----------------------------------------------------------------------------------------
def fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def put_in_place(tmp: Path) -> None:
    """Give a file that is written and synced its name, `tmp` without ".tmp": what has its name is whole."""
    tmp.rename(tmp.with_suffix(""))
    fsync(tmp.parent)


def write_text(path: Path, text: str) -> None:
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text)
    fsync(tmp)
    put_in_place(tmp)


def write_share(directory: Path, shard: str, tensors: dict[str, torch.Tensor], codes: dict[str, bytes] | None,
                metadata: dict[str, str]) -> dict:  # fmt: skip
    """Write a rank's share of a version, as its codes or whole; the file's entry in the manifest."""
    kind = "full" if codes is None else "delta"
    tmp = directory / f"{shard}{SUFFIX[kind]}.tmp"
    directory.mkdir(parents=True, exist_ok=True)
    if codes is None:
        # The digest that counts is each tensor's, and the receiver knows what the header must be.
        hasher = None
        write_safetensors(tmp, list(tensors.items()))
    else:
        data = [(name, torch.frombuffer(bytearray(code), dtype=torch.uint8)) for name, code in codes.items() if code]
        write_safetensors(tmp, data, metadata, hasher := blake3())
    size = tmp.stat().st_size
    put_in_place(tmp)
    return {"version": int(metadata["version"]), "kind": kind, "bytes": size,
            "blake3": hasher.hexdigest() if hasher else ""}  # fmt: skip


def write_static(directory: Path, source: Path, shards: list[dict], card: str = "") -> dict:
    """Make a directory of whole shares a checkpoint that others can open: index, config, tokenizer. Returns their
    entries in the manifest; the index is not among them, since a receiver makes its own. card: its README.md."""
    texts: dict[str, str] = {}
    for name in STATIC_FILES:
        if (source / name).exists():
            text = (source / name).read_text()
            if name == "config.json":  # says what the files hold, for who opens it with dtype "auto"
                config = json.loads(text)
                config.pop("torch_dtype", None)
                dtype = next(iter(shards[0]["tensors"].values()))["dtype"]
                config["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
                text = json.dumps(config, indent=1)
            texts[name] = text
    texts["README.md"] = card
    if "generation_config.json" not in texts:
        eos = json.loads(texts["config.json"]).get("eos_token_id")
        texts["generation_config.json"] = json.dumps({"eos_token_id": eos, "do_sample": True}, indent=1)
    for name, text in texts.items():
        write_text(directory / name, text)
    write_index(directory, shards)
    kept = {name: text.encode() for name, text in texts.items() if name in STATIC_FILES}  # nobody needs to fetch a card
    return {name: {"bytes": len(text), "blake3": digest(text)} for name, text in kept.items()}


def model_card(run_dir: Path, step: int) -> str:
    """README.md of a checkpoint that a run made: what it comes from, how well it did, and all flags."""
    lines = lambda name: (run_dir / name).read_text().split("\n")[:-1] if (run_dir / name).exists() else []
    config = json.loads((run_dir / "config.json").read_text()) if (run_dir / "config.json").exists() else {}
    base = config.get("model") or f"a tiny Qwen3-MoE, warm-started on {config.get('task')!r}"
    rewards = [r["train/reward"] for r in map(json.loads, lines("metrics.jsonl")) if step - 10 <= r["step"] < step]
    said = [f"Mean reward of the {len(rewards)} steps before it: {sum(rewards) / len(rewards):.4f}."] if rewards else []
    for record in map(json.loads, lines("validation.jsonl")):
        if record["version"] == step:
            said += [f"{name}: {record[name]:.4f}." for name in record if "@" in name]
    front = f"---\nbase_model: {config['model']}\n---\n" if config.get("model") else ""
    return (
        f"{front}# {run_dir.name}, step {step}\n\nMade from {base} by train_cispo.py: {step} steps of reinforcement "
        f"learning. {' '.join(said)}\n\nThe run's flags:\n\n```json\n{json.dumps(config, indent=1)}\n```\n"
    )


def write_index(directory: Path, shards: list[dict]) -> None:
    where = {name: shard["name"] + SUFFIX["full"] for shard in shards for name in shard["tensors"]}
    write_text(directory / INDEX, json.dumps({"metadata": {}, "weight_map": where}))


def served_file(root: Path, version: str, name: str) -> Path | None:
    """The file of a version that a node may fetch under this name, if it is there. Whatever is being written has
    another name."""
    path = root / f"v{version}" / name
    known = name in STATIC_FILES or re.fullmatch(r"model-\d{5}-of-\d{5}\.(safetensors|delta)", name)
    return path if known and version.isdigit() and path.is_file() else None


def has_token(request: web.Request, token: str) -> bool:
    """Whether the request carries the run's bearer token; compared in a time that does not depend on it."""
    given = request.headers.get("Authorization", "").removeprefix("Bearer ")
    return hmac.compare_digest(given.encode(errors="surrogateescape"), token.encode())


def http_url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class FileServer:
    """What a trainer node other than rank 0's serves, in a thread: the files of its ranks' shares."""

    def __init__(self, root: Path, token: str, host: str, port: int):
        self.root, self.token, started = root, token, threading.Event()
        serve = lambda: asyncio.run(self._serve(host, port, started))
        threading.Thread(target=serve, name="file server", daemon=True).start()
        if not started.wait(30):
            raise WeightsError(f"no file server on {host}: its thread has failed")

    async def _serve(self, host: str, port: int, started: threading.Event) -> None:
        app = web.Application()
        app.router.add_get("/weights/{version}/{name}", self._file)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError:  # taken: any other will do, since the manifest names it
            await web.TCPSite(runner, host, 0).start()
        self.url = http_url(host, runner.addresses[0][1])
        started.set()
        await asyncio.Event().wait()  # for as long as the process lives

    async def _file(self, request: web.Request) -> web.StreamResponse:
        if not has_token(request, self.token):
            return web.json_response({"error": "missing or wrong bearer token"}, status=401)
        path = served_file(self.root, **request.match_info)
        return web.FileResponse(path) if path else web.json_response({"error": "no such file"}, status=404)


def own_address() -> str:
    """Where other hosts reach this one: the address of the connection to torchrun's store."""
    with socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=30) as s:
        return s.getsockname()[0]


# ---- publish -------------------------------------------------------------------------------------------------
class Publisher:
    """Publishes versions, a rank's share on each rank: `publish` copies it to host memory, a thread does the rest while
    training goes on. Every rank makes one, and all call `publish` for the same versions.

    There are two sets of host buffers, since the version before is what the next is compared with; `publish` waits
    until the set it needs is free, visibly in its seconds. The ranks' threads meet in the store and never in a
    collective. What fails in a thread reaches `hub.fail` on rank 0, so that the loop stops with its state saved.
    """

    def __init__(self, model, dtype: torch.dtype, root: Path, static: Path, full_every: int, keep: int,
                 store: dist.Store, deadline_s: float, hub=None, port: int = 0):  # fmt: skip
        """hub: rank 0's, None elsewhere; static: a checkpoint directory with config and tokenizer; store: for the
        ranks to meet in; port: of this node's file server, where it needs one."""
        mesh = model.mesh
        self.model, self.dtype, self.root, self.static, self.keep = model, dtype, root, static, keep
        self.rank, self.world_size, self.full_every = mesh.rank, mesh.world_size, full_every
        self.store, self.deadline_s, self.hub = dist.PrefixStore("weights", store), deadline_s, hub
        self.shard = f"model-{self.rank + 1:05d}-of-{self.world_size:05d}"
        self.node, first_here = os.environ.get("GROUP_RANK", "0"), int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        self.error: Exception | None = None
        self.stats: dict[str, float] = {}  # of the last version, for the metrics (rank 0)
        self.version, self.tensors, self.described = -1, {}, {}  # what the thread wrote last
        self.files: dict[str, list[dict]] = {}  # of each shard, those that are on disk (rank 0)
        self.whole, self.repairs, self.repaired = {}, 0, -1
        if first_here:
            self._clear()
        if self.rank == 0:
            self.store.set("run", json.dumps({"id": hub.run["id"], "token": hub.token}))
            self.store.set(f"url/{self.node}", "")  # the hub serves these
        await_keys(self.store, ["run"], Wait("version", deadline_s, who=f"trainer rank {self.rank}", whom="the hub"))
        run = json.loads(self.store.get("run"))
        self.run = run["id"]
        self.server = None
        if first_here and self.rank != 0:
            self.server = FileServer(root, run["token"], own_address(), port)
            self.store.set(f"url/{self.node}", self.server.url)
        # A neighbour's directory must have been cleared before this rank writes to it.
        await_keys(self.store, [f"url/{self.node}"], Wait("version", deadline_s, who=f"trainer rank {self.rank}"))
        self._views: list[dict[str, torch.Tensor]] = []
        self._free = threading.Semaphore(2)
        self._jobs: queue.Queue = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def _clear(self) -> None:
        """Remove what a run that was killed, or went back, left: versions that are not whole."""
        for left in self.root.glob("v*"):
            if not ((left / MANIFEST).exists() and (left / INDEX).exists()):
                shutil.rmtree(left, ignore_errors=True)
        self.root.mkdir(parents=True, exist_ok=True)

    # -- the training thread
    def publish(self, version: int, last: bool = False) -> None:
        """Copy this rank's share. All ranks must call: dense tensors are gathered."""
        wait = Wait("publish", self.deadline_s, who=f"trainer rank {self.rank}")
        if not self._free.acquire(timeout=self.deadline_s):
            self._fail(version, WaitOver(wait.message(f"v{version}")))
        if not self._views:
            self._allocate()
        views = self._views[version % 2]
        for name, tensor in own_hf(self.model, self.dtype):
            if self.error is None:  # else only the others' collectives are served
                views[name].copy_(tensor, non_blocking=True)
        if self.model.mesh.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # sync: the parameters may change now
        self._jobs.put((version, views, last or version % self.full_every == 0))

    def _allocate(self) -> None:
        """Two sets of host buffers, each in one piece: pinned on CUDA, so that copies run at the bus's speed. They are
        registered after the fact, since torch's pinned allocator rounds up to a power of two."""
        shapes = [(name, tensor.shape) for name, tensor in own_hf(self.model, self.dtype)]
        for _ in range(2):
            flat = torch.empty(sum(shape.numel() for _, shape in shapes), dtype=self.dtype)
            if self.model.mesh.device.type == "cuda" and flat.numel():
                if (error := int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, 1))) != 0:
                    raise WeightsError(f"{flat.nbytes / 2**30:.1f} GiB of host memory cannot be pinned: CUDA {error}")
            parts = flat.split([shape.numel() for _, shape in shapes])
            self._views.append({name: part.view(shape) for (name, shape), part in zip(shapes, parts)})

    def close(self) -> None:
        """Until all is on disk, or has failed."""
        self._jobs.put(None)
        wait = Wait("publish", self.deadline_s, who=f"trainer rank {self.rank}")
        self._thread.join(self.deadline_s if self.error is None else 1.0)
        if self._thread.is_alive() and self.error is None:
            self._fail(self.version, WaitOver(wait.message("at the end of the run")))

    # -- the publisher's thread
    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=0.5)
            except queue.Empty:
                job = ()
            if job is None:
                return
            try:
                if self.error is None and job:
                    self._publish(*job)
                elif self.error is None:
                    self._repair()
            except Exception as e:  # any: it must reach the training thread, not die with this one
                self._fail(job[0] if job else self.version, e)
            if self.error is not None:
                self._free.release()  # publish() shall find the error, and not wait for ever

    def _fail(self, version: int, error: Exception) -> None:
        self.error = self.error or WeightsError(f"publishing v{version} to {self.root} failed: {error}")
        if self.rank == 0:
            self.hub.fail(str(self.error))
        else:
            self.store.set(f"{version}/{self.rank}", json.dumps({"error": str(self.error)}))

    def _publish(self, version: int, views: dict[str, torch.Tensor], full: bool) -> None:
        start, old, metadata = time.perf_counter(), self.tensors, {"run": self.run, "version": str(version)}
        first = self.version < 0

        def encode(name: str) -> tuple[bytes | None, dict]:
            code = None if first else delta.encode(old[name], views[name])
            return code, self.described[name] if code == b"" else describe(views[name])

        # Codec and hash leave Python's lock alone. The cores are shared with the other ranks of this node.
        threads = max(1, min(8, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        with ThreadPoolExecutor(threads) as workers:
            found = dict(zip(views, workers.map(encode, views)))
        codes = None if first else {name: code for name, (code, _) in found.items()}
        self.described = {name: described for name, (_, described) in found.items()}
        self.version, self.tensors = version, views
        if not first:
            self._free.release()  # the version before is not needed any more
        encoded = time.perf_counter()
        delta_bytes, full_bytes = sum(map(len, (codes or {}).values())), sum(t.nbytes for t in views.values())
        directory, files = self.root / f"v{version}", []
        if codes is not None and delta_bytes < full_bytes:
            base = {**metadata, "base": str(version - 1)}
            files.append(write_share(directory, self.shard, views, codes, base))
        if full or not files:
            files.append(write_share(directory, self.shard, views, None, metadata))
        elements = sum(t.numel() for t in views.values())
        changed = elements if first else sum(delta.changed(code) for code in codes.values())
        part = {"node": self.node, "name": self.shard, "tensors": self.described, "files": files, "changed": changed,
                "elements": elements, "delta_bytes": delta_bytes, "full_bytes": full_bytes,
                "encode_s": encoded - start, "write_s": time.perf_counter() - encoded}  # fmt: skip
        self.store.set(f"{version}/{self.rank}", json.dumps(part))
        if self.rank == 0:
            self._commit(version, start)
        elif self.server is not None and self.store.check(["oldest"]):
            self._prune(int(self.store.get("oldest")))  # on this node's disk; rank 0 does it on its own

    def _parts(self, what: str, deadline_s: float) -> list[dict]:
        """Rank 0: every rank's word on a version. Raises: WeightsError with the rank whose thread has failed."""
        keys = [f"{what}/{rank}" for rank in range(self.world_size)]
        await_keys(self.store, keys, Wait("version", deadline_s, who="trainer rank 0's publisher"))
        parts = [json.loads(self.store.get(key)) for key in keys]
        for key in keys:
            self.store.delete_key(key)
        for rank, part in enumerate(parts):
            if "error" in part:
                raise WeightsError(f"rank {rank}: {part['error']}")
        return [part for part in parts if part["tensors"]]  # a small model may have nothing for a rank

    def _commit(self, version: int, start: float) -> None:
        """Rank 0: once all shares are on disk, the manifest, and with it the version."""
        parts = self._parts(str(version), self.deadline_s)
        total = lambda key: sum(part[key] for part in parts)
        self.shards = [{"name": part["name"], "tensors": part["tensors"]} for part in parts]
        self._add(parts)
        if all(file["kind"] == "full" for part in parts for file in part["files"][-1:]):
            self._complete(version)
        self.stats = {
            "weights/changed": total("changed") / total("elements"), "weights/delta_bytes": total("delta_bytes"),
            "weights/full_bytes": total("full_bytes"),
            "timing/train/publish_encode": max(part["encode_s"] for part in parts),
            "timing/train/publish_write": max(part["write_s"] for part in parts),
            "timing/train/publish_total": time.perf_counter() - start,
        }  # fmt: skip
        oldest = self._oldest(version)
        self._write_manifest(version, oldest)
        self._prune(oldest)
        self.store.set("oldest", str(oldest))

    def _complete(self, version: int) -> None:
        """All shares of a version are whole: make its directory a checkpoint that others can open."""
        card = model_card(self.root.parent, version)
        self.whole = {"version": version,
                      "files": write_static(self.root / f"v{version}", self.static, self.shards, card)}  # fmt: skip

    def _add(self, parts: list[dict]) -> None:
        for part in parts:
            url = self.store.get(f"url/{part['node']}").decode()
            self.files.setdefault(part["name"], []).extend({**file, "url": url} for file in part["files"])

    def _write_manifest(self, version: int, oldest: int) -> None:
        for shard, files in self.files.items():
            self.files[shard] = [file for file in files if file["version"] >= oldest]
        shards = [{**shard, "files": [f for f in self.files[shard["name"]] if f["version"] <= version]}
                  for shard in self.shards]  # fmt: skip
        text = json.dumps({"run": self.run, "version": version, "base": version - 1, "static": self.whole,
                           "full": self.whole["version"] == version, "shards": shards})  # fmt: skip
        write_text(self.root / f"v{version}" / MANIFEST, text)
        self.hub.set_published(text.encode())

    def _oldest(self, version: int) -> int:
        """The oldest version to keep: what leads from a whole one to each of the last `keep`, whose manifest a node
        may just have read; and what a node is still fetching, as long as that is no more than four whole copies."""
        sizes: dict[int, int] = {}
        for file in (file for files in self.files.values() for file in files):
            sizes[file["version"]] = sizes.get(file["version"], 0) + file["bytes"]
        fulls = [{f["version"] for f in files if f["kind"] == "full"} for files in self.files.values()]
        wholes = sorted(set.intersection(*fulls))
        oldest = max((v for v in wholes if v <= version - self.keep + 1), default=wholes[0])
        used = self.hub.oldest_in_use()
        for older in sorted((v for v in sizes if used <= v < oldest), reverse=True):
            if sum(size for v, size in sizes.items() if v >= older) <= 4 * self.stats["weights/full_bytes"]:
                oldest = older
        return oldest

    def _prune(self, oldest: int) -> None:
        for old in self.root.glob("v*"):
            if old.name[1:].isdigit() and int(old.name[1:]) < oldest:
                shutil.rmtree(old, ignore_errors=True)  # a neighbour on a shared disk may be at it too

    def _repair(self) -> None:
        """Between versions: a node refused the newest one, so write all of it again, whole, from memory. Else a file
        damaged here would keep every node from it until the next whole version."""
        if self.rank == 0 and self.hub.refused == self.version != self.repaired:
            self.repaired = self.version
            self.store.set("wanted", str(self.repairs + 1))
        if self.version < 0 or not self.store.check(["wanted"]) or int(self.store.get("wanted")) == self.repairs:
            return
        self.repairs += 1
        metadata = {"run": self.run, "version": str(self.version)}
        file = write_share(self.root / f"v{self.version}", self.shard, self.tensors, None, metadata)
        part = {"node": self.node, "name": self.shard, "files": [file], "tensors": bool(self.tensors)}
        self.store.set(f"repair {self.repairs}/{self.rank}", json.dumps(part))
        if self.rank == 0:
            try:
                parts = self._parts(f"repair {self.repairs}", min(60.0, self.deadline_s))
            except WaitOver:  # at the end of a run the other ranks may have closed theirs; nothing is lost by it
                return
            self._add(parts)
            if all(part["files"][0]["version"] == self.version for part in parts):  # else a rank is one ahead
                self._complete(self.version)
            self._write_manifest(self.version, oldest=0)


# ---- check -----------------------------------------------------------------------------------------------------
def check(path: Path) -> str:
    """Prove that a directory is a whole Hugging Face checkpoint of a model that can be trained here: every tensor of
    the shape that config.json asks for and finite, a tokenizer, and where there is a manifest, what it says. Returns a
    line about it. Raises: WeightsError naming what is wrong."""
    from model import ModelConfig, Qwen3MoE

    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            raise WeightsError(
                f"{path} has no {name}; a version without it is a delta, the whole ones open by themselves"
            )
    with torch.device("meta"):
        shapes = Qwen3MoE(ModelConfig.from_dir(path)).checkpoint_shapes()
    manifest = json.loads((path / MANIFEST).read_text()) if (path / MANIFEST).exists() else {}
    described = {name: d for shard in manifest.get("shards", ()) for name, d in shard["tensors"].items()}
    for name, want in manifest.get("static", {}).get("files", {}).items():
        if not (path / name).exists() or digest((path / name).read_bytes()) != want["blake3"]:
            raise WeightsError(f"{path / name}: missing, or its digest differs from the manifest")
    dtypes, elements = set(), 0
    for name, stored in stored_tensors(path, shapes).items():
        tensor = stored[:]
        if described and describe(tensor) != described.get(name):
            raise WeightsError(f"{path}: tensor {name} differs from the manifest")
        if not tensor.isfinite().all():
            raise WeightsError(f"{path}: {name} is not finite throughout")
        dtypes, elements = dtypes | {str(tensor.dtype).removeprefix("torch.")}, elements + tensor.numel()
    said = (
        f"as the manifest of v{manifest['version']} says" if manifest else "without a manifest to compare digests with"
    )
    return f"{path}: whole, {len(shapes)} tensors, {elements:,} parameters in {', '.join(sorted(dtypes))}, {said}"


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "check":
        sys.exit("usage: python weights.py check DIR")
    try:
        print(check(Path(sys.argv[2])))
    except (WeightsError, ValueError, OSError) as e:
        sys.exit(f"weights.py: error: {e}")
