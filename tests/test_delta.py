"""delta.py: the new version comes back bit for bit, and no bytes make it write anywhere else."""

import pytest
import torch

import delta

INTS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def patterns(dtype, *values):
    """A tensor of these bit patterns, given as unsigned integers."""
    bits = torch.iinfo(INTS[dtype]).bits
    return torch.tensor([v - (v >> (bits - 1) << bits) for v in values], dtype=INTS[dtype]).view(dtype)


def same_bits(a, b):
    return torch.equal(a.view(INTS[a.dtype]), b.view(INTS[b.dtype]))


def patched(old, new):
    result = old.clone()
    delta.apply(delta.encode(old, new), result)
    return result


@pytest.mark.parametrize("dtype", INTS)
def test_apply_of_encode_gives_the_new_bits_whatever_they_are(dtype):
    """200 seeded cases: any patterns to any others, where none, one, few, half or all of them changed."""
    info = torch.iinfo(INTS[dtype])
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        size = int(torch.randint(1, 3000, (), generator=g))
        old = torch.randint(info.min, info.max, (size,), generator=g, dtype=INTS[dtype])
        other = torch.randint(info.min, info.max, (size,), generator=g, dtype=INTS[dtype])
        small = old + torch.randint(-3, 4, (size,), generator=g, dtype=INTS[dtype])
        share = (0, 0.001, 0.03, 0.5, 1)[seed % 5]
        changed = torch.rand(size, generator=g) < share
        new = torch.where(changed, other if seed % 2 else small, old)
        assert same_bits(patched(old.view(dtype), new.view(dtype)), new.view(dtype)), seed
        assert delta.encode(old.view(dtype), old.clone().view(dtype)) == b""
