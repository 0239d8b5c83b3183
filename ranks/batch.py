"""From the groups of a step to packed micro-batches: what lies between the hub and the model.

Rank 0 turns the groups into one safetensors blob (`pack_batch`) that every rank gets; each rank
cuts its own micro-batches from it (`unpack_batch`). All ranks compute the same assignment, so none
of it needs a message.
"""

import math
from bisect import bisect, insort
from dataclasses import dataclass
from itertools import accumulate, count

import torch
from safetensors.torch import load, save

from bridge.groups import NOT_SAMPLED, Group
from loss import group_advantages


def shaped_rewards(group: Group, cfg) -> torch.Tensor:
    """What the samples of a group are judged by: their rewards, less a penalty for the last tokens
    that they may have. Shapes: (S,). Source: DAPO, arXiv:2503.14476 eq. 13, times a factor: 0 up to
    L - buffer tokens, then a line to -factor at L, the longest that the sample could be."""
    if not cfg.overlong_buffer_tokens:
        return group.rewards
    most = min(cfg.max_new_tokens, cfg.max_total_sequence_length - len(group.prompt_ids))
    over = group.lengths - (most - cfg.overlong_buffer_tokens)
    return group.rewards - cfg.overlong_penalty * (over / cfg.overlong_buffer_tokens).clamp(0, 1)


def left_out(groups: list[Group], cfg) -> dict[str, list[torch.Tensor]]:
    """Which samples of each group take no part in the loss, nor in what it is divided by, and why.
    If that were all, they stay: a step has to have something."""
    # A group of equal rewards teaches nothing, but its tokens count in every mean.
    constant = [
        cfg.drop_zero_variance and shaped_rewards(g, cfg).unique().numel() == 1 for g in groups
    ]
    constant = [bool(c) and not all(constant) for c in constant]
    flat = [torch.full((len(g.rewards),), c) for g, c in zip(groups, constant)]
    # A sample that was cut off is still what its siblings are compared with, as in the seed system.
    long = [g.truncated.bool() & bool(cfg.overlong_filter) & ~f for g, f in zip(groups, flat)]
    if all(bool((f | o).all()) for f, o in zip(flat, long)):
        long = [torch.zeros_like(o) for o in long]
    return {"zero_variance_dropped": flat, "overlong_filtered": long}


def pack_batch(groups: list[Group], cfg) -> bytes:
    """All samples of a step as one safetensors blob, which rank 0 broadcasts. Rows are in group
    order; `update` says which optimizer update a row belongs to, so a dropped sample shifts nobody
    into another update."""
    P, S = len(groups), cfg.num_generations_per_prompt
    rewards_PS, valid_PS, rows_PS = (
        torch.zeros(P, S),
        torch.zeros(P, S).bool(),
        torch.zeros(P, S).bool(),
    )
    out = left_out(groups, cfg)
    rows = [~(flat | long) for flat, long in zip(*out.values())]
    for p, g in enumerate(groups):
        n = len(g.rewards)
        rewards_PS[p, :n], valid_PS[p, :n] = (
            shaped_rewards(g, cfg),
            ~out["zero_variance_dropped"][p],
        )
        rows_PS[p, :n] = rows[p]
    std = cfg.advantage_std if cfg.normalize_rewards else None
    advantages_PS = group_advantages(rewards_PS, valid_PS, cfg.use_leave_one_out_baseline, std)
    tokens = [row.repeat_interleave(g.lengths) for row, g in zip(rows, groups)]
    kept = lambda name: torch.cat([getattr(g, name)[t] for g, t in zip(groups, tokens)])
    prompts = [g.prompt_ids for row, g in zip(rows, groups) for _ in range(int(row.sum()))]
    return save(
        {
            "prompt_ids": torch.tensor([t for ids in prompts for t in ids]),
            "prompt_lengths": torch.tensor([len(ids) for ids in prompts]),
            "token_ids": kept("token_ids").long(),
            "lengths": torch.cat([g.lengths[row] for row, g in zip(rows, groups)]).long(),
            "gen_logprobs": kept("logprobs"),
            "versions": kept("versions"),
            "advantages": advantages_PS[rows_PS],
            "positive": rewards_PS[rows_PS] > 0,
            "prompt": torch.arange(P)[:, None].expand(P, S)[rows_PS],
            "update": (torch.arange(P * S) // cfg.train_global_batch_size).view(P, S)[rows_PS],
        }
    )


@dataclass
class MicroBatch:
    """Whole samples packed into one row of tokens. Loss tokens are padded to the log-prob chunk;
    `mask` tells."""

    tokens_T: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int  # longest sequence
    num_tokens: int  # without padding; 0 if all is masked
    rows_N: torch.Tensor  # positions whose hidden state predicts a sampled token
    targets_N: torch.Tensor  # those tokens
    lengths_B: torch.Tensor  # sampled tokens of each sequence
    mask: torch.Tensor  # and the following: padded to whole chunks
    gen_logprobs: torch.Tensor
    advantages: torch.Tensor
    versions: torch.Tensor
    weights: torch.Tensor  # what a token counts for in the mean that is the loss
    nll_weights: torch.Tensor  # and in the mean over tokens of rewarded samples
    sequence: torch.Tensor  # which sequence of the micro-batch a token is of
    age: torch.Tensor | None = None  # and these are filled in by the step
    prev_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    expert_ids: torch.Tensor | None = None  # (L, t, K) to replay


def fill_bins(row_lengths: list[int], num_bins: int, max_tokens: int, tight: bool):
    """Longest row first, each to the bin with the least in it or (tight, once no bin is empty) with
    the least room that will do. Returns bins as (tokens, number, rows), lightest first; None where
    a row finds no room."""
    bins = [(0, i, []) for i in range(num_bins)]
    for row in sorted(range(len(row_lengths)), key=lambda r: -row_lengths[r]):
        with_room = bisect(bins, (max_tokens - row_lengths[row], math.inf))
        if not with_room:
            return None
        tokens, i, rows = bins.pop(with_room - 1 if tight and bins[0][0] else 0)
        insort(bins, (tokens + row_lengths[row], i, [*rows, row]))
    return bins


def assign_rows(row_lengths: list[int], dp: int, max_tokens: int) -> list[list[list[int]]]:
    """Row indices as [dp rank][micro-batch][...], the same on every rank that computes it.

    Expert parallelism makes the ranks wait for each other in every layer, so each has the same
    number of micro-batches (the fewest found to fit; some are empty where rows are fewer), and
    those of one index are alike: in tokens, as all are, and in attention's T^2, by which they are
    sorted. A token of a 15k sequence costs Qwen3-30B-A3B twice that of a short one, so
    micro-batches with the same tokens may differ by that much in time.
    """
    assert max(row_lengths) <= max_tokens, (
        f"a row of {max(row_lengths)} tokens is above the budget of {max_tokens}"
    )
    fewest = math.ceil(sum(row_lengths) / (dp * max_tokens))
    # Greedy balance fits up to 95-99 % fill; best fit to above 99 %, where "balanced" means little
    # more than "full".
    tries = (
        fill_bins(row_lengths, dp * n, max_tokens, tight)
        for n in count(fewest)
        for tight in (False, True)
    )
    bins = next(filter(None, tries))
    cost = lambda b: b[0] + sum(row_lengths[r] ** 2 for r in b[2]) / max_tokens
    bins.sort(key=cost, reverse=True)
    ranks = [(0, rank, []) for rank in range(dp)]
    # the fullest of one index goes to the rank with the least so far
    for i in range(0, len(bins), dp):
        pairs = zip(sorted(ranks), sorted(bins[i : i + dp], reverse=True))
        ranks = [
            (tokens + bin_tokens, rank, [*mine, rows])
            for (tokens, rank, mine), (bin_tokens, _, rows) in pairs
        ]
    return [mine for _, _, mine in sorted(ranks, key=lambda r: r[1])]


def unpack_batch(blob: bytes, cfg, dp_rank: int, dp: int, device, pad_to: int = 1):
    """For each update of the step: this rank's micro-batches, and the update's (loss tokens,
    samples) on all ranks.

    pad_to: the tensor-parallel degree. Sequence parallelism cuts a micro-batch into that many equal
    slices, so it is padded to a multiple (at least two tokens a slice) with one more sequence, of
    token 0, which no loss row is of.
    """
    batch = load(blob)
    prompts = batch["prompt_ids"].split(batch["prompt_lengths"].tolist())
    samples = batch["token_ids"].split(batch["lengths"].tolist())
    per_token = [batch[n].split(batch["lengths"].tolist()) for n in ("gen_logprobs", "versions")]
    # What was put into a sample is context, and no row of the loss: all that follows counts sampled
    # tokens.
    sampled = [(versions != NOT_SAMPLED).nonzero().flatten() for versions in per_token[1]]
    num_sampled = torch.tensor([len(s) for s in sampled])
    row_lengths = (batch["prompt_lengths"] + batch["lengths"]).tolist()

    def pad(pieces):
        flat = torch.cat(pieces)
        chunks = max(1, math.ceil(len(flat) / cfg.logprob_chunk_size))
        return torch.nn.functional.pad(flat, (0, chunks * cfg.logprob_chunk_size - len(flat))).to(
            device
        )

    updates, counts = [], []
    for update in range(cfg.samples_per_step // cfg.train_global_batch_size):
        rows = (batch["update"] == update).nonzero().flatten().tolist()
        if not rows:
            continue  # every sample of it was dropped
        lengths, prompt, positive = (
            num_sampled[rows],
            batch["prompt"][rows],
            batch["positive"][rows],
        )
        units = prompt if cfg.prompt_level_loss else torch.zeros_like(prompt)
        weights = row_weights(lengths, units if cfg.token_level_loss else torch.arange(len(rows)))
        nll_weights = positive / (lengths * positive).sum().clamp(min=1)
        micro_batches = []
        shortest = min(range(len(rows)), key=lambda i: row_lengths[rows[i]])
        for picked in assign_rows(
            [row_lengths[r] for r in rows], dp, cfg.max_tokens_per_micro_batch
        )[dp_rank]:
            # fewer rows than micro-batches: a masked one keeps this rank's collectives in step
            live = bool(picked)
            picked = picked or [shortest]
            chosen = [rows[i] for i in picked]
            ends = list(accumulate(row_lengths[r] for r in chosen))
            padded = max(2, -(-ends[-1] // pad_to)) * pad_to
            cu_seqlens = torch.tensor(
                [0, *ends] + [padded] * (padded > ends[-1]), dtype=torch.int32
            )
            tokens = torch.cat([t for r in chosen for t in (prompts[r], samples[r])])
            lengths_B = num_sampled[chosen]
            starts = [end - len(samples[r]) for r, end in zip(chosen, ends)]
            rows_N = torch.cat([start + sampled[r] - 1 for r, start in zip(chosen, starts)])
            micro_batches.append(
                MicroBatch(
                    tokens_T=torch.nn.functional.pad(tokens, (0, padded - len(tokens))).to(device),
                    cu_seqlens=cu_seqlens.to(device),
                    max_seqlen=int(cu_seqlens.diff().max()),
                    num_tokens=ends[-1] * live,
                    rows_N=rows_N.to(device),
                    targets_N=torch.cat([samples[r][sampled[r]] for r in chosen]).to(device),
                    lengths_B=lengths_B.to(device),
                    mask=pad([torch.full((len(rows_N),), live)]),
                    gen_logprobs=pad([per_token[0][r][sampled[r]] for r in chosen]),
                    advantages=pad([batch["advantages"][chosen].repeat_interleave(lengths_B)]),
                    versions=pad([per_token[1][r][sampled[r]] for r in chosen]),
                    weights=pad([(weights[picked] * live).repeat_interleave(lengths_B)]),
                    nll_weights=pad([(nll_weights[picked] * live).repeat_interleave(lengths_B)]),
                    sequence=pad([torch.arange(len(chosen)).repeat_interleave(lengths_B)]),
                )
            )
        updates.append(micro_batches)
        counts.append((int(lengths.sum()), len(rows)))
    return updates, counts


# ---- the loss of a micro-batch -------------------------------------------------------------------
def row_weights(lengths_R, units_R):
    """What each token of a row counts for: tokens are averaged within their unit, then the units
    are averaged.

    A unit is the whole optimizer batch (token mean), a prompt, or a row (sequence mean). Counts are
    of the optimizer batch on all ranks, so the sum of micro-batch losses over micro-batches and
    ranks is the loss, and no averaging is needed anywhere. Shapes: all (R,), over all rows of the
    batch.
    """
    units, unit_R = units_R.unique(return_inverse=True)
    tokens_U = torch.zeros(len(units)).index_add(0, unit_R, lengths_R.float())
    return 1 / (len(units) * tokens_U[unit_R]).clamp(min=1)
