"""A version into a live model by copies alone, where copies are all that its loading comes to.

vLLM's layer-wise reload takes 3 to 5 ms of Python a layer, in which it makes no token, and room for
a layer beside the model. So the first one is watched: which bytes of the files were copied, and to
where in the memory that kernels read. If these copies make up every parameter, and each is found
there just as it is in the file, later versions of the same layout go in by the same copies. What
is quantized, packed, padded or transposed is not found so, and vLLM loads every version.

Needs torch alone.
"""

from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm_tensors import Directory


class View(NamedTuple):
    """Of a file or memory, as a row of elements."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int  # elements

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "View":
        return cls(tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())


class Copy(NamedTuple):
    file: str
    source: View
    into: torch.Tensor  # a view of a tensor of the model


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Watch(TorchDispatchMode):
    """While it is entered: what is copied out of a directory's files, and on. vLLM loads a layer
    into memory of its own, processes it, and copies the results over the model's tensors."""

    def __init__(self, directory: Directory):
        super().__init__()
        self.directory = directory
        self._files = {address(data): file for file, data in directory.bytes.items()}
        # by the address of the memory that now has them
        self._copied: dict[int, list[tuple[str, View, View]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default and not args[0].is_meta:
            self._see(*args[:2])
        return result

    def _see(self, into: torch.Tensor, source: torch.Tensor) -> None:
        start, end = address(source), address(into)
        if file := self._files.get(start):
            self._copied.setdefault(end, []).append((file, View.of(source), View.of(into)))
        elif start != end and start in self._copied and View.of(into) == View.of(source):
            self._copied[end] = self._copied.pop(start)

    @torch.no_grad()
    def proven(self, model: torch.nn.Module) -> list[Copy] | None:
        """The copies; None unless they make up the model. Each tensor is compared on the host."""
        copies = []
        if self._copied.keys() - {address(p) for p in model.parameters()}:
            return None  # some went elsewhere, as into a buffer
        for p in model.parameters():
            end, last = p.storage_offset(), p.storage_offset() + p.numel()
            for file, source, at in sorted(
                self._copied.get(address(p), []), key=lambda step: step[2].offset
            ):
                begin, end = end, end + at.size.numel()
                if (at.dtype, at.offset) != (p.dtype, begin) or end > last:
                    return None
                copies.append(Copy(file, source, p.as_strided(*at[1:])))
            if end != last:
                return None
        are_there = all(
            into.is_contiguous() and torch.equal(into.cpu(), source.to(into.dtype))
            for (*_, into), source in zip(copies, sources(copies, self.directory))
        )
        return copies if are_there else None


def sources(copies: list[Copy], directory: Directory):
    """What each takes from a directory."""
    rows = {}
    for copy in copies:
        dtype, *view = copy.source
        if (row := rows.get((copy.file, dtype))) is None:
            data = directory.bytes[copy.file]
            row = data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)
            rows[copy.file, dtype] = row
        yield row.as_strided(*view)


@torch.no_grad()
def copy_version(copies: list[Copy], directory: Directory) -> None:
    for copy, source in zip(copies, sources(copies, directory)):
        copy.into.copy_(source)
