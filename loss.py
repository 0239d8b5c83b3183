"""The policy-gradient losses, their advantages, and the log-probs they are made of.

CISPO (MiniMax-M1, arXiv:2506.13585) is one line. With ratio = pi_theta / pi_prev of a sampled token,

    L = -A * sg(clip(ratio, 1 - ratio_clip_min, 1 + ratio_clip_max)) * log pi_theta

where sg stops the gradient. PPO's clip takes the gradient away from every token whose ratio left the band; here a
clipped token keeps gradient, only its weight is bounded. Off-policy tokens that matter most (rare words such as
"wait" or "however", whose ratio jumps first) go on learning.

Everything below is a function of log-probs. `Algorithm` holds the numbers, `policy_loss` puts the parts together;
a fork that wants another loss writes another function like `cispo_loss`.
"""

from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

LOG_RATIO_MAX = 20.0  # exp(20) = 4.9e8: far outside any clip, far inside fp32


@dataclass(frozen=True)
class Algorithm:
    """The seed system's loss_fn keys, resolved. Bounds are offsets from 1, as there: the ratio is clamped to
    [1 - ratio_clip_min, 1 + ratio_clip_max]."""

    use_cispo: bool = True
    ratio_clip_min: float = 1.0
    ratio_clip_max: float = 5.0
    ratio_clip_c: float | None = None
    use_importance_sampling_correction: bool = True


# ---- advantages ----------------------------------------------------------------------------------------------
def group_advantages(rewards_PS, valid_PS, leave_one_out: bool, normalize: bool, eps: float = 1e-6):
    """How much better a sample did than its siblings.

    The baseline of a sample is the mean reward of its group (with `leave_one_out`: of the group's other samples);
    with `normalize` the difference is divided by the standard deviation (n-1) of the same samples, where that is
    not zero. Invalid samples take no part and get 0; so does a sample without a sibling.

    Shapes: rewards_PS (P, S) float, valid_PS (P, S) bool -> (P, S).
    Source: NeMo RL's leave-one-out baseline and std (facts checked in tests against its numbers).
    """
    P, S = rewards_PS.shape
    others_SS = ~torch.eye(S, dtype=torch.bool) if leave_one_out else torch.ones(S, S, dtype=torch.bool)
    used_PSS = others_SS.to(rewards_PS.device) & valid_PS[:, None, :]  # whom sample s is compared with
    count_PS = used_PSS.sum(-1)
    rewards_PSS = rewards_PS.double()[:, None, :].expand(P, S, S)  # fp64: a constant group has exactly zero spread
    mean_PS = torch.where(used_PSS, rewards_PSS, 0).sum(-1) / count_PS.clamp(min=1)
    advantages_PS = rewards_PS.double() - mean_PS
    if normalize:
        deviation_PSS = torch.where(used_PSS, rewards_PSS - mean_PS[..., None], 0)
        std_PS = (deviation_PSS.square().sum(-1) / (count_PS - 1).clamp(min=1)).sqrt()
        # A spread below the rounding of the mean is no spread: 16 x 0.3 must count as a constant group.
        advantages_PS = torch.where(std_PS > 1e-12, advantages_PS / (std_PS + eps), advantages_PS)
    alone = valid_PS.sum(-1, keepdim=True) < 2
    return torch.where(valid_PS & ~alone, advantages_PS, 0).to(rewards_PS.dtype)


# ---- losses, per token ---------------------------------------------------------------------------------------
def bounded_exp(log_ratio):
    return log_ratio.clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()


def cispo_loss(logprobs, prev_logprobs, advantages, alg: Algorithm):
    """-A * sg(clip(ratio)) * log pi; the gradient is -A * clip(ratio) for every token, clipped or not.

    Shapes: all (T,) -> loss, ratio, clamped ratio: (T,). The loss alone carries gradient.
    """
    ratio = bounded_exp(logprobs - prev_logprobs).detach()
    weight = ratio.clamp(1 - alg.ratio_clip_min, 1 + alg.ratio_clip_max)
    return -advantages * weight * logprobs, ratio, weight


def ppo_clip_loss(logprobs, prev_logprobs, advantages, alg: Algorithm):
    """max(-A r, -A clip(r)) (PPO, arXiv:1707.06347), and with ratio_clip_c = c the dual clip (arXiv:1912.09729):
    where A < 0 the loss is at most -A c. Shapes and results as in `cispo_loss`."""
    ratio = bounded_exp(logprobs - prev_logprobs)
    clamped = ratio.clamp(1 - alg.ratio_clip_min, 1 + alg.ratio_clip_max)
    loss = torch.maximum(-advantages * ratio, -advantages * clamped)
    if alg.ratio_clip_c is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * alg.ratio_clip_c), loss)
    return loss, ratio.detach(), clamped.detach()


# ---- the loss of a micro-batch -------------------------------------------------------------------------------
def token_weights(lengths_B, mask_T, num_tokens, num_seqs, token_level: bool):
    """What each token's loss counts for; summed over the whole optimizer batch (all ranks) these are 1.

    token_level: 1 / num_tokens. Otherwise the mean over sequences of each one's token mean, 1 / (num_seqs * length).
    Both counts are global, so the sum of micro-batch losses over micro-batches and ranks is the loss, and no
    averaging is needed anywhere. The loss tokens come first in mask_T, then the padding.

    Shapes: lengths_B (B,) loss tokens of each sequence -> (T,), 0 where masked.
    """
    if token_level:
        return torch.where(mask_T, 1.0 / max(num_tokens, 1), 0.0)
    per_seq_B = 1.0 / (lengths_B.clamp(min=1) * max(num_seqs, 1))
    per_token = per_seq_B.repeat_interleave(lengths_B)
    return torch.where(mask_T, torch.nn.functional.pad(per_token, (0, len(mask_T) - len(per_token))), 0.0)


def policy_loss(logprobs, prev_logprobs, gen_logprobs, advantages, mask, weights, num_tokens, alg: Algorithm):
    """Loss and metrics of one micro-batch, as its share of the optimizer batch.

    logprobs: log pi of the sampled tokens under the weights being trained (with gradient); prev_logprobs: the
    trainer's own at the start of the step; gen_logprobs: the sampler's. Masked positions may hold anything, inf and
    NaN included: they are replaced before any arithmetic, since 0 * inf would be NaN in value or gradient.

    Shapes: all (T,); weights from `token_weights`; num_tokens the global count of loss tokens, 0-D or int.
    Returns: loss (0-D) and metrics, a dict of 0-D tensors. Names ending in _min or _max reduce by that, all others
    by sum, over micro-batches and ranks; a sum over the whole batch is a mean over its tokens.
    Source of names and definitions: NeMo RL's clipped policy-gradient loss.
    """
    curr, prev, gen, advantages = (
        torch.where(mask, x, 0.0) for x in (logprobs, prev_logprobs, gen_logprobs, advantages)
    )
    # FORK HERE: another algorithm is another function of these log-probs.
    loss_T, ratio, clamped = (cispo_loss if alg.use_cispo else ppo_clip_loss)(curr, prev, advantages, alg)
    is_weight = bounded_exp(prev - gen)  # trainer against sampler: numerics, and the policies between the two
    if alg.use_importance_sampling_correction:
        loss_T = loss_T * is_weight
    loss = (loss_T * weights).sum()

    with torch.no_grad():
        mean = lambda x: torch.where(mask, x, 0.0).sum() / max(num_tokens, 1)
        low = lambda x: torch.where(mask, x, torch.inf).amin()
        high = lambda x: torch.where(mask, x, -torch.inf).amax()
        metrics = {
            "loss": loss.detach(),
            "probs_ratio": mean(ratio), "probs_ratio_min": low(ratio), "probs_ratio_max": high(ratio),
            "probs_ratio_clamped": mean(clamped),
            "probs_ratio_clamped_min": low(clamped), "probs_ratio_clamped_max": high(clamped),
            "sampling_importance_ratio": mean(is_weight),
            "approx_entropy": -mean(bounded_exp(curr - gen) * curr),
            **{name: mean(x) for name, x in mismatch(prev, gen).items()},
        }  # fmt: skip
    return loss, metrics


def mismatch(prev, gen):
    """How far the trainer's log-probs (prev) are from the sampler's (gen), per token, in nats but for the first.

    The KL terms are the k3 estimator e^d - d - 1. Source: NeMo RL's metrics of the same names.
    """
    d = (prev - gen).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)
    k3 = lambda x: torch.expm1(x) - x  # expm1, log1p: where numerics agree the result is 1e-10, and 0 at equality
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


# ---- log-probs of a large vocabulary -------------------------------------------------------------------------
def _chunk_logprobs(hidden_ND, weight_VD, targets_N, temperature):
    logits_NV = (hidden_ND @ weight_VD.t()).float() / temperature
    logprobs_NV = logits_NV.log_softmax(-1)
    entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1).detach()
    return logprobs_NV.gather(-1, targets_N[:, None]).squeeze(-1), entropy_N


_compiled_chunk_logprobs = torch.compile(_chunk_logprobs, dynamic=False, fullgraph=True)


def token_logprobs(hidden_ND, weight_VD, targets_N, temperature: float, chunk_tokens: int, compiled: bool):
    """log pi of each target token, and the entropy of each distribution, with one chunk of logits alive at a time.

    The logits of a chunk are recomputed in its backward. The rows are padded to whole chunks, so that one compiled
    graph serves every batch; the results keep that padded length (mask them), which spares the callers reshapes.

    Shapes: hidden_ND (N, D), weight_VD (V, D), targets_N (N,) -> logprobs, entropy: (N padded to chunks,) fp32.
    Units: nats, at the sampling temperature.
    """
    pad = max(1, -(-len(targets_N) // chunk_tokens)) * chunk_tokens - len(targets_N)
    hidden_ND = torch.nn.functional.pad(hidden_ND, (0, 0, 0, pad))
    targets_N = torch.nn.functional.pad(targets_N, (0, pad))
    body = _compiled_chunk_logprobs if compiled else _chunk_logprobs
    chunks = [
        checkpoint(body, hidden, weight_VD, targets, temperature, use_reentrant=False)
        for hidden, targets in zip(hidden_ND.split(chunk_tokens), targets_N.split(chunk_tokens))
    ]
    logprobs, entropy = zip(*chunks)
    return torch.cat(logprobs), torch.cat(entropy)
