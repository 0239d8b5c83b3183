"""From the groups of a step to packed micro-batches: what lies between the hub and the model.

Rank 0 packs the groups into one safetensors blob (`pack_batch`) that every rank gets and opens
(`Batch`). With the advantages of its samples each rank cuts its own micro-batches from it. All
ranks compute the same assignment, so none of it needs a message.
"""

import math
from bisect import bisect, insort
from dataclasses import dataclass
from itertools import accumulate, count

import torch
from safetensors.torch import load, save

from bridge.groups import NOT_SAMPLED, Group


# ---- on rank 0: what the step is trained on ------------------------------------------------------
def shaped_rewards(group: Group, cfg) -> torch.Tensor:
    """What the samples of a group are judged by: their rewards, less a penalty for the last tokens
    that they may have.

    Shapes: (S,). Source: DAPO, arXiv:2503.14476 eq. 13, times a factor: 0 up to L - buffer tokens,
    then a line to -factor at L, the longest that the sample could be.
    """
    if not cfg.overlong_buffer_tokens:
        return group.rewards
    most = min(cfg.max_new_tokens, cfg.max_total_sequence_length - len(group.prompt_ids))
    over = group.lengths - (most - cfg.overlong_buffer_tokens)
    return group.rewards - cfg.overlong_penalty * (over / cfg.overlong_buffer_tokens).clamp(0, 1)


def stacked(values: list[torch.Tensor], num_samples: int) -> torch.Tensor:
    """A value of each sample of each group, (P, S); 0 where a group has fewer samples than S."""
    values_PS = values[0].new_zeros(len(values), num_samples)
    for p, value_S in enumerate(values):
        values_PS[p, : len(value_S)] = value_S
    return values_PS


def sampled(groups: list[Group], num_samples: int) -> torch.Tensor:
    """Where there is a sample, (P, S)."""
    return stacked([torch.ones_like(g.truncated, dtype=torch.bool) for g in groups], num_samples)


def left_out(groups: list[Group], cfg) -> dict[str, torch.Tensor]:
    """Which samples take no part in the loss, nor in what it is divided by, and why. If that were
    all of them they stay: a step has to have something. Shapes: (P, S) bool, by reason."""
    S = cfg.num_generations_per_prompt
    sampled_PS = sampled(groups, S)
    # A group of equal rewards teaches nothing, but its tokens count in every mean.
    equal_P = torch.tensor([shaped_rewards(g, cfg).unique().numel() == 1 for g in groups])
    drop = cfg.drop_zero_variance and not equal_P.all()
    equal_PS = sampled_PS & equal_P[:, None] & drop
    # A sample that was cut off is still what its siblings are compared with, as in NeMo RL.
    long_PS = stacked([g.truncated.bool() for g in groups], S) & ~equal_PS & cfg.overlong_filter
    if not (sampled_PS & ~equal_PS & ~long_PS).any():
        long_PS = torch.zeros_like(long_PS)
    return {"zero_variance_dropped": equal_PS, "overlong_filtered": long_PS}


def trained_lengths(groups: list[Group], omitted: dict[str, torch.Tensor]) -> list[int]:
    """Tokens of each sample that is trained on, with its prompt; omitted: those of `left_out`."""
    out_PS = torch.stack(list(omitted.values())).any(0)
    return [
        len(g.prompt_ids) + length
        for g, out_S in zip(groups, out_PS)
        for length, out in zip(g.lengths.tolist(), out_S.tolist())
        if not out
    ]


def pack_batch(groups: list[Group], cfg) -> bytes:
    """All samples of a step as one safetensors blob: the fields of `Batch`."""
    S = cfg.num_generations_per_prompt
    out = left_out(groups, cfg)
    valid_PS = sampled(groups, S) & ~out["zero_variance_dropped"]
    rows_PS = valid_PS & ~out["overlong_filtered"]
    kept = [row_S[: len(g.rewards)] for row_S, g in zip(rows_PS, groups)]
    tokens = [row_S.repeat_interleave(g.lengths) for row_S, g in zip(kept, groups)]
    prompts = [g.prompt_ids for row_S, g in zip(kept, groups) for _ in range(int(row_S.sum()))]

    def of_tokens(name: str) -> torch.Tensor:
        return torch.cat([getattr(g, name)[mask] for g, mask in zip(groups, tokens)])

    P, size = len(groups), cfg.train_global_batch_size  # of an update
    rewards_PS = stacked([shaped_rewards(g, cfg) for g in groups], S)
    return save(
        {
            "rewards_PS": rewards_PS,
            "valid_PS": valid_PS,
            "rows_PS": rows_PS,
            "prompt": torch.arange(P)[:, None].expand(P, S)[rows_PS],
            # A sample that is left out shifts nobody into another update.
            "update": (torch.arange(P * S) // size).view(P, S)[rows_PS],
            "positive": rewards_PS[rows_PS] > 0,
            "prompt_ids": torch.tensor([token for ids in prompts for token in ids]),
            "prompt_lengths": torch.tensor([len(ids) for ids in prompts]),
            "token_ids": of_tokens("token_ids").long(),
            "lengths": torch.cat([g.lengths[row_S] for row_S, g in zip(kept, groups)]).long(),
            "gen_logprobs": of_tokens("logprobs"),
            "versions": of_tokens("versions"),
        }
    )


def made_up(cfg, m, version: int) -> list[Group]:
    """A step's groups of a few tokens each, which nobody sampled, the same on every rank: what is
    compiled for them serves real ones. m: the ModelConfig."""
    found, S = [], cfg.num_generations_per_prompt
    for p in range(cfg.num_prompts_per_step):
        prompt_ids = [1 + i % (m.vocab_size - 1) for i in range(2 + p % 3)]
        lengths = torch.tensor([2 + (p + s) % 3 for s in range(S)], dtype=torch.int32)
        total = int(lengths.sum())
        token_ids = torch.arange(total, dtype=torch.int32) % m.vocab_size
        rewards = (torch.arange(S) % 2).float()
        group = Group(
            p, prompt_ids, lengths, token_ids, torch.full((total,), -1.0),
            torch.full_like(token_ids, version), rewards, torch.zeros(S, dtype=torch.uint8),
        )  # fmt: skip
        if cfg.router_replay == "sampler":
            experts_K = torch.arange(m.num_experts_per_tok).to(m.expert_dtype)
            group.prompt_experts, group.experts = (
                experts_K.expand(n, m.num_hidden_layers, -1) for n in (len(prompt_ids) - 1, total)
            )
        found.append(group)
    return found


# ---- on every rank -------------------------------------------------------------------------------
@dataclass
class Batch:
    """The samples of a step. A row is a sample that is trained on; rows are in group order."""

    rewards_PS: torch.Tensor  # as trained on; 0 where there is no sample
    valid_PS: torch.Tensor  # samples that others may be compared with
    rows_PS: torch.Tensor  # samples that are rows
    prompt: torch.Tensor  # of each row: which prompt of the step,
    update: torch.Tensor  # which optimizer update it belongs to,
    positive: torch.Tensor  # and whether it was rewarded
    prompt_ids: torch.Tensor  # of all rows, one after the other; the following likewise
    prompt_lengths: torch.Tensor  # of each row
    token_ids: torch.Tensor
    lengths: torch.Tensor  # of each row
    gen_logprobs: torch.Tensor
    versions: torch.Tensor

    @staticmethod
    def unpack(blob: bytes) -> "Batch":
        return Batch(**load(blob))


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
    places_N: torch.Tensor  # and where they are in the batch's token_ids
    lengths_B: torch.Tensor  # sampled tokens of each sequence
    mask: torch.Tensor  # and the following: padded to whole chunks
    gen_logprobs: torch.Tensor
    advantages: torch.Tensor
    versions: torch.Tensor
    weights: torch.Tensor  # what a token counts for in the mean that is the loss
    nll_weights: torch.Tensor  # and in the mean over tokens of rewarded samples
    sequence: torch.Tensor  # which sequence of the micro-batch a token is of
    age: torch.Tensor | None = None  # and these are filled in by the step
    logprobs: torch.Tensor | None = None  # of the update's forward pass
    prev_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    expert_ids: torch.Tensor | None = None  # (L, t, K) to replay


def micro_batches_of(
    batch: Batch, advantages_PS, cfg, dp_rank: int, dp: int, device, pad_to: int = 1
) -> tuple[list[list[MicroBatch]], list[tuple[int, int]]]:
    """For each update of the step: this rank's micro-batches, and the update's (loss tokens,
    samples) on all ranks.

    pad_to: the tensor-parallel degree. Sequence parallelism cuts a micro-batch into that many equal
    slices, so it is padded to a multiple (at least two tokens a slice) with one more sequence, of
    token 0, which no loss row is of.
    """
    rows = _Rows(batch, advantages_PS)
    updates, counts = [], []
    for mine, by_rank in rows_by_rank(batch, cfg, dp):
        lengths, rewarded = rows.num_sampled[mine], batch.positive[mine]
        units = batch.prompt[mine] if cfg.prompt_level_loss else torch.zeros_like(mine)
        weights = row_weights(lengths, units if cfg.token_level_loss else torch.arange(len(mine)))
        nll_weights = rewarded / (lengths * rewarded).sum().clamp(min=1)
        packed = []
        for picked, live in by_rank[dp_rank]:
            counted = (weights[picked] * live, nll_weights[picked] * live)
            packed.append(rows.pack(mine[picked].tolist(), *counted, live, cfg, device, pad_to))
        updates.append(packed)
        counts.append((int(lengths.sum()), len(mine)))
    return updates, counts


def rows_by_rank(batch: Batch, cfg, dp: int) -> list[tuple[torch.Tensor, list]]:
    """For each update of the step that has any: its rows of the batch, (n,), and as [dp
    rank][micro-batch] which of those, and whether they count. Fewer rows than micro-batches: a
    masked one keeps the rank's collectives in step."""
    found = []
    all_lengths = (batch.prompt_lengths + batch.lengths).tolist()
    for number in range(cfg.samples_per_step // cfg.train_global_batch_size):
        mine = (batch.update == number).nonzero().flatten()
        if not len(mine):
            continue  # every sample of it was left out
        lengths = [all_lengths[row] for row in mine.tolist()]
        shortest = lengths.index(min(lengths))
        by_rank = assign_rows(lengths, dp, cfg.max_tokens_per_micro_batch)
        found.append((mine, [[(x or [shortest], bool(x)) for x in rank] for rank in by_rank]))
    return found


def padded_length(tokens: int, pad_to: int) -> int:
    """Of a micro-batch: a multiple of pad_to, and at least two tokens for each."""
    return max(2, -(-tokens // pad_to)) * pad_to


class _Rows:
    """The rows of a batch, one by one."""

    def __init__(self, batch: Batch, advantages_PS):
        lengths = batch.lengths.tolist()
        self.prompts = batch.prompt_ids.split(batch.prompt_lengths.tolist())
        self.samples = batch.token_ids.split(lengths)
        self.gen_logprobs = batch.gen_logprobs.split(lengths)
        self.versions = batch.versions.split(lengths)
        self.advantages = advantages_PS[batch.rows_PS]
        self.lengths = (batch.prompt_lengths + batch.lengths).tolist()  # with the prompt
        self.starts = [0, *accumulate(lengths)]  # in token_ids
        # What was put into a sample is context, and no row of the loss: only sampled tokens count.
        self.sampled = [(v != NOT_SAMPLED).nonzero().flatten() for v in self.versions]
        self.num_sampled = torch.tensor([len(positions) for positions in self.sampled])

    def pack(self, rows: list[int], weights, nll_weights, live, cfg, device, pad_to) -> MicroBatch:
        """These rows end to end. weights, nll_weights: of each row; live: they count."""
        ends = list(accumulate(self.lengths[r] for r in rows))
        padded = padded_length(ends[-1], pad_to)
        last = [padded] if padded > ends[-1] else []
        cu_seqlens = torch.tensor([0, *ends, *last], dtype=torch.int32)
        tokens = torch.cat([part for r in rows for part in (self.prompts[r], self.samples[r])])
        starts = [end - len(self.samples[r]) for r, end in zip(rows, ends)]
        rows_N = torch.cat([start + self.sampled[r] - 1 for r, start in zip(rows, starts)])
        lengths_B = self.num_sampled[rows]
        chunks = max(1, math.ceil(len(rows_N) / cfg.logprob_chunk_size))
        padding = (0, chunks * cfg.logprob_chunk_size - len(rows_N))

        def pad(flat: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(flat, padding).to(device)

        def of_sampled(values) -> torch.Tensor:
            return torch.cat([values[r][self.sampled[r]] for r in rows])

        return MicroBatch(
            tokens_T=torch.nn.functional.pad(tokens, (0, padded - len(tokens))).to(device),
            cu_seqlens=cu_seqlens.to(device),
            max_seqlen=int(cu_seqlens.diff().max()),
            num_tokens=ends[-1] * live,
            rows_N=rows_N.to(device),
            targets_N=of_sampled(self.samples).to(device),
            places_N=torch.cat([self.starts[r] + self.sampled[r] for r in rows]),
            lengths_B=lengths_B.to(device),
            mask=pad(torch.full((len(rows_N),), live)),
            gen_logprobs=pad(of_sampled(self.gen_logprobs)),
            advantages=pad(self.advantages[rows].repeat_interleave(lengths_B)),
            versions=pad(of_sampled(self.versions)),
            weights=pad(weights.repeat_interleave(lengths_B)),
            nll_weights=pad(nll_weights.repeat_interleave(lengths_B)),
            sequence=pad(torch.arange(len(rows)).repeat_interleave(lengths_B)),
        )


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


# ---- which rank gets which rows ------------------------------------------------------------------
def worst_fit(bins: list, room_from: int) -> int:
    """The emptiest bin: loads come out alike."""
    return 0


def best_fit(bins: list, room_from: int) -> int:
    """The fullest bin that has room, once no bin is empty: more rows fit in all."""
    return room_from - 1 if bins[0][0] else 0


def fill_bins(row_lengths: list[int], num_bins: int, max_tokens: int, choose):
    """Longest row first, each to the bin that `choose` names. Returns bins as (tokens, number,
    rows), lightest first; None where a row finds no room."""
    bins = [(0, number, []) for number in range(num_bins)]
    for row in sorted(range(len(row_lengths)), key=lambda r: -row_lengths[r]):
        room_from = bisect(bins, (max_tokens - row_lengths[row], math.inf))
        if not room_from:  # not even the emptiest has room
            return None
        tokens, number, rows = bins.pop(choose(bins, room_from))
        insort(bins, (tokens + row_lengths[row], number, [*rows, row]))
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
    # Worst fit fits up to 95-99 % fill; best fit to above 99 %, where "alike" means little more
    # than "full".
    bins = None
    for micro_batches_each in count(math.ceil(sum(row_lengths) / (dp * max_tokens))):
        for choose in (worst_fit, best_fit):
            bins = bins or fill_bins(row_lengths, dp * micro_batches_each, max_tokens, choose)
        if bins:
            break

    def cost(one_bin) -> float:
        tokens, _, rows = one_bin
        return tokens + sum(row_lengths[r] ** 2 for r in rows) / max_tokens

    bins.sort(key=cost, reverse=True)
    ranks = [(0, rank, []) for rank in range(dp)]  # tokens so far, rank, its micro-batches
    for i in range(0, len(bins), dp):
        # The fullest of one index goes to the rank with the least so far.
        pairs = zip(sorted(ranks), sorted(bins[i : i + dp], reverse=True))
        ranks = [
            (tokens + more, rank, [*mine, rows]) for (tokens, rank, mine), (more, _, rows) in pairs
        ]
    return [mine for _, _, mine in sorted(ranks, key=lambda r: r[1])]
