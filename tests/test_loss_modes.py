"""Every mode of NeMo RL's loss block: its literal numbers, its gradients, and what the
metrics say of it."""

import dataclasses
import math

import pytest
import torch
from batches import policy_loss, rows_of, token_loss
from test_loss import BY_SIGN, INPUTS, NARROW, PRINTED, REGIONS
from torch.testing import assert_close

from bridge.groups import Group
from config import Config
from loss import BINS, Algorithm, group_advantages, kl_estimate, ratio_quantile
from ranks.batch import pack_batch, row_weights
from report import fetch, name_of_loss, update_metrics

torch.set_num_threads(1)

FOUR = dict(rtol=1e-4, atol=6e-5)  # numbers printed with four decimals: half the last digit
PPO = Algorithm(use_cispo=False, use_importance_sampling_correction=False, **NARROW)
CORRECTED = dataclasses.replace(PPO, use_importance_sampling_correction=True)
CURR, PREV, GEN, ADV = INPUTS


def ppo(**changes):
    return dataclasses.replace(PPO, **changes)


def evaluate(
    curr, prev, gen, adv, alg, ref=None, positive=None, sequences=None, dtype=torch.float32
):
    """loss, metrics, gradient and per-token losses times the number of tokens. Rows of equal length
    are sequences."""
    flat = [torch.tensor(x, dtype=dtype).flatten() for x in (curr, prev, gen, adv)]
    n = len(flat[0])
    sequence = torch.arange(sequences or 1).repeat_interleave(n // (sequences or 1))
    mask = torch.ones(n, dtype=torch.bool)
    ref = None if ref is None else torch.tensor(ref, dtype=dtype).flatten()
    nll = None if positive is None else torch.tensor(positive, dtype=dtype) / sum(positive)
    flat[0].requires_grad_()
    extra = dict(ref_logprobs=ref, nll_weights=nll, sequence=sequence, num_seqs=sequences or 1)
    value, metrics = policy_loss(*flat, mask, mask.to(dtype) / n, n, alg, **extra)
    gradient = torch.autograd.grad(value, flat[0])[0]
    tokens = token_loss(*flat, mask, mask.to(dtype), alg, ref, nll, sequence)[0].detach()
    return value.item(), metrics, gradient, tokens


def test_every_key_of_the_recipes_loss_block_is_a_flag_with_its_value():
    recipe = dict(
        reference_policy_kl_penalty=0.0,
        reference_policy_kl_type="k3",
        kl_input_clamp_value=20.0,
        kl_output_clamp_value=10.0,
        ratio_clip_min=1.0,
        ratio_clip_max=5.0,
        ratio_clip_c=None,
        token_level_loss=True,
        use_on_policy_kl_approximation=False,
        use_importance_sampling_correction=True,
        use_kl_in_reward=False,
        truncated_importance_sampling_type=None,
        truncated_importance_sampling_ratio=None,
        use_cispo=True,
        truncated_importance_sampling_ratio_min=None,
        sequence_level_importance_ratios=False,
        disable_ppo_ratio=False,
        force_on_policy_ratio=False,
        positive_example_nll_weight=0.0,
    )
    resolved = {**dataclasses.asdict(Config()), **dataclasses.asdict(Config().algorithm)}
    assert {name: resolved[name] for name in recipe} == recipe


# ---- NeMo RL's literal numbers -------------------------------------------------------------------
def test_reinforce_gives_nemo_rls_number_and_its_ratio_is_the_logprob():
    alg = ppo(disable_ppo_ratio=True)
    value, metrics, gradient, tokens = evaluate([-0.5, -1.0, -1.5], PREV, GEN, ADV, alg)
    assert_close(value, 0.8333, **FOUR)
    assert_close(tokens, torch.tensor([0.5, -1.0, 3.0]), **PRINTED)
    assert_close(gradient, torch.tensor([-1.0, 1.0, -2.0]) / 3, **PRINTED)
    assert (
        metrics["probs_ratio"] == metrics["probs_ratio_clamped"] == -1
        and metrics["probs_ratio_min"] == -1.5
    )


def test_forced_on_policy_ratio_is_exactly_one_and_prev_is_ignored():
    value, metrics, gradient, _ = evaluate(
        CURR, [math.nan] * 3, GEN, ADV, ppo(force_on_policy_ratio=True)
    )
    assert_close(value, -0.6667, **FOUR)
    assert_close(gradient, torch.tensor([-1.0, 1.0, -2.0]) / 3, rtol=1e-6, atol=0)  # fp32 thirds
    ends = [
        f"probs_ratio{clamped}{end}" for clamped in ("", "_clamped") for end in ("", "_min", "_max")
    ]
    assert all(metrics[name] == 1.0 for name in ends)


def test_gspo_gives_nemo_rls_numbers():
    alg = ppo(sequence_level_importance_ratios=True)
    value, metrics, gradient, _ = evaluate(CURR, PREV, GEN, ADV, alg)
    assert_close(value, -0.6057, **FOUR)
    assert_close(metrics["probs_ratio"].item(), 0.9086, **FOUR)
    # d/dcurr_t of -mean(A) * exp(mean lr): every token of the sequence gets the same
    assert_close(gradient, torch.full((3,), -2 / 9 * math.exp(-0.28768 / 3)), rtol=1e-6, atol=0)
    value, metrics, gradient, tokens = evaluate(
        [CURR] * 2, [PREV, [-2.0] * 3], [GEN] * 2, [ADV] * 2, alg, sequences=2
    )
    assert_close(value, -0.4912, **FOUR)
    assert_close(tokens, torch.tensor([-0.9086, 0.9086, -1.8171, -1.2, 2.4697, -2.4]), **FOUR)
    # of the second, the middle loss is unclipped
    assert_close(gradient[3:], torch.full((3,), 2.4697 / 18), **FOUR)
    corrected = dataclasses.replace(alg, use_importance_sampling_correction=True)
    value, metrics, *_ = evaluate(CURR, PREV, GEN, ADV, corrected)
    assert_close([value, metrics["sampling_importance_ratio"].item()], [-0.4959, 0.8187], **FOUR)


def test_corrected_ppo_and_truncation_give_nemo_rls_numbers():
    value, _, gradient, tokens = evaluate(CURR, PREV, GEN, ADV, CORRECTED)
    assert_close(value, -0.2065, **FOUR)
    assert_close(tokens, torch.tensor([-0.30325, 1.6487, -1.96488]), **FOUR)
    assert_close(gradient, torch.tensor([-0.30327, 1.64872, 0.0]) / 3, **FOUR)
    tis = dict(truncated_importance_sampling_type="tis", truncated_importance_sampling_ratio=0.8)
    value, metrics, *_ = evaluate(CURR, PREV, GEN, ADV, dataclasses.replace(CORRECTED, **tis))
    assert_close(value, -0.4744, **FOUR)
    # before truncation
    assert_close(metrics["sampling_importance_ratio"].item(), 1.024661, **PRINTED)
    whole = dataclasses.replace(CORRECTED, sequence_level_importance_ratios=True, **tis)
    assert_close(evaluate(CURR, PREV, GEN, ADV, whole)[0], -0.4846, **FOUR)


@pytest.mark.parametrize(
    "low, weights, outside", [(None, [0.1, 1.0, 2.0], 1 / 3), (0.5, [0.5, 1.0, 2.0], 2 / 3)]
)
def test_truncation_clamps_to_its_bounds_and_counts_what_was_outside(low, weights, outside):
    alg = dataclasses.replace(
        CORRECTED,
        force_on_policy_ratio=True,
        truncated_importance_sampling_type="tis",
        truncated_importance_sampling_ratio=2.0,
        truncated_importance_sampling_ratio_min=low,
    )
    curr = [math.log(x) for x in (0.1, 1.0, 3.0)]
    value, metrics, gradient, _ = evaluate(curr, [0.0] * 3, [0.0] * 3, [1.0] * 3, alg)
    assert_close(value, -sum(weights) / 3, **PRINTED)
    assert_close(gradient, -torch.tensor(weights) / 3, **PRINTED)
    assert_close(metrics["is_oob_ratio"].item(), outside, **PRINTED)


def test_truncation_counts_one_of_three_tokens_outside():
    alg = dataclasses.replace(
        CORRECTED, truncated_importance_sampling_type="tis", truncated_importance_sampling_ratio=2.0
    )
    prev = [math.log(x) for x in (1.0, 3.0, 0.5)]
    assert_close(
        evaluate([0.0] * 3, prev, [0.0] * 3, [1.0] * 3, alg)[1]["is_oob_ratio"].item(),
        1 / 3,
        **PRINTED,
    )


def test_icepop_drops_the_tokens_outside_its_bounds():
    alg = dataclasses.replace(
        CORRECTED,
        truncated_importance_sampling_type="icepop",
        truncated_importance_sampling_ratio=5.0,
        truncated_importance_sampling_ratio_min=0.5,
    )
    value, metrics, gradient, tokens = evaluate(PREV, PREV, [-0.5, -3.5, -0.8], ADV, alg)
    assert_close(tokens, torch.tensor([-0.6065, 0.0, -2 * 0.8187]), **FOUR)
    assert_close(gradient, tokens / 3, **PRINTED)  # the ratio is 1, so loss and slope are equal
    assert gradient[1] == 0 and metrics["is_oob_ratio"].item() == pytest.approx(1 / 3)
    assert value == pytest.approx(tokens.mean().item(), rel=1e-6)


def test_seq_mask_tis_drops_whole_sequences_and_keeps_the_raw_weight_of_others():
    alg = dataclasses.replace(
        CORRECTED,
        truncated_importance_sampling_type="seq-mask-tis",
        truncated_importance_sampling_ratio=1.002,
        truncated_importance_sampling_ratio_min=0.999,
    )
    gen = [[-1.0005] * 3, [-0.5, -1.5, -0.8]]  # geometric means 1.0005 and 0.9355
    _, metrics, gradient, tokens = evaluate(
        [PREV] * 2, [PREV] * 2, gen, [ADV] * 2, alg, sequences=2
    )
    assert_close(
        tokens, torch.tensor([-1.0005001, 1.0005001, -2.0010002, 0, 0, 0]), rtol=1e-6, atol=0
    )
    assert_close(gradient, tokens / 6, rtol=1e-6, atol=0)
    assert_close(metrics["is_oob_ratio"].item(), 0.5, **PRINTED)  # of sequences


@pytest.mark.parametrize(
    "kind, raw, bounded",
    [
        ("k1", [-1, 14, 29], [-1, 10, 10]),
        ("k2", [0.5, 98, 420.5], [0.5, 10, 10]),
        ("k3", [0.7183, 13, 28], [0.7183, 10, 10]),
    ],
)
def test_kl_estimators_and_their_clamps_give_nemo_rls_numbers(kind, raw, bounded):
    logprobs, ref = torch.full((3,), -1.0), torch.tensor([0.0, -15.0, -30.0])
    wide = Algorithm(
        reference_policy_kl_type=kind, kl_input_clamp_value=1e3, kl_output_clamp_value=1e3
    )
    assert_close(kl_estimate(logprobs, ref, wide), torch.tensor(raw, dtype=torch.float32), **FOUR)
    usual = Algorithm(reference_policy_kl_type=kind)
    assert_close(
        kl_estimate(logprobs, ref, usual), torch.tensor(bounded, dtype=torch.float32), **FOUR
    )


def test_kl_term_gives_nemo_rls_number_and_its_whole_gradient():
    curr, d = [0.0, -1.0, -2.0], torch.tensor([-1.0, 0.0, 1.0])
    alg = ppo(reference_policy_kl_penalty=0.1)
    value, metrics, gradient, _ = evaluate(curr, curr, curr, [0.0] * 3, alg, ref=[-1.0] * 3)
    assert_close([value, metrics["kl_penalty"].item()], [0.0362, 0.362069], **FOUR)
    k3 = torch.expm1(d) - d
    # score function, and the estimator's own
    assert_close(gradient, 0.1 / 3 * (k3 + 1 - d.exp()), **PRINTED)
    in_reward = dataclasses.replace(alg, use_kl_in_reward=True)
    value, metrics, gradient, _ = evaluate(curr, curr, curr, [0.0] * 3, in_reward, ref=[-1.0] * 3)
    assert value == 0 and (gradient == 0).all() and metrics["kl_penalty"] > 0.3


def test_kl_weighted_by_the_samplers_ratio_gives_nemo_rls_number():
    alg = dataclasses.replace(
        CORRECTED, reference_policy_kl_penalty=0.1, use_on_policy_kl_approximation=True
    )
    value, metrics, *_ = evaluate(CURR, PREV, GEN, ADV, alg, ref=[-1.0] * 3)
    assert_close([value, metrics["kl_penalty"].item()], [-0.2004, 0.060543], **FOUR)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_a_token_whose_kl_is_clamped_gets_no_kl_gradient(kind):
    alg = ppo(
        reference_policy_kl_penalty=0.1, reference_policy_kl_type=kind, kl_output_clamp_value=1e9
    )
    *_, gradient, _ = evaluate(
        [-30.0, -1.0], [-30.0, -1.0], [-30.0, -1.0], [0.0] * 2, alg, ref=[-1.0, -2.0]
    )
    assert gradient[0] == 0 and gradient[1] != 0


def test_positive_example_nll_is_a_mean_over_rewarded_tokens_alone():
    alg = ppo(positive_example_nll_weight=0.5)
    value, metrics, gradient, _ = evaluate(PREV, PREV, PREV, [0.0] * 3, alg, positive=[1, 1, 0])
    assert value == 0.5 and metrics["positive_nll_loss"] == 1.0
    assert_close(gradient, torch.tensor([-0.25, -0.25, 0.0]), rtol=0, atol=0)


def test_the_sampler_anchor_is_cispo_with_gen_in_place_of_prev():
    alg = Algorithm(ratio_anchor="sampler", use_importance_sampling_correction=False)
    against_prev = Algorithm(use_importance_sampling_correction=False)
    found = evaluate(CURR, [math.nan] * 3, GEN, ADV, alg)
    wanted = evaluate(CURR, GEN, GEN, ADV, against_prev)
    assert found[0] == wanted[0] and torch.equal(found[2], wanted[2])
    # There is no prev, so the mismatch is that of the current policy.
    at_start = evaluate(CURR, CURR, GEN, ADV, against_prev)
    assert found[1]["gen_kl_error"] == at_start[1]["gen_kl_error"]


# ---- finite differences --------------------------------------------------------------------------
KL = dict(reference_policy_kl_penalty=0.3)
MODES = {
    "cispo": Algorithm(use_importance_sampling_correction=False),
    "cispo, corrected": Algorithm(),
    "cispo, 0.2": Algorithm(**NARROW),
    "cispo, sampler": Algorithm(ratio_anchor="sampler", use_importance_sampling_correction=False),
    "cispo, bounds by sign": Algorithm(**BY_SIGN),
    **{f"cispo, {kind}": Algorithm(**region) for kind, region in REGIONS.items()},
    "cispo, tv, kl": Algorithm(**REGIONS["tv"], **KL),
    "cispo, kl, nll": Algorithm(**KL, positive_example_nll_weight=0.7),
    "ppo": PPO,
    "ppo, corrected": CORRECTED,
    "ppo, sampler": ppo(ratio_anchor="sampler"),
    "ppo, dual clip": ppo(ratio_clip_c=1.5),
    "reinforce": ppo(disable_ppo_ratio=True),
    "forced on-policy": dataclasses.replace(CORRECTED, force_on_policy_ratio=True),
    "gspo": dataclasses.replace(CORRECTED, sequence_level_importance_ratios=True),
    "gspo, sampler": ppo(sequence_level_importance_ratios=True, ratio_anchor="sampler"),
    **{
        kind: Algorithm(
            truncated_importance_sampling_type=kind,
            truncated_importance_sampling_ratio=1.1,
            truncated_importance_sampling_ratio_min=0.9,
        )
        for kind in ("tis", "icepop", "seq-mask-tis")
    },
    **{
        f"{kind}{', gen' if weighted else ''}": ppo(
            **KL,
            reference_policy_kl_type=kind,
            use_on_policy_kl_approximation=weighted,
            kl_input_clamp_value=1.5,
            kl_output_clamp_value=0.8,
        )
        for kind in ("k1", "k2", "k3")
        for weighted in (False, True)
    },
    "kl in reward": Algorithm(**KL, use_kl_in_reward=True),
}


def random_case(dtype=torch.float64, n=60):
    """curr (a leaf), the other arguments of token_loss and policy_loss before alg, and those after
    it."""
    g = torch.Generator().manual_seed(0)
    gen = -3 * torch.rand(n, generator=g, dtype=dtype) - 0.01
    prev, curr, ref = (gen + torch.randn(n, generator=g, dtype=dtype) * s for s in (0.1, 0.7, 1.0))
    adv = torch.randn(n, generator=g, dtype=dtype)
    mask = torch.arange(n) < n - 7
    weights = torch.where(mask, torch.rand(n, generator=g, dtype=dtype), 0.0)
    nll = torch.where(mask & (torch.arange(n) % 3 == 0), 0.05, 0.0).to(dtype)
    return (
        curr.requires_grad_(),
        (prev, gen, adv, mask, weights),
        (ref, nll, torch.arange(n) // 9, 6),
    )


@pytest.mark.parametrize("name", MODES)
def test_gradient_is_the_finite_difference_with_what_is_detached_held_still(name, monkeypatch):
    """A stop-gradient is a constant: `detach` gives back, in the shifted evaluations, what it gave
    at the point."""
    curr, args, extra = random_case()
    evaluate_at = lambda x: policy_loss(x, *args, 53, MODES[name], *extra)
    detach, seen, replay = torch.Tensor.detach, [], None

    def recorded(x):
        if replay is None:
            seen.append(detach(x).clone())
            return seen[-1]
        return next(replay)

    monkeypatch.setattr(torch.Tensor, "detach", recorded)
    gradient = torch.autograd.grad(evaluate_at(curr)[0], curr)[0]
    with torch.no_grad():
        for t in range(len(curr)):
            values = []
            for step in (1e-6, -1e-6):
                replay = iter(seen)
                moved = curr.clone()
                moved[t] += step
                values.append(evaluate_at(moved)[0].item())
            # 1e-8: rounding of a value near 1 in fp64, over a step of 1e-6, is 1e-10; the cubic
            # term is 1e-12.
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(
                gradient[t].item(), rel=1e-6, abs=1e-8
            ), t
    assert (gradient != 0).any() and (gradient[-7:] == 0).all()


@pytest.mark.parametrize("name", [name for name, alg in MODES.items() if not alg.needs_sequences])
def test_token_loss_is_elementwise_so_a_head_may_call_it_on_any_piece(name):
    curr, args, (ref, nll, *_) = random_case()
    whole = torch.autograd.grad(policy_loss(curr, *args, 53, MODES[name], ref, nll)[0], curr)[0]
    gradient = []
    for piece in torch.arange(60).split(17):
        x, *rest, ref_piece, nll_piece = (x.detach()[piece] for x in (curr, *args, ref, nll))
        x.requires_grad_()
        gradient.append(
            torch.autograd.grad(
                token_loss(x, *rest, MODES[name], ref_piece, nll_piece)[0].sum(), x
            )[0]
        )
    assert torch.equal(torch.cat(gradient), whole)


COMPILED = ["gspo", "seq-mask-tis", "k3, gen", "cispo, kl, nll", "cispo, bounds by sign"]


@pytest.mark.parametrize("name", [*COMPILED, *(f"cispo, {kind}" for kind in REGIONS)])
def test_modes_compile_without_a_graph_break_and_equal_eager(name):
    torch._dynamo.reset()  # it compiles one function a few times only, and here each mode is one
    compiled = torch.compile(policy_loss, dynamic=True, fullgraph=True)
    curr, args, extra = random_case(torch.float32)
    found, wanted = (f(curr, *args, 53, MODES[name], *extra) for f in (compiled, policy_loss))
    assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # sums of values near 1, fused and reordered
    slopes = [torch.autograd.grad(x[0], curr)[0] for x in (found, wanted)]
    assert_close(*slopes, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MODES)
def test_extreme_ratios_stay_finite_in_every_mode(name):
    n = 60
    g = torch.Generator().manual_seed(1)
    pick = lambda: torch.tensor([-5.0, -95.0, -1e25])[torch.randint(3, (n,), generator=g)]
    curr, prev, gen, ref = pick(), pick(), pick(), pick()
    junk = torch.arange(n) >= n - 10
    for x in (curr, prev, gen, ref):
        x[junk] = torch.tensor([math.nan, math.inf, -math.inf, 1e38, 0.0]).repeat(2)
    curr.requires_grad_()
    extra = dict(ref_logprobs=ref, nll_weights=~junk / n, sequence=torch.arange(n) // 9, num_seqs=6)
    value, metrics = policy_loss(
        curr, prev, gen, torch.ones(n), ~junk, ~junk / 50, 50, MODES[name], **extra
    )
    gradient = torch.autograd.grad(value, curr)[0]
    assert value.isfinite() and gradient.isfinite().all() and (gradient[junk] == 0).all()
    assert all(m.isfinite().all() for m in metrics.values()), metrics


# ---- diagnostics ---------------------------------------------------------------------------------
def test_would_clip_counts_exactly_the_tokens_that_get_no_gradient_under_ppo():
    g = torch.Generator().manual_seed(2)
    prev = -6 * torch.rand(500, generator=g)
    curr = (prev + torch.randn(500, generator=g) * 0.3).requires_grad_()
    adv, mask = torch.randn(500, generator=g), torch.arange(500) < 480
    value, metrics = policy_loss(curr, prev, prev, adv, mask, mask / 480, 480, PPO)
    dropped = (torch.autograd.grad(value, curr)[0] == 0) & mask
    rare = prev.exp() < 0.05
    wanted = {
        "would_clip": dropped,
        "would_clip_pos": dropped & (adv > 0),
        "would_clip_neg": dropped & (adv < 0),
        "low_prob": rare & mask,
        "low_prob_would_clip": rare & dropped,
    }
    for name, tokens in wanted.items():
        assert 0 < tokens.sum() < 480 and metrics[name].item() == pytest.approx(
            tokens.sum().item() / 480, rel=1e-6
        )


def test_ratio_quantiles_are_within_one_percent_and_add_up_over_micro_batches():
    log_ratio = torch.randn(4000, generator=torch.Generator().manual_seed(3)) * 0.8
    curr, zero, mask = -5 + log_ratio, torch.full((4000,), -5.0), torch.ones(4000, dtype=torch.bool)
    count = lambda x: policy_loss(
        x, zero[: len(x)], zero[: len(x)], x, mask[: len(x)], x, 4000, PPO
    )[1]
    histogram = sum(count(part)["ratio_histogram"] for part in curr.split([1500, 1, 2499]))
    assert torch.equal(histogram, count(curr)["ratio_histogram"])
    for q in (0.5, 0.95, 0.99):
        exact = log_ratio.sort().values[math.ceil(q * 4000) - 1].exp().item()
        # half of a 0.02 nat bin
        assert ratio_quantile(histogram.tolist(), q) == pytest.approx(exact, rel=0.0101)
    assert ratio_quantile([0.0] * BINS, 0.5) is None


def test_the_record_of_a_step_holds_quantiles_and_no_histogram():
    _, metrics, *_ = evaluate(CURR, PREV, GEN, ADV, Algorithm())
    record = update_metrics(fetch(metrics), [(3, 1)])
    assert record["train/ratio_p50"] == pytest.approx(1.0) and record[
        "train/ratio_p99"
    ] == pytest.approx(1.5, rel=0.01)
    assert (
        record["train/low_prob_share_of_would_clip"] == 0 and "train/ratio_histogram" not in record
    )


@pytest.mark.parametrize(
    ("alg", "name"),
    [
        (Algorithm(), "CISPO, weight clamped to [0, 6]"),
        (ppo(), "PPO, ratio clipped to [0.8, 1.2]"),
        (ppo(disable_ppo_ratio=True), "REINFORCE, no ratio"),
        (ppo(force_on_policy_ratio=True), "policy gradient, ratio forced to 1"),
    ],
)
def test_a_run_names_its_loss_and_the_bounds_that_this_loss_has(alg, name):
    assert name_of_loss(alg) == name


def test_mismatch_by_age_is_counted_with_the_loss():
    flat = [torch.tensor(x) for x in INPUTS]
    mask, age = torch.ones(3, dtype=torch.bool), torch.tensor([0, 1, 1])
    _, metrics = policy_loss(*flat, mask, mask / 3, 3, Algorithm(), age=age, max_age=1)
    assert [metrics[f"tokens_age_{a}"].item() for a in (0, 1)] == [1, 2]
    assert metrics["token_mult_prob_error_same_version"].item() == pytest.approx(math.exp(0.5))


# ---- means and advantages ------------------------------------------------------------------------
def test_row_weights_are_the_three_means():
    lengths, prompts = torch.tensor([5, 1, 2, 8]), torch.tensor([0, 0, 3, 3])
    of = lambda units: row_weights(lengths, units)
    assert_close(of(torch.zeros(4)), torch.full((4,), 1 / 16))  # token mean
    assert_close(of(torch.arange(4)), 1 / (4 * lengths))  # mean over sequences of their token mean
    # over prompts: 2 of 6 and 10 tokens
    assert_close(of(prompts), torch.tensor([1 / 12, 1 / 12, 1 / 20, 1 / 20]))
    for units in (torch.zeros(4), torch.arange(4), prompts):
        assert (of(units) * lengths).sum().item() == pytest.approx(1.0)


def test_batch_std_divides_all_advantages_by_one_number():
    rewards, valid = (
        torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 9.0]]),
        torch.ones(3, 3).bool(),
    )
    valid[2, 2] = False
    centred = group_advantages(rewards, valid, True, None)
    # over the step's valid samples, n-1, groups without spread included
    spread = centred[valid].double().std()
    assert_close(
        group_advantages(rewards, valid, True, "batch"),
        (centred / spread).float(),
        rtol=2e-6,
        atol=0,
    )
    assert (group_advantages(torch.ones(2, 4), torch.ones(2, 4).bool(), True, "batch") == 0).all()


def packed(rewards, **flags):
    groups = [
        Group(
            i,
            [1, 2],
            torch.tensor([2, 3], dtype=torch.int32),
            torch.arange(5, dtype=torch.int32),
            -torch.ones(5),
            torch.zeros(5, dtype=torch.int32),
            torch.tensor(r),
            torch.zeros(2, dtype=torch.uint8),
        )
        for i, r in enumerate(rewards)
    ]
    cfg = Config(
        num_prompts_per_step=len(rewards),
        num_generations_per_prompt=2,
        train_global_batch_size=2,
        **flags,
    )
    return rows_of(pack_batch(groups, cfg), cfg)


def test_groups_without_variance_leave_loss_and_denominator_but_move_nobody():
    rewards = [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]
    blob = packed(rewards, drop_zero_variance=True)
    assert blob["update"].tolist() == [1, 1, 3, 3] and blob["prompt"].tolist() == [1, 1, 3, 3]
    assert blob["lengths"].tolist() == [2, 3, 2, 3] and blob["advantages"].tolist() == [
        1.0,
        -1.0,
        -1.0,
        1.0,
    ]
    assert blob["positive"].tolist() == [True, False, False, True] and len(blob["token_ids"]) == 10
    assert len(packed(rewards)["lengths"]) == 8
    # With nothing left to train on the step goes on with all of them: their loss is zero anyway.
    assert len(packed([[1.0, 1.0], [0.0, 0.0]], drop_zero_variance=True)["lengths"]) == 4
