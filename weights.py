"""Weights on their way: from a Hugging Face checkpoint into the trainer, and from the trainer to vLLM.

A published version is a directory `v{N}` that is a complete Hugging Face checkpoint (safetensors, config.json,
tokenizer) plus `manifest.json`, which says what the other files must contain:

    {"version": 3, "files": {name: {"bytes": n, "blake3": digest}}, "tensors": {name: {"dtype", "shape", "blake3"}}}

The directory is written as `v{N}.tmp`, synced to disk and renamed; the manifest goes last. A reader that finds a
manifest finds everything, and `verify` proves it: each tensor's digest is taken from the trainer's memory before
the file is written, so a match on the far side covers the writer, both disks and the wire.

The part that runs inside vLLM is vllm_engine.py.
"""

import asyncio
import json
import os
import queue
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from blake3 import blake3
from safetensors import safe_open

MANIFEST = "manifest.json"
# What makes a checkpoint directory complete besides its weights; copied to every published version.
STATIC_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
                "merges.txt", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json")  # fmt: skip
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int32: "I32",
           torch.int64: "I64", torch.uint8: "U8"}  # fmt: skip


class WeightsError(RuntimeError):
    """Weights that are incomplete, damaged or not the ones expected. The message names the file or tensor."""


# ---- safetensors ---------------------------------------------------------------------------------------------
def tensor_bytes(tensor: torch.Tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def digest(data) -> str:
    return blake3(data).hexdigest()


def describe(tensor: torch.Tensor) -> dict:
    """A tensor's entry in the manifest."""
    return {"dtype": _DTYPES.get(tensor.dtype), "shape": list(tensor.shape), "blake3": digest(tensor_bytes(tensor))}


def write_safetensors(path: Path, tensors: list[tuple[str, torch.Tensor]]) -> str:
    """Write CPU tensors: header, then buffers, then fsync. Returns the file's digest. The library's save_file copies
    each tensor to bytes first and takes 2 to 5 times as long; what is written here, it reads."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors:
        end = offset + t.numel() * t.element_size()
        header[name] = {"dtype": _DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    hasher = blake3()
    with open(path, "wb") as f:
        for data in (struct.pack("<Q", len(text)), text, *(tensor_bytes(t) for _, t in tensors)):
            hasher.update(data)
            f.write(data)
        f.flush()
        os.fsync(f.fileno())
    return hasher.hexdigest()


def checkpoint_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory: those its index names, else model.safetensors."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        return [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return [path / "model.safetensors"]


def read_tensors(path: Path) -> Iterable[tuple[str, torch.Tensor]]:
    """(name, tensor) of a whole checkpoint directory, one mapped tensor at a time."""
    for file in checkpoint_files(path):
        with safe_open(file, framework="pt") as f:
            for name in f.keys():
                yield name, f.get_tensor(name)


@torch.no_grad()
def load_hf(model, path: str | Path) -> int:
    """Copy a Hugging Face checkpoint into the model: of each tensor, the bytes of this rank's slice and no others.
    Returns how many those were.

    Raises: WeightsError when a tensor is missing, left over, or of another shape; the message names it.
    """
    path, missing, bytes_read = Path(path), model.checkpoint_shapes(), 0
    mine = {hf: (view, split) for name, _ in model.named_parameters() for hf, view, split in model.hf_parts(name)}
    for file in checkpoint_files(path):
        if not file.exists():
            raise WeightsError(f"{file}: no such file")
        with safe_open(file, framework="pt") as f:
            for name in f.keys():
                stored = f.get_slice(name)
                if name not in missing:
                    raise WeightsError(f"{path}: tensor {name} has no place in this model")
                if (shape := torch.Size(stored.get_shape())) != (wanted := missing.pop(name)):
                    raise WeightsError(f"{path}: {name} is {tuple(shape)}, expected {tuple(wanted)}")
                if name in mine:
                    view, split = mine[name]
                    part = stored[split.of(shape)]
                    bytes_read += part.nbytes
                    view.copy_(part)
    if missing:
        raise WeightsError(f"{path}: {len(missing)} tensors are missing, {next(iter(missing))} among them")
    return bytes_read


@torch.no_grad()
def gather_hf(model, dtype: torch.dtype) -> list[tuple[str, torch.Tensor]]:
    """The whole checkpoint in rank 0's host memory; all ranks must call, the others get []. One parameter at a time,
    from the ranks of rank 0's own tp and ep groups: they hold one whole copy of the model."""
    mesh, tensors = model.mesh, []
    for name, p in model.named_parameters():
        split, is_expert = model.split_of(name), ".experts." in name
        group, ranks = (mesh.ep_group, mesh.ep) if is_expert else (mesh.tp_group, mesh.tp)
        if mesh.rank >= ranks:
            continue
        whole = p.detach().to(dtype)
        if group is not None and split.count > 1:
            parts = [torch.empty_like(whole) for _ in range(ranks)] if mesh.rank == 0 else None
            dist.gather(whole, parts, dst=0, group=group)
            whole = torch.cat(parts[:: ranks // split.count], dim=split.dim) if parts else None
        if mesh.rank == 0:
            tensors += model.hf_views(name, whole.to("cpu", copy=True))
    return tensors


# ---- publish -------------------------------------------------------------------------------------------------
def write_version(root: Path, version: int, tensors: list[tuple[str, torch.Tensor]], static: Path) -> Path:
    """Write one version atomically: `v{N}.tmp`, fsync, manifest last, rename. Returns the directory."""
    final, tmp = root / f"v{version}", root / f"v{version}.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    for name in STATIC_FILES:
        if (static / name).exists():
            shutil.copyfile(static / name, tmp / name)
    config = json.loads((tmp / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(tensors[0][1].dtype).removeprefix("torch.")  # what the file holds, for who opens it "auto"
    (tmp / "config.json").write_text(json.dumps(config, indent=1))
    described = {name: describe(tensor) for name, tensor in tensors}
    files = {p.name: {"bytes": p.stat().st_size, "blake3": digest(p.read_bytes())} for p in sorted(tmp.iterdir())}
    model_file = tmp / "model.safetensors"
    model_digest = write_safetensors(model_file, tensors)
    files[model_file.name] = {"bytes": model_file.stat().st_size, "blake3": model_digest}
    manifest = tmp / MANIFEST
    manifest.write_text(json.dumps({"version": version, "files": files, "tensors": described}))
    fsync(manifest)
    shutil.rmtree(final, ignore_errors=True)  # left by a run that is being repeated under the same name
    tmp.rename(final)
    fsync(root)
    return final


def fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


class Publisher:
    """Writes versions from a background thread, one at a time and in order.

    The tensors are copies, so the next step may change the weights while they are written. At most one version waits:
    if the disk is slower than training, publish blocks, visibly in its seconds. A writer that failed
    raises from the next call.
    """

    def __init__(self, root: Path, static: Path, keep: int, on_published: Callable[[int], None]):
        self.root, self.static, self.keep, self.on_published = root, static, keep, on_published
        self.error: Exception | None = None
        self.write_s = 0.0  # of the last version written
        self._jobs: queue.Queue = queue.Queue(maxsize=1)
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def publish(self, version: int, tensors: list[tuple[str, torch.Tensor]]) -> None:
        """tensors: whole, in host memory, and the publisher's from now on (`gather_hf` makes them)."""
        self._raise_if_failed()
        self._jobs.put((version, tensors))

    def close(self) -> None:
        """Wait until all versions are on disk."""
        self._jobs.put(None)
        self._thread.join()
        self._raise_if_failed()

    def _raise_if_failed(self) -> None:
        if self.error is not None:
            raise WeightsError(f"publishing to {self.root} failed: {self.error!r}") from self.error

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self.error is None:  # after a failure only drain, so that publish() can raise instead of block
                try:
                    start = time.perf_counter()
                    version, tensors = job
                    write_version(self.root, version, tensors, self.static)
                    self.write_s = time.perf_counter() - start
                    self.on_published(version)
                    for old in self.root.glob("v*"):
                        if old.name[1:].isdigit() and int(old.name[1:]) <= version - self.keep:
                            shutil.rmtree(old)
                except Exception as e:  # any failure: it must reach the training thread, not die with this one
                    self.error = e


# ---- receive -------------------------------------------------------------------------------------------------
def verify(path: Path, manifest: dict) -> None:
    """Check a directory against its manifest: every file's size and digest, every tensor's dtype, shape and digest.

    Raises: WeightsError naming the first file or tensor that differs.
    """
    for name, want in manifest["files"].items():
        file = path / name
        if not file.exists() or file.stat().st_size != want["bytes"]:
            raise WeightsError(f"{file}: {file.stat().st_size if file.exists() else 'no'} bytes, not {want['bytes']}")
        if file.suffix != ".safetensors" and digest(file.read_bytes()) != want["blake3"]:
            raise WeightsError(f"{file}: digest differs from the manifest")
    left = dict(manifest["tensors"])
    for name, tensor in read_tensors(path):
        found = describe(tensor)
        if found != (want := left.pop(name, None)):
            raise WeightsError(f"{path}: tensor {name} differs from the manifest: {found} instead of {want}")
    if left:
        raise WeightsError(f"{path}: {len(left)} tensors of the manifest are missing, {next(iter(left))} among them")


async def fetch(session, manifest: dict, root: Path, have: Path | None) -> Path:
    """Bring a version from the hub into `root/v{N}`, verified; files that `have` (an older version) already holds
    unchanged are linked instead of fetched.

    Raises: WeightsError when what arrived is not what the manifest says; aiohttp.ClientError for the network.
    """
    final, tmp = root / f"v{manifest['version']}", root / f"v{manifest['version']}.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    held = json.loads((have / MANIFEST).read_text())["files"] if have else {}
    for name, want in manifest["files"].items():
        if Path(name).name != name:
            raise WeightsError(f"manifest names {name!r}, which is not a plain file name")
        if held.get(name) == want:
            os.link(have / name, tmp / name)
            continue
        async with session.get(f"/weights/{manifest['version']}/{name}") as response:
            response.raise_for_status()
            with open(tmp / name, "wb") as f:
                async for chunk in response.content.iter_chunked(1 << 20):
                    f.write(chunk)
    await asyncio.to_thread(verify, tmp, manifest)  # seconds for a large model: meanwhile the node must say it lives
    (tmp / MANIFEST).write_text(json.dumps(manifest))
    shutil.rmtree(final, ignore_errors=True)
    tmp.rename(final)
    return final
