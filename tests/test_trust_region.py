"""The trust region around the sampler, the effective sample size, bounds by sign, and MaxRL."""

import dataclasses
import math

import pytest
import torch
from batches import policy_loss
from test_loss import REGIONS
from torch.testing import assert_close

from loss import Algorithm, effective_share, group_advantages, left_trust_region
from ranks.parallel import merge
from report import fetch, update_metrics

torch.set_num_threads(1)

SAMPLER = dict(ratio_anchor="sampler", use_importance_sampling_correction=False)


def logs(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def evaluate(p, q, advantages, alg, ref=None):
    """Metrics, and the gradient of each token times the number of tokens."""
    curr, gen, n = logs(*p).requires_grad_(), logs(*q), len(p)
    mask = torch.ones(n, dtype=torch.bool)
    given = (gen, gen, torch.tensor(advantages, dtype=torch.float64), mask, mask / n, n, alg)
    value, metrics = policy_loss(curr, *given, ref)
    return metrics, torch.autograd.grad(value, curr)[0] * n


# ---- who is masked -------------------------------------------------------------------------------
MOVES = {  # from q to p: whether it is too far by tv, kl and kpop, where A > 0; and where A < 0
    (1e-6, 1e-5): ((False, False, False), (False, False, False)),  # a ratio of 10, and nothing
    (1e-3, 0.04): ((False, False, True), (False, False, True)),  # KL(p || q) alone is far
    (0.5, 0.8): ((True, True, True), (False, False, True)),
    (0.5, 0.2): ((False, False, True), (True, True, True)),  # a ratio of 0.4
    (0.99, 0.8): ((False, False, True), (True, True, True)),
    (0.9, 0.99): ((False, True, True), (False, False, True)),
    (0.5, 0.6): ((False, False, False), (False, False, False)),
    (0.3, 0.3): ((False, False, False), (False, False, False)),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("kind", REGIONS)
def test_only_a_token_that_would_move_further_out_is_masked_and_by_kpop_all_that_are_out(
    move, kind
):
    q, p = move
    alg = Algorithm(**REGIONS[kind])
    for advantage, wanted in zip((2.0, -0.5), MOVES[move]):
        left = left_trust_region(logs(p), logs(q), torch.tensor([advantage]), alg)
        assert left.item() == wanted[list(REGIONS).index(kind)]
        _, gradient = evaluate([p], [q], [advantage], dataclasses.replace(alg, **SAMPLER))
        kept = -advantage * min(p / q, 6)
        assert gradient.item() == pytest.approx(0.0 if left else kept, rel=1e-12)


def test_each_bound_is_for_its_sign():
    alg = Algorithm(trust_region="tv", trust_region_low=0.1, trust_region_high=0.3, **SAMPLER)
    p, q, advantages = (0.7, 0.9, 0.45, 0.3), (0.5, 0.5, 0.5, 0.5), (1.0, 1.0, -1.0, -1.0)
    assert (evaluate(p, q, advantages, alg)[1] != 0).tolist() == [True, False, True, False]
    metrics, _ = evaluate(p, q, advantages, alg)
    shares = {n: metrics[f"trust_masked{n}"].item() for n in ("", "_pos", "_neg")}
    assert shares == {"": 0.5, "_pos": 0.25, "_neg": 0.25}


def test_the_region_is_around_the_sampler_and_not_around_the_start_of_the_step():
    """prev is where the policy is; the sampler was far away."""
    mask, alg = torch.ones(1, dtype=torch.bool), Algorithm(**REGIONS["tv"])
    for gen, kept in ((0.8, True), (0.5, False)):
        curr = logs(0.8).requires_grad_()
        given = (logs(0.8), logs(gen), torch.ones(1).double(), mask, mask.double(), 1, alg)
        gradient = torch.autograd.grad(policy_loss(curr, *given)[0], curr)[0]
        assert (gradient != 0).item() == kept


def test_a_masked_token_stays_in_the_denominator():
    alg = Algorithm(**REGIONS["tv"], **SAMPLER)
    _, alone = evaluate([0.5, 0.5], [0.5, 0.5], [1.0, 1.0], alg)
    _, beside = evaluate([0.5, 0.9], [0.5, 0.5], [1.0, 1.0], alg)
    assert beside.tolist() == [alone[0].item(), 0.0]


def test_a_masked_token_keeps_the_pull_to_the_starting_model():
    alg = Algorithm(**REGIONS["tv"], **SAMPLER, reference_policy_kl_penalty=0.5)
    both, none = (
        evaluate([0.9], [0.5], [1.0], dataclasses.replace(alg, trust_region=kind), logs(0.4))[1]
        for kind in ("tv", None)
    )
    assert both.item() != 0 and none.item() == pytest.approx(both.item() - 0.9 / 0.5)


def test_a_tokens_advantage_of_zero_is_counted_as_neither():
    metrics, _ = evaluate([0.9, 0.1], [0.5, 0.5], [0.0, 0.0], Algorithm(**REGIONS["kpop"]))
    assert all(metrics[f"trust_masked{n}"] == 0 for n in ("", "_pos", "_neg"))


@pytest.mark.parametrize("kind", REGIONS)
def test_a_logprob_that_is_no_number_is_not_hidden_by_the_mask(kind):
    """It has to make the gradient's norm no number, or its update would not be skipped."""
    curr = torch.tensor([math.nan, -1.0], requires_grad=True)
    gen, mask = torch.full((2,), -1.0), torch.ones(2, dtype=torch.bool)
    for advantage in (1.0, -1.0):
        given = (gen, gen, torch.full((2,), advantage), mask, mask / 2, 2)
        value, _ = policy_loss(curr, *given, Algorithm(**REGIONS[kind]))
        assert torch.autograd.grad(value, curr)[0].isnan().tolist() == [True, False]


def test_without_a_trust_region_no_bit_of_loss_and_gradient_changes_by_what_is_far():
    """Off, and a region that holds everything: equal to the last bit, as is every metric."""
    wide = Algorithm(trust_region="tv", trust_region_low=1.0, trust_region_high=1.0)
    p, q, advantages = torch.rand(3, 200, generator=torch.Generator().manual_seed(0)).tolist()
    advantages = [a - 0.5 for a in advantages]
    off, on = (evaluate(p, q, advantages, alg) for alg in (Algorithm(), wide))
    assert torch.equal(off[1], on[1])
    assert on[0].keys() - off[0].keys() == {f"trust_masked{n}" for n in ("", "_pos", "_neg")}
    assert all(torch.equal(x, on[0][name]) for name, x in off[0].items())


# ---- effective sample size -----------------------------------------------------------------------
def record_of(p, q, pieces, updates=1):
    """A step's record: each update has all tokens, in micro-batches of so many."""
    metrics, n = {}, len(p)
    for _ in range(updates):
        for curr, gen in zip(logs(*p).split(pieces), logs(*q).split(pieces)):
            mask = torch.ones(len(curr), dtype=torch.bool)
            given = (gen, gen, torch.ones(len(curr)), mask, mask / n, n, Algorithm())
            metrics = merge(metrics, policy_loss(curr, *given)[1])
    return update_metrics(fetch(metrics), [(n, 1)] * updates)["train/effective_sample_size"]


def test_the_effective_sample_size_is_a_share_of_the_tokens_however_they_are_split():
    p, q = torch.rand(2, 30, generator=torch.Generator().manual_seed(1)).double().tolist()
    w = [a / b for a, b in zip(p, q)]
    wanted = sum(w) ** 2 / (30 * sum(x * x for x in w))
    assert 0.05 < wanted < 0.95
    for pieces in ([30], [1] * 30, [7, 3, 20]):
        for updates in (1, 3):
            assert record_of(p, q, pieces, updates) == pytest.approx(wanted, rel=1e-12)


def test_equal_weights_are_all_effective_and_one_large_weight_is_alone():
    assert record_of([0.2] * 8, [0.4] * 8, [8]) == pytest.approx(1.0)
    assert record_of([1e-9] * 7 + [0.9], [0.9] * 8, [8]) == pytest.approx(1 / 8, rel=1e-6)
    assert effective_share(0.0, 0.0, 0) is None


def test_the_weight_is_unclipped_and_against_the_sampler_whatever_the_loss_uses():
    curr, prev, gen = logs(0.9, 0.1), logs(0.5, 0.5), logs(0.01, 0.2)
    mask = torch.ones(2, dtype=torch.bool)
    for alg in (Algorithm(), Algorithm(**SAMPLER), Algorithm(use_cispo=False)):
        _, metrics = policy_loss(curr, prev, gen, torch.ones(2), mask, mask / 2, 2, alg)
        assert metrics["weight_sum"].item() == pytest.approx(90.5)
        assert metrics["weight_square_sum"].item() == pytest.approx(90**2 + 0.25)


# ---- bounds by sign ------------------------------------------------------------------------------
def test_bounds_by_sign_clamp_each_sign_by_its_own():
    alg = Algorithm(ratio_clip_min=0.8, ratio_clip_max=1.0, **SAMPLER)
    alg = dataclasses.replace(alg, ratio_clip_min_negative=0.3, ratio_clip_max_negative=4.0)
    p, q = [0.04, 0.9] * 2, [0.4, 0.1] * 2  # ratios 0.1 and 9
    metrics, gradient = evaluate(p, q, [1.0, 1.0, -1.0, -1.0], alg)
    assert_close(gradient.tolist(), [-0.2, -2.0, 0.7, 5.0])
    ends = [metrics[f"probs_ratio_clamped_{end}"].item() for end in ("min", "max")]
    assert_close(ends, [0.2, 5.0])


# ---- MaxRL ---------------------------------------------------------------------------------------
def max_rl(rewards, valid=None, leave_one_out=False):
    rewards_PS = torch.tensor([rewards])
    valid_PS = torch.ones_like(rewards_PS, dtype=torch.bool)
    valid_PS = valid_PS if valid is None else torch.tensor([valid])
    return group_advantages(rewards_PS, valid_PS, leave_one_out, "mean")[0].tolist()


def test_max_rl_divides_by_the_mean_reward_of_the_group():
    assert max_rl([1.0, 0.0, 0.0, 0.0]) == [3.0, -1.0, -1.0, -1.0]  # prime-rl's example
    assert max_rl([1.0, 1.0, 1.0, 0.0]) == pytest.approx([1 / 3] * 3 + [-1.0])
    # compared with its siblings only: n / (n - 1) times that
    assert max_rl([1.0, 0.0, 0.0, 0.0], leave_one_out=True) == pytest.approx(
        [4 / 3 * a for a in (3, -1, -1, -1)]
    )


@pytest.mark.parametrize("leave_one_out", [True, False])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.3, -0.7])
def test_a_group_of_equal_rewards_teaches_nothing_at_mean_zero_too(reward, leave_one_out):
    assert max_rl([reward] * 16, leave_one_out=leave_one_out) == [0.0] * 16


def test_negative_rewards_turn_no_sign_and_a_mean_of_zero_between_them_is_finite():
    """By the mean alone the better of -1 and -3 would get -0.5, and 1 and -1 infinity."""
    assert max_rl([-1.0, -3.0]) == [0.5, -0.5]
    assert max_rl([1.0, -1.0]) == [1.0, -1.0]
    # rewards with a penalty for length: at most n + 1 in size, however near 0 the mean is
    assert max(map(abs, max_rl([1.0, -0.999]))) <= 3


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_invalid_samples_are_not_in_the_mean(leave_one_out):
    valid = [True, False, True, True, False]
    found = max_rl([1.0, math.nan, 0.0, 0.0, 1e30], valid, leave_one_out)
    alone = max_rl([1.0, 0.0, 0.0], leave_one_out=leave_one_out)
    assert found == [alone[0], 0.0, alone[1], alone[2], 0.0]
    assert max_rl([1.0, 0.0], [True, False], leave_one_out) == [0.0, 0.0]
