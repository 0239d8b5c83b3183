"""batch.py: rows to ranks and micro-batches. What may not change with the layout is checked by
changing the layout."""

import dataclasses
import random
from collections import Counter

import pytest
import torch
from batches import rows_of, unpack_batch

from bridge.groups import Group
from config import Config
from ranks.batch import assign_rows, left_out, pack_batch, shaped_rewards


# ---- packing -------------------------------------------------------------------------------------
def long_tailed(
    seed: int, longest: int, fill: float | None, dp=16, max_tokens=16384, rows=512
) -> list[int]:
    """Log-normal lengths, clipped; with `fill`, scaled until they are that share of a whole number
    of micro-batches."""
    rng = random.Random(seed)
    mu, sigma = rng.choice([(7.0, 1.0), (7.5, 1.0), (7.8, 0.7), (8.0, 0.8)])
    lengths = [min(longest, max(16, int(rng.lognormvariate(mu, sigma)))) for _ in range(rows)]
    bins = sum(lengths) // (dp * max_tokens) * dp
    for _ in range(10 if fill else 0):
        lengths = [
            min(longest, max(16, int(n * fill * bins * max_tokens / sum(lengths)))) for n in lengths
        ]
    return lengths


def bin_sums(packed, values):
    return [[sum(values[r] for r in rows) for rows in rank] for rank in packed]


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 33, 200])
@pytest.mark.parametrize("dp", [1, 2, 3, 16])
def test_each_row_is_packed_once_within_the_budget_and_all_ranks_have_as_many_micro_batches(
    dp, rows
):
    for seed in range(20):
        lengths = [random.Random(f"{seed}/{row}").randint(1, 64) for row in range(rows)]
        packed = assign_rows(lengths, dp, max_tokens=64)
        assert sorted(r for rank in packed for picked in rank for r in picked) == list(range(rows))
        assert len(packed) == dp and len({len(rank) for rank in packed}) == 1
        assert max(map(max, bin_sums(packed, lengths))) <= 64
        empty = sum(not picked for rank in packed for picked in rank)
        assert empty == max(0, dp * len(packed[0]) - rows)  # none without need
        # every rank computes it for itself
        assert packed == assign_rows(list(lengths), dp, max_tokens=64)


@pytest.mark.parametrize("fill", [0.97, 0.98, 0.99])
@pytest.mark.parametrize("longest", [8192, 16384])
def test_a_long_tailed_batch_fills_its_micro_batches_and_loads_ranks_evenly(longest, fill):
    """512 samples, 16 ranks, 16k tokens. Fill is tokens / (ranks * micro-batches * budget). No
    packing can fill what the batch has no tokens for, so this batch has tokens for `fill` of a
    whole number of micro-batches, and the packing must do with that number. Skew is max / mean - 1:
    of tokens over ranks; of what a rank waits for, which is the sum over micro-batches of the
    slowest rank's, in tokens and in time (a token costs 1 + length / 15.1k units in Qwen3-30B-A3B:
    its FLOPs in facts/performance.md)."""
    for seed in range(25):
        lengths = long_tailed(seed, longest, fill)
        packed, total = assign_rows(lengths, 16, 16384), sum(lengths)
        assert total / (16 * len(packed[0]) * 16384) >= fill - 1e-3
        # at 97 % fill a full rank has 3.09 %
        assert max(map(sum, bin_sums(packed, lengths))) * 16 / total - 1 <= 0.031
        wait = lambda sums: sum(map(max, zip(*sums))) * 16 / sum(map(sum, sums)) - 1
        assert wait(bin_sums(packed, lengths)) <= 0.035
        # 0.4 if sorted by tokens
        assert wait(bin_sums(packed, [n + n * n / 15100 for n in lengths])) <= 0.15


def test_a_batch_that_leaves_room_has_the_fewest_micro_batches_and_even_ranks():
    for seed in range(50):
        lengths = long_tailed(seed, 8192, fill=None)
        packed, total = assign_rows(lengths, 16, 16384), sum(lengths)
        least = -(-total // (16 * 16384))
        # there greedy may need one more
        assert len(packed[0]) <= least + (total > 0.995 * least * 16 * 16384)
        assert max(map(sum, bin_sums(packed, lengths))) * 16 / total <= 1.03


def test_the_order_of_rows_does_not_change_the_packing_of_lengths():
    lengths = random.Random(0).sample(range(1, 4000), 300)
    shuffled = random.Random(1).sample(lengths, 300)
    named = lambda lengths: [
        [[lengths[r] for r in rows] for rows in rank] for rank in assign_rows(lengths, 4, 8192)
    ]
    assert named(lengths) == named(shuffled)


def test_a_row_above_the_budget_is_refused():
    with pytest.raises(AssertionError, match="a row of 65 tokens is above the budget of 64"):
        assign_rows([3, 65], 2, max_tokens=64)


# ---- micro-batches -------------------------------------------------------------------------------
CFG = Config(
    num_prompts_per_step=6,
    num_generations_per_prompt=4,
    train_global_batch_size=12,
    max_new_tokens=20,
    max_total_sequence_length=32,
    max_tokens_per_micro_batch=64,
    logprob_chunk_size=16,
)


def random_groups(keep=4):
    """Six groups with token ids from 1, every log-prob unlike the others; of each, `keep` samples
    were returned."""
    g = torch.Generator().manual_seed(0)
    groups = []
    for ordinal in range(6):
        lengths = torch.randint(1, 21, (keep,), generator=g, dtype=torch.int32)
        total = int(lengths.sum())
        groups.append(
            Group(
                ordinal,
                torch.randint(1, 32, (1 + 2 * ordinal,), generator=g).tolist(),
                lengths,
                torch.randint(1, 32, (total,), generator=g, dtype=torch.int32),
                -torch.rand(total, generator=g),
                torch.zeros(total, dtype=torch.int32),
                torch.randint(0, 2, (keep,), generator=g).float(),
                torch.zeros(keep, dtype=torch.uint8),
            )
        )
    return groups


def loss_tokens(cfg, dp, pad_to, keep=4):
    """What the loss sees, over all ranks: how often each (update, log-prob, advantage, weight,
    target, word before)."""
    blob, seen = pack_batch(random_groups(keep), cfg), Counter()
    for rank in range(dp):
        updates, _ = unpack_batch(blob, cfg, rank, dp, torch.device("cpu"), pad_to)
        for u, mb in ((u, mb) for u, micro_batches in enumerate(updates) for mb in micro_batches):
            live = mb.mask[: len(mb.rows_N)]
            per_token = [
                x[mb.mask].tolist()
                for x in (mb.gen_logprobs, mb.advantages, mb.weights, mb.nll_weights)
            ]
            words = [mb.targets_N[live].tolist(), mb.tokens_T[mb.rows_N][live].tolist()]
            seen.update(zip([u] * int(live.sum()), *per_token, *words))
            assert not mb.weights[~mb.mask].any() and not mb.nll_weights[~mb.mask].any()
    return seen


@pytest.mark.parametrize(
    "flags", [{}, {"prompt_level_loss": True}, {"token_level_loss": False, "use_cispo": False}]
)
def test_no_layout_changes_what_the_loss_sees(flags):
    cfg = Config(**{**vars(CFG), **flags})
    whole = loss_tokens(Config(**{**vars(cfg), "max_tokens_per_micro_batch": 4096}), dp=1, pad_to=1)
    assert len(whole) == whole.total() == sum(int(g.lengths.sum()) for g in random_groups())
    for update in (0, 1):  # the weights of an update are those of a mean, whatever it is over
        assert sum(key[3] for key in whole if key[0] == update) == pytest.approx(1.0)
    for dp, pad_to in [(1, 2), (2, 1), (3, 4), (5, 8), (16, 2)]:
        assert loss_tokens(cfg, dp, pad_to) == whole, (dp, pad_to)


@pytest.mark.parametrize("pad_to", [2, 3, 4, 32])
def test_padding_is_one_more_sequence_at_the_end_that_no_loss_row_is_of(pad_to):
    blob, padded = pack_batch(random_groups(), CFG), 0
    plain, wide = (
        [mb for update in unpack_batch(blob, CFG, 0, 4, torch.device("cpu"), n)[0] for mb in update]
        for n in (1, pad_to)
    )
    for a, b in zip(plain, wide, strict=True):
        n = len(a.tokens_T)
        assert len(b.tokens_T) % pad_to == 0 and 2 * pad_to <= len(b.tokens_T) < n + 2 * pad_to
        assert torch.equal(b.tokens_T[:n], a.tokens_T) and not b.tokens_T[n:].any()
        ends = a.cu_seqlens.tolist() + ([len(b.tokens_T)] if len(b.tokens_T) > n else [])
        assert b.cu_seqlens.tolist() == ends and b.cu_seqlens.dtype == torch.int32
        padded += len(b.tokens_T) > n
        for name in ("rows_N", "targets_N", "mask", "weights", "lengths_B", "sequence"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert padded


def test_a_rank_that_gets_no_row_runs_the_shortest_one_masked():
    """Of 6 prompts with 2 samples kept of 4: 6 rows an update for 16 ranks."""
    ranks = [
        unpack_batch(pack_batch(random_groups(2), CFG), CFG, rank, 16, torch.device("cpu"))
        for rank in range(16)
    ]
    assert [seqs for _, seqs in ranks[0][1]] == [6, 6] and all(
        counts == ranks[0][1] for _, counts in ranks
    )
    for update in (0, 1):
        micro_batches = [updates[update] for updates, _ in ranks]
        assert {len(m) for m in micro_batches} == {1}
        live = [mb for (mb,) in micro_batches if mb.mask.any()]
        idle = [mb for (mb,) in micro_batches if not mb.mask.any()]
        assert (len(live), len(idle)) == (6, 10)
        assert {len(mb.tokens_T) for mb in idle} == {min(len(mb.tokens_T) for mb in live)}


# ---- samples that were cut off -------------------------------------------------------------------
def group_of(lengths, rewards, truncated, prompt=(1, 2)):
    ints, total = lambda *x: torch.tensor(x, dtype=torch.int32), sum(lengths)
    return Group(
        0,
        list(prompt),
        ints(*lengths),
        ints(*[3] * total),
        -torch.arange(total) / 100,
        ints(*[0] * total),
        torch.tensor(rewards),
        torch.tensor(truncated).byte(),
    )


def test_a_filtered_sample_leaves_the_loss_and_its_denominators_but_not_the_baseline():
    """As in NeMo RL: the advantages are those of the whole group, and no token of the
    sample is anywhere."""
    groups = [
        group_of([3, 4, 5, 20], [1.0, 0.0, 1.0, 0.0], [0, 0, 0, 1]),
        group_of([2, 2], [1.0, 0.0], [0, 0]),
    ]
    cfg = dataclasses.replace(CFG, num_prompts_per_step=2, train_global_batch_size=8)
    plain, filtered = (
        rows_of(pack_batch(groups, dataclasses.replace(cfg, overlong_filter=on)), cfg)
        for on in (False, True)
    )
    assert plain["lengths"].tolist() == [3, 4, 5, 20, 2, 2] and filtered["lengths"].tolist() == [
        3,
        4,
        5,
        2,
        2,
    ]
    for name in ("advantages", "positive", "prompt", "update", "prompt_lengths"):
        assert filtered[name].tolist() == plain[name][[0, 1, 2, 4, 5]].tolist(), name
    assert (
        torch.equal(filtered["gen_logprobs"][12:], plain["gen_logprobs"][32:])
        and len(filtered["token_ids"]) == 16
    )
    _, counts = unpack_batch(
        pack_batch(groups, dataclasses.replace(cfg, overlong_filter=True)), cfg, 0, 1, "cpu"
    )
    assert counts == [(16, 5)]
    found = left_out(groups, dataclasses.replace(cfg, overlong_filter=True))
    long = [row[:n].tolist() for row, n in zip(found["overlong_filtered"], (4, 2))]
    assert long == [[False] * 3 + [True], [False] * 2]


def test_a_step_of_nothing_but_what_would_be_left_out_is_trained_on_as_it_is():
    cut, flat = group_of([20, 20], [1.0, 0.0], [1, 1]), group_of([3, 3], [1.0, 1.0], [0, 0])
    cfg = dataclasses.replace(
        CFG, num_prompts_per_step=2, overlong_filter=True, drop_zero_variance=True
    )
    count = lambda groups: {why: int(m.sum()) for why, m in left_out(groups, cfg).items()}
    assert count([cut, cut]) == {"zero_variance_dropped": 0, "overlong_filtered": 0}
    assert count([flat, flat]) == {"zero_variance_dropped": 0, "overlong_filtered": 0}
    assert count([cut, flat]) == {"zero_variance_dropped": 2, "overlong_filtered": 0}
    both = group_of([20, 3], [1.0, 0.0], [1, 0])
    assert count([both, flat]) == {"zero_variance_dropped": 2, "overlong_filtered": 1}


def test_the_soft_overlong_penalty_is_dapo_s():
    """L = 20, buffer 5: 0 up to 15 tokens, then a fifth more with each, -1 at 20; times the factor.
    A prompt that leaves its samples less room has its own L."""
    lengths = [1, 15, 16, 18, 20]
    group = group_of(lengths, [1.0, 0.0, 1.0, 0.0, 1.0], [0] * 5)
    cfg = dataclasses.replace(CFG, overlong_buffer_tokens=5)
    penalty = lambda g, **flags: (
        shaped_rewards(g, dataclasses.replace(cfg, **flags)) - g.rewards
    ).tolist()
    assert penalty(group) == pytest.approx([0, 0, -0.2, -0.6, -1.0])
    assert penalty(group, overlong_penalty=0.5) == pytest.approx([0, 0, -0.1, -0.3, -0.5])
    assert penalty(group, overlong_buffer_tokens=0) == [0.0] * 5
    assert penalty(group_of([10, 11, 15], [0.0] * 3, [0] * 3, [1] * 17)) == pytest.approx(
        [0, -0.2, -1.0]
    )
    # what is trained on decides: these are not equally good
    same = group_of([15, 20], [1.0, 1.0], [0, 0])
    found = left_out([same], dataclasses.replace(cfg, drop_zero_variance=True))
    assert not found["zero_variance_dropped"].any()
