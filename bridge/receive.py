"""New weights on a rollout node: pull what leads from the version at hand to the new one, patch a
copy, prove it.

A version is a directory `v{N}` that opens in vLLM, beside the manifest it was proven against. Per
shard (a trainer rank's share) the cheapest way by bytes is taken: the chain of deltas from the
shard at hand, or the newest whole copy and the chain from there. A directory has its name only when
every tensor's digest is right; whatever is found wrong refuses the update, and the old directory
was not touched.

All of it runs in threads at a low priority, so that vLLM keeps generating; sockets, files, hashes
and codecs leave Python's lock alone.
"""

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
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


class NoRoom(WeightsError):
    """The node's directory is too small for the weights, or cannot be written: nothing that the
    trainer could mend."""


# ---- what to pull --------------------------------------------------------------------------------
def path_to(shard: dict, version: int, held: int | None) -> list[dict]:
    """The files of a shard to apply in turn, the fewest bytes that lead to `version`: after `held`,
    if that is at hand, or from a whole copy. Raises: WeightsError when none does."""
    best: dict[int, tuple[int, list[dict]]] = {} if held is None else {held: (0, [])}
    for file in sorted(shard["files"], key=lambda f: f["version"]):
        cost, files = (
            (0, []) if file["kind"] == "full" else best.get(file["version"] - 1, (None, []))
        )
        found = best.get(file["version"])
        if cost is not None and (found is None or cost + file["bytes"] < found[0]):
            best[file["version"]] = (cost + file["bytes"], [*files, file])
    if version not in best:
        raise WeightsError(
            f"no way to v{version} of {shard['name']} from v{held}: {len(shard['files'])} files"
        )
    return best[version][1]


def header_of(shard: dict) -> bytes:
    """What the shard's safetensors file must start with."""
    size = lambda t: torch.Size(t["shape"]).numel() * DTYPES[t["dtype"]].itemsize
    return safetensors_header(
        {n: (t["dtype"], t["shape"], size(t)) for n, t in shard["tensors"].items()}, {}
    )


def full_bytes(shard: dict) -> int:
    header = header_of(shard)
    ends = [t["data_offsets"][1] for n, t in json.loads(header[8:]).items() if n != "__metadata__"]
    return len(header) + max(ends)


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
@dataclass
class Source:
    """The hub and its fellow servers: where files come from, and when to give up."""

    hub: str
    headers: dict[str, str]
    stop: threading.Event = field(default_factory=threading.Event)

    def pull(self, url: str, version: int, name: str, fd: int, start: int, end: int) -> None:
        """Bytes start..end of a file into the same place of fd. What breaks off is resumed where it
        was. Raises: WeightsError when it is refused or does not move for PATIENCE_S."""
        to, attempt = urlsplit(url or self.hub), 0
        what, buffer = f"v{version}/{name} from {to.netloc}", memoryview(bytearray(1 << 20))
        wait = Wait("weights fetch", PATIENCE_S, whom=what)
        connect = (
            http.client.HTTPSConnection if to.scheme == "https" else http.client.HTTPConnection
        )
        while start < end:
            if self.stop.is_set():
                raise WeightsError("stopped")
            try:
                with contextlib.closing(connect(to.hostname, to.port, timeout=5.0)) as connection:
                    headers = {**self.headers, "Range": f"bytes={start}-{end - 1}"}
                    connection.request(
                        "GET", f"{to.path.rstrip('/')}/weights/{version}/{name}", headers=headers
                    )
                    response = connection.getresponse()
                    if response.status >= 500:
                        raise ConnectionError(f"status {response.status}")
                    if response.status != 206:
                        raise WeightsError(
                            f"{what}: status {response.status}, {response.read(300)!r}"
                        )
                    while start < end:
                        if self.stop.is_set():
                            raise WeightsError("stopped")
                        if not (count := response.readinto(buffer[: end - start])):
                            raise ConnectionError("the connection was closed")
                        write(fd, buffer[:count], start)
                        start, attempt, wait = (
                            start + count,
                            0,
                            Wait("weights fetch", PATIENCE_S, whom=what),
                        )
            except (OSError, http.client.HTTPException) as e:
                wait.check(f"at byte {start} of {end}; {e!r}")
                self.stop.wait(backoff_s(attempt, most=2.0))
                attempt += 1


def write(fd: int, data, at: int) -> None:
    try:
        while data:
            count = os.pwrite(fd, data, at)
            data, at = data[count:], at + count
    except OSError as e:  # of this machine, and not of the link: no retry
        raise NoRoom(f"cannot write weights: {e}") from None


# ---- one update ----------------------------------------------------------------------------------
def receive(
    manifest: dict, root: Path, have: Path | None, source: Source
) -> tuple[Path, dict[str, float]]:
    """Bring a version to `root/v{N}`, proven; `have`, an older one, is left as it is. Returns it
    and the seconds and bytes of its parts.

    Raises: WeightsError when what arrived is not what the manifest says; WaitOver for the network.
    """
    # Of this thread, on Linux, and those it starts: a tenth of a core where all are busy, for lower
    # than that a small machine would never be done.
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
    version, start = manifest["version"], time.perf_counter()
    final, tmp = root / f"v{version}", root / f"v{version}.tmp"
    old = (
        json.loads((have / MANIFEST).read_text())
        if have
        else {"run": "", "shards": [], "static": {"files": {}}}
    )
    kind = lambda shard: [(n, t["dtype"], t["shape"]) for n, t in shard["tensors"].items()]
    known = {shard["name"]: kind(shard) for shard in old["shards"] if old["run"] == manifest["run"]}
    paths = {
        shard["name"]: path_to(
            shard, version, old["version"] if known.get(shard["name"]) == kind(shard) else None
        )
        for shard in manifest["shards"]
    }
    pulled = [(name, file) for name, path in paths.items() for file in path]
    need = sum(map(full_bytes, manifest["shards"])) + sum(
        f["bytes"] for _, f in pulled if f["kind"] == "delta"
    )
    check_room(root, need, need if have is None else 0)
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        with ThreadPoolExecutor(STREAMS) as streams:
            jobs, fds = [], []
            static = manifest["static"]
            for name, want in static["files"].items():
                if old["static"]["files"].get(name) == want:
                    os.link(have / name, tmp / name)
                else:
                    jobs += ranges(tmp / name, "", static["version"], name, want["bytes"], fds)
            for name, file in pulled:
                there = name + SUFFIX[file["kind"]]
                here = tmp / (
                    there if file["kind"] == "full" else f"{name}.{file['version']}.delta"
                )
                jobs += ranges(here, file["url"], file["version"], there, file["bytes"], fds)
            # the first range of every file first, so that all nodes send at once
            jobs.sort(key=lambda job: job[4])
            try:
                for done in [streams.submit(source.pull, *job) for job in jobs]:
                    done.result()
            except BaseException:
                source.stop.set()  # the others end at their next chunk
                raise
            finally:
                streams.shutdown(cancel_futures=True)
                for fd in fds:
                    os.close(fd)
        fetched = time.perf_counter()
        threads = max(1, min(8, cores() // 8))  # vLLM's share of the machine is the larger one
        with ThreadPoolExecutor(threads) as workers:
            list(
                workers.map(
                    lambda shard: patch(shard, paths[shard["name"]], manifest, tmp, have),
                    manifest["shards"],
                )
            )
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
        "fetch_bytes": sum(file["bytes"] for _, file in pulled),
    }


def check_room(root: Path, need: int, later: int) -> None:
    """Raises: NoRoom unless `need` bytes are free; for the first version also what the second will
    take beside it."""
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free < need + later:
        what = (
            "two versions, of which one replaces the other"
            if later
            else "the new version beside the old"
        )
        raise NoRoom(
            f"{root} has {free / 2**30:.2f} GiB free, and {what} need "
            f"{(need + later) / 2**30:.2f}: "
            "choose another directory with --dir"
        )


def ranges(path: Path, url: str, version: int, name: str, size: int, fds: list[int]) -> list[tuple]:
    """Source.pull's arguments for the ranges of a file, whose room is taken here: a full disk shows
    now."""
    fds.append(fd := os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600))
    if size:
        os.posix_fallocate(fd, 0, size)
    return [
        (url, version, name, fd, at, min(at + RANGE_BYTES, size))
        for at in range(0, size, RANGE_BYTES)
    ]


def patch(shard: dict, path: list[dict], manifest: dict, tmp: Path, have: Path | None) -> None:
    """The shard's whole file in `tmp`: the one pulled, or a copy of the one at hand, and the deltas
    on it."""
    file = tmp / (shard["name"] + SUFFIX["full"])
    if not file.exists():
        shutil.copyfile(have / file.name, file)
    base = next((f["version"] for f in path if f["kind"] == "full"), None)
    if base is None:
        base = json.loads((have / MANIFEST).read_text())["version"]
    if file.stat().st_size != (size := full_bytes(shard)):
        raise WeightsError(f"{file}: {file.stat().st_size} bytes, not {size}")
    # writing to it writes the file
    whole = torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8)
    header = header_of(shard)
    if whole[: len(header)].numpy().tobytes() != header:
        raise WeightsError(f"{file}: header differs from the manifest")
    where = {n: t["data_offsets"] for n, t in json.loads(header[8:]).items() if n != "__metadata__"}
    for entry in (f for f in path if f["kind"] == "delta"):
        code_file = tmp / f"{shard['name']}.{entry['version']}.delta"
        if digest(code_file.read_bytes()) != entry["blake3"]:
            raise WeightsError(
                f"v{entry['version']}/{shard['name']}.delta: digest differs from the manifest"
            )
        with safe_open(code_file, framework="pt") as f:
            found, wanted = (
                f.metadata(),
                {"run": manifest["run"], "version": str(entry["version"]), "base": str(base)},
            )
            if {key: found.get(key) for key in wanted} != wanted:
                raise WeightsError(
                    f"v{entry['version']}/{shard['name']}.delta is of {found}, not of {wanted}"
                )
            for name in f.keys():
                low, high = where[name]
                tensor = whole[len(header) + low : len(header) + high].view(
                    DTYPES[shard["tensors"][name]["dtype"]]
                )
                try:
                    delta.apply(f.get_tensor(name).numpy().tobytes(), tensor)
                except ValueError as e:
                    raise WeightsError(
                        f"v{entry['version']}/{shard['name']}.delta, {name}: {e}"
                    ) from None
        base = entry["version"]
        code_file.unlink()


def prove(path: Path, manifest: dict, workers: ThreadPoolExecutor, stop: threading.Event) -> None:
    """Check a directory against its manifest: every static file's digest, every tensor's dtype,
    shape and digest.

    Raises: WeightsError naming the first file or tensor that differs.
    """
    for name, want in manifest["static"]["files"].items():
        if digest((path / name).read_bytes()) != want["blake3"]:
            raise WeightsError(f"{path / name}: digest differs from the manifest")
    left = {name: want for shard in manifest["shards"] for name, want in shard["tensors"].items()}

    def check(named):
        if stop.is_set():
            raise WeightsError("stopped")
        if (found := describe(named[1])) != (want := left.pop(named[0], None)):
            raise WeightsError(
                f"{path}: tensor {named[0]} differs from the manifest: {found} instead of {want}"
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
