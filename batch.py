"""From the groups of a step to packed micro-batches: what lies between the hub and the model.

Rank 0 turns the groups into one safetensors blob (`pack_batch`) that every rank gets; each rank cuts its own
micro-batches from it (`unpack_batch`). All ranks compute the same assignment, so none of it needs a message.
"""

import math
from dataclasses import dataclass

import torch
from safetensors.torch import load, save

from ledger import Group
from loss import group_advantages, row_weights


def pack_batch(groups: list[Group], cfg) -> bytes:
    """All samples of a step as one safetensors blob, which rank 0 broadcasts. Rows are in group order; `update` says
    which optimizer update a row belongs to, so a dropped sample shifts nobody into another update."""
    P, S = len(groups), cfg.num_generations_per_prompt
    rewards_PS, valid_PS = torch.zeros(P, S), torch.zeros(P, S, dtype=torch.bool)
    # A group of equal rewards teaches nothing, but its tokens count in every mean; if all are so, they stay.
    kept = [p for p, g in enumerate(groups) if not cfg.drop_zero_variance or g.rewards.unique().numel() > 1]
    kept = kept or list(range(P))
    for p in kept:
        rewards_PS[p, : len(groups[p].rewards)] = groups[p].rewards
        valid_PS[p, : len(groups[p].rewards)] = True
    std = cfg.advantage_std if cfg.normalize_rewards else None
    advantages_PS = group_advantages(rewards_PS, valid_PS, cfg.use_leave_one_out_baseline, std)
    groups = [groups[p] for p in kept]
    return save({
        "prompt_ids": torch.tensor([t for g in groups for _ in g.rewards for t in g.prompt_ids]),
        "prompt_lengths": torch.tensor([len(g.prompt_ids) for g in groups for _ in g.rewards]),
        "token_ids": torch.cat([g.token_ids for g in groups]).long(),
        "lengths": torch.cat([g.lengths for g in groups]).long(),
        "gen_logprobs": torch.cat([g.logprobs for g in groups]),
        "versions": torch.cat([g.versions for g in groups]),
        "advantages": advantages_PS[valid_PS],
        "positive": rewards_PS[valid_PS] > 0,
        "prompt": torch.arange(P)[:, None].expand(P, S)[valid_PS],
        "update": (torch.arange(P * S) // cfg.train_global_batch_size).view(P, S)[valid_PS],
    })  # fmt: skip


@dataclass
class MicroBatch:
    """Whole samples packed into one row of tokens. Loss tokens are padded to the log-prob chunk; `mask` tells."""

    tokens_T: torch.Tensor
    cu_seqlens: torch.Tensor
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


def assign_rows(row_lengths: list[int], world_size: int, max_tokens: int) -> list[list[list[int]]]:
    """Rows to ranks, then each rank's rows to micro-batches of at most max_tokens: longest first, to whoever has
    least. Every rank computes the same answer. Returns row indices as [rank][micro-batch][...]."""
    by_length = sorted(range(len(row_lengths)), key=lambda r: -row_lengths[r])
    ranks, loads = [[] for _ in range(world_size)], [0] * world_size
    for row in by_length:
        rank = loads.index(min(loads))
        ranks[rank].append(row)
        loads[rank] += row_lengths[row]
    packed = []
    for rows in ranks:
        bins: list[list[int]] = []
        room: list[int] = []
        for row in rows:
            fits = next((i for i, free in enumerate(room) if free >= row_lengths[row]), None)
            if fits is None:
                bins.append([])
                room.append(max_tokens)
                fits = len(bins) - 1
            bins[fits].append(row)
            room[fits] -= row_lengths[row]
        packed.append(bins)
    return packed


def unpack_batch(blob: bytes, cfg, rank: int, world_size: int, device):
    """For each update of the step: this rank's micro-batches, and the update's (loss tokens, samples) on all ranks."""
    batch = load(blob)
    prompts = batch["prompt_ids"].split(batch["prompt_lengths"].tolist())
    samples = batch["token_ids"].split(batch["lengths"].tolist())
    per_token = [batch[n].split(batch["lengths"].tolist()) for n in ("gen_logprobs", "versions")]
    row_lengths = (batch["prompt_lengths"] + batch["lengths"]).tolist()

    def pad(pieces):
        flat = torch.cat(pieces)
        chunks = max(1, math.ceil(len(flat) / cfg.logprob_chunk_size))
        return torch.nn.functional.pad(flat, (0, chunks * cfg.logprob_chunk_size - len(flat))).to(device)

    updates, counts = [], []
    for update in range(cfg.samples_per_step // cfg.train_global_batch_size):
        rows = (batch["update"] == update).nonzero().flatten().tolist()
        if not rows:
            continue  # every sample of it was dropped
        lengths, prompt, positive = (batch[name][rows] for name in ("lengths", "prompt", "positive"))
        units = prompt if cfg.prompt_level_loss else torch.zeros_like(prompt)
        weights = row_weights(lengths, units if cfg.token_level_loss else torch.arange(len(rows)))
        nll_weights = positive / (lengths * positive).sum().clamp(min=1)
        mine = assign_rows([row_lengths[r] for r in rows], world_size, cfg.max_tokens_per_micro_batch)[rank]
        idle = not mine  # more ranks than samples left: a masked one keeps this rank's collectives in step
        micro_batches = []
        for picked in mine or [[0]]:
            chosen = [rows[i] for i in picked]
            ends = torch.tensor([row_lengths[r] for r in chosen]).cumsum(0)
            lengths_B = batch["lengths"][chosen]
            rows_N = torch.cat([torch.arange(end - n, end) - 1 for end, n in zip(ends, lengths_B)])
            micro_batches.append(
                MicroBatch(
                    tokens_T=torch.cat([t for r in chosen for t in (prompts[r], samples[r])]).to(device),
                    cu_seqlens=torch.nn.functional.pad(ends, (1, 0)).to(device, torch.int32),
                    rows_N=rows_N.to(device),
                    targets_N=torch.cat([samples[r] for r in chosen]).to(device),
                    lengths_B=lengths_B.to(device),
                    mask=pad([torch.full((len(rows_N),), not idle)]),
                    gen_logprobs=pad([per_token[0][r] for r in chosen]),
                    advantages=pad([batch["advantages"][chosen].repeat_interleave(lengths_B)]),
                    versions=pad([per_token[1][r] for r in chosen]),
                    weights=pad([(weights[picked] * (not idle)).repeat_interleave(lengths_B)]),
                    nll_weights=pad([(nll_weights[picked] * (not idle)).repeat_interleave(lengths_B)]),
                    sequence=pad([torch.arange(len(chosen)).repeat_interleave(lengths_B)]),
                )
            )
        updates.append(micro_batches)
        counts.append((int(batch["lengths"][rows].sum()), len(rows)))
    return updates, counts
