"""Twelve programs call twelve things CISPO. Each one's weight as a formula, the flags that make
ours equal to it, and the table of both in docs/conformance.md. What a peer does was read in its
source at the commits of 2026-08 (docs/beside-others.md).

A weight is what -A * grad log pi is multiplied with. p, q, g: the token's probability under the
weights being trained, under the trainer's at the start of the step (the "old" policy), and under
the sampler.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from batches import policy_loss, unpack_batch

from bridge.groups import Group
from config import Config
from ranks.batch import pack_batch

torch.set_num_threads(1)
clip = lambda x, low, high: min(max(x, low), high)
SAMPLER = dict(ratio_anchor="sampler", use_importance_sampling_correction=False)
# age 0: refused uncorrected
PREV = dict(use_importance_sampling_correction=False, max_trajectory_age_steps=0)
PROMPT, TIS = dict(prompt_level_loss=True), dict(truncated_importance_sampling_type="tis")


def bounds(low, high):
    return dict(ratio_clip_min=low, ratio_clip_max=high)


# name: what is multiplied with -A * grad log pi, flags that make ours equal, the mean over tokens,
# where it was read
PEERS = {
    "NeMo RL, CISPO recipe": (
        lambda p, q, g: clip(p / q, 1 - 1.0, 1 + 5.0) * (q / g),
        {},
        "batch",
        "nemo_rl/algorithms/loss/loss_functions.py; the async lag-1 recipe",
    ),
    "NeMo RL, code defaults": (
        lambda p, q, g: clip(p / q, 1 - 0.2, 1 + 0.2),
        PREV | bounds(0.2, 0.2),
        "batch",
        "nemo_rl/algorithms/loss/loss_functions.py",
    ),
    "TRL, `epsilon_high=5`": (
        lambda p, q, g: min(p / q, 5.0),  # absolute, where others write 1 + epsilon
        PREV | bounds(1.0, 4.0),
        "batch",
        "trl/trainer/grpo_trainer.py; without its vLLM correction",
    ),
    "verl, defaults": (
        lambda p, q, g: clip(p / q, 1 - 0.2, 1 + 0.2),
        PREV | bounds(0.2, 0.2),
        "batch",
        "verl/trainer/ppo/core_algos.py",
    ),
    "verl, example script": (
        lambda p, q, g: clip(p / q, 1 - 10, 1 + 0.2),  # a lower bound below 0 is none
        PREV | bounds(1.0, 0.2),
        "batch",
        "verl/trainer/ppo/core_algos.py, clip_ratio_low=10",
    ),
    "slime, `--calculate-per-token-loss`": (
        lambda p, q, g: clip(p / q, 1 - 0.2, 1 + 0.2),
        PREV | bounds(0.2, 0.2),
        "batch",
        "slime/utils/ppo_utils.py",
    ),
    "slime, as it advises": (
        lambda p, q, g: clip(p / q, 1 - 1.0, 1 + 4.0) * min(q / g, 2.0),
        bounds(1.0, 4.0) | TIS | dict(truncated_importance_sampling_ratio=2.0),
        "batch",
        "slime/utils/arguments.py: --eps-clip 1 --eps-clip-high 4; with its TIS",
    ),
    "SkyRL": (
        lambda p, q, g: clip(p / q, 1 - 1.0, 1 + 4.0),
        PREV | bounds(1.0, 4.0),
        "batch",
        "skyrl/backends/skyrl_train/utils/ppo_utils.py",
    ),
    "SkyRL, `cispo_anchor=rollout`": (
        lambda p, q, g: clip(p / g, 1 - 1.0, 1 + 4.0),
        SAMPLER | bounds(1.0, 4.0),
        "batch",
        "the same; what its async trainer requires",
    ),
    "open-instruct": (
        lambda p, q, g: min(p / q, 1 + 0.272) * min(q / g, 2.0),
        bounds(1.0, 0.272) | TIS | dict(truncated_importance_sampling_ratio=2.0),
        "batch",
        "open_instruct/grpo_utils.py",
    ),
    "Tinker": (
        lambda p, q, g: clip(p / g, 0.0, 4.0),  # thresholds are ratios
        SAMPLER | bounds(1.0, 3.0),
        "sum",
        "tinker-cookbook tutorials/202_loss_functions.py",
    ),
    "MiniMax-M1, eps_high 5": (
        lambda p, q, g: clip(p / q, 0.0, 1 + 5.0),  # the paper tunes eps_high and does not print it
        PREV | bounds(1.0, 5.0) | PROMPT | dict(use_leave_one_out_baseline=False),
        "prompt",
        "arXiv:2506.13585",
    ),
    "ScaleRL, eps_max 5": (
        lambda p, q, g: min(p / g, 5.0),
        SAMPLER
        | bounds(1.0, 4.0)
        | PROMPT
        | dict(advantage_std="batch", drop_zero_variance=True, use_leave_one_out_baseline=False),
        "prompt",
        "arXiv:2510.13786",
    ),
}


# Those whose weight depends on the sign of the advantage A, or on the probability itself.
def kl(a, b):
    return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))


def dppo_tv(d):
    return lambda p, g, A: (p - g if A > 0 else g - p) <= d


def dppo_kl(d):
    return lambda p, g, A: not ((p > g) == (A > 0) and p != g and kl(g, p) > d)


UNBOUNDED = 1e6  # none of these has an upper clip
BY_SIGN = {
    "DPPO, total variation": (
        lambda p, q, g, A: min(p / g, 20.0) * dppo_tv(0.15)(p, g, A),
        SAMPLER | bounds(1.0, 19.0) | dict(trust_region="tv"),
        "arXiv:2602.04879; verl/trainer/ppo/core_algos.py, dppo_tv",
    ),
    "DPPO, KL": (
        lambda p, q, g, A: min(p / g, 20.0) * dppo_kl(0.05)(p, g, A),
        SAMPLER | bounds(1.0, 19.0) | dict(trust_region="kl"),
        "arXiv:2602.04879; verl/trainer/ppo/core_algos.py, dppo_kl",
    ),
    "prime-rl, default": (
        lambda p, q, g, A: p / g * dppo_tv(0.2)(p, g, A),
        SAMPLER
        | bounds(1.0, UNBOUNDED)
        | dict(trust_region="tv", trust_region_low=0.2, trust_region_high=0.2),
        "src/prime_rl/trainer/rl/loss.py; without its 1e-3 * (log ratio)^2",
    ),
    "KPop": (
        lambda p, q, g, A: p / g * (max(kl(p, g), kl(g, p)) <= 0.1),
        SAMPLER | bounds(1.0, UNBOUNDED) | dict(trust_region="kpop"),
        "ringtech.notion.site/kpop; its mask, on an unclipped weight",
    ),
    "DISPO": (
        lambda p, q, g, A: clip(p / q, 0.0, 6.0) if A > 0 else clip(p / q, 0.2, 2.0),
        PREV | bounds(1.0, 5.0) | dict(ratio_clip_min_negative=0.8, ratio_clip_max_negative=1.0),
        "arXiv:2602.00983; its form, with bounds of ours",
    ),
}
# (p, g): a rare token that is ten times as likely, one likelier, one less likely, a sure one
PAIRS = [(1e-5, 1e-6), (0.9, 0.6), (0.5, 0.8), (0.02, 0.2), (0.99, 0.999)]
RATIOS = [0.1, 0.5, 1.0, 1.5, 3.0, 5.5, 30.0]


def our_weights(cfg, p, q, g, advantage):
    """d loss / d log pi over -A, token by token."""
    curr, prev, gen = (torch.tensor(x, dtype=torch.float64).log() for x in (p, q, g))
    n, curr = len(p), curr.requires_grad_()
    mask, advantages = (
        torch.ones(n, dtype=torch.bool),
        torch.full((n,), advantage, dtype=torch.float64),
    )
    value, _ = policy_loss(
        curr, prev, gen, advantages, mask, torch.ones(n, dtype=torch.float64), n, cfg.algorithm
    )
    return (torch.autograd.grad(value, curr)[0] / -advantage).tolist()


@pytest.mark.parametrize("advantage", [1.5, -0.5])
@pytest.mark.parametrize("peer", PEERS)
def test_flags_make_our_weights_those_of_the_peer(peer, advantage):
    formula, flags, *_ = PEERS[peer]
    (cfg := Config(**flags)).validate()
    # Each ratio to prev with trainer and sampler equal, far apart by more than any bound, and
    # either way round.
    cases = [(r * 1e-3, 1e-3, 1e-3 / w) for r in RATIOS for w in (1.0, 0.3, 0.95, 1.1, 2.5)]
    found = our_weights(cfg, *zip(*cases), advantage)
    # fp64, a few roundings
    assert found == pytest.approx([formula(*case) for case in cases], rel=1e-12)


@pytest.mark.parametrize("advantage", [1.5, -0.5])
@pytest.mark.parametrize("peer", BY_SIGN)
def test_flags_make_our_weights_those_of_the_peer_by_sign_and_probability(peer, advantage):
    formula, flags, _ = BY_SIGN[peer]
    (cfg := Config(**flags)).validate()
    grid = [0.001, 0.01, 0.03, 0.1, 0.2, 0.31, 0.5, 0.7, 0.81, 0.9, 0.97]
    cases = [(p, q, g) for p, g in [*PAIRS, *((p, g) for p in grid for g in grid)] for q in (p, g)]
    found = our_weights(cfg, *zip(*cases), advantage)
    assert found == pytest.approx([formula(*case, advantage) for case in cases], rel=1e-12)


@pytest.mark.parametrize("peer", PEERS)
def test_flags_make_our_mean_over_tokens_that_of_the_peer(peer):
    """Two prompts with samples of 2 and 1, 3 and 4 tokens, through packing. Tinker's sum is 10
    times the mean."""
    _, flags, mean, _ = PEERS[peer]
    cfg = Config(
        num_prompts_per_step=2, num_generations_per_prompt=2, train_global_batch_size=4, **flags
    )
    ints = lambda *x: torch.tensor(x, dtype=torch.int32)
    groups = [
        Group(
            i,
            [1],
            ints(*lengths),
            torch.ones(sum(lengths), dtype=torch.int32),
            -torch.ones(sum(lengths)),
            torch.zeros(sum(lengths), dtype=torch.int32),
            torch.tensor([0.0, 1.0]),
            torch.zeros(2, dtype=torch.uint8),
        )
        for i, lengths in enumerate([(2, 1), (3, 4)])
    ]
    ((mb,),), _ = unpack_batch(pack_batch(groups, cfg), cfg, 0, 1, torch.device("cpu"))
    by_length = dict(zip(mb.lengths_B.tolist(), mb.weights[mb.mask].split(mb.lengths_B.tolist())))
    prompts = {2: 1 / 6, 1: 1 / 6, 3: 1 / 14, 4: 1 / 14}  # 1 / (2 prompts * its tokens)
    for length, weights in by_length.items():
        wanted = prompts[length] if mean == "prompt" else 0.1
        assert weights.tolist() == pytest.approx([wanted] * length)


def test_trl_with_the_loss_type_alone_cannot_be_had_here():
    """There the cap is then 0.2, also for a token whose probability has not changed at all."""
    with pytest.raises(ValueError, match=r"--ratio-clip-max -0\.8: must be at least 0"):
        Config(**PREV, ratio_clip_max=-0.8).validate()


def table_rows():
    """The rows of docs/conformance.md: weights where the trainer agrees with the sampler, so that
    all anchors are the same."""
    show = lambda x: f"{x:.3f}".rstrip("0").rstrip(".")
    rows = {
        name: [formula(r * 1e-3, 1e-3, 1e-3) for r in RATIOS]
        for name, (formula, *_) in PEERS.items()
    }
    rows["TRL, `loss_type` alone"] = [min(r, 0.2) for r in RATIOS]
    read = {
        name: (mean, as_flags(flags), source) for name, (_, flags, mean, source) in PEERS.items()
    }
    read["TRL, `loss_type` alone"] = (
        "batch",
        "refused",
        "trl/trainer/grpo_trainer.py: epsilon_high falls back to epsilon",
    )
    return [
        f"| {name} | {' | '.join(map(show, row))} | {' | '.join(read[name])} |"
        for name, row in rows.items()
    ]


def rows_by_sign():
    """Of docs/conformance.md: weights where A > 0, and then where A < 0, by pairs of probabilities."""
    rows = []
    for name, (formula, flags, source) in BY_SIGN.items():
        cells = (" / ".join(f"{formula(p, g, g, A):.3g}" for A in (1, -1)) for p, g in PAIRS)
        rows.append(f"| {name} | {' | '.join(cells)} | {as_flags(flags)} | {source} |")
    return rows


def as_flags(flags):
    """With the three short names that docs/conformance.md explains."""
    short = (
        "sampler"
        if SAMPLER.items() <= flags.items()
        else "uncorrected"
        if PREV.items() <= flags.items()
        else ""
    )
    rest = {n: v for n, v in flags.items() if n not in {**SAMPLER, **PREV, **bounds(0, 0)}}
    clips = (
        f"{flags['ratio_clip_min']:g}/{flags['ratio_clip_max']:g}"
        if "ratio_clip_min" in flags
        else ""
    )
    dashed = [
        f"`--{n.replace('_', '-')} {v}`"
        if not isinstance(v, bool)
        else f"`--{'' if v else 'no-'}{n.replace('_', '-')}`"
        for n, v in rest.items()
    ]
    return ", ".join(filter(None, [short, clips, *dashed])) or "none: the default"


def test_the_documented_table_is_what_is_tested_here():
    text = (Path(__file__).resolve().parent.parent / "docs/conformance.md").read_text()
    section = re.search(r"## Weights by program\n(.*?)\n## ", text, re.S).group(1)
    found = [line for line in section.splitlines() if line.startswith("| ") and "---" not in line][
        1:
    ]
    assert found == table_rows()
    by_sign = text.split("## Weights by sign and probability\n")[1].split("\n## ")[0]
    assert [line for line in by_sign.splitlines() if line.startswith("| ")][1:] == rows_by_sign()
    header = " | ".join(f"{r:g}" for r in RATIOS)
    assert f"| at ratio | {header} | mean | flags | read in |" in section
