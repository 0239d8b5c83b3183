"""The fused head against autograd on full logits: in any chunking, over any number of vocabulary
shards."""

import dataclasses
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from batches import policy_loss
from on_ranks import on_ranks
from torch.testing import assert_close

from loss import Algorithm
from ranks import ops
from ranks.ops import IGNORED, chunk_rows, fused_head_loss, token_logprobs
from ranks.parallel import join_ranks

torch.set_num_threads(1)

ALGORITHMS = [
    Algorithm(),
    Algorithm(use_importance_sampling_correction=False),
    Algorithm(use_cispo=False, ratio_clip_min=0.2, ratio_clip_max=0.2, ratio_clip_c=3.0),
    # bounds that tokens of 20 to 120 words, far from the sampler's, are on both sides of
    Algorithm(trust_region="tv", trust_region_low=0.02, trust_region_high=0.02),
    Algorithm(trust_region="kl", trust_region_low=0.01, trust_region_high=0.01),
    Algorithm(trust_region="kpop", trust_region_high=0.02, ratio_clip_max_negative=0.5),
]


# ---- cases and references ------------------------------------------------------------------------
def case(seed, dtype=torch.float32, **fixed):
    """Inputs of a micro-batch with random shapes; ratios lie on both sides of every clip. `fixed`
    overrides."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    c = dict(
        N=rng.randint(2, 40),
        D=rng.choice([4, 16]),
        V=4 * rng.randint(5, 30),
        chunk=rng.choice([1, 3, 8, 64]),
    )
    c |= dict(
        temperature=rng.choice([1.0, 0.6, 1.7]),
        upstream=rng.choice([1.0, -2.5]),
        alg=rng.choice(ALGORITHMS),
    )
    c |= fixed
    N, rand = c["N"], lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    c["hidden"], c["weight"] = rand(N, c["D"]).to(dtype), (rand(c["V"], c["D"]) * 0.5).to(dtype)
    c["targets"] = torch.randint(c["V"], (N,), generator=g)
    logprobs = full_logprobs(c, c["hidden"].double(), c["weight"].double())
    prev = logprobs + rand(N)
    gen = prev + rand(N) * 0.3
    mask = torch.rand(N, generator=g) < c.get("kept", 0.8)
    advantages = rand(N) * c.get("advantages", 1.0)
    c["aux"] = (*(x.to(dtype) for x in (prev, gen, advantages)), mask, mask.to(dtype) / max(N, 1))
    return c


def full_logprobs(c, hidden, weight):
    return (
        (hidden @ weight.t() / c["temperature"])
        .log_softmax(-1)
        .gather(-1, c["targets"][:, None])
        .squeeze(-1)
    )


def objective_of(c):
    # as in train_update: another object and another function each time
    alg = dataclasses.replace(c["alg"])
    return lambda logprobs, *aux: policy_loss(logprobs, *aux, 1, alg)[0]


def padded(x, size):
    return torch.nn.functional.pad(x, (0, size - len(x)))


def by_autograd(c, hidden, weight):
    logprobs = full_logprobs(c, hidden, weight)
    rows = max(1, c["N"])  # policy_loss knows no batch without a row
    return objective_of(c)(*(padded(x, rows) for x in (logprobs, *c["aux"]))), logprobs


def in_one_pass(c, hidden, weight, **kwargs):
    settings = dict(temperature=c["temperature"], chunk_tokens=c["chunk"], compiled=False) | kwargs
    return fused_head_loss(hidden, weight, c["targets"], objective_of(c), c["aux"], **settings)[:2]


def in_two_passes(c, hidden, weight, compiled=False, tp_group=None):
    settings = c["temperature"], c["chunk"], compiled, tp_group
    logprobs, _ = token_logprobs(hidden, weight, c["targets"], *settings)
    return objective_of(c)(logprobs, *(padded(x, len(logprobs)) for x in c["aux"])), logprobs


def run(method, c, frozen=(), **kwargs):
    """loss, log-probs, and the gradients to hidden states and weight (None where frozen)."""
    leaves = {n: c[n].clone().requires_grad_(n not in frozen) for n in ("hidden", "weight")}
    value, logprobs = method(c, *leaves.values(), **kwargs)
    (value * c["upstream"]).backward()
    return value.detach(), logprobs.detach()[: c["N"]], leaves["hidden"].grad, leaves["weight"].grad


def assert_same(found, wanted, rel):
    """Relative to the norm of the whole tensor: single entries may cancel to nothing."""
    for what, a, b in zip(("loss", "log-probs", "d hidden", "d weight"), found, wanted):
        assert (a is None) == (b is None), what
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype, what
            # the loss is a mean of terms as large as the log-probs, which cancel
            scale = b.norm() if what != "loss" else wanted[1].abs().max() if len(wanted[1]) else 1
            assert (a - b).norm() <= rel * scale, f"{what}: {(a - b).norm() / scale:.2e}"


# ---- one pass = two passes = autograd ------------------------------------------------------------
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-13}  # some ten roundings each


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("seed", range(30))
def test_one_pass_and_two_passes_equal_autograd_on_full_logits(seed, dtype):
    c = case(seed, dtype)
    wanted = run(by_autograd, c)
    for method in (in_one_pass, in_two_passes):
        assert_same(run(method, c), wanted, ROUNDING[dtype])


ODD = [dict(N=1), dict(N=1, chunk=1), dict(N=0), dict(N=24, chunk=8), dict(chunk=0)]
ODD += [dict(kept=0.0), dict(advantages=0.0)]  # nothing but masked tokens; nothing to learn


@pytest.mark.parametrize("special", ODD, ids=str)
def test_odd_batches_equal_autograd_too(special):
    for seed in range(3):
        c = case(seed, **special)
        wanted = run(by_autograd, c)
        for method in (in_one_pass, in_two_passes):
            found = run(method, c)
            assert_same(found, wanted, 1e-6)
            if {0} & {special.get("N"), special.get("kept"), special.get("advantages")}:
                # exactly, not nearly
                assert found[0] == 0 and not found[2].any() and not found[3].any()


@pytest.mark.parametrize("frozen", [("hidden",), ("weight",)])
def test_what_is_frozen_gets_no_gradient_and_the_other_the_same(frozen):
    c = case(5)
    wanted = run(by_autograd, c, frozen)
    for method in (in_one_pass, in_two_passes):
        assert_same(run(method, c, frozen), wanted, 1e-6)


def test_a_frozen_head_costs_two_gemms_and_the_whole_three(monkeypatch):
    c, gemms = case(5, N=8, chunk=8), []
    mm, addmm = torch.mm, torch.addmm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: gemms.append(1) or mm(*a, **k))
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: gemms.append(1) or addmm(*a, **k))
    for frozen, wanted in (((), 3), (("weight",), 2), (("hidden",), 2)):
        gemms.clear()
        run(in_one_pass, c, frozen)
        assert len(gemms) == wanted
    gemms.clear()
    with torch.no_grad():
        in_two_passes(c, c["hidden"].requires_grad_(), c["weight"].requires_grad_())
    assert len(gemms) == 1


def test_padding_rows_get_no_gradient_from_an_objective_that_is_not_zero_there():
    c = case(3, N=5, chunk=8)
    found = torch.autograd.grad(
        fused_head_loss(
            c["hidden"].requires_grad_(),
            c["weight"].requires_grad_(),
            c["targets"],
            lambda lp: -lp,
            (),
            1.0,
            8,
            False,
        )[0],
        [c["hidden"], c["weight"]],
    )
    c["temperature"] = 1.0
    wanted = torch.autograd.grad(
        -full_logprobs(c, c["hidden"], c["weight"]).sum(), [c["hidden"], c["weight"]]
    )
    assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_without_grad_mode_the_loss_is_there_and_nothing_is_kept():
    c = case(7)
    hidden, weight = c["hidden"].requires_grad_(), c["weight"].requires_grad_()
    with torch.no_grad():
        value, _ = in_one_pass(c, hidden, weight)
        logprobs, _ = token_logprobs(
            hidden, weight, c["targets"], c["temperature"], c["chunk"], False
        )
    assert not value.requires_grad and not logprobs.requires_grad
    assert_close(value, by_autograd(c, hidden, weight)[0].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alg", ALGORITHMS[:3])
def test_the_coefficient_is_the_finite_difference_of_the_token_loss(alg):
    """In fp64. CISPO's weight is held fixed, since no gradient flows through it."""
    c = case(11, torch.float64, alg=alg, N=40, kept=1.0)
    logprobs = full_logprobs(c, c["hidden"], c["weight"])
    hidden, eps = c["hidden"], 1e-6
    found = run(in_one_pass, c | {"upstream": 1.0})[2]
    prev, gen, advantages, _, weights = c["aux"]
    weight = (logprobs - prev).exp().clamp(1 - alg.ratio_clip_min, 1 + alg.ratio_clip_max)
    is_weight = (prev - gen).exp() if alg.use_importance_sampling_correction else 1.0

    def loss_at(hidden):
        moved = full_logprobs(c, hidden, c["weight"])
        if not alg.use_cispo:
            return objective_of(c)(moved, *c["aux"])
        return -(advantages * weight * is_weight * weights * moved).sum()

    for seed in range(5):
        way = torch.randn(
            hidden.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        slope = (loss_at(hidden + eps * way) - loss_at(hidden - eps * way)) / (2 * eps)
        # eps^2 of curvature and 1e-16 / eps of cancellation
        assert_close((found * way).sum(), slope, rtol=1e-7, atol=1e-8)


# ---- where the weight's gradient goes ------------------------------------------------------------
def test_the_gradient_of_a_tied_weight_is_added_to_what_is_there():
    c = case(2, N=20, V=40, D=16, upstream=1.0)
    ids = torch.arange(20) * 2

    def tied(method, **kwargs):
        table = c["weight"].clone().requires_grad_()
        table.grad = torch.ones_like(table)
        for _ in range(2):  # two micro-batches
            method(c, table[ids].tanh(), table, **({"weight_grad": table.grad} if kwargs else {}))[
                0
            ].backward()
        return table.grad

    assert_close(tied(in_one_pass, weight_grad=True), tied(by_autograd), rtol=1e-5, atol=1e-6)


def test_a_factor_that_comes_too_late_and_a_second_backward_are_errors():
    c = case(2)
    weight = c["weight"].clone().requires_grad_()
    value, _ = in_one_pass(c, c["hidden"], weight, weight_grad=torch.zeros_like(weight))
    with pytest.raises(RuntimeError, match="scale its objective"):
        (2 * value).backward()
    value, _ = in_one_pass(c, c["hidden"], weight)
    value.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="a second backward"):
        value.backward()


# ---- precision -----------------------------------------------------------------------------------
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("dtype", "N", "V"), [("bfloat16", 64, 2000), ("float32", 4, 151_936), ("bfloat16", 4, 151_936)]
)
def test_logprobs_are_within_1e_5_nats_of_fp64(dtype, N, V, compiled):
    """In bf16 the logits would be wrong by 0.06; and 151,936 terms added up in fp32 by 1.4e-5."""
    c = case(0, getattr(torch, dtype), N=N, V=V, D=64, temperature=1.0)
    found, entropy = token_logprobs(c["hidden"], c["weight"], c["targets"], 1.0, N, compiled)
    logprobs = (c["hidden"].double() @ c["weight"].double().t()).log_softmax(-1)
    assert found.dtype == torch.float32
    assert (
        found - full_logprobs(c, c["hidden"].double(), c["weight"].double())
    ).abs().max() <= 1e-5
    assert (entropy + (logprobs.exp() * logprobs).sum(-1)).abs().max() <= 1e-5


def test_bf16_gradients_are_those_of_fp32_rounded_once():
    c = case(4, torch.bfloat16, N=20, chunk=8, upstream=1.0)
    found = run(in_one_pass, c)
    wanted = run(by_autograd, c | {n: c[n].float() for n in ("hidden", "weight")})
    assert found[2].dtype == found[3].dtype == torch.bfloat16
    for a, b in zip(found[2:], wanted[2:]):
        assert (a.float() - b).norm() <= 2**-8 * b.norm()  # half a unit in bf16's last place


# ---- compilation and memory ----------------------------------------------------------------------
def test_compiled_equals_eager_and_fifty_lengths_need_one_compilation():
    torch._dynamo.reset()
    fixed = dict(D=16, V=52, chunk=8, temperature=0.6, alg=ALGORITHMS[0])
    run(in_one_pass, case(0, **fixed), compiled=True)  # warm-up
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in range(50):
            c = case(n, N=n, **fixed)
            assert_same(run(in_one_pass, c, compiled=True), run(in_one_pass, c), 1e-6)
        with pytest.raises(torch._dynamo.exc.RecompileError):  # the alarm works
            run(in_one_pass, case(0, **fixed | {"V": 56}), compiled=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(
    "n, worked_on", [(5, [5]), (24, [24]), (53, [24, 24, 5]), (1, [2]), (0, [2])]
)
def test_no_chunk_has_more_rows_than_tokens_are_left(n, worked_on, monkeypatch):
    """A chunk that is padded to its full size costs as much as a full one; of the compiler's sake
    two rows are left."""
    rows, body = [], ops._head_body
    monkeypatch.setattr(
        ops, "_head_body", lambda logits, *rest: (rows.append(len(logits)), body(logits, *rest))[1]
    )
    run(in_one_pass, case(0, N=n, D=16, V=52, chunk=24))
    assert rows == worked_on


PEAKS = """
import torch
from ranks import ops
from tools import bench
torch.set_num_threads(1)
V, D = 10_000, 16
for N in (512, 512, 2048, 8192):  # the first to warm up
    class x:
        weight_VD, hidden_ND = (torch.randn(n, D, requires_grad=True) for n in (V, N))
        leaves = {"weight": weight_VD, "hidden": hidden_ND}
    targets = torch.randint(V, (N,))
    head = lambda: ops.fused_head_loss(x.hidden_ND, x.weight_VD, targets, lambda lp: -lp, (), 1.0, 128, False)[0]
    print(bench.measure(head, x, trim=True)["mib"])
"""


def test_memory_does_not_grow_with_the_number_of_tokens():
    command, repo = [sys.executable, "-c", PEAKS], Path(__file__).parent.parent
    # glibc keeps nothing of what was freed
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, cwd=repo, env=env, capture_output=True, text=True, check=True)
    _, *peaks = map(float, done.stdout.split())
    full_logits = 4 * 8192 * 10_000 / 2**20
    assert max(peaks) <= 1.1 * min(peaks) and max(peaks) < full_logits / 8, peaks


def test_chunks_are_the_largest_power_of_two_in_the_budget():
    assert chunk_rows(151_936, False) == 256 and chunk_rows(151_936, True) == 2048
    # as many as ever help, as few as ever do
    assert chunk_rows(32, True) == 4096 and chunk_rows(10**9, False) == 16


# ---- a sharded vocabulary ------------------------------------------------------------------------
def shards_on_this_rank(compiled, drop):
    """This rank's words of every case. drop: an all-reduce to leave out, by number."""
    join_ranks(60)
    rank, tp = dist.get_rank(), dist.get_world_size()
    calls, real = [], ops.all_reduce
    keep = lambda: calls.append(1) or (len(calls) - 1) % 2 != drop
    if drop is not None:
        ops.all_reduce = lambda x, *rest: real(x, *rest) if keep() else x
    results = []
    for c in shard_cases(compiled):
        shard = c | {"weight": c["weight"].chunk(tp)[rank]}
        for method in (in_one_pass, in_two_passes):
            results.append(run(method, shard, tp_group=dist.group.WORLD, compiled=compiled))
    return [[x.tolist() for x in result] for result in results]


def shard_cases(compiled):
    if compiled:
        return [case(s, V=64, D=16, chunk=8, temperature=1.0, alg=ALGORITHMS[0]) for s in range(2)]
    return (
        [case(s, chunk=64) for s in range(8)]
        + [case(s) for s in range(8, 16)]
        + [case(0, N=0), case(1, kept=0.0)]
    )


def shards(tp, compiled=False, drop=None):
    """For each case, in one pass and in two, each rank's results."""
    return zip(*on_ranks(tp, shards_on_this_rank, compiled, drop))


def whole(ranks):
    """One result from those of the ranks: what all of them must agree on, the sum of their shares
    of the hidden states' gradient, and the weight's rows put together."""
    for other in ranks[1:]:
        assert other[:2] == ranks[0][:2]  # bit by bit: the ranks go on with it
    hidden, weight = sum(torch.tensor(r[2]) for r in ranks), [row for r in ranks for row in r[3]]
    return [torch.tensor(ranks[0][0]), torch.tensor(ranks[0][1]), hidden, torch.tensor(weight)]


@pytest.mark.parametrize(("tp", "compiled"), [(1, False), (2, False), (4, False), (2, True)])
def test_a_sharded_vocabulary_gives_the_loss_and_gradients_of_the_whole(tp, compiled):
    cases = [c for c in shard_cases(compiled) for _ in ("one pass", "two passes")]
    for c, ranks in zip(cases, shards(tp, compiled), strict=True):
        wanted = run(by_autograd, c)
        found = whole(ranks)
        assert_same([a.view_as(b) for a, b in zip(found, wanted)], wanted, 1e-6)


@pytest.mark.parametrize("drop", [0, 1], ids=["the maximum", "the sums"])
def test_without_any_one_of_the_all_reduces_the_shards_do_differ(drop):
    """The control of the test above. The cases of one chunk: there the two collectives come in this
    order."""
    c, ranks = next(zip(shard_cases(False), shards(2, drop=drop)))
    wanted, found = run(by_autograd, c), ranks[0]
    errors = [(torch.tensor(a).view_as(b) - b).norm() / b.norm() for a, b in zip(found[:2], wanted)]
    assert max(errors) > 0.01


def test_the_mark_of_padding_is_no_word_of_any_shard():
    assert math.log2(-IGNORED) == 31 and torch.tensor(IGNORED).int().item() == IGNORED
