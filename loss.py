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
import torch.distributed as dist

from metrics import Parts, bounded_exp, mismatch_by_age, sequence_mean, sequence_sum, token_metrics
from parallel import all_reduce


@dataclass(frozen=True)
class Algorithm:
    """The seed system's loss_fn keys, resolved; their meaning is beside the flags in train_cispo.py. Bounds are
    offsets from 1, as there: the ratio is clamped to [1 - ratio_clip_min, 1 + ratio_clip_max]."""

    use_cispo: bool = True
    ratio_clip_min: float = 1.0
    ratio_clip_max: float = 5.0
    ratio_clip_c: float | None = None
    ratio_anchor: str = "prev"
    disable_ppo_ratio: bool = False
    force_on_policy_ratio: bool = False
    sequence_level_importance_ratios: bool = False
    use_importance_sampling_correction: bool = True
    truncated_importance_sampling_type: str | None = None
    truncated_importance_sampling_ratio: float | None = None
    truncated_importance_sampling_ratio_min: float | None = None
    reference_policy_kl_penalty: float = 0.0
    reference_policy_kl_type: str = "k3"
    kl_input_clamp_value: float = 20.0
    kl_output_clamp_value: float = 10.0
    use_on_policy_kl_approximation: bool = False
    use_kl_in_reward: bool = False
    positive_example_nll_weight: float = 0.0

    @property
    def needs_prev(self) -> bool:
        """Whether the trainer's log-probs at the start of the step are read; else the current ones, detached, are."""
        return not self.force_on_policy_ratio and self.ratio_anchor == "prev"

    @property
    def needs_sequences(self) -> bool:
        """Whether a token's loss depends on the other tokens of its sequence. Else `token_loss` is elementwise."""
        return self.sequence_level_importance_ratios or self.truncated_importance_sampling_type == "seq-mask-tis"


# ---- advantages ----------------------------------------------------------------------------------------------
def group_advantages(rewards_PS, valid_PS, leave_one_out: bool, std: str | None, eps: float = 1e-6):
    """How much better a sample did than its siblings.

    The baseline of a sample is the mean reward of its group (with `leave_one_out`: of the group's other samples);
    with std "group" the difference is divided by the standard deviation (n-1) of the same samples, where that is
    not zero; with "batch" by the one of all differences of the step (ScaleRL). Invalid samples take no part and get
    0; so does a sample without a sibling.

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
    if std == "group":
        deviation_PSS = torch.where(used_PSS, rewards_PSS - mean_PS[..., None], 0)
        std_PS = (deviation_PSS.square().sum(-1) / (count_PS - 1).clamp(min=1)).sqrt()
        # A spread below the rounding of the mean is no spread: 16 x 0.3 must count as a constant group.
        advantages_PS = torch.where(std_PS > 1e-12, advantages_PS / (std_PS + eps), advantages_PS)
    compared_PS = valid_PS & (valid_PS.sum(-1, keepdim=True) > 1)
    if std == "batch" and compared_PS.any() and (spread := advantages_PS[compared_PS].std()) > 1e-12:
        advantages_PS = advantages_PS / (spread + eps)
    return torch.where(compared_PS, advantages_PS, 0).to(rewards_PS.dtype)


# ---- losses, per token ---------------------------------------------------------------------------------------
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


def reinforce_loss(logprobs, prev_logprobs, advantages, alg: Algorithm):
    """-A * log pi, without a ratio; as in the seed system, log pi is what the ratio metrics then show."""
    return -advantages * logprobs, logprobs.detach(), logprobs.detach()


def correction_weight(own, gen, mask, alg: Algorithm, sequence):
    """Weight of trainer against sampler: raw, as it is used, and where it is out of bounds, all (T,) and detached.

    tis clamps it to the bounds; icepop zeroes the tokens outside; seq-mask-tis zeroes the sequences whose geometric
    mean is outside. With sequence-level ratios it is the product over the sequence, as in the seed system.
    """
    kind, low, high = (getattr(alg, f"truncated_importance_sampling_{n}") for n in ("type", "ratio_min", "ratio"))
    whole = alg.sequence_level_importance_ratios
    raw = bounded_exp(sequence_sum(own - gen, sequence) if whole else own - gen)
    if kind is None:
        return raw, raw, torch.zeros_like(mask)
    judged = bounded_exp(sequence_mean(own - gen, mask, sequence)) if kind == "seq-mask-tis" else raw
    outside = (judged < (low or 0.0)) | (judged > high)
    return raw, raw.clamp(low or 0.0, high) if kind == "tis" else torch.where(outside, 0.0, raw), outside


def kl_estimate(logprobs, ref_logprobs, alg: Algorithm, weight=None):
    """Per-token estimate of KL(pi || pi_ref): k1 -d, k2 d^2 / 2, k3 e^d - 1 - d, where d = ref - log pi is clamped
    first and the result last. `weight` multiplies it, without gradient where the clamp of d has taken that away.

    Shapes: all (T,). Source: Schulman's note on approximating KL; arXiv:2506.09477 for the weight's gradient.
    """
    d = ref_logprobs - logprobs
    clamped = d.clamp(-alg.kl_input_clamp_value, alg.kl_input_clamp_value)
    kind = alg.reference_policy_kl_type
    kl = -clamped if kind == "k1" else clamped.square() / 2 if kind == "k2" else torch.expm1(clamped) - clamped
    if weight is not None:
        kl = kl * torch.where(d == clamped, weight, weight.detach())
    return kl.clamp(-alg.kl_output_clamp_value, alg.kl_output_clamp_value)


# ---- the loss of a micro-batch -------------------------------------------------------------------------------
def row_weights(lengths_R, units_R):
    """What each token of a row counts for: tokens are averaged within their unit, then the units are averaged.

    A unit is the whole optimizer batch (token mean), a prompt, or a row (sequence mean). Counts are of the optimizer
    batch on all ranks, so the sum of micro-batch losses over micro-batches and ranks is the loss, and no averaging
    is needed anywhere. Shapes: all (R,), over all rows of the batch.
    """
    units, unit_R = units_R.unique(return_inverse=True)
    tokens_U = torch.zeros(len(units)).index_add(0, unit_R, lengths_R.float())
    return 1 / (len(units) * tokens_U[unit_R]).clamp(min=1)


def token_loss(
    logprobs, prev, gen, advantages, mask, weights, alg: Algorithm, ref=None, nll_weights=None, sequence=None
):
    """The loss of every token, times what it counts for; the sum is the loss. The gradient flows to logprobs alone.

    Elementwise unless `alg.needs_sequences`: token t of the result depends on token t of the arguments, so a head
    may call this on any piece of the tokens. Masked positions may hold anything, inf and NaN included: they are
    replaced before any arithmetic, since 0 * inf would be NaN in value or gradient.

    Shapes: all (T,). Arguments as in `policy_loss`. Returns: loss (T,) and the parts that metrics are made of.
    """
    curr, prev, gen, advantages = (torch.where(mask, x, 0.0) for x in (logprobs, prev, gen, advantages))
    own = prev if alg.needs_prev else curr.detach()
    anchor = token_anchor = gen if alg.ratio_anchor == "sampler" else own
    if alg.sequence_level_importance_ratios and not alg.force_on_policy_ratio:  # GSPO, arXiv:2507.18071
        anchor = curr - sequence_mean(curr - anchor, mask, sequence)  # so the ratio is the sequence's, at each token
    # FORK HERE: another algorithm is another function of these log-probs.
    term = cispo_loss if alg.use_cispo else reinforce_loss if alg.disable_ppo_ratio else ppo_clip_loss
    loss_T, ratio, clamped = term(curr, anchor, advantages, alg)
    raw, used, outside = correction_weight(own, gen, mask, alg, sequence)
    if alg.use_importance_sampling_correction:
        loss_T = loss_T * used
    kl = torch.zeros_like(curr)
    if alg.reference_policy_kl_penalty:
        # The samples come from the policy itself, so their probability has a gradient too, though its value is 1.
        weight = bounded_exp(curr - (gen if alg.use_on_policy_kl_approximation else curr.detach()))
        kl = kl_estimate(curr, torch.where(mask, ref, 0.0), alg, weight)
        if not alg.use_kl_in_reward:
            loss_T = loss_T + alg.reference_policy_kl_penalty * kl
    loss_T = loss_T * weights
    if alg.positive_example_nll_weight:
        loss_T = loss_T - alg.positive_example_nll_weight * nll_weights * curr
    parts = Parts(curr.detach(), own, token_anchor, gen, advantages, ratio, clamped, raw, outside, kl.detach())
    return loss_T, parts


def policy_loss(
    logprobs, prev_logprobs, gen_logprobs, advantages, mask, weights, num_tokens, alg: Algorithm,
    ref_logprobs=None, nll_weights=None, sequence=None, num_seqs=1, age=None, max_age=0,
):  # fmt: skip
    """Loss and metrics of one micro-batch, as its share of the optimizer batch.

    logprobs: log pi of the sampled tokens under the weights being trained (with gradient); prev_logprobs: the
    trainer's own at the start of the step; gen_logprobs: the sampler's; ref_logprobs: the starting model's, for the
    KL penalty; weights: `row_weights` of each token, 0 where masked; nll_weights: the same for the mean over tokens
    of rewarded samples; sequence: which sequence of the micro-batch a token is of; age: in steps, 0 is current.

    Shapes: all (T,); num_tokens, num_seqs: global counts of loss tokens and sequences, 0-D or int.
    Returns: loss (0-D) and metrics, a dict of 0-D tensors and one histogram. Names ending in _min or _max reduce by
    that, all others by sum, over micro-batches and ranks; a sum over the whole batch is a mean over its tokens.
    Source of names and definitions: NeMo RL's clipped policy-gradient loss. sampling_importance_ratio is the weight
    before truncation, since the truncated one hides what it is there to show.
    """
    loss_T, parts = token_loss(
        logprobs, prev_logprobs, gen_logprobs, advantages, mask, weights, alg, ref_logprobs, nll_weights, sequence
    )
    loss = loss_T.sum()

    with torch.no_grad():
        metrics = token_metrics(parts, mask, weights, nll_weights, num_tokens, num_seqs, sequence, alg)
        if age is not None:
            metrics.update(mismatch_by_age(parts.own, parts.gen, mask, age, max_age))
    return loss, {"loss": loss.detach(), **metrics}


# ---- log-probs of a large vocabulary -------------------------------------------------------------------------
# A chunk's logits are the largest tensor of the program, so they live once: one GEMM writes them, an elementwise body
# turns them into d loss / d logits where they lie, two GEMMs read that. Nothing is recomputed, since the loss of a
# token gives its gradient as soon as its log-prob is known: 3 GEMMs, 6*D*V FLOPs a token, forward and backward.
IGNORED = -(2**31)  # target of a padding row; with a sharded vocabulary -1 can be a word of another rank


def chunk_rows(vocab_rows: int, budget_bytes: int = 2**28) -> int:
    """Tokens whose fp32 logits fit the budget: a power of two from 16 to 4096, as batches are multiples of such."""
    return 1 << min(12, max(4, (budget_bytes // (4 * vocab_rows)).bit_length() - 1))


def _head_body(logits_Cv, dlogits_Cv, targets_C, aux, token_objective, temperature: float, tp_group):
    """From a chunk's logits to its loss (0-D), log-probs and entropies; d loss / d logits goes to dlogits_Cv, which
    may be logits_Cv. Targets count from this rank's first word. Without an objective: no loss, dlogits untouched."""
    z_Cv = logits_Cv / temperature
    z_Cv = z_Cv - all_reduce(z_Cv.amax(-1), tp_group, dist.ReduceOp.MAX)[:, None]
    sum64 = lambda x_Cv: x_Cv.sum(-1, dtype=torch.float64)  # 151,936 terms one by one in fp32 are wrong by 1e-5
    here_C = (targets_C >= 0) & (targets_C < z_Cv.shape[1])
    target_C = torch.where(here_C, z_Cv.gather(-1, torch.where(here_C, targets_C, 0)[:, None]).squeeze(-1), 0.0)
    packed_3C = torch.stack([sum64(z_Cv.exp()), sum64(z_Cv.exp() * z_Cv), target_C.double()])
    sum_C, weighted_C, target_C = all_reduce(packed_3C, tp_group).unbind()
    logprobs_C = (target_C - sum_C.log()).to(z_Cv.dtype)
    entropy_C = (sum_C.log() - weighted_C / sum_C).to(z_Cv.dtype)
    if token_objective is None:
        return None, logprobs_C, entropy_C

    def chunk_loss(logprobs_C):
        loss = token_objective(logprobs_C, *aux)
        loss = torch.where(targets_C != IGNORED, loss, 0.0).sum() if loss.ndim else loss
        return loss, loss

    coef_C, loss = torch.func.grad(chunk_loss, has_aux=True)(logprobs_C)
    coef_C = torch.where(targets_C != IGNORED, coef_C, 0.0) / temperature
    onehot_Cv = torch.arange(z_Cv.shape[1], device=z_Cv.device, dtype=torch.int32) == targets_C.int()[:, None]
    softmax_Cv = (z_Cv - sum_C.log().to(z_Cv.dtype)[:, None]).exp()  # another exp: kept, the first would be a buffer
    dlogits_Cv.copy_(coef_C[:, None] * (onehot_Cv.to(z_Cv.dtype) - softmax_Cv))
    return loss, logprobs_C, entropy_C


_compiled_head_body = torch.compile(_head_body, fullgraph=True)


def _run_head_body(compiled, logits_Cv, dlogits_Cv, targets_C, aux, *rest):
    """The body, compiled once for any number of rows but one (a compiler takes 1 for a constant)."""
    if not compiled:
        return _head_body(logits_Cv, dlogits_Cv, targets_C, aux, *rest)
    for x in (logits_Cv, dlogits_Cv, targets_C, *aux):
        torch._dynamo.mark_dynamic(x, 0)
    return _compiled_head_body(logits_Cv, dlogits_Cv, targets_C, aux, *rest)


@torch.no_grad()
def _head_pass(head, token_objective, aux, needs=(False, False), weight_grad=None):
    """Every chunk through the body. head: the arguments of `token_logprobs`; needs: whether hidden states, and weight,
    want a gradient. Returns: loss, log-probs, entropy, (gradients)."""
    hidden_ND, weight_vD, targets_N, temperature, chunk_tokens, compiled, tp_group = head
    N, (v, D), C = len(hidden_ND), weight_vD.shape, chunk_tokens or chunk_rows(len(weight_vD))
    # Logits are fp32 whatever the inputs: rounded to bf16 they are wrong by 0.06 nats. Only CUDA has a GEMM from bf16
    # to fp32; elsewhere (tests) the operands are made fp32. Gradients are rounded to bf16 just for the tensor cores.
    narrow = hidden_ND.dtype if hidden_ND.is_cuda and hidden_ND.dtype.itemsize < 4 else None
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    to_fp32 = {"out_dtype": dtype} if narrow else {}
    weight = weight_vD if narrow else weight_vD.to(dtype)
    new = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device=hidden_ND.device)
    most = max(2, min(N, C))
    logits_Cv = new(most, v)
    dlogits_Cv = new(most, v, dtype=narrow) if narrow and any(needs) else logits_Cv
    dhidden_ND = new(N, D, dtype=narrow or dtype) if needs[0] else None
    dweight_vD = (new(v, D) if weight_grad is None else weight_grad) if needs[1] else None
    padded = -(-max(N, 1) // C) * C  # one chunk at least: a rank without tokens takes part in the collectives
    loss, logprobs, entropy = new(1).zero_()[0], new(padded).zero_(), new(padded).zero_()
    targets_N = targets_N - (v * dist.get_rank(tp_group) if tp_group is not None else 0)
    for start in range(0, padded, C):
        real = min(C, N - start)
        rows, c = slice(start, start + real), max(2, real)  # the last chunk has as many rows as are left, at least 2
        pad = lambda x, value=0, rows=rows, extra=c - real: torch.nn.functional.pad(x[rows], (0, extra), value=value)
        hidden = torch.nn.functional.pad(hidden_ND[rows], (0, 0, 0, c - real)).to(dtype=weight.dtype)
        logits_cv = logits_Cv[:c]
        dlogits_cv = logits_cv if dlogits_Cv is logits_Cv else dlogits_Cv[:c]  # two views of one would be two inputs
        torch.mm(hidden, weight.t(), **to_fp32, out=logits_cv)
        chunk_loss, logprobs_C, entropy_C = _run_head_body(
            compiled, logits_cv, dlogits_cv, pad(targets_N, IGNORED), tuple(map(pad, aux)), token_objective,
            temperature, tp_group,
        )  # fmt: skip
        logprobs[rows], entropy[rows] = logprobs_C[:real], entropy_C[:real]
        loss += chunk_loss if token_objective else 0
        if needs[0]:
            torch.mm(dlogits_cv[:real], weight, out=dhidden_ND[rows])
        if needs[1]:
            beta = 0 if start == 0 and weight_grad is None else 1  # 0: the memory's old content counts for nothing
            torch.addmm(dweight_vD, dlogits_cv.t(), hidden, **to_fp32, beta=beta, out=dweight_vD)
    dhidden_ND = dhidden_ND.to(hidden_ND.dtype) if needs[0] else None
    dweight_vD = dweight_vD.to(weight_vD.dtype) if needs[1] and weight_grad is None else None
    return loss, logprobs, entropy, (dhidden_ND, dweight_vD)


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known, forward; those times the upstream gradient, backward (once: in place)."""

    @staticmethod
    def forward(ctx, loss, hidden_ND, weight_vD, gradients, weight_grad_is_added):
        ctx.gradients, ctx.added = gradients, weight_grad_is_added
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        assert ctx.gradients is not None, "a second backward through fused_head_loss: its gradients are used up"
        gradients, ctx.gradients = ctx.gradients, None  # no reference stays, so autograd takes the memory, not a copy
        if ctx.added:  # too late to scale that one
            torch._assert_async(upstream == 1, "fused_head_loss with weight_grad: scale its objective, not the loss")
        if upstream.is_cuda or upstream != 1:  # on a CPU the comparison is free, on a GPU a sync
            gradients = tuple(None if g is None else g.mul_(upstream.to(g.dtype)) for g in gradients)
        return None, *gradients, None, None


def fused_head_loss(
    hidden_ND, weight_vD, targets_N, token_objective, aux=(), temperature: float = 1.0, chunk_tokens: int = 0,
    compiled: bool = True, tp_group=None, weight_grad=None,
):  # fmt: skip
    """The loss of the tokens, its gradients with it, and their log-probs, in one pass over the vocabulary.

    token_objective(logprobs_C, *aux_C): each token's loss, or their sum, from that token's own numbers; `aux` are its
    tensors, and on padding they are 0 (so must be a sum). A loss of whole sequences is one of `token_logprobs`.
    chunk_tokens: rows of logits alive at a time; 0: as `chunk_rows` has it. tp_group: the vocabulary is sharded over
    it in rank order, equal parts; weight_vD is this rank's, everything else the same on all ranks. The gradient of
    the hidden states is then this rank's words' share of it: the model adds the shares up where it gathers tokens.
    weight_grad (v, D), fp32: the weight's gradient is added to it at once, and autograd passes none on; the loss must
    then be differentiated as it is, with no factor. For a main gradient, or weight.grad of a leaf, tied or not.

    Shapes: hidden_ND (N, D), weight_vD (v, D) of the same dtype, targets_N (N,) -> loss (0-D, with gradient to hidden
    states and weight), logprobs and entropy as `token_logprobs` returns them, without gradient.
    """
    head = (hidden_ND, weight_vD, targets_N, temperature, chunk_tokens, compiled, tp_group)
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (hidden_ND, weight_vD)]
    loss, *results, gradients = _head_pass(head, token_objective, tuple(x.detach() for x in aux), needs, weight_grad)
    added = weight_grad is not None and needs[1]
    return _WithGradients.apply(loss, hidden_ND, weight_vD, gradients, added), *results


class _TokenLogprobs(torch.autograd.Function):
    """Log-probs forward, keeping no logits; backward makes them again, with the coefficients that came from above:
    the two-pass mode, 8*D*V FLOPs a token."""

    @staticmethod
    def forward(ctx, *head):
        ctx.save_for_backward(*head[:3])
        ctx.rest = head[3:]
        _, logprobs, entropy, _ = _head_pass(head, None, ())
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, coef, _):
        head = (*ctx.saved_tensors, *ctx.rest)
        *_, gradients = _head_pass(head, torch.mul, (coef.contiguous(),), ctx.needs_input_grad[:2])
        return *gradients, *(None for _ in head[2:])


def token_logprobs(hidden_ND, weight_vD, targets_N, temperature, chunk_tokens, compiled, tp_group=None):
    """log pi of each target token, and the entropy of each distribution, with one chunk of logits alive at a time.

    Differentiable in the log-probs, for losses that need them all before their gradient is known; under no_grad
    nothing is kept. The results are padded to whole chunks (mask them), which spares the callers reshapes.

    Shapes: hidden_ND (N, D), weight_vD (v, D), targets_N (N,) -> logprobs, entropy: (N padded to chunks,) fp32.
    Units: nats, at the sampling temperature.
    """
    return _TokenLogprobs.apply(hidden_ND, weight_vD, targets_N, temperature, chunk_tokens, compiled, tp_group)
