"""The trainer's end of the weights: each rank copies, writes and serves its share of every
version."""

import json
import os
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from blake3 import blake3

from bridge import delta
from bridge.files import FileServer, own_address
from bridge.processes import cores
from bridge.versions import Versions, clear, prune
from bridge.waits import Wait, WaitOver, await_keys, gather_json
from bridge.weights import SUFFIX, WeightsError, describe, own_hf, put_in_place, write_safetensors

# Of the whole. A larger delta saves less time on the way than a node needs to apply it, at 1 to 2
# GB/s. In bf16 none is so large; in fp32, at a high rate, all are.
LARGEST_DELTA = 0.5
SUMMED = ("changed", "elements", "delta_bytes", "full_bytes")  # of a version, over the ranks


def write_share(
    directory: Path,
    shard: str,
    tensors: dict[str, torch.Tensor],
    codes: dict[str, bytes] | None,
    metadata: dict[str, str],
) -> dict:
    """Write a rank's share of a version, as its codes or whole. Returns the file's entry in the
    manifest."""
    kind = "full" if codes is None else "delta"
    tmp = directory / f"{shard}{SUFFIX[kind]}.tmp"
    directory.mkdir(parents=True, exist_ok=True)
    hasher = None  # whole: each tensor has a digest, and the receiver knows what the header must be
    if codes is None:
        write_safetensors(tmp, list(tensors.items()))
    else:
        data = [
            (name, torch.frombuffer(bytearray(code), dtype=torch.uint8))
            for name, code in codes.items()
            if code
        ]
        write_safetensors(tmp, data, metadata, hasher := blake3())
    entry = {
        "version": int(metadata["version"]),
        "kind": kind,
        "bytes": tmp.stat().st_size,
        "blake3": hasher.hexdigest() if hasher else "",
    }
    put_in_place(tmp)
    return entry


class Share(NamedTuple):
    """This rank's share of a version, in host memory."""

    version: int
    tensors: dict[str, torch.Tensor]
    described: dict[str, dict]  # their entries in the manifest


def encode(
    version: int, tensors: dict[str, torch.Tensor], before: Share | None
) -> tuple[Share, dict[str, bytes] | None]:
    """A share with its digests, and what changed since the version before; None for the first."""

    def work(name: str) -> tuple[bytes | None, dict]:
        if before is None:
            return None, describe(tensors[name])
        code = delta.encode(before.tensors[name], tensors[name])
        # b"": nothing has changed
        return code, describe(tensors[name]) if code else before.described[name]

    # Codec and hash release Python's lock. The cores are shared with the other ranks of this node.
    threads = max(1, min(8, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    with ThreadPoolExecutor(threads) as workers:
        found = dict(zip(tensors, workers.map(work, tensors)))
    share = Share(version, tensors, {name: described for name, (_, described) in found.items()})
    return share, None if before is None else {name: code for name, (code, _) in found.items()}


def host_buffers(
    shapes: dict[str, torch.Size], dtype: torch.dtype, pinned: bool
) -> dict[str, torch.Tensor]:
    """Host memory for a share, in one piece; pinned, copies from the GPU run at the bus's speed. It
    is registered after the fact, since torch's pinned allocator rounds up to a power of two.
    Raises: WeightsError when it cannot be pinned."""
    sizes = [shape.numel() for shape in shapes.values()]
    flat = torch.empty(sum(sizes), dtype=dtype)
    if pinned and flat.numel():
        error = int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, 1))
        if error != 0:
            size = f"{flat.nbytes / 2**30:.1f} GiB"
            raise WeightsError(f"{size} of host memory cannot be pinned: CUDA {error}")
    parts = flat.split(sizes)
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts)}


class Publisher:
    """Publishes versions, a rank's share on each rank: `publish` copies it to host memory, a thread
    does the rest while training goes on. Every rank makes one, and all call `publish` for the same
    versions.

    There are two sets of host buffers, since the version before is what the next is compared with;
    `publish` waits until the set it needs is free, visibly in its seconds. The ranks' threads meet
    in the store and never in a collective. What fails in a thread reaches `hub.fail` on rank 0, so
    that the loop stops with its state saved.

    As a context manager it ends with `close`, and no longer serves this node's files.
    """

    def __init__(
        self,
        model,
        dtype: torch.dtype,
        root: Path,
        static: Path,
        full_every: int,
        keep: int,
        store: dist.Store,
        deadline_s: float,
        hub=None,
        port: int = 0,
    ):
        """hub: rank 0's, None elsewhere; static: a checkpoint directory with config and tokenizer;
        store: for the ranks to meet in; port: of this node's file server, where it needs one."""
        mesh = model.mesh
        self.model, self.dtype, self.root, self.full_every = model, dtype, root, full_every
        self.rank, self.world_size = mesh.rank, mesh.world_size
        self.store, self.deadline_s, self.hub = dist.PrefixStore("weights", store), deadline_s, hub
        self.shard = f"model-{self.rank + 1:05d}-of-{self.world_size:05d}"
        self.error: Exception | None = None
        self.stats: dict[str, float] = {}  # of the last version, for the metrics (rank 0)
        self.server: FileServer | None = None
        self._meet(port)
        self._versions = Versions(root, static, self.run, keep)  # filled on rank 0 alone
        self._share: Share | None = None  # what the thread wrote last
        self._repairs, self._repaired = 0, -1  # how many there were; the last version repaired
        self._views: list[dict[str, torch.Tensor]] = []
        self._free = threading.Semaphore(2)
        self._jobs: queue.Queue = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def _meet(self, port: int) -> None:
        """The run's id from rank 0. The first rank of each node clears the node's directory and
        says where its files are served; the others wait for that before they write."""
        node = f"url/{os.environ.get('GROUP_RANK', '0')}"
        first_here = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        if first_here:
            clear(self.root)
        if self.rank == 0:
            self.store.set("run", json.dumps({"id": self.hub.run["id"], "token": self.hub.token}))
            self.store.set(node, "")  # the hub serves these
        await_keys(self.store, ["run"], self._wait("version", whom="the hub"))
        run = json.loads(self.store.get("run"))
        if first_here and self.rank != 0:
            self.server = FileServer(self.root, run["token"], own_address(), port)
            self.store.set(node, self.server.url)
        await_keys(self.store, [node], self._wait("version"))
        self.run, self.url = run["id"], self.store.get(node).decode()

    # ---- the training thread
    def publish(self, version: int, last: bool = False) -> None:
        """Copy this rank's share. All ranks must call: dense tensors are gathered. last: of the
        run, and so whole."""
        on_cuda = self.model.mesh.device.type == "cuda"
        wait = self._wait("publish")
        if not self._free.acquire(timeout=self.deadline_s):
            self._fail(version, WaitOver(wait.message(f"v{version}")))
        if not self._views:
            shapes = {name: tensor.shape for name, tensor in own_hf(self.model, self.dtype)}
            self._views = [host_buffers(shapes, self.dtype, pinned=on_cuda) for _ in range(2)]
        views = self._views[version % 2]
        for name, tensor in own_hf(self.model, self.dtype):
            if self.error is None:  # else only the others' collectives are served
                views[name].copy_(tensor, non_blocking=True)
        if on_cuda:
            torch.cuda.current_stream().synchronize()  # sync: the parameters may change now
        self._jobs.put((version, views, last or version % self.full_every == 0))

    def close(self) -> None:
        """Until all is on disk, or has failed. This node's files are served on."""
        self._jobs.put(None)
        wait = self._wait("publish")
        self._thread.join(self.deadline_s if self.error is None else 1.0)
        if self._thread.is_alive() and self.error is None:
            self._fail(self._version, WaitOver(wait.message("at the end of the run")))

    def __enter__(self) -> "Publisher":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        else:  # the others may be gone: what is not written is not waited for
            self._jobs.put(None)
        if self.server is not None:
            self.server.close()

    def _wait(self, name: str, whom: str = "") -> Wait:
        return Wait(name, self.deadline_s, whom, who=f"trainer rank {self.rank}")

    @property
    def _version(self) -> int:
        return self._share.version if self._share else -1

    # ---- the publisher's thread
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
                self._fail(job[0] if job else self._version, e)
            if self.error is not None:
                self._free.release()  # publish() shall find the error, and not wait for ever

    def _fail(self, version: int, error: Exception) -> None:
        self.error = self.error or WeightsError(
            f"publishing v{version} to {self.root} failed: {error}"
        )
        if self.rank == 0:
            self.hub.fail(str(self.error))
        else:
            self.store.set(f"{version}/{self.rank}", json.dumps({"error": str(self.error)}))

    def _publish(self, version: int, views: dict[str, torch.Tensor], full: bool) -> None:
        start, before = time.perf_counter(), self._share
        self._share, codes = encode(version, views, before)
        if before is not None:
            self._free.release()  # its buffers are not needed any more
        encoded = time.perf_counter()
        full_bytes = sum(t.nbytes for t in views.values())
        delta_bytes = sum(map(len, codes.values())) if codes else 0
        files = []
        if codes is not None and delta_bytes < LARGEST_DELTA * full_bytes:
            files.append(self._write(codes))
        if full or not files:
            files.append(self._write(None))
        elements = sum(t.numel() for t in views.values())
        changed = elements if codes is None else sum(map(delta.changed, codes.values()))
        part = {
            "name": self.shard,
            "tensors": self._share.described,
            "files": files,
            "changed": changed,
            "elements": elements,
            "delta_bytes": delta_bytes,
            "full_bytes": full_bytes,
            "encode_s": encoded - start,
            "write_s": time.perf_counter() - encoded,
        }
        parts = self._gather(str(version), part, self.deadline_s)
        if self.rank == 0:
            self._commit(version, parts, start, compare=full)
        elif self.server is not None and self.store.check(["oldest"]):
            prune(self.root, int(self.store.get("oldest")))  # rank 0's node has rank 0 for it

    def _write(self, codes: dict[str, bytes] | None) -> dict:
        """This rank's share as codes, or whole. Returns the file's entry in the manifest."""
        version = self._share.version
        metadata = {"run": self.run, "version": str(version)}
        if codes is not None:
            metadata["base"] = str(version - 1)
        directory = self.root / f"v{version}"
        entry = write_share(directory, self.shard, self._share.tensors, codes, metadata)
        return {**entry, "url": self.url}

    def _gather(self, what: str, part: dict, deadline_s: float) -> list[dict]:
        """On rank 0 all ranks' parts, without those of ranks that own no tensor, as in a small
        model. Raises: RankFailed, WaitOver."""
        wait = Wait("version", deadline_s, who="trainer rank 0's publisher")
        parts = gather_json(self.store, what, self.rank, self.world_size, part, wait)
        return [part for part in parts if part["tensors"]]

    def _commit(self, version: int, parts: list[dict], start: float, compare: bool) -> None:
        """Rank 0: all shares are on disk; write the manifest, and with it the version is there."""
        self._versions.add(version, parts)
        total = {key: sum(part[key] for part in parts) for key in SUMMED}
        self.stats = {
            "weights/changed": total["changed"] / total["elements"],
            "weights/delta_bytes": total["delta_bytes"],
            "weights/full_bytes": total["full_bytes"],
            "timing/train/publish_encode": max(part["encode_s"] for part in parts),
            "timing/train/publish_write": max(part["write_s"] for part in parts),
            "timing/train/publish_total": time.perf_counter() - start,
        }
        oldest = self._versions.oldest_to_keep(version, self.hub.oldest_in_use())
        self._versions.forget(oldest)
        self.hub.set_published(self._versions.write_manifest(version, compare))
        prune(self.root, oldest)
        self.store.set("oldest", str(oldest))

    def _repair(self) -> None:
        """Between versions, where a node has refused the newest one: write all of it again, whole,
        from memory. Else a file damaged here would keep every node from it until the next whole
        version.

            a node        rank 0                                     every other rank
            refuses vN -> store: wanted = k + 1                  ->  wanted > repairs: k + 1 now
                          writes its share of vN whole               writes its share of vN whole
                          store: all "repair k + 1/RANK"         <-  store: "repair k + 1/RANK"
            fetches vN <- a manifest of vN that names these files
        """
        if self.rank == 0 and self.hub.refused == self._version != self._repaired:
            self._repaired = self._version
            self.store.set("wanted", str(self._repairs + 1))
        wanted = int(self.store.get("wanted")) if self.store.check(["wanted"]) else 0
        if self._share is None or wanted == self._repairs:
            return
        self._repairs += 1
        part = {
            "name": self.shard,
            "files": [self._write(None)],
            "tensors": bool(self._share.tensors),
        }
        try:
            deadline_s = min(60.0, self.deadline_s)
            parts = self._gather(f"repair {self._repairs}", part, deadline_s)
        except WaitOver:  # at the end of a run the others may have closed theirs: nothing is lost
            return
        if self.rank == 0:
            self._versions.add_whole(self._version, parts)
            self.hub.set_published(self._versions.write_manifest(self._version, compare=True))
