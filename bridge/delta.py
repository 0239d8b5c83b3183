"""What changed in a tensor from one version to the next, bit for bit, in few bytes.

A bf16 weight moves only when its fp32 master crosses a rounding boundary. A step at RL learning
rates changes a few per cent of the weights, most of them by one unit in the last place. A code says
where and by how much:

- where: for each changed element the number of unchanged ones before it, in 16 bits. 65535 stands
  for that many unchanged elements and no change after them, so a longer gap takes several entries;
- by how much: a difference of integers. A float's bit pattern is a sign and a magnitude. Written as
  two's complement it counts through the floats in order, with -0.0 just below 0.0. So a small step
  is a small number, across zero too, and the step between any two patterns (NaN payloads) is some
  number.

Both are cut into planes: the low bytes of all entries, then the next higher ones. Each plane is
compressed by itself. The low bytes are skewed and the higher ones nearly all zero, so rare long
gaps and large steps need no other escape.

Applying a code twice steps twice. The base must be the very bytes that the code was made from, and
the result is verified by its digest: receive.py patches a copy of a verified version, and starts
again from that version if the digest is wrong.
"""

import struct

import numpy as np
import torch
import zstandard

# element size, elements, gap entries, changed elements; the planes' lengths follow
_HEADER = struct.Struct("<BQQQ")
_SKIP = 65535  # a gap entry: so many unchanged elements, and no changed one
_BIAS = 127  # steps from -127 to 128 have zeros in all bytes but the lowest
# The low bytes are nearly independent: Huffman coding suits them, and matches only cost bytes. So
# zstd is told to look for as few matches as it can. Against its plain level 1 the steps shrink by a
# tenth, at the same speed.
_ZSTD = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6)


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's bit patterns as signed integers, sharing its memory."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu", (
        "deltas are of contiguous tensors in host memory"
    )
    return tensor.detach().view(-1).view(torch.uint8).numpy().view(f"i{tensor.element_size()}")


def _ordered(bits: np.ndarray) -> np.ndarray:
    """Sign and magnitude to two's complement and, the same operation, back."""
    info = np.iinfo(bits.dtype)
    return bits ^ ((bits >> (info.bits - 1)) & info.max)


def _planes(numbers: np.ndarray) -> list[np.ndarray]:
    return list(np.ascontiguousarray(numbers.view(np.uint8).reshape(-1, numbers.itemsize).T))


def encode(old: torch.Tensor, new: torch.Tensor) -> bytes:
    """The code that turns `old` into `new`, of the same dtype and shape; b"" when they are equal,
    bit for bit."""
    assert old.dtype == new.dtype and old.shape == new.shape, (
        f"{old.dtype} {old.shape}, {new.dtype} {new.shape}"
    )
    a, b = _bits(old), _bits(new)
    where = np.flatnonzero(a != b)
    if len(where) == 0:
        return b""
    gaps = np.diff(where, prepend=-1) - 1
    if gaps.max() >= _SKIP:
        gaps = np.insert(gaps % _SKIP, np.repeat(np.arange(len(gaps)), gaps // _SKIP), _SKIP)
    # wraps around, and back in apply
    steps = _ordered(b.take(where)) - _ordered(a.take(where)) + a.dtype.type(_BIAS)
    zstd = zstandard.ZstdCompressor(compression_params=_ZSTD)
    frames = [zstd.compress(plane) for plane in _planes(gaps.astype("<u2")) + _planes(steps)]
    header = _HEADER.pack(a.itemsize, a.size, len(gaps), len(where))
    return b"".join([header, *(struct.pack("<Q", len(f)) for f in frames), *frames])


def changed(code: bytes) -> int:
    """How many elements a code of `encode` changes."""
    return _HEADER.unpack_from(code)[3] if code else 0


def apply(code: bytes, tensor: torch.Tensor) -> None:
    """Turn a tensor that equals `old` into `new`, in place. Raises: ValueError when the code is
    malformed or the tensor has another size; the tensor is then unchanged."""
    if not code:
        return
    bits = _bits(tensor)
    if len(code) < _HEADER.size:
        raise ValueError(f"delta of {len(code)} bytes is shorter than its header")
    itemsize, numel, entries, changed = _HEADER.unpack_from(code)
    if (itemsize, numel) != (bits.itemsize, bits.size):
        raise ValueError(
            f"delta of {numel} elements of {itemsize} bytes, tensor has {bits.size} of "
            f"{bits.itemsize}"
        )
    if not 0 < changed <= entries <= numel:  # bounds what is decompressed below
        raise ValueError(
            f"delta changes {changed} elements in {entries} entries, tensor has {numel}"
        )
    start = _HEADER.size + 8 * (2 + itemsize)
    if len(code) < start:
        raise ValueError(f"delta of {len(code)} bytes is shorter than its header")
    planes = []
    for i, length in enumerate(struct.unpack_from(f"<{2 + itemsize}Q", code, _HEADER.size)):
        planes.append(_decompress(code[start : start + length], entries if i < 2 else changed))
        start += length
    if start != len(code):
        raise ValueError(f"delta has {len(code)} bytes, not the {start} its header says")
    gaps = np.stack(planes[:2], axis=1).view("<u2").reshape(-1).astype(np.int64)
    steps = np.stack(planes[2:], axis=1).view(bits.dtype).reshape(-1)
    is_change = gaps != _SKIP
    where = (np.cumsum(gaps + is_change) - 1)[is_change]
    if len(where) != changed or where[-1] >= numel:
        raise ValueError(
            f"delta changes {len(where)} elements up to {where[-1:]}, not {changed} of {numel}"
        )
    bits[where] = _ordered(_ordered(bits[where]) + (steps - bits.dtype.type(_BIAS)))


def _decompress(frame: bytes, size: int) -> np.ndarray:
    try:
        # said before any of it is allocated
        if zstandard.get_frame_parameters(frame).content_size != size:
            raise ValueError(f"a plane of the delta is not {size} bytes")
        return np.frombuffer(
            zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False), np.uint8
        )
    except zstandard.ZstdError as e:
        raise ValueError(f"a plane of the delta is damaged: {e}") from None
