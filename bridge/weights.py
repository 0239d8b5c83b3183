"""Files of weights: a Hugging Face checkpoint into the model, and out again to the rollout nodes.
The two ends are publish.py and receive.py.

Every rank owns a share of the checkpoint's tensors (`own_hf`). It copies the share to host memory
between two steps, and encodes, writes and serves it in the background. A version is a directory
`v{N}` on the disk of each trainer node:

    model-00001-of-00004.delta        rank 0's share, as what changed since version N-1 (delta.py);
                                      each rank writes one
    model-00001-of-00004.safetensors  the same share whole: every K-th version, the first and last
                                      of a run, and where the delta would be larger
    model.safetensors.index.json, config.json, tokenizer.json, ...
                                      where all shares are whole; transformers and vLLM open v{N}
    manifest.json                     on rank 0's node, written last: without it there is no version

The manifest has the digest of every tensor of the version, taken from the trainer's memory: a match
at the node covers codec, disks and network. It names the files of this and earlier versions that
lead there, with their sizes and servers:

    {"run": id, "version": 12, "base": 11, "full": false,
     "static": {"version": 0, "files": {name: {"bytes", "blake3"}}},
     "shards": [{"name": "model-00001-of-00004", "tensors": {name: {"dtype", "shape", "blake3"}},
                 "files": [{"version": 12, "kind": "delta", "bytes", "blake3", "url"}, ...]}]}
"""

import itertools
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from blake3 import blake3
from safetensors import SafetensorError, safe_open

MANIFEST, INDEX = "manifest.json", "model.safetensors.index.json"
# What a checkpoint directory has besides its weights; copied to every whole version.
STATIC_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
)
SUFFIX = {"full": ".safetensors", "delta": ".delta"}
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class WeightsError(RuntimeError):
    """Weights that are incomplete, damaged or not the ones expected. The message names the file or
    tensor."""


# ---- safetensors ---------------------------------------------------------------------------------
def tensor_bytes(tensor: torch.Tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def digest(data) -> str:
    return blake3(data).hexdigest()


def describe(tensor: torch.Tensor) -> dict:
    """A tensor's entry in the manifest."""
    return {
        "dtype": _NAMES.get(tensor.dtype),
        "shape": list(tensor.shape),
        "blake3": digest(tensor_bytes(tensor)),
    }


def safetensors_header(
    tensors: dict[str, tuple[str, list[int], int]], metadata: dict[str, str]
) -> bytes:
    """What a safetensors file starts with, for tensors of (dtype, shape, bytes) that lie end to
    end."""
    header, offset = {"__metadata__": {"format": "pt", **metadata}}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return struct.pack("<Q", len(text)) + text


def write_safetensors(
    path: Path,
    tensors: list[tuple[str, torch.Tensor]],
    metadata: dict | None = None,
    hasher: blake3 | None = None,
) -> None:
    """Write CPU tensors as a file that the safetensors library reads: header, buffers, fsync. The
    room is taken first, so a full disk shows before anything is written, and ext4 needs less time
    per byte.

    hasher: gets the file's bytes; hashing takes as long again.
    """
    entries = {
        n: (_NAMES[t.dtype], list(t.shape), t.numel() * t.element_size()) for n, t in tensors
    }
    header = safetensors_header(entries, metadata or {})
    with open(path, "wb") as f:
        os.posix_fallocate(
            f.fileno(), 0, len(header) + sum(size for _, _, size in entries.values())
        )
        started = 0
        for data in (header, *(tensor_bytes(t) for _, t in tensors)):
            f.write(data)
            if hasher is not None:
                hasher.update(data)
            if f.tell() - started >= 32 << 20:
                # "Not needed": the disk starts to write these while the next are copied, and not
                # only at the fsync.
                os.posix_fadvise(f.fileno(), started, f.tell() - started, os.POSIX_FADV_DONTNEED)
                started = f.tell()
        f.flush()
        os.fsync(f.fileno())


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to; None for embedding, last norm and head."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def layer_order(name: str) -> tuple:
    """Sorts tensors as a model uses them: embedding, the layers by number, then norm and head."""
    if (layer := layer_of(name)) is not None:
        return 1, layer, name
    return (0 if "embed" in name else 2), 0, name


def checkpoint_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory: those its index names, else
    model.safetensors. Raises: WeightsError for an index that cannot be read."""
    if not (index := path / INDEX).exists():
        return [path / "model.safetensors"]
    try:
        return [
            path / name
            for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise WeightsError(f"{index}: no index of safetensors files: {e!r}") from None


class Expert:
    """One expert's projection in a tensor that holds a layer's experts; read like a safetensors
    slice."""

    def __init__(self, fused, expert: int, rows: slice):
        self.fused, self.expert, self.rows, self.get_dtype = fused, expert, rows, fused.get_dtype

    def get_shape(self) -> list[int]:
        return [self.rows.stop - self.rows.start, *self.fused.get_shape()[2:]]

    def __getitem__(self, index) -> torch.Tensor:
        return self.fused[self.expert, self.rows][index]


def stored_tensors(path: Path, shapes: dict[str, torch.Size]) -> dict:
    """What a checkpoint directory has for each tensor of a model (`checkpoint_shapes`), in layer
    order, as safetensors slices: only headers are read, but for a head that may be the embedding.

    It may hold what a model has no parameter for: rotary tables, and with tied embeddings a head of
    the same values, or the head alone. A layer's experts may lie in one tensor, as transformers has
    them in memory: gate and up (E, 2F, D), down (E, D, F).

    Raises: WeightsError when a tensor is missing, left over, quantized or of another shape; the
    message names it.
    """
    found = open_slices(path)
    for name in list(found):
        if name.endswith(ROTARY):
            del found[name]  # computed here, as everywhere
        elif name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            found |= experts_of(name, found.pop(name))
    if HEAD in found and HEAD not in shapes:
        tie(found, path)
    for name, stored in found.items():
        shape, wanted = tuple(stored.get_shape()), shapes.get(name)
        if wanted is None:
            raise WeightsError(f"{path}: tensor {name} has no place in this model")
        if shape != tuple(wanted):
            raise WeightsError(f"{path}: {name} is {shape}, config.json makes it {tuple(wanted)}")
        if stored.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise WeightsError(
                f"{path}: {name} is {stored.get_dtype()}: quantized weights cannot be trained"
            )
    if missing := shapes.keys() - found.keys():
        raise WeightsError(
            f"{path}: {len(missing)} tensors are missing, {min(missing, key=layer_order)} among "
            "them"
        )
    return {name: found[name] for name in sorted(found, key=layer_order)}


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROTARY = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")


def open_slices(path: Path) -> dict:
    """A slice of each tensor in a checkpoint directory, by name. Raises: WeightsError for a file
    that cannot be read, and for a tensor that is in two."""
    found = {}
    for file in checkpoint_files(path):
        if not file.exists():
            raise WeightsError(
                f"{file}: no such file; weights are read from it or from the files that {INDEX} "
                "names"
            )
        try:
            f = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as e:
            raise WeightsError(f"{file}: not a safetensors file: {e}") from None
        for name in f.keys():
            if name in found:
                raise WeightsError(f"{path}: tensor {name} is in two files")
            found[name] = f.get_slice(name)
    return found


def experts_of(name: str, fused) -> dict[str, Expert]:
    """Each expert's projections in a tensor that holds a layer's experts."""
    prefix, projection = name.rsplit(".", 1)
    experts, rows, _ = fused.get_shape()
    parts = {"down_proj": slice(0, rows)}
    if projection == "gate_up_proj":
        parts = {"gate_proj": slice(0, rows // 2), "up_proj": slice(rows // 2, rows)}
    return {
        f"{prefix}.{e}.{part}.weight": Expert(fused, e, where)
        for part, where in parts.items()
        for e in range(experts)
    }


def tie(found: dict, path: Path) -> None:
    """Where the head is the embedding, a checkpoint may hold either or both. Leaves the embedding
    alone. Raises: WeightsError when the two differ."""
    head = found.pop(HEAD)
    embedding = found.setdefault(EMBEDDING, head)
    same = head.get_shape() == embedding.get_shape() and all(
        torch.equal(head[at : at + 4096].float(), embedding[at : at + 4096].float())
        for at in range(0, head.get_shape()[0], 4096)
    )
    if not same:
        raise WeightsError(
            f"{path}: {HEAD} differs from {EMBEDDING}, and config.json says tie_word_embeddings: "
            "true; if the head is one of its own, it must say false"
        )


def read_tensors(path: Path) -> Iterable[tuple[str, torch.Tensor]]:
    """(name, tensor) of a whole checkpoint directory, mapped one at a time, layer by layer: vLLM
    converts a layer when all its tensors have come, and keeps those of other layers in memory."""
    files = [safe_open(file, framework="pt") for file in checkpoint_files(path)]
    where = {name: file for file in files for name in file.keys()}
    for name in sorted(where, key=layer_order):
        yield name, where[name].get_tensor(name)


@torch.no_grad()
def load_hf(model, path: str | Path) -> int:
    """Copy a Hugging Face checkpoint into the model: of each tensor, the bytes of this rank's slice
    and no others. Returns how many those were.

    Raises: WeightsError for what `stored_tensors` refuses, and for values that are not finite.
    """
    path, bytes_read = Path(path), 0
    stored = stored_tensors(path, model.cfg.checkpoint_shapes())
    mine = {
        hf: (view, split)
        for name, _ in model.named_parameters()
        for hf, view, split in model.hf_parts(name)
    }
    for name in (name for name in stored if name in mine):
        view, split = mine[name]
        part = stored[name][split.of(stored[name].get_shape())]
        bytes_read += part.nbytes
        if not view.copy_(part).isfinite().all():
            raise WeightsError(f"{path}: {name} is not finite throughout")
    return bytes_read


@torch.no_grad()
def own_hf(model, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor on the device) of this rank's share of the checkpoint, one at a
    time. Every tensor is one rank's, so that all ranks and nodes take part in copying, writing and
    serving. All ranks must exhaust it.

    An expert is never gathered: of the ranks that have it, the replicas take turns by layer. Dense
    tensors go around all ranks; each is gathered over its owner's tp group, and the others do
    nothing for it.
    """
    mesh = model.mesh
    model.await_values()
    replicas = mesh.world_size // mesh.ep  # of an expert
    owners = itertools.cycle(range(mesh.world_size))  # of dense tensors
    for name, p in model.named_parameters():
        split = model.split_of(name)
        if ".experts." in name:
            if layer_of(name) % replicas == mesh.rank // mesh.ep:
                views = model.hf_views(name, p.detach(), first_expert=split.index * len(p))
                yield from ((hf_name, view.to(dtype)) for hf_name, view in views)
            continue
        owner = next(owners)
        if owner // mesh.tp != mesh.dp_rank:
            continue
        whole = p.detach().to(dtype)
        if split.count > 1:
            parts = (
                [torch.empty_like(whole) for _ in range(mesh.tp)] if mesh.rank == owner else None
            )
            dist.gather(whole, parts, dst=owner, group=mesh.tp_group)
            whole = torch.cat(parts[:: mesh.tp // split.count], dim=split.dim) if parts else None
        if mesh.rank == owner:
            yield name, whole


# ---- files of a version --------------------------------------------------------------------------
def fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def put_in_place(tmp: Path) -> None:
    """Rename a written and synced file from NAME.tmp to NAME: a file with its final name is
    whole."""
    tmp.rename(tmp.with_suffix(""))
    fsync(tmp.parent)


def write_text(path: Path, text: str) -> None:
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text)
    fsync(tmp)
    put_in_place(tmp)
