"""What a micro-batch's tokens say of the training: the seed system's metrics, and what CISPO is judged by.

All are tensors on the device, and shares of the optimizer batch: they add up over micro-batches and ranks (those
named _min and _max reduce by that), so that nothing waits before the step is over. Also here: the arithmetic that
loss and metrics share.
"""

import bisect
import itertools
import math
from typing import NamedTuple

import torch

LOG_RATIO_MAX = 20.0  # exp(20) = 4.9e8: far outside any clip, far inside fp32


def bounded_exp(log_ratio):
    return log_ratio.clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()


def sequence_sum(x, sequence):
    """Sum over each token's sequence, at every token. Shapes: (T,), 0 where masked; sequence (T,) indices below T."""
    return torch.zeros_like(x).index_add(0, sequence, x)[sequence]


def sequence_mean(x, mask, sequence):
    return sequence_sum(x, sequence) / sequence_sum(mask.to(x.dtype), sequence).clamp(min=1)


class Parts(NamedTuple):
    """Of each token, detached and 0 where masked. Shapes: all (T,)."""

    curr: torch.Tensor  # log pi under the weights being trained
    own: torch.Tensor  # under the trainer's at the start of the step; curr where the loss has no use for it
    anchor: torch.Tensor  # what the ratio is taken against
    gen: torch.Tensor  # under the sampler's
    advantages: torch.Tensor
    ratio: torch.Tensor  # as in the loss, so GSPO's is its sequence's
    clamped: torch.Tensor
    correction: torch.Tensor  # exp(own - gen), before truncation
    outside: torch.Tensor  # of the truncation's bounds
    kl: torch.Tensor  # to the starting model, estimated


def token_metrics(parts: Parts, mask, weights, nll_weights, num_tokens, num_seqs, sequence, alg):
    """The seed system's metrics by its names and definitions, but for sampling_importance_ratio, which is the weight
    before truncation: the truncated one hides what it is there to show. Then the diagnostics of the clip.

    Shapes: all (T,), weights as in loss.policy_loss -> a dict of 0-D tensors and one histogram.
    """
    curr, own, anchor, gen, advantages, ratio, clamped, correction, outside, kl = parts
    mean = lambda x: torch.where(mask, x, 0.0).sum() / max(num_tokens, 1)
    seq_mean = lambda x: mean(x / sequence_sum(mask.float(), sequence).clamp(min=1)) * num_tokens / max(num_seqs, 1)
    low = lambda x: torch.where(mask, x, torch.inf).amin()
    high = lambda x: torch.where(mask, x, -torch.inf).amax()
    metrics = {
        "probs_ratio": mean(ratio), "probs_ratio_min": low(ratio), "probs_ratio_max": high(ratio),
        "probs_ratio_clamped": mean(clamped),
        "probs_ratio_clamped_min": low(clamped), "probs_ratio_clamped_max": high(clamped),
        "sampling_importance_ratio": (seq_mean if alg.sequence_level_importance_ratios else mean)(correction),
        "approx_entropy": -mean(bounded_exp(curr - gen) * curr),
        "kl_penalty": (kl * weights).sum(),
        "positive_nll_loss": mean(kl * 0) if nll_weights is None else -(nll_weights * curr).sum(),
        **{name: mean(x) for name, x in mismatch(own, gen).items()},
        **clip_diagnostics(curr, anchor, advantages, mask, mean),
    }  # fmt: skip
    if alg.truncated_importance_sampling_type:
        over = seq_mean if alg.truncated_importance_sampling_type == "seq-mask-tis" else mean
        metrics["is_oob_ratio"] = over(outside.float())
    return metrics


# Log-ratios are counted in bins of 0.02 nats from -4 to 4, the ends included: a quantile read from the counts is
# within 1 % of the ratio for ratios in 0.018..54, and counts add up over micro-batches, ranks and updates.
BIN_NATS, BINS = 0.02, 401


def clip_diagnostics(curr, anchor, advantages, mask, mean):
    """Whose gradient PPO's clip at 0.2 would have taken away, as shares of all tokens; how many tokens are rare
    (p < 0.05 under the anchor), alone and among those; and the histogram of the token-level ratio."""
    log_ratio = curr - anchor
    dropped_pos = (advantages > 0) & (log_ratio > math.log(1.2))
    dropped_neg = (advantages < 0) & (log_ratio < math.log(0.8))
    rare = anchor < math.log(0.05)
    bins = (log_ratio.nan_to_num(0.0) / BIN_NATS).round().clamp(-(BINS // 2), BINS // 2).long() + BINS // 2
    shares = {"would_clip": dropped_pos | dropped_neg, "would_clip_pos": dropped_pos, "would_clip_neg": dropped_neg,
              "low_prob": rare, "low_prob_would_clip": rare & (dropped_pos | dropped_neg)}  # fmt: skip
    return {
        **{name: mean(x.float()) for name, x in shares.items()},
        "ratio_histogram": torch.zeros(BINS, device=curr.device).index_add(0, bins, mask.float()),
    }


def ratio_quantile(histogram: list[float], q: float) -> float | None:
    """The ratio below which a share q of the tokens lies, to 1 %; None without tokens."""
    cumulative = list(itertools.accumulate(histogram))
    if not cumulative[-1]:
        return None
    return math.exp(BIN_NATS * (bisect.bisect_left(cumulative, q * cumulative[-1]) - BINS // 2))


def mismatch(prev, gen):
    """How far the trainer's log-probs (prev) are from the sampler's (gen), per token, in nats but for the first.

    The KL terms are the k3 estimator e^d - d - 1. Source: NeMo RL's metrics of the same names.
    """
    d = (prev - gen).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)
    # Near 0 by its series: expm1(x) - x has noise of 1e-8 there once compiled, and the numbers to be seen are 1e-13.
    k3 = lambda x: torch.where(x.abs() < 0.01, x * x * (0.5 + x / 6 + x * x / 24), torch.expm1(x) - x)
    to_mix = lambda x: -torch.log1p(torch.expm1(x) / 2)  # log q - log((p + q) / 2), where x = log p - log q
    return {
        "token_mult_prob_error": (gen - prev).abs().clamp(max=LOG_RATIO_MAX).exp(),
        "gen_kl_error": k3(d),
        "policy_kl_error": k3(-d),
        "js_divergence_error": 0.5 * (k3(to_mix(d)) + k3(to_mix(-d))),
    }


def mismatch_by_age(prev, gen, mask, age, max_age: int):
    """The mismatch of tokens that the current weights sampled (numerics alone) apart from that of older ones
    (policy lag as well). Sums over tokens, with their counts; and the number of tokens of each age in steps.

    Shapes: all (T,); age in steps, 0 is the current version.
    """
    values = mismatch(torch.where(mask, prev, 0.0), torch.where(mask, gen, 0.0))
    sums = {f"tokens_age_{a}": (mask & (age == a)).sum() for a in range(max_age + 1)}
    for kind, chosen in (("same_version", mask & (age == 0)), ("older_version", mask & (age > 0))):
        sums[f"tokens_{kind}"] = chosen.sum()
        for name in ("token_mult_prob_error", "gen_kl_error"):
            sums[f"{name}_{kind}"] = torch.where(chosen, values[name], 0.0).sum()
    return sums


def expert_tokens(expert_ids_LtK, num_tokens: int, model):
    """Rows that this rank sent to each expert of each layer, (L, E), padding left out."""
    mine = max(0, num_tokens - model.mesh.tp_rank * expert_ids_LtK.shape[1])  # the row's padding is at its end
    count = lambda ids_tK: ids_tK[:mine].flatten().bincount(minlength=model.cfg.num_experts)
    return torch.stack([count(ids_tK) for ids_tK in expert_ids_LtK])


def expert_load(metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`expert_tokens` (L, E), rows that each layer sent to each expert, as what one looks at: the busiest expert's
    share of an even one, layer by layer (1 is balanced, E / K is everything to the same experts), and the share of
    experts that got nothing."""
    if "expert_tokens" not in metrics:
        return metrics
    tokens_LE = metrics["expert_tokens"].double()
    rest = {name: value for name, value in metrics.items() if name != "expert_tokens"}
    busiest_L = tokens_LE.amax(1) / tokens_LE.mean(1).clamp(min=1e-9)  # no token at all: 0
    return {**rest, "moe_busiest_by_layer": busiest_L, "moe_busiest_max": busiest_L.max(),
            "moe_idle_share": (tokens_LE == 0).double().mean()}  # fmt: skip
