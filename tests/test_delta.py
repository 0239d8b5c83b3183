"""delta.py: the new version comes back bit for bit, and no bytes make it write anywhere else."""

import struct

import pytest
import torch
import zstandard

from bridge import delta

INTS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def patterns(dtype, *values):
    """A tensor of these bit patterns, given as unsigned integers."""
    bits = torch.iinfo(INTS[dtype]).bits
    return torch.tensor([v - (v >> (bits - 1) << bits) for v in values], dtype=INTS[dtype]).view(
        dtype
    )


def same_bits(a, b):
    return torch.equal(a.view(INTS[a.dtype]), b.view(INTS[b.dtype]))


def patched(old, new):
    result = old.clone()
    delta.apply(delta.encode(old, new), result)
    return result


@pytest.mark.parametrize("dtype", INTS)
def test_apply_of_encode_gives_the_new_bits_whatever_they_are(dtype):
    """200 seeded cases: any patterns to any others, where none, one, few, half or all of them
    changed."""
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


@pytest.mark.parametrize("dtype", INTS)
def test_signed_zeros_infinities_nan_payloads_and_denormals_all_become_each_other(dtype):
    """Both ends of each half of the patterns, and each pair of them."""
    top, exponent = (
        1 << torch.iinfo(INTS[dtype]).bits - 1,
        patterns(dtype, 0).fill_(torch.inf).view(INTS[dtype]).item(),
    )
    # 0, denormals, largest, inf, NaNs
    half = [0, 1, 2, exponent - 1, exponent, exponent + 1, top - 1]
    values = [sign + value for sign in (0, top) for value in half]
    old = patterns(dtype, *[a for a in values for _ in values])
    new = patterns(dtype, *[b for _ in values for b in values])
    assert same_bits(patched(old, new), new)
    assert delta.changed(delta.encode(old, new)) == len(values) * (len(values) - 1)


@pytest.mark.parametrize(
    "changed",
    [
        [65534],
        [65535],
        [65536],
        [0, 65535],
        [0, 65536],
        [0, 65537],
        [131069],
        [131070],
        [131071],
        [1, 131072, 300000],
        [299999, 300000],
        [300000],
    ],
)
def test_gaps_too_long_for_16_bits_are_kept(changed):
    old = torch.zeros(300001, dtype=torch.bfloat16)
    new = old.clone()
    new[changed] = 1
    code = delta.encode(old, new)
    assert (
        same_bits(patched(old, new), new)
        and delta.changed(code) == len(changed)
        and len(code) < 200
    )


def test_tensors_without_dimensions_and_without_elements():
    for shape in ((), (1,), (0,), (3, 0), (2, 3, 4)):
        old, new = torch.zeros(shape), torch.ones(shape)
        assert same_bits(patched(old, new), new) and (old.numel() > 0) == bool(
            delta.encode(old, new)
        )


def test_a_step_of_adamw_takes_at_most_0_6_of_the_bytes_of_xor_and_zstd():
    """Why steps are what is sent, and not values: the promise of the module's docstring, on 1 M
    weights."""
    g = torch.Generator().manual_seed(0)
    for lr in (1e-6, 3e-6, 1e-5):
        p = torch.nn.Parameter((torch.randn(1 << 20, generator=g) * 0.02).bfloat16().float())
        optimizer = torch.optim.AdamW([p], lr=lr)
        for _ in range(3):
            p.grad, old = torch.randn(1 << 20, generator=g), p.detach().bfloat16()
            optimizer.step()
        code, xor = (
            delta.encode(old, new := p.detach().bfloat16()),
            old.view(torch.int16) ^ new.view(torch.int16),
        )
        assert len(code) <= 0.6 * len(zstandard.ZstdCompressor(level=1).compress(xor.numpy())), lr


# ---- damaged codes -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sample():
    g = torch.Generator().manual_seed(3)
    old = torch.randint(-32768, 32767, (200000,), generator=g, dtype=torch.int16)
    new = old.clone()
    # and one far behind them, so that there are long gaps
    where = torch.randint(0, 60000, (700,), generator=g)
    new[where] += torch.randint(-200, 200, (700,), generator=g, dtype=torch.int16)
    new[199999] += 1
    return old.view(torch.bfloat16), new.view(torch.bfloat16), delta.encode(old, new)


def refused(code, old):
    """Whether apply raised; it must have left the tensor alone then, and what lies around it in any
    case."""
    around = torch.full((old.numel() + 2000,), 7, dtype=torch.int16)
    target = around[1000:-1000].view(torch.bfloat16)
    target.copy_(old)
    try:
        delta.apply(code, target)
    except ValueError:
        assert same_bits(target, old)
        return True
    finally:
        assert (around[:1000] == 7).all() and (around[-1000:] == 7).all()
    return False


def test_every_truncation_is_refused_and_changes_nothing(sample):
    old, _, code = sample
    assert all(refused(code[:length], old) for length in range(1, len(code)))
    assert refused(code + b"\0", old)


def test_flipped_bits_never_write_outside_the_tensor(sample):
    """Most are refused; what is not gives other weights, which their digest shows
    (test_weights.py)."""
    old, _, code = sample
    g = torch.Generator().manual_seed(4)
    # all of the header
    bits = [*range(8 * 80), *torch.randint(0, 8 * len(code), (2000,), generator=g).tolist()]
    flipped = []
    for bit in bits:
        damaged = bytearray(code)
        damaged[bit // 8] ^= 1 << bit % 8
        flipped.append(refused(bytes(damaged), old))
    assert all(flipped[: 8 * delta._HEADER.size])  # sizes and counts
    for _ in range(300):
        refused(bytes(torch.randint(0, 256, (200,), generator=g, dtype=torch.uint8).tolist()), old)


def test_a_code_for_another_tensor_is_refused(sample):
    old, _, code = sample
    for other in (
        old[:-1],
        old.float(),
        torch.zeros(0, dtype=torch.bfloat16),
        old.view(torch.int16)[: len(old) // 2],
    ):
        with pytest.raises(ValueError, match="elements of"):
            delta.apply(code, other.clone())


def test_a_plane_that_would_unpack_to_more_than_it_may_is_refused_before_it_is_unpacked():
    """A few bytes of zstd can be terabytes: the size is checked where it is written, and it must be
    written."""
    tensor = torch.zeros(1000, dtype=torch.bfloat16)
    # a frame that claims 32 TiB, and is empty
    huge = struct.pack("<IBQ", 0xFD2FB528, 0xE0, 1 << 45) + b"\x01\0\0"
    unsaid = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10))
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    good = zstandard.ZstdCompressor().compress(bytes(10))
    for plane in (huge, unsaid, bomb, good[:-1], good + good, b""):
        code = delta._HEADER.pack(2, 1000, 10, 10) + struct.pack(
            "<4Q", *map(len, [good, good, plane, good])
        )
        with pytest.raises(ValueError, match="plane of the delta"):
            delta.apply(code + good + good + plane + good, tensor)
    assert not tensor.any()


def test_counts_that_do_not_fit_the_tensor_are_refused():
    """Positions behind the end, fewer or more changes than said."""
    tensor, pack = torch.zeros(1000, dtype=torch.bfloat16), zstandard.ZstdCompressor().compress

    def code(low, high, entries, changed):
        planes = [pack(bytes(p)) for p in (low, high, [127] * changed, [0] * changed)]
        lengths = struct.pack("<4Q", *map(len, planes))
        return delta._HEADER.pack(2, 1000, entries, changed) + lengths + b"".join(planes)

    delta.apply(code([0, 99], [0, 1], 2, 2), tensor)  # 1 + 355 elements on: a good one
    for low, high, changed in (
        ([0, 231], [0, 3], 2),
        ([255, 0], [255, 0], 1),
        ([0, 0], [0, 0], 1),
        ([255], [255], 1),
    ):
        with pytest.raises(ValueError, match="delta changes"):
            delta.apply(code(low, high, len(low), changed), tensor)
