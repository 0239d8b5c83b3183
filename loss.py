"""The policy-gradient losses, their advantages, and the log-probs they are made of.

CISPO (MiniMax-M1, arXiv:2506.13585) is one line. With ratio = pi_theta / pi_prev of a sampled
token,

    L = -A * sg(clip(ratio, 1 - ratio_clip_min, 1 + ratio_clip_max)) * log pi_theta

where sg stops the gradient. PPO's clip takes the gradient away from every token whose ratio left
the band; here a clipped token keeps gradient, only its weight is bounded. Off-policy tokens that
matter most (rare words such as "wait" or "however", whose ratio jumps first) go on learning.

Everything below is a function of log-probs. `Algorithm` holds the numbers, `policy_loss` puts the
parts together; a fork that wants another loss writes another function like `cispo_loss`.
"""

import bisect
import itertools
import math
from typing import NamedTuple

import torch

from algorithm import LOG_RATIO_MAX, Algorithm


# ---- advantages ----------------------------------------------------------------------------------
def group_advantages(rewards_PS, valid_PS, leave_one_out: bool, std: str | None, eps: float = 1e-6):
    """How much better a sample did than its siblings.

    The baseline of a sample is the mean reward of its group (with `leave_one_out`: of the group's
    other samples); with std "group" the difference is divided by the standard deviation (n-1) of
    the same samples, where that is not zero; with "batch" by the one of all differences of the step
    (ScaleRL); with "mean" by the mean reward of the whole group (MaxRL, arXiv:2602.02710), where
    that is not zero. MaxRL is made for rewards of 0 and 1. Others are taken by their absolute
    values in that mean: the same where none is negative, and else it would turn the sign of
    advantages, or come near 0 between rewards that are not. Invalid samples take no part and get 0;
    so does a sample without a sibling.

    Shapes: rewards_PS (P, S) float, valid_PS (P, S) bool -> (P, S).
    Source: NeMo RL's leave-one-out baseline and std (facts checked in tests against its numbers).
    """
    P, S = rewards_PS.shape
    others_SS = (
        ~torch.eye(S, dtype=torch.bool) if leave_one_out else torch.ones(S, S, dtype=torch.bool)
    )
    # whom sample s is compared with
    used_PSS = others_SS.to(rewards_PS.device) & valid_PS[:, None, :]
    count_PS = used_PSS.sum(-1)
    # fp64: a constant group has exactly zero spread
    rewards_PSS = rewards_PS.double()[:, None, :].expand(P, S, S)
    mean_PS = torch.where(used_PSS, rewards_PSS, 0).sum(-1) / count_PS.clamp(min=1)
    advantages_PS = rewards_PS.double() - mean_PS
    if std == "group":
        deviation_PSS = torch.where(used_PSS, rewards_PSS - mean_PS[..., None], 0)
        std_PS = (deviation_PSS.square().sum(-1) / (count_PS - 1).clamp(min=1)).sqrt()
        # A spread below the rounding of the mean is no spread: 16 x 0.3 must count as a constant
        # group.
        advantages_PS = torch.where(std_PS > 1e-12, advantages_PS / (std_PS + eps), advantages_PS)
    if std == "mean":
        sizes_P1 = torch.where(valid_PS, rewards_PS.double().abs(), 0).sum(-1, keepdim=True)
        mean_P1 = sizes_P1 / valid_PS.sum(-1, keepdim=True).clamp(min=1)
        # 0: no sample was rewarded, and all differences are 0.
        advantages_PS = torch.where(mean_P1 > 0, advantages_PS / mean_P1, 0)
    compared_PS = valid_PS & (valid_PS.sum(-1, keepdim=True) > 1)
    if (
        std == "batch"
        and compared_PS.any()
        and (spread := advantages_PS[compared_PS].std()) > 1e-12
    ):
        advantages_PS = advantages_PS / (spread + eps)
    return torch.where(compared_PS, advantages_PS, 0).to(rewards_PS.dtype)


# ---- losses, per token ---------------------------------------------------------------------------
def cispo_loss(logprobs, prev_logprobs, advantages, alg: Algorithm):
    """-A * sg(clip(ratio)) * log pi; the gradient is -A * clip(ratio) for every token, clipped or
    not.

    Shapes: all (T,) -> loss, ratio, clamped ratio: (T,). The loss alone carries gradient.
    """
    ratio = bounded_exp(logprobs - prev_logprobs).detach()
    weight = ratio.clamp(*alg.weight_bounds)
    if alg.negative_weight_bounds != alg.weight_bounds:  # DISPO, arXiv:2602.00983
        weight = torch.where(advantages < 0, ratio.clamp(*alg.negative_weight_bounds), weight)
    return -advantages * weight * logprobs, ratio, weight


def ppo_clip_loss(logprobs, prev_logprobs, advantages, alg: Algorithm):
    """max(-A r, -A clip(r)) (PPO, arXiv:1707.06347), and with ratio_clip_c = c the dual clip
    (arXiv:1912.09729): where A < 0 the loss is at most -A c. Shapes and results as in
    `cispo_loss`."""
    ratio = bounded_exp(logprobs - prev_logprobs)
    clamped = ratio.clamp(*alg.weight_bounds)
    loss = torch.maximum(-advantages * ratio, -advantages * clamped)
    if alg.ratio_clip_c is not None:
        loss = torch.where(
            advantages < 0, torch.minimum(loss, -advantages * alg.ratio_clip_c), loss
        )
    return loss, ratio.detach(), clamped.detach()


def reinforce_loss(logprobs, prev_logprobs, advantages, alg: Algorithm):
    """-A * log pi, without a ratio; as in NeMo RL, log pi is what the ratio metrics then
    show."""
    return -advantages * logprobs, logprobs.detach(), logprobs.detach()


def correction_weight(own, gen, mask, alg: Algorithm, sequence):
    """Weight of trainer against sampler: raw, as it is used, and where it is out of bounds, all
    (T,) and detached.

    tis clamps it to the bounds; icepop zeroes the tokens outside; seq-mask-tis zeroes the sequences
    whose geometric mean is outside. With sequence-level ratios it is the product over the sequence,
    as in NeMo RL.
    """
    kind = alg.truncated_importance_sampling_type
    high = alg.truncated_importance_sampling_ratio
    low = alg.truncated_importance_sampling_ratio_min or 0.0
    log_weight = own - gen
    if alg.sequence_level_importance_ratios:
        log_weight = sequence_sum(log_weight, sequence)
    raw = bounded_exp(log_weight)
    if kind is None:
        return raw, raw, torch.zeros_like(mask)
    if kind == "seq-mask-tis":
        judged = bounded_exp(sequence_mean(own - gen, mask, sequence))
    else:
        judged = raw
    outside = (judged < low) | (judged > high)
    used = raw.clamp(low, high) if kind == "tis" else torch.where(outside, 0.0, raw)
    return raw, used, outside


def left_trust_region(logprobs, gen_logprobs, advantages, alg: Algorithm):
    """Which tokens are outside of the trust region around the sampler, and would be moved further
    out. What counts is the distance of two choices, this token or any other: a ratio of 10 is
    nothing from 1e-6 to 1e-5, and 0.4 is much from 0.5 to 0.2.

    tv and kl (DPPO, arXiv:2602.04879): total variation |p - q|, or KL(q || p), of the trainer's
    probability p and the sampler's q. Where A > 0 the token becomes likelier: it has left if p is
    above q by more than trust_region_high; where A < 0, below by more than trust_region_low. kpop
    (ringtech.notion.site/kpop): the larger of both KL above trust_region_high, whatever the sign.

    Shapes: all (T,) -> (T,) bool; logprobs without gradient. A log-prob that is no number has left
    nothing: it must reach the gradient, whose check finds it.
    """
    low, high = alg.trust_region_low, alg.trust_region_high
    p, q = logprobs.exp(), gen_logprobs.exp()
    if alg.trust_region == "tv":
        return torch.where(advantages > 0, p - q > high, q - p > low)
    # KPop's bounds, since 1 - p must not be 0; and what is rarer is the same to both.
    p, q = (x.clamp(1e-6, 1 - 1e-6) for x in (p, q))
    if alg.trust_region == "kl":
        far = binary_kl(q, p)
        return torch.where(advantages > 0, (p > q) & (far > high), (p < q) & (far > low))
    return torch.maximum(binary_kl(p, q), binary_kl(q, p)) > high


def binary_kl(p, q):
    """KL divergence of two choices with probabilities p, 1 - p from q, 1 - q. Units: nats."""
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def kl_estimate(logprobs, ref_logprobs, alg: Algorithm, weight=None):
    """Per-token estimate of KL(pi || pi_ref): k1 -d, k2 d^2 / 2, k3 e^d - 1 - d, where d = ref -
    log pi is clamped first and the result last. `weight` multiplies it, without gradient where the
    clamp of d has taken that away.

    Shapes: all (T,). Source: Schulman's note on approximating KL; arXiv:2506.09477 for the weight's
    gradient.
    """
    d = ref_logprobs - logprobs
    clamped = d.clamp(-alg.kl_input_clamp_value, alg.kl_input_clamp_value)
    if alg.reference_policy_kl_type == "k1":
        kl = -clamped
    elif alg.reference_policy_kl_type == "k2":
        kl = clamped.square() / 2
    else:
        kl = torch.expm1(clamped) - clamped
    if weight is not None:
        kl = kl * torch.where(d == clamped, weight, weight.detach())
    return kl.clamp(-alg.kl_output_clamp_value, alg.kl_output_clamp_value)


class Tokens(NamedTuple):
    """What the loss reads of each sampled token, besides its log-prob under the weights being
    trained. Shapes: all (T,)."""

    prev: torch.Tensor  # log-prob under the trainer's weights at the start of the step
    gen: torch.Tensor  # log-prob under the sampler's
    advantages: torch.Tensor
    mask: torch.Tensor  # False where there is no token; the rest may hold anything there
    weights: torch.Tensor  # `row_weights`: what it counts for in the mean, 0 where masked
    ref: torch.Tensor | None = None  # log-prob under the starting model, for the KL penalty
    nll_weights: torch.Tensor | None = None  # what it counts for in the mean over rewarded samples


def token_loss(logprobs, tokens: Tokens, alg: Algorithm, sequence=None):
    """The loss of every token, times what it counts for; the sum is the loss. The gradient flows to
    logprobs alone.

    Elementwise unless `alg.needs_sequences`: token t of the result depends on token t of the
    arguments, so a head may call this on any piece of the tokens. Masked positions may hold
    anything, inf and NaN included: they are replaced before any arithmetic, since 0 * inf would be
    NaN in value or gradient.

    Shapes: logprobs (T,); sequence (T,): which sequence of the micro-batch a token is of. Returns:
    loss (T,) and the parts that metrics are made of.
    """
    mask = tokens.mask
    curr, prev, gen, advantages = (
        torch.where(mask, x, 0.0) for x in (logprobs, tokens.prev, tokens.gen, tokens.advantages)
    )
    own = prev if alg.needs_prev else curr.detach()
    anchor = token_anchor = gen if alg.ratio_anchor == "sampler" else own
    # GSPO, arXiv:2507.18071
    if alg.sequence_level_importance_ratios and not alg.force_on_policy_ratio:
        # so the ratio is the sequence's, at each token
        anchor = curr - sequence_mean(curr - anchor, mask, sequence)
    # FORK HERE: another algorithm is another function of these log-probs.
    if alg.use_cispo:
        loss_T, ratio, clamped = cispo_loss(curr, anchor, advantages, alg)
    elif alg.disable_ppo_ratio:
        loss_T, ratio, clamped = reinforce_loss(curr, anchor, advantages, alg)
    else:
        loss_T, ratio, clamped = ppo_clip_loss(curr, anchor, advantages, alg)
    raw, used, outside = correction_weight(own, gen, mask, alg, sequence)
    if alg.use_importance_sampling_correction:
        loss_T = loss_T * used
    left = torch.zeros_like(mask)
    if alg.trust_region:  # such a token still counts in what the loss is divided by
        left = left_trust_region(curr.detach(), gen, advantages, alg)
        loss_T = torch.where(left, 0.0, loss_T)
    kl = torch.zeros_like(curr)
    if alg.reference_policy_kl_penalty:
        # The samples come from the policy itself, so their probability has a gradient too, though
        # its value is 1.
        weight = bounded_exp(curr - (gen if alg.use_on_policy_kl_approximation else curr.detach()))
        kl = kl_estimate(curr, torch.where(mask, tokens.ref, 0.0), alg, weight)
        if not alg.use_kl_in_reward:
            loss_T = loss_T + alg.reference_policy_kl_penalty * kl
    loss_T = loss_T * tokens.weights
    if alg.positive_example_nll_weight:
        loss_T = loss_T - alg.positive_example_nll_weight * tokens.nll_weights * curr
    ratios = (ratio, clamped, raw, outside, left)
    parts = Parts(curr.detach(), own, token_anchor, gen, advantages, *ratios, kl.detach())
    return loss_T, parts


def policy_loss(
    logprobs,
    tokens: Tokens,
    alg: Algorithm,
    num_tokens,
    num_seqs=1,
    sequence=None,
    age=None,
    max_age=0,
):
    """Loss and metrics of one micro-batch, as its share of the optimizer batch.

    logprobs: log pi of the sampled tokens under the weights being trained, with gradient; age: of a
    token's weights, in steps, 0 is current.

    Shapes: all (T,); num_tokens, num_seqs: global counts of loss tokens and sequences, 0-D or int.
    Returns: loss (0-D) and metrics, a dict of 0-D tensors and one histogram. Names ending in _min
    or _max reduce by that, all others by sum, over micro-batches and ranks; a sum over the whole
    batch is a mean over its tokens. Source of names and definitions: NeMo RL's clipped
    policy-gradient loss.
    """
    loss_T, parts = token_loss(logprobs, tokens, alg, sequence)
    loss = loss_T.sum()
    with torch.no_grad():
        metrics = token_metrics(parts, tokens, num_tokens, num_seqs, sequence, alg)
        if age is not None:
            metrics.update(mismatch_by_age(parts.own, parts.gen, tokens.mask, age, max_age))
    return loss, {"loss": loss.detach(), **metrics}


# ---- what the tokens say of the training ---------------------------------------------------------
def bounded_exp(log_ratio):
    return log_ratio.clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()


def sequence_sum(x, sequence):
    """Sum over each token's sequence, at every token. Shapes: (T,), 0 where masked; sequence (T,)
    indices below T."""
    return torch.zeros_like(x).index_add(0, sequence, x)[sequence]


def sequence_mean(x, mask, sequence):
    return sequence_sum(x, sequence) / sequence_sum(mask.to(x.dtype), sequence).clamp(min=1)


class Parts(NamedTuple):
    """Of each token, detached and 0 where masked. Shapes: all (T,)."""

    curr: torch.Tensor  # log pi under the weights being trained
    # under the trainer's at the start of the step; curr where the loss has no use for it
    own: torch.Tensor
    anchor: torch.Tensor  # what the ratio is taken against
    gen: torch.Tensor  # under the sampler's
    advantages: torch.Tensor
    ratio: torch.Tensor  # as in the loss, so GSPO's is its sequence's
    clamped: torch.Tensor
    correction: torch.Tensor  # exp(own - gen), before truncation
    outside: torch.Tensor  # of the truncation's bounds
    left: torch.Tensor  # the trust region
    kl: torch.Tensor  # to the starting model, estimated


def token_metrics(parts: Parts, tokens: Tokens, num_tokens, num_seqs, sequence, alg):
    """NeMo RL's metrics by its names and definitions, but for sampling_importance_ratio: it is the
    weight before truncation, since the truncated one hides what it is there to show. Then the
    diagnostics of the clip.

    Shapes: all (T,) -> a dict of 0-D tensors and one histogram.
    """
    curr, own, anchor, gen, advantages, ratio, clamped, correction, outside, left, kl = parts
    mask, nll_weights = tokens.mask, tokens.nll_weights

    def mean(x):
        return torch.where(mask, x, 0.0).sum() / max(num_tokens, 1)

    def seq_mean(x):
        per_sequence = x / sequence_sum(mask.float(), sequence).clamp(min=1)
        return mean(per_sequence) * num_tokens / max(num_seqs, 1)

    def low(x):
        return torch.where(mask, x, torch.inf).amin()

    def high(x):
        return torch.where(mask, x, -torch.inf).amax()

    correction_mean = seq_mean if alg.sequence_level_importance_ratios else mean
    metrics = {
        "probs_ratio": mean(ratio),
        "probs_ratio_min": low(ratio),
        "probs_ratio_max": high(ratio),
        "probs_ratio_clamped": mean(clamped),
        "probs_ratio_clamped_min": low(clamped),
        "probs_ratio_clamped_max": high(clamped),
        "sampling_importance_ratio": correction_mean(correction),
        "approx_entropy": -mean(bounded_exp(curr - gen) * curr),
        "kl_penalty": (kl * tokens.weights).sum(),
        "positive_nll_loss": mean(kl * 0) if nll_weights is None else -(nll_weights * curr).sum(),
        **{name: mean(x) for name, x in mismatch(own, gen).items()},
        **clip_diagnostics(curr, anchor, advantages, mask, mean),
        **weight_sums(curr, gen, mask),
    }
    if alg.truncated_importance_sampling_type:
        over = seq_mean if alg.truncated_importance_sampling_type == "seq-mask-tis" else mean
        metrics["is_oob_ratio"] = over(outside.float())
    if alg.trust_region:
        signs = {"": advantages != 0, "_pos": advantages > 0, "_neg": advantages < 0}
        for end, sign in signs.items():
            metrics[f"trust_masked{end}"] = mean((left & sign).float())
    return metrics


# Log-ratios are counted in bins of 0.02 nats from -4 to 4, the ends included: a quantile read from
# the counts is within 1 % of the ratio for ratios in 0.018..54, and counts add up over
# micro-batches, ranks and updates.
BIN_NATS, BINS = 0.02, 401


def clip_diagnostics(curr, anchor, advantages, mask, mean):
    """Whose gradient PPO's clip at 0.2 would have taken away, as shares of all tokens; how many
    tokens are rare (p < 0.05 under the anchor), alone and among those; and the histogram of the
    token-level ratio."""
    log_ratio = curr - anchor
    dropped_pos = (advantages > 0) & (log_ratio > math.log(1.2))
    dropped_neg = (advantages < 0) & (log_ratio < math.log(0.8))
    rare = anchor < math.log(0.05)
    bins = (log_ratio.nan_to_num(0.0) / BIN_NATS).round().clamp(
        -(BINS // 2), BINS // 2
    ).long() + BINS // 2
    shares = {
        "would_clip": dropped_pos | dropped_neg,
        "would_clip_pos": dropped_pos,
        "would_clip_neg": dropped_neg,
        "low_prob": rare,
        "low_prob_would_clip": rare & (dropped_pos | dropped_neg),
    }
    return {
        **{name: mean(x.float()) for name, x in shares.items()},
        "ratio_histogram": torch.zeros(BINS, device=curr.device).index_add(0, bins, mask.float()),
    }


def weight_sums(curr, gen, mask):
    """Sums over tokens of the importance weight w = pi / pi_sampler, before any clip, and of its
    square. They add up over micro-batches, ranks and updates, and `effective_share` reads them."""
    weight = torch.where(mask, bounded_exp(curr - gen), 0.0)
    return {"weight_sum": weight.sum(), "weight_square_sum": weight.square().sum()}


def effective_share(weight_sum: float, weight_square_sum: float, num_tokens: int) -> float | None:
    """Effective sample size (sum w)^2 / sum w^2 as a share of the tokens: 1 where all weights are
    equal, 1 / n where one token is all there is. None without tokens. Source: VCPO,
    arXiv:2602.17616, which takes it of samples: it falls before a run collapses."""
    return weight_sum**2 / (num_tokens * weight_square_sum) if weight_square_sum else None


def ratio_quantile(histogram: list[float], q: float) -> float | None:
    """The ratio below which a share q of the tokens lies, to 1 %; None without tokens."""
    cumulative = list(itertools.accumulate(histogram))
    if not cumulative[-1]:
        return None
    return math.exp(BIN_NATS * (bisect.bisect_left(cumulative, q * cumulative[-1]) - BINS // 2))


def mismatch(prev, gen):
    """How far the trainer's log-probs (prev) are from the sampler's (gen), per token, in nats but
    for the first.

    The KL terms are the k3 estimator e^d - d - 1. Source: NeMo RL's metrics of the same names.
    """
    d = (prev - gen).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)

    # Near 0 by its series: expm1(x) - x has noise of 1e-8 there once compiled, and the numbers to
    # be seen are 1e-13.
    def k3(x):
        return torch.where(x.abs() < 0.01, x * x * (0.5 + x / 6 + x * x / 24), torch.expm1(x) - x)

    # log q - log((p + q) / 2), where x = log p - log q
    def to_mix(x):
        return -torch.log1p(torch.expm1(x) / 2)

    return {
        "token_mult_prob_error": (gen - prev).abs().clamp(max=LOG_RATIO_MAX).exp(),
        "gen_kl_error": k3(d),
        "policy_kl_error": k3(-d),
        "js_divergence_error": 0.5 * (k3(to_mix(d)) + k3(to_mix(-d))),
    }


def mismatch_by_age(prev, gen, mask, age, max_age: int):
    """The mismatch of tokens that the current weights sampled (numerics alone) apart from that of
    older ones (policy lag as well). Sums over tokens, with their counts; and the number of tokens
    of each age in steps.

    Shapes: all (T,); age in steps, 0 is the current version.
    """
    values = mismatch(torch.where(mask, prev, 0.0), torch.where(mask, gen, 0.0))
    sums = {f"tokens_age_{a}": (mask & (age == a)).sum() for a in range(max_age + 1)}
    for kind, chosen in (("same_version", mask & (age == 0)), ("older_version", mask & (age > 0))):
        sums[f"tokens_{kind}"] = chosen.sum()
        for name in ("token_mult_prob_error", "gen_kl_error"):
            sums[f"{name}_{kind}"] = torch.where(chosen, values[name], 0.0).sum()
    return sums
