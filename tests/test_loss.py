"""The losses against NeMo RL's numbers, a per-token loop in float64, and the properties a
denominator must have."""

import math
import random
from decimal import Decimal
from itertools import product

import pytest
import torch
from batches import policy_loss
from torch.testing import assert_close

from loss import Algorithm, cispo_loss, group_advantages, mismatch
from ranks.batch import row_weights
from ranks.ops import token_logprobs

torch.set_num_threads(1)

# The reference table has 6 decimals: 5e-7 is half its last digit, and 1e-6 relative is 8 fp32
# roundings.
PRINTED = dict(rtol=1e-6, atol=6e-7)
RECIPE, NARROW = (
    dict(ratio_clip_min=1.0, ratio_clip_max=5.0),
    dict(ratio_clip_min=0.2, ratio_clip_max=0.2),
)
REGIONS = {  # DPPO's and KPop's own bounds
    "tv": dict(trust_region="tv", trust_region_low=0.15, trust_region_high=0.15),
    "kl": dict(trust_region="kl", trust_region_low=0.05, trust_region_high=0.05),
    "kpop": dict(trust_region="kpop", trust_region_high=0.1),
}
BY_SIGN = dict(ratio_clip_min_negative=0.4, ratio_clip_max_negative=0.7)
ALGORITHMS = {
    "cispo": Algorithm(use_importance_sampling_correction=False),
    "cispo, IS": Algorithm(),
    "cispo, bounds by sign": Algorithm(**BY_SIGN),
    **{f"cispo, IS, {kind}": Algorithm(**region) for kind, region in REGIONS.items()},
    "ppo": Algorithm(use_cispo=False, use_importance_sampling_correction=False, **NARROW),
    "ppo, IS": Algorithm(use_cispo=False, **NARROW),
    "ppo, dual clip, IS": Algorithm(use_cispo=False, ratio_clip_c=3.0, **NARROW),
}


def batch(num_tokens, seed=0, dtype=torch.float32):
    """logprobs (a leaf), prev, gen, advantages: with differences of about 1, so that every clip has
    both its sides."""
    g = torch.Generator().manual_seed(seed)
    gen = -3 * torch.rand(num_tokens, generator=g, dtype=dtype) - 0.01
    prev, curr = (gen + torch.randn(num_tokens, generator=g, dtype=dtype) * s for s in (0.3, 1.0))
    return curr.requires_grad_(), prev, gen, torch.randn(num_tokens, generator=g, dtype=dtype)


def run(inputs, mask, weights, num_tokens, alg, loss_fn=policy_loss):
    """loss, metrics and d loss / d logprobs."""
    loss, metrics = loss_fn(*inputs, mask, weights, num_tokens, alg)
    return loss.detach(), metrics, torch.autograd.grad(loss, inputs[0])[0]


# ---- NeMo RL's numbers ---------------------------------------------------------------------------
# logprobs, prev, gen, advantages
INPUTS = [[-1.69315, -1.0, -0.59453], [-1.0, -1.0, -1.0], [-0.5, -1.5, -0.8], [1.0, -1.0, 2.0]]
INPUTS_E = [[-1.69315, -1.0, -0.69741], [-1.0, -1.0, -3.0], [-0.5, -1.5, -0.8], [1.0, -1.0, -4.0]]
NEMO = {  # inputs, clip, IS correction, loss, per-token loss (IS weight included), d loss / d curr
    "A": (INPUTS, NARROW, False, 0.593797, [1.354520, -1, 1.426872], [-0.266667, 0.333333, -0.8]),
    "B": (
        INPUTS,
        NARROW,
        True,
        0.113687,
        [0.821558, -1.648721, 1.168224],
        [-0.161742, 0.549574, -0.654985],
    ),
    "C": (
        INPUTS,
        RECIPE,
        False,
        0.543390,
        [0.846573, -1, 1.783599],
        [-0.166666, 0.333333, -1.000005],
    ),
    "D": (
        INPUTS,
        RECIPE,
        True,
        0.108346,
        [0.513472, -1.648721, 1.460287],
        [-0.101088, 0.549574, -0.818735],
    ),
    "E": (
        INPUTS_E,
        RECIPE,
        False,
        -5.630422,
        [0.846573, -1, -16.737840],
        [-0.166666, 0.333333, 8.0],
    ),
}


def run_case(inputs, alg):
    """As in NeMo's fixture, with a first token that is masked. Also the loss of each token
    alone."""
    rows = torch.nn.functional.pad(torch.tensor(inputs), (1, 0), value=math.nan).unbind()
    rows[0].requires_grad_()
    mask = torch.tensor([False, True, True, True])
    loss, metrics, gradient = run(rows, mask, mask / 3, 3, alg)
    per_token = torch.stack([run(rows, mask, one, 3, alg)[0] for one in torch.eye(4)])
    assert gradient[0] == per_token[0] == 0
    return loss, per_token[1:], gradient[1:], metrics


@pytest.mark.parametrize("case", NEMO)
def test_cispo_gives_nemo_rls_numbers(case):
    inputs, clip, correction, *expected = NEMO[case]
    alg = Algorithm(**clip, use_importance_sampling_correction=correction)
    loss, per_token, gradient, metrics = run_case(inputs, alg)
    for found, wanted in zip((loss, per_token, gradient), expected):
        assert_close(found, torch.tensor(wanted), **PRINTED)
    curr, prev, gen, advantages = torch.tensor(inputs)
    alone = cispo_loss(curr, prev, advantages, alg)[0] * ((prev - gen).exp() if correction else 1)
    assert_close(alone, torch.tensor(expected[1]), **PRINTED)
    clamped = {"B": (1.0, 0.8, 1.2), "D": (1.000002, 0.499999, 1.500007)}
    if case in clamped:
        wanted = {
            "token_mult_prob_error": 1.506282,
            "gen_kl_error": 0.091328,
            "policy_kl_error": 0.092218,
            "js_divergence_error": 0.022284,
            "sampling_importance_ratio": 1.024661,
            "approx_entropy": 0.964112,
            "probs_ratio": 1.000002,
            "probs_ratio_min": 0.499999,
            "probs_ratio_max": 1.500007,
            "loss": expected[0],
            "kl_penalty": 0.0,
            "positive_nll_loss": 0.0,
            "would_clip": 1 / 3,
            "would_clip_pos": 1 / 3,
            "would_clip_neg": 0.0,
            "low_prob": 0.0,
            "low_prob_would_clip": 0.0,
            # of pi / pi_sampler
            "weight_sum": sum(math.exp(p - q) for p, q in zip(inputs[0], inputs[2])),
            "weight_square_sum": sum(math.exp(2 * (p - q)) for p, q in zip(inputs[0], inputs[2])),
            **{
                "probs_ratio_clamped" + end: value
                for end, value in zip(("", "_min", "_max"), clamped[case])
            },
        }
        histogram = metrics.pop("ratio_histogram")
        assert metrics.keys() == wanted.keys() and histogram.sum() == 3
        for name, value in wanted.items():
            assert_close(metrics[name].item(), value, msg=name, **PRINTED)


def test_ppo_clip_and_dual_clip_give_nemo_rls_numbers():
    clip = dict(use_cispo=False, use_importance_sampling_correction=False, **NARROW)
    # half the last printed digit, and the inputs' own rounding
    four_decimals = dict(rtol=0, atol=6e-5)
    assert_close(run_case(INPUTS, Algorithm(**clip))[0].item(), -0.6333, **four_decimals)
    loss, per_token, *_ = run_case(INPUTS_E, Algorithm(**clip, ratio_clip_c=3.0))
    assert_close(loss.item(), 4.1667, **four_decimals)
    assert_close(per_token, torch.tensor([-0.5, 1.0, 12.0]), **four_decimals)


# ---- where the gradient goes ---------------------------------------------------------------------
def test_gradient_is_minus_advantage_times_clipped_ratio_and_never_flows_through_the_ratio():
    curr, prev, gen, advantages = batch(200)
    mask = torch.ones(200, dtype=torch.bool)
    loss, _ = policy_loss(
        curr, prev.requires_grad_(), gen, advantages, mask, mask, 200, ALGORITHMS["cispo"]
    )
    to_curr, to_prev = torch.autograd.grad(loss, [curr, prev], allow_unused=True)
    assert to_prev is None
    ratio = (curr - prev).detach().exp()
    assert 0 < (ratio > 6).sum() < 200  # both sides of the clip are there
    # the same products: a few roundings
    assert_close(to_curr, -advantages * ratio.clamp(0, 6), rtol=1e-6, atol=0)


@pytest.mark.parametrize("advantage, ratio", [(1.0, 9.0), (-1.0, 0.1)])
def test_a_clipped_token_still_gets_gradient_under_cispo_and_none_under_ppo(advantage, ratio):
    inputs = torch.tensor(
        [[-1.0], [-1.0 - math.log(ratio)], [-1.0 - math.log(ratio)], [advantage]]
    ).unbind()
    inputs[0].requires_grad_()
    for use_cispo, wanted in ((True, -advantage * min(max(ratio, 0.8), 1.2)), (False, 0.0)):
        gradient = run(
            inputs, torch.tensor([True]), torch.ones(1), 1, Algorithm(use_cispo=use_cispo, **NARROW)
        )[2]
        # a few fp32 products; PPO's zero is exact
        assert_close(gradient.item(), wanted, rtol=1e-6, atol=0)


def too_far(p, q, advantage, alg):
    """Whether a token is masked by the trust region: p under the trainer's weights, q under the
    sampler's."""
    low, high = alg.trust_region_low, alg.trust_region_high
    kl = lambda a, b: a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))
    if alg.trust_region == "tv":
        return p - q > high if advantage > 0 else q - p > low
    if alg.trust_region == "kl":
        return (p > q and kl(q, p) > high) if advantage > 0 else (p < q and kl(q, p) > low)
    return alg.trust_region == "kpop" and max(kl(p, q), kl(q, p)) > high


def by_hand(curr, prev, gen, advantage, alg):
    """Loss of one token and its derivative, in Python floats, by the formulas of the papers."""
    ratio = math.exp(curr - prev)
    low, high = alg.ratio_clip_min, alg.ratio_clip_max
    if advantage < 0 and alg.ratio_clip_max_negative is not None:
        low, high = alg.ratio_clip_min_negative, alg.ratio_clip_max_negative
    clipped = min(max(ratio, 1 - low), 1 + high)
    correction = math.exp(prev - gen) if alg.use_importance_sampling_correction else 1.0
    if too_far(math.exp(curr), math.exp(gen), advantage, alg):
        return 0.0, 0.0
    if alg.use_cispo:
        return correction * -advantage * clipped * curr, correction * -advantage * clipped
    loss, slope = -advantage * ratio, -advantage * ratio
    if -advantage * clipped > loss:
        loss, slope = -advantage * clipped, 0.0
    if alg.ratio_clip_c is not None and advantage < 0 and loss > -advantage * alg.ratio_clip_c:
        loss, slope = -advantage * alg.ratio_clip_c, 0.0
    return correction * loss, correction * slope


@pytest.mark.parametrize("seed", range(20))
def test_loss_and_gradient_match_a_per_token_loop(seed):
    rng = random.Random(seed)
    inputs = batch(97, seed, torch.float64)
    mask = torch.rand(97, generator=torch.Generator().manual_seed(seed)) < 0.7
    weights = torch.where(mask, torch.linspace(0.1, 1.0, 97, dtype=torch.float64), 0.0)
    # log-probs, so that each is a probability below 1 whatever the noise has added
    inputs = (*((x.detach().clamp(max=-0.01)) for x in inputs[:3]), inputs[3])
    inputs[0].requires_grad_()
    for use_cispo, correction, dual in [(1, 1, 0), (1, 0, 0), (0, 1, 0), (0, 0, 0), (0, 1, 1)]:
        clip = dict(ratio_clip_min=rng.uniform(0.1, 1), ratio_clip_max=rng.uniform(0.1, 3))
        clip["ratio_clip_c"] = rng.uniform(1.05, 3) if dual else None
        if use_cispo:
            kind = rng.choice([None, "tv", "kl", "kpop"])
            bounds = {f"trust_region_{end}": rng.uniform(0.01, 0.2) for end in ("low", "high")}
            clip |= dict(trust_region=kind, **bounds) | rng.choice([{}, BY_SIGN])
        alg = Algorithm(
            use_cispo=bool(use_cispo), use_importance_sampling_correction=bool(correction), **clip
        )
        loss, _, gradient = run(inputs, mask, weights, int(mask.sum()), alg)
        rows = [
            by_hand(*row, alg) if use else (0.0, 0.0)
            for *row, use in zip(*(x.tolist() for x in inputs), mask)
        ]
        losses, slopes = torch.tensor(rows, dtype=torch.float64).unbind(-1)
        # 1e-12: float64 on both sides, 97 terms with cancellation between them.
        assert_close(loss, (losses * weights).sum(), rtol=1e-12, atol=1e-12)
        assert_close(gradient, slopes * weights, rtol=1e-12, atol=1e-12)


# ---- denominators --------------------------------------------------------------------------------
def reduce_metrics(parts):
    how = {"min": min, "max": max}
    return {name: how.get(name[-3:], sum)([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("token_level", [True, False])
def test_any_split_into_micro_batches_adds_up_to_the_whole(token_level, name):
    lengths = torch.tensor([5, 1, 13, 2, 8, 3])  # 32 loss tokens
    inputs, mask = batch(32), torch.ones(32, dtype=torch.bool)
    rows = row_weights(lengths, torch.zeros(6) if token_level else torch.arange(6))
    weights = rows.repeat_interleave(lengths)
    per_sequence = torch.stack([w.sum() for w in weights.split(lengths.tolist())])
    # fp32 additions
    assert_close(
        per_sequence, lengths / 32 if token_level else torch.ones(6) / 6, rtol=1e-6, atol=0
    )
    whole = run(inputs, mask, weights, 32, ALGORITHMS[name])
    for split in ([6], [1, 1, 1, 1, 1, 1], [2, 4], [1, 3, 2]):  # sequences in each micro-batch
        parts, start = [], 0
        for part in lengths.split(split):
            n = int(part.sum())
            # A micro-batch is padded with junk, and knows what its own tokens count for in the
            # whole.
            part_weights = torch.nn.functional.pad(weights[start : start + n], (0, 4))
            rows = [
                torch.cat((x.detach()[start : start + n], torch.full((4,), math.nan)))
                for x in inputs
            ]
            rows[0].requires_grad_()
            real = torch.arange(n + 4) < n
            parts.append(run(rows, real, part_weights, 32, ALGORITHMS[name]))
            assert (parts[-1][2][n:] == 0).all()
            start += n
        # 1e-6 of values near 1: the same 32 terms, added in another order.
        assert_close(sum(part[0] for part in parts), whole[0], rtol=1e-6, atol=1e-6)
        assert_close(reduce_metrics([part[1] for part in parts]), whole[1], rtol=1e-6, atol=1e-6)
        # Token by token the same operations: the gradient is equal to the last bit.
        assert torch.equal(torch.cat([part[2][:-4] for part in parts]), whole[2])


# ---- overflow ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ALGORITHMS)
def test_extreme_ratios_and_junk_under_the_mask_stay_finite(name):
    extreme = [
        *product([-5.0, -95.0, -1e30], [-5.0, -95.0, -1e30], [-5.0, -95.0, -1e30], [1.0, -1.0])
    ]
    junk = [*product([-1.0, math.inf, -math.inf, math.nan, 1e38], repeat=4)]
    inputs = torch.tensor(extreme + junk).unbind(-1)
    inputs[0].requires_grad_()
    mask = torch.arange(len(extreme + junk)) < len(extreme)
    loss, metrics, gradient = run(inputs, mask, mask / len(extreme), len(extreme), ALGORITHMS[name])
    assert (
        loss.isfinite()
        and gradient.isfinite().all()
        and all(m.isfinite().all() for m in metrics.values())
    ), metrics
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("num_tokens", [10, 0])  # tokens elsewhere; not a token in the whole batch
def test_a_micro_batch_with_everything_masked_has_loss_zero(num_tokens, name):
    inputs = [torch.full((6,), x) for x in (math.nan, -math.inf, math.inf, math.nan)]
    mask = torch.zeros(6, dtype=torch.bool)
    inputs[0].requires_grad_()
    loss, metrics, gradient = run(inputs, mask, torch.zeros(6), num_tokens, ALGORITHMS[name])
    neutral = {"min": math.inf, "max": -math.inf}  # of the reductions; of a sum it is 0
    assert (
        loss == 0
        and (gradient == 0).all()
        and all((v == neutral.get(k[-3:], 0)).all() for k, v in metrics.items())
    )


# ---- metrics near zero ---------------------------------------------------------------------------
@pytest.mark.parametrize("d", [1e-6, -1e-6, 1e-4, -1e-3, 1e-2, 0.7, -3.0])
@pytest.mark.parametrize("gen", [-0.01, -1.0, -20.0])
def test_mismatch_is_accurate_for_small_differences(gen, d):
    gen = torch.tensor(gen)
    prev = gen + d
    # 28 digits: the textbook formulas cost nothing there
    p, q = (Decimal(x.item()) for x in (prev, gen))
    k3 = lambda x: x.exp() - x - 1
    log_mix = ((p.exp() + q.exp()) / 2).ln()
    wanted = abs(p - q).exp(), k3(p - q), k3(q - p), (k3(p - log_mix) + k3(q - log_mix)) / 2
    for (name, found), value in zip(mismatch(prev, gen).items(), map(float, wanted)):
        # fp32 takes a difference of two numbers of size |d|, each known to 1.2e-7 |d|; then 1e-6 of
        # the result. So k3(1e-6) is 5e-13 within 1.2e-13, where the naive e^d - d - 1 has noise of
        # 1e-7.
        assert_close(
            found.item(),
            value,
            rtol=1e-6,
            atol=1.2e-7 * abs(d),
            msg=f"{name}: {found.item()}, not {value}",
        )


def test_the_compiled_kl_is_never_below_zero_and_as_small_as_the_difference_says():
    """The compiler's expm1 is not exact near 0: a KL of 1e-13 came out as -1e-8."""
    gen = -torch.rand(1000) * 3
    for d in (1e-7, 1e-6, 1e-5, 1e-3):
        prev = gen + d * torch.randn(1000)
        exact = (prev.double() - gen.double()).square() / 2
        for name in ("gen_kl_error", "policy_kl_error"):
            found = torch.compile(mismatch, dynamic=True)(prev, gen)[name]
            # 1 + d / 3 is the next term of the series; 2.4e-7 the rounding of prev - gen, at most
            assert (found >= 0).all() and found.mean() == pytest.approx(
                exact.mean().item(), rel=2 * d + 1e-4
            )


def test_equal_logprobs_have_no_mismatch_at_all():
    logprobs = -30 * torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    for name, value in mismatch(logprobs, logprobs.clone()).items():
        assert (value == (1.0 if name == "token_mult_prob_error" else 0.0)).all(), name


# ---- advantages ----------------------------------------------------------------------------------
def advantages_of(*rewards, valid=None, leave_one_out=True, normalize=True):
    rewards_PS = torch.tensor([rewards])
    valid_PS = (
        torch.ones_like(rewards_PS, dtype=torch.bool) if valid is None else torch.tensor([valid])
    )
    return group_advantages(rewards_PS, valid_PS, leave_one_out, "group" if normalize else None)[
        0
    ].tolist()


def test_group_advantages_give_nemo_rls_numbers():
    # four printed decimals
    close = lambda found, wanted: assert_close(found, wanted, rtol=0, atol=6e-5)
    close(advantages_of(*[1.0] + [0.0] * 15), [1.0] + [-0.2582] * 15)
    close(advantages_of(*[0.0] + [1.0] * 15), [-1.0] + [0.2582] * 15)
    close(advantages_of(*[1.0] * 8 + [0.0] * 8), [1.0328] * 8 + [-1.0328] * 8)
    close(advantages_of(1.0, 2.0, 3.0), [-1.5 / 0.70711, 0.0, 1.5 / 0.70711])
    close(advantages_of(1.0, 2.0, 3.0, normalize=False), [-1.5, 0.0, 1.5])
    close(advantages_of(1.0, 0.0), [1.0, -1.0])  # one other sample has no spread: not scaled
    close(advantages_of(*[1.0] + [0.0] * 15, leave_one_out=False), [3.75] + [-0.25] * 15)


@pytest.mark.parametrize("leave_one_out", [True, False])
# 0.3: in fp32 the rounding of the mean would leave a spread
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.3])
def test_a_group_without_spread_has_advantage_exactly_zero(reward, leave_one_out):
    assert advantages_of(*[reward] * 16, leave_one_out=leave_one_out) == [0.0] * 16


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_invalid_samples_get_zero_and_change_nobody_else(leave_one_out):
    valid = [True, False, True, True, False]
    found = advantages_of(1.0, math.nan, 0.0, 0.5, 1e30, valid=valid, leave_one_out=leave_one_out)
    alone = advantages_of(1.0, 0.0, 0.5, leave_one_out=leave_one_out)
    assert found == [alone[0], 0.0, alone[1], alone[2], 0.0]
    assert (
        advantages_of(0.0, 1.0, 0.0, valid=[False, True, False], leave_one_out=leave_one_out)
        == [0.0] * 3
    )


# ---- log-probs of a vocabulary -------------------------------------------------------------------
CHUNK, D, V = 8, 16, 50


def in_chunks(compiled):
    return lambda *inputs, temperature: token_logprobs(*inputs, temperature, CHUNK, compiled)


def in_fp64(hidden_ND, weight_VD, targets_N, temperature):
    distribution = torch.distributions.Categorical(
        logits=hidden_ND.double() @ weight_VD.double().t() / temperature
    )
    return distribution.log_prob(targets_N).float(), distribution.entropy().float()


def run_head(logprobs_of, num_tokens, temperature):
    """log-probs, entropy, and the gradients to hidden states and weight."""
    g = torch.Generator().manual_seed(num_tokens)
    hidden_ND, weight_VD = (
        torch.randn(n, D, generator=g, requires_grad=True) for n in (num_tokens, V)
    )
    targets_N = torch.randint(V, (num_tokens,), generator=g)
    logprobs, entropy = (
        x[:num_tokens]
        for x in logprobs_of(hidden_ND, weight_VD, targets_N, temperature=temperature)
    )
    (logprobs * torch.linspace(-1, 2, num_tokens)).sum().backward()
    return logprobs.detach(), entropy.detach(), hidden_ND.grad, weight_VD.grad


SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK]
# logits of size 10 in fp32 are known to 1e-6, and sums of V = 50 of them
NEAR = dict(rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("n", SIZES)
def test_chunked_logprobs_match_log_softmax_in_fp64(n, temperature):
    assert_close(
        run_head(in_chunks(False), n, temperature), run_head(in_fp64, n, temperature), **NEAR
    )


def test_compiled_logprobs_equal_eager_and_never_recompile():
    run_head(in_chunks(True), CHUNK, 0.6)  # warm-up: the one compilation
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in SIZES:
            assert_close(
                run_head(in_chunks(True), n, 0.6), run_head(in_chunks(False), n, 0.6), **NEAR
            )
        with pytest.raises(torch._dynamo.exc.RecompileError):  # the alarm works
            run_head(in_chunks(True), CHUNK, 0.7)


@pytest.mark.parametrize("name", ["cispo, IS", "ppo, dual clip, IS"])
def test_compiled_policy_loss_equals_eager(name):
    compiled = torch.compile(policy_loss, dynamic=True, fullgraph=True)
    for n in (33, 47, 64):
        mask = torch.arange(n) < n - 3
        arguments = batch(n, n), mask, mask / (n - 3), n - 3, ALGORITHMS[name]
        # 1e-6: the compiler fuses and reorders sums of values near 1.
        assert_close(run(*arguments, compiled), run(*arguments), rtol=1e-6, atol=1e-6)
