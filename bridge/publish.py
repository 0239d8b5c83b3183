"""The trainer's end of the weights: every version is copied, written, served and deleted here."""

import json
import os
import queue
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from blake3 import blake3

from bridge import delta
from bridge.files import FileServer, own_address
from bridge.processes import cores
from bridge.waits import Wait, WaitOver, await_keys
from bridge.weights import (
    DTYPES,
    INDEX,
    MANIFEST,
    STATIC_FILES,
    SUFFIX,
    WeightsError,
    describe,
    digest,
    own_hf,
    put_in_place,
    write_safetensors,
    write_text,
)


def write_share(
    directory: Path,
    shard: str,
    tensors: dict[str, torch.Tensor],
    codes: dict[str, bytes] | None,
    metadata: dict[str, str],
) -> dict:
    """Write a rank's share of a version, as its codes or whole; the file's entry in the
    manifest."""
    kind = "full" if codes is None else "delta"
    tmp = directory / f"{shard}{SUFFIX[kind]}.tmp"
    directory.mkdir(parents=True, exist_ok=True)
    if codes is None:
        # The digest that counts is each tensor's, and the receiver knows what the header must be.
        hasher = None
        write_safetensors(tmp, list(tensors.items()))
    else:
        data = [
            (name, torch.frombuffer(bytearray(code), dtype=torch.uint8))
            for name, code in codes.items()
            if code
        ]
        write_safetensors(tmp, data, metadata, hasher := blake3())
    size = tmp.stat().st_size
    put_in_place(tmp)
    return {
        "version": int(metadata["version"]),
        "kind": kind,
        "bytes": size,
        "blake3": hasher.hexdigest() if hasher else "",
    }


def write_static(directory: Path, source: Path, shards: list[dict], card: str = "") -> dict:
    """Make a directory of whole shares a checkpoint that others can open: index, config, tokenizer.
    Returns their entries in the manifest; the index is not among them, since a receiver makes its
    own. card: its README.md."""
    texts: dict[str, str] = {}
    for name in STATIC_FILES:
        if (source / name).exists():
            text = (source / name).read_text()
            # says what the files hold, for who opens it with dtype "auto"
            if name == "config.json":
                config = json.loads(text)
                config.pop("torch_dtype", None)
                dtype = next(iter(shards[0]["tensors"].values()))["dtype"]
                config["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
                text = json.dumps(config, indent=1)
            texts[name] = text
    texts["README.md"] = card
    if "generation_config.json" not in texts:
        eos = json.loads(texts["config.json"]).get("eos_token_id")
        texts["generation_config.json"] = json.dumps(
            {"eos_token_id": eos, "do_sample": True}, indent=1
        )
    for name, text in texts.items():
        write_text(directory / name, text)
    write_index(directory, shards)
    # nobody needs to fetch a card
    kept = {name: text.encode() for name, text in texts.items() if name in STATIC_FILES}
    return {name: {"bytes": len(text), "blake3": digest(text)} for name, text in kept.items()}


def model_card(run_dir: Path, step: int) -> str:
    """README.md of a checkpoint that a run made: what it comes from, how well it did, and all
    flags."""
    lines = lambda name: (
        (run_dir / name).read_text().split("\n")[:-1] if (run_dir / name).exists() else []
    )
    config = (
        json.loads((run_dir / "config.json").read_text())
        if (run_dir / "config.json").exists()
        else {}
    )
    base = config.get("model") or f"a tiny Qwen3-MoE, warm-started on {config.get('task')!r}"
    rewards = [
        r["train/reward"]
        for r in map(json.loads, lines("metrics.jsonl"))
        if step - 10 <= r["step"] < step
    ]
    said = (
        [f"Mean reward of the {len(rewards)} steps before it: {sum(rewards) / len(rewards):.4f}."]
        if rewards
        else []
    )
    for record in map(json.loads, lines("validation.jsonl")):
        if record["version"] == step:
            said += [f"{name}: {record[name]:.4f}." for name in record if "@" in name]
    front = f"---\nbase_model: {config['model']}\n---\n" if config.get("model") else ""
    return (
        f"{front}# {run_dir.name}, step {step}\n\nMade from {base} by train_cispo.py: {step} "
        "steps of reinforcement "
        f"learning. {' '.join(said)}\n\nThe run's "
        f"flags:\n\n```json\n{json.dumps(config, indent=1)}\n```\n"
    )


def write_index(directory: Path, shards: list[dict]) -> None:
    where = {name: shard["name"] + SUFFIX["full"] for shard in shards for name in shard["tensors"]}
    write_text(directory / INDEX, json.dumps({"metadata": {}, "weight_map": where}))


# ---- publish -------------------------------------------------------------------------------------
class Publisher:
    """Publishes versions, a rank's share on each rank: `publish` copies it to host memory, a thread
    does the rest while training goes on. Every rank makes one, and all call `publish` for the same
    versions.

    There are two sets of host buffers, since the version before is what the next is compared with;
    `publish` waits until the set it needs is free, visibly in its seconds. The ranks' threads meet
    in the store and never in a collective. What fails in a thread reaches `hub.fail` on rank 0, so
    that the loop stops with its state saved.
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
        self.model, self.dtype, self.root, self.static, self.keep = model, dtype, root, static, keep
        self.rank, self.world_size, self.full_every = mesh.rank, mesh.world_size, full_every
        self.store, self.deadline_s, self.hub = dist.PrefixStore("weights", store), deadline_s, hub
        self.shard = f"model-{self.rank + 1:05d}-of-{self.world_size:05d}"
        self.node, first_here = (
            os.environ.get("GROUP_RANK", "0"),
            int(os.environ.get("LOCAL_RANK", self.rank)) == 0,
        )
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
        await_keys(
            self.store,
            ["run"],
            Wait("version", deadline_s, who=f"trainer rank {self.rank}", whom="the hub"),
        )
        run = json.loads(self.store.get("run"))
        self.run = run["id"]
        self.server = None
        if first_here and self.rank != 0:
            self.server = FileServer(root, run["token"], own_address(), port)
            self.store.set(f"url/{self.node}", self.server.url)
        # A neighbour's directory must have been cleared before this rank writes to it.
        await_keys(
            self.store,
            [f"url/{self.node}"],
            Wait("version", deadline_s, who=f"trainer rank {self.rank}"),
        )
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
        """Two sets of host buffers, each in one piece: pinned on CUDA, so that copies run at the
        bus's speed. They are registered after the fact, since torch's pinned allocator rounds up to
        a power of two."""
        shapes = [(name, tensor.shape) for name, tensor in own_hf(self.model, self.dtype)]
        for _ in range(2):
            flat = torch.empty(sum(shape.numel() for _, shape in shapes), dtype=self.dtype)
            if self.model.mesh.device.type == "cuda" and flat.numel():
                if (
                    error := int(
                        torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, 1)
                    )
                ) != 0:
                    raise WeightsError(
                        f"{flat.nbytes / 2**30:.1f} GiB of host memory cannot be pinned: CUDA "
                        f"{error}"
                    )
            parts = flat.split([shape.numel() for _, shape in shapes])
            self._views.append(
                {name: part.view(shape) for (name, shape), part in zip(shapes, parts)}
            )

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
        self.error = self.error or WeightsError(
            f"publishing v{version} to {self.root} failed: {error}"
        )
        if self.rank == 0:
            self.hub.fail(str(self.error))
        else:
            self.store.set(f"{version}/{self.rank}", json.dumps({"error": str(self.error)}))

    def _publish(self, version: int, views: dict[str, torch.Tensor], full: bool) -> None:
        start, old, metadata = (
            time.perf_counter(),
            self.tensors,
            {"run": self.run, "version": str(version)},
        )
        first = self.version < 0

        def encode(name: str) -> tuple[bytes | None, dict]:
            code = None if first else delta.encode(old[name], views[name])
            return code, self.described[name] if code == b"" else describe(views[name])

        # Codec and hash leave Python's lock alone. The cores are shared with the other ranks of
        # this node.
        threads = max(1, min(8, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        with ThreadPoolExecutor(threads) as workers:
            found = dict(zip(views, workers.map(encode, views)))
        codes = None if first else {name: code for name, (code, _) in found.items()}
        self.described = {name: described for name, (_, described) in found.items()}
        self.version, self.tensors = version, views
        if not first:
            self._free.release()  # the version before is not needed any more
        encoded = time.perf_counter()
        delta_bytes, full_bytes = (
            sum(map(len, (codes or {}).values())),
            sum(t.nbytes for t in views.values()),
        )
        directory, files = self.root / f"v{version}", []
        if codes is not None and delta_bytes < full_bytes:
            base = {**metadata, "base": str(version - 1)}
            files.append(write_share(directory, self.shard, views, codes, base))
        if full or not files:
            files.append(write_share(directory, self.shard, views, None, metadata))
        elements = sum(t.numel() for t in views.values())
        changed = elements if first else sum(delta.changed(code) for code in codes.values())
        part = {
            "node": self.node,
            "name": self.shard,
            "tensors": self.described,
            "files": files,
            "changed": changed,
            "elements": elements,
            "delta_bytes": delta_bytes,
            "full_bytes": full_bytes,
            "encode_s": encoded - start,
            "write_s": time.perf_counter() - encoded,
        }
        self.store.set(f"{version}/{self.rank}", json.dumps(part))
        if self.rank == 0:
            self._commit(version, start)
        elif self.server is not None and self.store.check(["oldest"]):
            # on this node's disk; rank 0 does it on its own
            self._prune(int(self.store.get("oldest")))

    def _parts(self, what: str, deadline_s: float) -> list[dict]:
        """Rank 0: every rank's word on a version. Raises: WeightsError with the rank whose thread
        has failed."""
        keys = [f"{what}/{rank}" for rank in range(self.world_size)]
        await_keys(self.store, keys, Wait("version", deadline_s, who="trainer rank 0's publisher"))
        parts = [json.loads(self.store.get(key)) for key in keys]
        for key in keys:
            self.store.delete_key(key)
        for rank, part in enumerate(parts):
            if "error" in part:
                raise WeightsError(f"rank {rank}: {part['error']}")
        # a small model may have nothing for a rank
        return [part for part in parts if part["tensors"]]

    def _commit(self, version: int, start: float) -> None:
        """Rank 0: once all shares are on disk, the manifest, and with it the version."""
        parts = self._parts(str(version), self.deadline_s)
        total = lambda key: sum(part[key] for part in parts)
        self.shards = [{"name": part["name"], "tensors": part["tensors"]} for part in parts]
        self._add(parts)
        if all(file["kind"] == "full" for part in parts for file in part["files"][-1:]):
            self._complete(version)
        self.stats = {
            "weights/changed": total("changed") / total("elements"),
            "weights/delta_bytes": total("delta_bytes"),
            "weights/full_bytes": total("full_bytes"),
            "timing/train/publish_encode": max(part["encode_s"] for part in parts),
            "timing/train/publish_write": max(part["write_s"] for part in parts),
            "timing/train/publish_total": time.perf_counter() - start,
        }
        oldest = self._oldest(version)
        self._write_manifest(version, oldest)
        self._prune(oldest)
        self.store.set("oldest", str(oldest))

    def _complete(self, version: int) -> None:
        """All shares of a version are whole: make its directory a checkpoint that others can
        open."""
        card = model_card(self.root.parent, version)
        self.whole = {
            "version": version,
            "files": write_static(self.root / f"v{version}", self.static, self.shards, card),
        }

    def _add(self, parts: list[dict]) -> None:
        for part in parts:
            url = self.store.get(f"url/{part['node']}").decode()
            self.files.setdefault(part["name"], []).extend(
                {**file, "url": url} for file in part["files"]
            )

    def _write_manifest(self, version: int, oldest: int) -> None:
        for shard, files in self.files.items():
            self.files[shard] = [file for file in files if file["version"] >= oldest]
        shards = [
            {**shard, "files": [f for f in self.files[shard["name"]] if f["version"] <= version]}
            for shard in self.shards
        ]
        text = json.dumps(
            {
                "run": self.run,
                "version": version,
                "base": version - 1,
                "static": self.whole,
                "full": self.whole["version"] == version,
                "shards": shards,
            }
        )
        write_text(self.root / f"v{version}" / MANIFEST, text)
        self.hub.set_published(text.encode())

    def _oldest(self, version: int) -> int:
        """The oldest version to keep: what leads from a whole one to each of the last `keep`, whose
        manifest a node may just have read; and what a node is still fetching, as long as that is no
        more than four whole copies."""
        sizes: dict[int, int] = {}
        for file in (file for files in self.files.values() for file in files):
            sizes[file["version"]] = sizes.get(file["version"], 0) + file["bytes"]
        fulls = [
            {f["version"] for f in files if f["kind"] == "full"} for files in self.files.values()
        ]
        wholes = sorted(set.intersection(*fulls))
        oldest = max((v for v in wholes if v <= version - self.keep + 1), default=wholes[0])
        used = self.hub.oldest_in_use()
        for older in sorted((v for v in sizes if used <= v < oldest), reverse=True):
            if (
                sum(size for v, size in sizes.items() if v >= older)
                <= 4 * self.stats["weights/full_bytes"]
            ):
                oldest = older
        return oldest

    def _prune(self, oldest: int) -> None:
        for old in self.root.glob("v*"):
            if old.name[1:].isdigit() and int(old.name[1:]) < oldest:
                # a neighbour on a shared disk may be at it too
                shutil.rmtree(old, ignore_errors=True)

    def _repair(self) -> None:
        """Between versions: a node refused the newest one, so write all of it again, whole, from
        memory. Else a file damaged here would keep every node from it until the next whole
        version."""
        if self.rank == 0 and self.hub.refused == self.version != self.repaired:
            self.repaired = self.version
            self.store.set("wanted", str(self.repairs + 1))
        if (
            self.version < 0
            or not self.store.check(["wanted"])
            or int(self.store.get("wanted")) == self.repairs
        ):
            return
        self.repairs += 1
        metadata = {"run": self.run, "version": str(self.version)}
        file = write_share(self.root / f"v{self.version}", self.shard, self.tensors, None, metadata)
        part = {
            "node": self.node,
            "name": self.shard,
            "files": [file],
            "tensors": bool(self.tensors),
        }
        self.store.set(f"repair {self.repairs}/{self.rank}", json.dumps(part))
        if self.rank == 0:
            try:
                parts = self._parts(f"repair {self.repairs}", min(60.0, self.deadline_s))
            # at the end of a run the other ranks may have closed theirs; nothing is lost by it
            except WaitOver:
                return
            self._add(parts)
            # else a rank is one ahead
            if all(part["files"][0]["version"] == self.version for part in parts):
                self._complete(self.version)
            self._write_manifest(self.version, oldest=0)
