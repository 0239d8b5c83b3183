"""New weights on a rollout node: fetch the files that lead from the version at hand to the new one,
patch a copy, verify it.

A version is a directory `v{N}` that vLLM opens, beside the manifest it was verified against. Of
each shard (a trainer rank's share) the way with the fewest bytes is taken: the chain of deltas from
the shard at hand, or the newest whole copy and the chain from there. A directory gets its name only
when every tensor's digest is right. What is found wrong refuses the update, and the old directory
is as it was.

All of it runs in threads at a low priority, so that vLLM keeps generating; sockets, files, hashes
and codecs release Python's lock.
"""

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import torch
from safetensors import safe_open

from bridge import delta
from bridge.processes import cores
from bridge.versions import write_index
from bridge.waits import Wait, WaitOver, backoff_s
from bridge.weights import (
    DTYPES,
    MANIFEST,
    STATIC_FILES,
    SUFFIX,
    WeightsError,
    describe,
    digest,
    read_tensors,
    safetensors_header,
)

# of one request: small enough to spread over streams, large enough to fill a link
RANGE_BYTES = 64 << 20
STREAMS = 8  # requests at a time, over all trainer nodes
PATIENCE_S = 120.0  # a trainer node may send nothing for so long
SILENCE_S = 5.0  # and one connection, before the rest is asked for on another


class NoRoom(WeightsError):
    """The node's directory is too small for the weights, or cannot be written: nothing that the
    trainer could mend."""


# ---- what to fetch -------------------------------------------------------------------------------
class Way(NamedTuple):
    """Files of a shard to apply in turn, and their bytes."""

    bytes: int
    files: list[dict]

    def then(self, file: dict) -> "Way":
        return Way(self.bytes + file["bytes"], [*self.files, file])


def path_to(shard: dict, version: int, held: int | None) -> list[dict]:
    """The files of a shard that lead to `version` in the fewest bytes: from `held`, if that is at
    hand, or from a whole copy. Raises: WeightsError when none do.

    cheapest[v] = min(whole file of v, cheapest[v-1] + delta of v), and nothing for `held`."""
    nothing = Way(0, [])
    cheapest = {} if held is None else {held: nothing}
    for file in sorted(shard["files"], key=lambda f: f["version"]):
        v = file["version"]
        before = nothing if file["kind"] == "full" else cheapest.get(v - 1)
        if before is not None:
            ways = [cheapest[v]] if v in cheapest else []
            cheapest[v] = min([*ways, before.then(file)], key=lambda way: way.bytes)
    if version not in cheapest:
        raise WeightsError(
            f"no way to v{version} of {shard['name']} from v{held}: {len(shard['files'])} files"
        )
    return cheapest[version].files


def header_of(shard: dict) -> bytes:
    """What the shard's safetensors file must start with."""
    entries = {}
    for name, t in shard["tensors"].items():
        size = torch.Size(t["shape"]).numel() * DTYPES[t["dtype"]].itemsize
        entries[name] = t["dtype"], t["shape"], size
    return safetensors_header(entries, {})


def offsets(header: bytes) -> dict[str, tuple[int, int]]:
    """Where in the file each tensor's bytes are."""
    entries, start = json.loads(header[8:]), len(header)
    del entries["__metadata__"]
    spans = {name: entry["data_offsets"] for name, entry in entries.items()}
    return {name: (start + low, start + high) for name, (low, high) in spans.items()}


def full_bytes(shard: dict) -> int:
    return max(end for _, end in offsets(header_of(shard)).values())


def check_manifest(manifest: dict, run: str, after: int) -> None:
    """Raises: WeightsError for a manifest of another run, or one that is not newer than `after`."""
    if manifest["run"] != run:
        raise WeightsError(f"manifest of run {manifest['run']}, this is {run}")
    if manifest["version"] <= after:
        raise WeightsError(f"manifest of v{manifest['version']}, which is not newer than v{after}")
    for shard in manifest["shards"]:
        if Path(shard["name"]).name != shard["name"]:
            raise WeightsError(f"manifest names {shard['name']!r}, which is not a plain file name")
    if extra := manifest["static"]["files"].keys() - set(STATIC_FILES):
        raise WeightsError(f"manifest names {sorted(extra)[0]!r}, which no checkpoint needs")


# ---- the network ---------------------------------------------------------------------------------
class Range(NamedTuple):
    """Bytes start..end of a file, and the open file here that they go to, at the same place."""

    url: str  # of the server; "" is the hub
    version: int
    name: str
    fd: int
    start: int
    end: int


@dataclass
class Source:
    """The hub and its fellow servers: where files come from, and when to give up."""

    hub: str
    headers: dict[str, str]
    stop: threading.Event = field(default_factory=threading.Event)

    def pull(self, part: Range) -> None:
        """Fetch a range. What breaks off is resumed where it was. Raises: WeightsError when it is
        refused; WaitOver when nothing comes for PATIENCE_S."""
        at, attempt = part.start, 0
        what = f"v{part.version}/{part.name} from {urlsplit(part.url or self.hub).netloc}"
        wait = Wait("weights fetch", PATIENCE_S, whom=what)
        while at < part.end:
            try:
                for data in self._chunks(part, at, what):
                    write(part.fd, data, at)
                    at, attempt = at + len(data), 0
                    wait = Wait("weights fetch", PATIENCE_S, whom=what)
            except (OSError, http.client.HTTPException) as e:
                wait.check(f"at byte {at} of {part.end}; {e!r}")
                self.stop.wait(backoff_s(attempt, most=2.0))
                attempt += 1

    def _chunks(self, part: Range, start: int, what: str) -> Iterator[memoryview]:
        """Bytes of a range from `start` on, from one connection; a chunk holds until the next."""
        to, buffer = urlsplit(part.url or self.hub), memoryview(bytearray(1 << 20))
        https = to.scheme == "https"
        connect = http.client.HTTPSConnection if https else http.client.HTTPConnection
        self._check()
        with contextlib.closing(connect(to.hostname, to.port, timeout=SILENCE_S)) as connection:
            headers = {**self.headers, "Range": f"bytes={start}-{part.end - 1}"}
            path = f"{to.path.rstrip('/')}/weights/{part.version}/{part.name}"
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            if response.status >= 500:
                raise ConnectionError(f"status {response.status}")
            if response.status != 206:
                raise WeightsError(f"{what}: status {response.status}, {response.read(300)!r}")
            while start < part.end:
                self._check()
                if not (count := response.readinto(buffer[: part.end - start])):
                    raise ConnectionError("the connection was closed")
                yield buffer[:count]
                start += count

    def _check(self) -> None:
        if self.stop.is_set():
            raise WeightsError("stopped")


def ranges(
    path: Path, url: str, version: int, name: str, size: int, opened: contextlib.ExitStack
) -> list[Range]:
    """The ranges of a file that `path` is to hold. It is opened until `opened` ends, and its room
    is taken, so that a full disk shows now."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    opened.callback(os.close, fd)
    if size:
        os.posix_fallocate(fd, 0, size)
    return [
        Range(url, version, name, fd, at, min(at + RANGE_BYTES, size))
        for at in range(0, size, RANGE_BYTES)
    ]


def write(fd: int, data, at: int) -> None:
    try:
        while data:
            count = os.pwrite(fd, data, at)
            data, at = data[count:], at + count
    except OSError as e:  # of this machine, and not of the link: no retry
        raise NoRoom(f"cannot write weights: {e}") from None


# ---- one update ----------------------------------------------------------------------------------
NOTHING = {"run": "", "version": None, "shards": [], "static": {"files": {}}}  # no version at hand


def receive(
    manifest: dict, root: Path, have: Path | None, source: Source
) -> tuple[Path, dict[str, float]]:
    """Bring a version to `root/v{N}`, verified; `have`, an older one, is left as it is. Returns it
    and the seconds and bytes of its parts.

    Raises: WeightsError when what arrived is not what the manifest says; WaitOver for the network;
    NoRoom.
    """
    # Of this thread and those it starts, on Linux: a tenth of a core where all are busy. Any lower,
    # and a small machine would never be done.
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
    version, start = manifest["version"], time.perf_counter()
    final, tmp = root / f"v{version}", root / f"v{version}.tmp"
    old = json.loads((have / MANIFEST).read_text()) if have else NOTHING
    paths = paths_to(manifest, old)
    sizes = {"full": 0, "delta": 0}
    for file in (file for path in paths.values() for file in path):
        sizes[file["kind"]] += file["bytes"]
    need = sum(map(full_bytes, manifest["shards"])) + sizes["delta"]
    check_room(root, need, need if have is None else 0)
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        pull_all(manifest, old, have, paths, tmp, source)
        fetched = time.perf_counter()
        threads = max(1, min(8, cores() // 8))  # vLLM's share of the machine is the larger one
        with ThreadPoolExecutor(threads) as workers:
            jobs = [
                workers.submit(patch, shard, paths[shard["name"]], manifest, tmp, have)
                for shard in manifest["shards"]
            ]
            for job in jobs:
                job.result()
            write_index(tmp, manifest["shards"])
            patched = time.perf_counter()
            prove(tmp, manifest, workers, source.stop)
        (tmp / MANIFEST).write_text(json.dumps(manifest))
        shutil.rmtree(final, ignore_errors=True)
        tmp.rename(final)
    except OSError as e:
        raise NoRoom(f"cannot write weights to {root}: {e}") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return final, {
        "fetch_s": fetched - start,
        "patch_s": patched - fetched,
        "verify_s": time.perf_counter() - patched,
        "fetch_bytes": sum(sizes.values()),
    }


def paths_to(manifest: dict, old: dict) -> dict[str, list[dict]]:
    """For each shard the files to apply; after the old version's, where that is of this run and
    holds the same tensors under this name."""

    def tensors(shard: dict) -> list[tuple]:
        return [(name, t["dtype"], t["shape"]) for name, t in shard["tensors"].items()]

    same_run = old["run"] == manifest["run"]
    held = {shard["name"]: tensors(shard) for shard in old["shards"] if same_run}
    return {
        shard["name"]: path_to(
            shard,
            manifest["version"],
            old["version"] if held.get(shard["name"]) == tensors(shard) else None,
        )
        for shard in manifest["shards"]
    }


def pull_all(
    manifest: dict, old: dict, have: Path | None, paths: dict, tmp: Path, source: Source
) -> None:
    """All files of a version to `tmp`: those of the paths, and config and tokenizer, which are
    linked where the old version has the same."""
    static = manifest["static"]
    with contextlib.ExitStack() as opened:
        jobs: list[Range] = []
        for name, want in static["files"].items():
            if old["static"]["files"].get(name) == want:
                os.link(have / name, tmp / name)
            else:
                size = want["bytes"]
                jobs += ranges(tmp / name, "", static["version"], name, size, opened)
        for name, file in ((name, file) for name, path in paths.items() for file in path):
            v, there = file["version"], name + SUFFIX[file["kind"]]
            here = there if file["kind"] == "full" else f"{name}.{v}.delta"
            jobs += ranges(tmp / here, file["url"], v, there, file["bytes"], opened)
        # the first range of every file first, so that all nodes send at once
        jobs.sort(key=lambda job: job.start)
        with ThreadPoolExecutor(STREAMS) as streams:
            try:
                for done in [streams.submit(source.pull, job) for job in jobs]:
                    done.result()
            except BaseException:
                source.stop.set()  # the others end at their next chunk
                raise
            finally:
                streams.shutdown(cancel_futures=True)


def check_room(root: Path, need: int, later: int) -> None:
    """Raises: NoRoom unless `need` bytes are free; for the first version also what the second will
    take beside it."""
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free >= need + later:
        return
    what = "the new version beside the old"
    if later:
        what = "two versions, of which one replaces the other"
    raise NoRoom(
        f"{root} has {free / 2**30:.2f} GiB free, and {what} need "
        f"{(need + later) / 2**30:.2f}: choose another directory with --dir"
    )


def patch(shard: dict, path: list[dict], manifest: dict, tmp: Path, have: Path | None) -> None:
    """The shard's whole file in `tmp`: the one that was fetched, or a copy of the one at hand, and
    the deltas on it. Raises: WeightsError."""
    file = tmp / (shard["name"] + SUFFIX["full"])
    if path[0]["kind"] == "full":
        base, deltas = path[0]["version"], path[1:]
    else:
        base, deltas = json.loads((have / MANIFEST).read_text())["version"], path
        shutil.copyfile(have / file.name, file)
    if file.stat().st_size != (size := full_bytes(shard)):
        raise WeightsError(f"{file}: {file.stat().st_size} bytes, not {size}")
    # writing to it writes the file
    whole = torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8)
    header = header_of(shard)
    if whole[: len(header)].numpy().tobytes() != header:
        raise WeightsError(f"{file}: header differs from the manifest")
    where = offsets(header)

    def tensor(name: str) -> torch.Tensor:
        low, high = where[name]
        return whole[low:high].view(DTYPES[shard["tensors"][name]["dtype"]])

    for entry in deltas:
        code_file = tmp / f"{shard['name']}.{entry['version']}.delta"
        what = f"v{entry['version']}/{shard['name']}.delta"
        wanted = {"run": manifest["run"], "version": str(entry["version"]), "base": str(base)}
        if digest(code_file.read_bytes()) != entry["blake3"]:
            raise WeightsError(f"{what}: digest differs from the manifest")
        apply_codes(code_file, what, wanted, tensor)
        base = entry["version"]
        code_file.unlink()


def apply_codes(
    file: Path, what: str, wanted: dict[str, str], tensor: Callable[[str], torch.Tensor]
) -> None:
    """Apply a delta file to the tensors that `tensor` gives by name. Raises: WeightsError where its
    metadata is not as wanted, or a code is malformed."""
    with safe_open(file, framework="pt") as f:
        found = f.metadata()
        if {key: found.get(key) for key in wanted} != wanted:
            raise WeightsError(f"{what} is of {found}, not of {wanted}")
        for name in f.keys():
            try:
                delta.apply(f.get_tensor(name).numpy().tobytes(), tensor(name))
            except ValueError as e:
                raise WeightsError(f"{what}, {name}: {e}") from None


def prove(path: Path, manifest: dict, workers: ThreadPoolExecutor, stop: threading.Event) -> None:
    """Check a directory against its manifest: every static file's digest, every tensor's dtype,
    shape and digest. Raises: WeightsError naming the first file or tensor that differs."""
    for name, want in manifest["static"]["files"].items():
        if digest((path / name).read_bytes()) != want["blake3"]:
            raise WeightsError(f"{path / name}: digest differs from the manifest")
    left = {name: want for shard in manifest["shards"] for name, want in shard["tensors"].items()}

    def check(named: tuple[str, torch.Tensor]) -> None:
        if stop.is_set():
            raise WeightsError("stopped")
        name, tensor = named
        if (found := describe(tensor)) != (want := left.pop(name, None)):
            raise WeightsError(
                f"{path}: tensor {name} differs from the manifest: {found} instead of {want}"
            )

    list(workers.map(check, read_tensors(path)))
    if left:
        raise WeightsError(
            f"{path}: {len(left)} tensors of the manifest are missing, {next(iter(left))} among "
            "them"
        )


async def fetch(
    manifest: dict, root: Path, have: Path | None, hub: str, headers: dict
) -> tuple[Path, dict]:
    """`receive`, off the event loop. A caller that is cancelled stops it."""
    source, pool = Source(hub, headers), ThreadPoolExecutor(1)
    work = asyncio.get_running_loop().run_in_executor(pool, receive, manifest, root, have, source)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        source.stop.set()
        with contextlib.suppress(WeightsError, WaitOver):
            await work
        raise
    finally:
        pool.shutdown(wait=False)
