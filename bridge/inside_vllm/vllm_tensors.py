"""A verified directory's tensors as vLLM's worker reads them, and the sum that tells tensors apart.

Needs torch alone.
"""

import json
import math
import mmap
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Place(NamedTuple):
    """Where a tensor's bytes are."""

    file: str
    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Run(NamedTuple):
    """Tensors of one shape that lie end to end in a file: `tensors` (n, *shape) is all of them, the
    first of which is the `first` of those asked for."""

    first: int
    tensors: torch.Tensor


class Layout(NamedTuple):
    """What all versions of a run have in common."""

    headers: dict[str, bytes]  # by file
    places: dict[str, Place]  # by tensor


class Directory:
    """The safetensors files of a directory, mapped: only what is read of a tensor comes from the
    disk. like: of a directory before; its headers are not read again where these are the same.
    Raises: OSError, ValueError or KeyError for what is no checkpoint."""

    def __init__(self, path: Path, like: Layout | None = None):
        index = path / INDEX
        names = {"model.safetensors"}
        if index.exists():
            names = set(json.loads(index.read_text())["weight_map"].values())
        self.bytes: dict[str, torch.Tensor] = {}
        headers = {}
        for name in sorted(names):
            with open(path / name, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            (length,) = struct.unpack("<Q", mapped[:8])
            headers[name] = mapped[: 8 + length]
            self.bytes[name] = torch.frombuffer(mapped, dtype=torch.uint8)
        if like is None or headers != like.headers:
            places = {}
            for name, header in headers.items():
                places |= places_in(name, header)
            like = Layout(headers, places)
        self.layout = like

    @property
    def places(self) -> dict[str, Place]:
        return self.layout.places

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.runs([name])[0].tensors[0]

    def runs(self, names: Iterable[str]) -> list[Run]:
        """Tensors of one shape and dtype, in as few pieces as they lie in."""
        pieces: list[list] = []  # [index of the first, its place, end of the last, count]
        for i, name in enumerate(names):
            place = self.places[name]
            last = pieces[-1] if pieces else None
            if last and (place.file, place.begin) == (last[1].file, last[2]):
                last[2], last[3] = place.end, last[3] + 1
            else:
                pieces.append([i, place, place.end, 1])
        found = []
        for first, place, end, count in pieces:
            flat = self.bytes[place.file][place.begin : end].view(place.dtype)
            found.append(Run(first, flat.view(count, *place.shape)))
        return found


def places_in(file: str, header: bytes) -> dict[str, Place]:
    """header: as it is in the file, with its length before it."""
    entries = json.loads(header[8:])
    entries.pop("__metadata__", None)
    places = {}
    for tensor, entry in entries.items():
        begin, end = (len(header) + offset for offset in entry["data_offsets"])
        shape = tuple(entry["shape"])
        places[tensor] = Place(file, begin, end, DTYPES[entry["dtype"]], shape)
    return places


def by_numbers(name: str) -> list[str | int]:
    """Sorts layer 10 behind layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


# ---- a sum over a tensor's bytes -----------------------------------------------------------------
WORDS = 1 << 20  # at a time: 8 MiB, which a GPU's cache holds
# odd numbers with their ones spread evenly, as signed 64-bit integers: 2^64 / the golden ratio, and
# the two factors of splitmix64
STEP, FACTORS = -0x61C8864680B583EB, (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


def tensor_sum(tensor: torch.Tensor) -> str:
    """64 bits that depend on every byte of a tensor and on its place, made on its device.

    The sum, mod 2^64, of splitmix64's finalizer (Steele, Lea and Flood, 2014) of each 8 bytes
    exclusive-or a number for their place. A difference by chance is missed once in 2^64; it is no
    proof against an adversary.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for begin in range(0, data.numel(), 8 * WORDS):
        part = data[begin : begin + 8 * WORDS]
        if rest := -part.numel() % 8:
            part = torch.nn.functional.pad(part, (0, rest))
        if part.storage_offset() * part.element_size() % 8:
            part = part.clone()  # a view as int64 must be aligned
        x = part.view(torch.int64)
        at = torch.arange(begin // 8 + 1, begin // 8 + 1 + x.numel(), device=x.device)
        x = at.mul_(STEP).bitwise_xor_(x)
        for shift, factor in zip((30, 27), FACTORS):
            x.bitwise_xor_(x >> shift).mul_(factor)
        total += x.bitwise_xor_(x >> 31).sum()
    return f"{math.prod(tensor.shape)}:{total.item() & (1 << 64) - 1:016x}"
