"""train_cispo.py and batch.py: flags, packing, and that ranks and micro-batches are invisible in
the update."""

import dataclasses
import json
import math

import pytest
import torch
from batches import unpack_batch
from on_ranks import on_ranks

import loss
import report
import train_cispo
from bridge import rollouts
from bridge.groups import Group
from bridge.validation import Validation
from config import Config
from model import ModelConfig, Qwen3MoE
from ranks import parallel
from ranks.batch import pack_batch
from ranks.parallel import Bucket, Mesh, ShardedAdamW, join_ranks, make_mesh, reduce_metrics
from task import Codec, Prompts
from train_cispo import compile_ahead, micro_batch_logprobs, train_update

# ---- packing -------------------------------------------------------------------------------------
SMALL = Config(
    num_prompts_per_step=4,
    num_generations_per_prompt=4,
    train_global_batch_size=8,
    max_new_tokens=9,
    max_total_sequence_length=32,
    max_tokens_per_micro_batch=64,
    logprob_chunk_size=16,
    compile=False,
)


TINY = ModelConfig(
    vocab_size=32,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=64,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    norm_topk_prob=True,
    initializer_range=0.3,
    mlp_only_layers=(0,),
)


def random_groups(seed=0, dropped=()):
    """Four groups of up to four samples with random lengths; `dropped`: groups that lost a
    sample."""
    g = torch.Generator().manual_seed(seed)
    groups = []
    for ordinal in range(4):
        samples = 3 if ordinal in dropped else 4
        lengths = torch.randint(1, 10, (samples,), generator=g, dtype=torch.int32)
        total = int(lengths.sum())
        groups.append(
            Group(
                ordinal,
                torch.randint(0, 32, (3 + 2 * ordinal,), generator=g).tolist(),
                lengths,
                torch.randint(0, 32, (total,), generator=g, dtype=torch.int32),
                -torch.rand(total, generator=g) * 5,
                torch.randint(0, 2, (total,), generator=g, dtype=torch.int32),
                torch.randint(0, 2, (samples,), generator=g).float(),
                torch.zeros(samples, dtype=torch.uint8),
            )
        )
    return groups


@pytest.mark.parametrize("dropped", [(), (1,)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sampled_token_is_packed_once_with_its_own_values(world_size, dropped):
    groups = random_groups(dropped=dropped)
    blob = pack_batch(groups, SMALL)
    rewards = torch.zeros(4, 4)
    valid = torch.zeros(4, 4, dtype=torch.bool)
    wanted = []
    for p, group in enumerate(groups):
        rewards[p, : len(group.rewards)], valid[p, : len(group.rewards)] = group.rewards, True
    advantages = loss.group_advantages(rewards, valid, True, "group")
    for p, group in enumerate(groups):
        pieces = [
            x.split(group.lengths.tolist())
            for x in (group.token_ids, group.logprobs, group.versions)
        ]
        for s, (tokens, gen, versions) in enumerate(zip(*pieces)):
            update = (p * 4 + s) // 8  # a dropped sample moves no other one to another update
            wanted.append(
                (
                    update,
                    group.prompt_ids,
                    tokens.tolist(),
                    gen.tolist(),
                    versions.tolist(),
                    [advantages[p, s].item()] * len(tokens),
                )
            )
    found = []
    for rank in range(world_size):
        updates, counts = unpack_batch(blob, SMALL, rank, world_size, torch.device("cpu"))
        assert [seqs for _, seqs in counts] == [8 - len(dropped), 8]
        for update, micro_batches in enumerate(updates):
            for mb in micro_batches:
                assert len(mb.tokens_T) <= 64 and len(mb.mask) % 16 == 0
                # row t predicts token t + 1
                assert torch.equal(mb.tokens_T[mb.rows_N + 1], mb.targets_N)
                values = [
                    x[mb.mask].split(mb.lengths_B.tolist())
                    for x in (mb.gen_logprobs, mb.versions, mb.advantages)
                ]
                rows = mb.tokens_T.split(mb.cu_seqlens.diff().tolist())
                for row, n, gen, versions, advantage in zip(rows, mb.lengths_B.tolist(), *values):
                    found.append(
                        (
                            update,
                            row[:-n].tolist(),
                            row[-n:].tolist(),
                            gen.tolist(),
                            versions.tolist(),
                            advantage.tolist(),
                        )
                    )
    assert sorted(map(repr, found)) == sorted(map(repr, wanted))


def test_a_rank_without_samples_and_an_update_without_any_keep_the_ranks_in_step():
    """Of the 16 samples of 4 groups of 4, in updates of 2, only the first 2 or 3 of each group were
    kept."""
    cfg = dataclasses.replace(SMALL, train_global_batch_size=2)
    groups = []
    for group, keep in zip(random_groups(), (2, 3, 2, 2)):
        tokens = int(group.lengths[:keep].sum())
        flat = {n: getattr(group, n)[:tokens] for n in ("token_ids", "logprobs", "versions")}
        rows = {n: getattr(group, n)[:keep] for n in ("lengths", "rewards", "truncated")}
        groups.append(dataclasses.replace(group, **flat, **rows))
    blob = pack_batch(groups, cfg)
    ranks = [unpack_batch(blob, cfg, rank, 2, torch.device("cpu")) for rank in range(2)]
    assert [seqs for _, seqs in ranks[0][1]] == [seqs for _, seqs in ranks[1][1]] == [2, 2, 1, 2, 2]
    (idle,) = ranks[1][0][2]  # the lone sample went to rank 0
    assert not idle.mask.any() and ranks[0][0][2][0].mask.any()
    model = Qwen3MoE(TINY)
    model.init_weights(torch.Generator().manual_seed(1))
    optimizer = ShardedAdamW(model, 1.0, lr=1e-3)
    idle.prev_logprobs = micro_batch_logprobs(model, idle, cfg)[0].detach()
    idle.age = 1 - idle.versions
    metrics, norm = train_update(model, optimizer, [idle], ranks[1][1][2], cfg, loss.policy_loss)
    assert norm == 0 and metrics["loss"] == 0 and metrics.keys() == first_update(SMALL)[0].keys()


# ---- gradients that leave while others are made --------------------------------------------------
def small_update(monkeypatch, model, num_micro_batches):
    """What happens in an update: "backward" where a pass begins, a bucket's names where its sum
    over the ranks does, "step" where the optimizer is called."""
    monkeypatch.setattr(parallel, "BUCKET_ELEMENTS", 1000)
    optimizer, events = ShardedAdamW(model, 1.0, lr=1e-3), []
    begin, expect, step = Bucket.begin_reducing, ShardedAdamW.expect_last, ShardedAdamW.step
    monkeypatch.setattr(
        Bucket, "begin_reducing", lambda self: events.append(self.names) or begin(self)
    )
    monkeypatch.setattr(ShardedAdamW, "expect_last", lambda *a: events.append("last") or expect(*a))
    monkeypatch.setattr(ShardedAdamW, "step", lambda self: events.append("step") or step(self))
    cfg = dataclasses.replace(SMALL, max_tokens_per_micro_batch=32, freeze_moe_router=False)
    updates, counts = unpack_batch(pack_batch(random_groups(), cfg), cfg, 0, 1, torch.device("cpu"))
    micro_batches = updates[0][:num_micro_batches]
    assert len(micro_batches) == num_micro_batches
    for mb in micro_batches:
        mb.prev_logprobs, mb.age = mb.gen_logprobs, 1 - mb.versions
    train_update(model, optimizer, micro_batches, counts[0], cfg, loss.policy_loss)
    return events, optimizer


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_every_sum_over_the_ranks_begins_in_the_last_backward_pass(tied, recompute, monkeypatch):
    model = Qwen3MoE(dataclasses.replace(TINY, tie_word_embeddings=tied), recompute=recompute)
    model.init_weights(torch.Generator().manual_seed(1))
    events, optimizer = small_update(monkeypatch, model, 2)
    assert events[0] == "last" and events[-1] == "step"
    assert len(optimizer.buckets) > 4
    assert sorted(events[1:-1]) == sorted(bucket.names for bucket in optimizer.buckets)


def test_weights_of_two_blocks_are_refused_by_name_and_not_summed_by_half(monkeypatch):
    model = Qwen3MoE(dataclasses.replace(TINY, num_hidden_layers=3))
    model.model["layers"][2] = model.model["layers"][1]
    model.init_weights(torch.Generator().manual_seed(1))
    model.recompute = True  # so each of the two has a backward pass of its own
    with pytest.raises(RuntimeError, match=r"layers\.1\..*a second gradient"):
        small_update(monkeypatch, model, 1)


# ---- one update, in any layout -------------------------------------------------------------------
def first_update(cfg, mesh=Mesh(), ahead=False):  # noqa: B008
    """Loss, gradient norm and the parameters after one update of a fixed batch. ahead: compile
    first, or run what would be compiled."""
    model = Qwen3MoE(TINY, mesh)
    model.init_weights(torch.Generator().manual_seed(1))
    optimizer, policy_loss = ShardedAdamW(model, 1.0, lr=1e-3), loss.policy_loss
    if cfg.compile:
        model.compile_blocks()
        policy_loss = torch.compile(policy_loss, dynamic=True)
    if ahead:
        compile_ahead(model, model, optimizer, 3, cfg, policy_loss)
        torch._dynamo.utils.counters.clear()
    updates, counts = unpack_batch(
        pack_batch(random_groups(dropped=(1,)), cfg),
        cfg,
        mesh.dp_rank,
        mesh.dp,
        mesh.device,
        mesh.tp,
    )
    with torch.no_grad():
        for mb in updates[0]:
            mb.prev_logprobs = micro_batch_logprobs(model, mb, cfg)[0] + 0.5 * torch.sin(
                mb.gen_logprobs
            )
            mb.ref_logprobs, mb.age = (
                mb.prev_logprobs + 0.3 * torch.cos(mb.gen_logprobs),
                1 - mb.versions,
            )
    stats, norm = train_update(model, optimizer, updates[0], counts[0], cfg, policy_loss)
    model.await_values()
    # of the histogram too
    one_number = lambda v: (v.flatten() * torch.arange(1, v.numel() + 1)).sum().item()
    return (
        {n: one_number(v) for n, v in reduce_metrics(stats, mesh.dp_group).items()},
        norm.item(),
        list(model.parameters()),
    )


GSPO_FLAGS = {
    "use_cispo": False,
    "token_level_loss": False,
    "sequence_level_importance_ratios": True,
}


ALGORITHMS = [
    {},
    {"use_cispo": False},
    {"use_cispo": False, "token_level_loss": False},
    GSPO_FLAGS,
    {
        "prompt_level_loss": True,
        "positive_example_nll_weight": 0.5,
        "reference_policy_kl_penalty": 0.1,
    },
    {
        "trust_region": "tv",
        "trust_region_low": 0.05,
        "advantage_std": "mean",
        "ratio_clip_max_negative": 0.3,
    },
]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_micro_batches_are_invisible_in_the_update(algorithm):
    whole = dataclasses.replace(SMALL, max_tokens_per_micro_batch=1024, **algorithm)
    split = dataclasses.replace(
        SMALL, max_tokens_per_micro_batch=32, logprob_chunk_size=5, **algorithm
    )
    (m1, n1, p1), (m2, n2, p2) = first_update(whole), first_update(split)
    # fp32 sums, reordered
    assert m1 == pytest.approx(m2, rel=1e-5, abs=1e-6) and n1 == pytest.approx(n2, rel=1e-5)
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(p1, p2))


REPLAY = [{"router_replay": "sampler"}, {"router_replay": "trainer"}]


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, *REPLAY])
def test_what_is_compiled_ahead_leaves_no_trace(algorithm):
    cfg = dataclasses.replace(SMALL, **algorithm)
    (m1, n1, p1), (m2, n2, p2) = first_update(cfg), first_update(cfg, ahead=True)
    assert m1 == m2 and n1 == n2 and all(map(torch.equal, p1, p2))


def ahead_of_a_rank(tp, ep):
    join_ranks(120)
    mesh = make_mesh(tp, ep, TINY.num_key_value_heads)
    cfg = dataclasses.replace(SMALL, tp=tp, ep=ep, router_replay="sampler")
    (m1, n1, p1), (m2, n2, p2) = first_update(cfg, mesh), first_update(cfg, mesh, ahead=True)
    return m1 == m2 and n1 == n2 and all(map(torch.equal, p1, p2))


@pytest.mark.parametrize(("tp", "ep"), [(1, 2), (2, 1)])
def test_what_is_compiled_ahead_leaves_no_trace_on_two_ranks(tp, ep):
    assert on_ranks(2, ahead_of_a_rank, tp, ep) == [True, True]


@pytest.mark.slow
def test_an_update_after_that_compiles_nothing():
    torch._dynamo.reset()  # it compiles one function a few times only
    first_update(dataclasses.replace(SMALL, compile=True), ahead=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


class Standby:
    """In place of hub and publisher: the loop runs, and nothing is served."""

    url, stats, error, deadline_s = "nowhere", {}, None, 1.0
    publish = close = __exit__ = lambda *args, **kwargs: None
    __enter__ = lambda self: self
    take_timing = ledger_state = lambda self: {}
    take_validations = lambda self: []
    begin_validation = lambda self, version: None
    status = lambda self: {"validation": {"rounds": []}}
    validation = Validation()


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"ratio_anchor": "sampler", "use_importance_sampling_correction": False},
        {"reference_policy_kl_penalty": 0.1, "positive_example_nll_weight": 0.1},
        {"reference_policy_kl_penalty": 0.1, "use_kl_in_reward": True, "drop_zero_variance": True},
        {
            **GSPO_FLAGS,
            "truncated_importance_sampling_type": "tis",
            "truncated_importance_sampling_ratio": 2.0,
        },
        {"use_cispo": False, "force_on_policy_ratio": True, "train_global_batch_size": 16},
        {
            "use_cispo": False,
            "disable_ppo_ratio": True,
            "advantage_std": "batch",
            "prompt_level_loss": True,
        },
        {"router_replay": "trainer", "freeze_moe_router": False, "activation_checkpointing": True},
        # wide enough that some tokens stay in it, whatever the warm start: else there is no gradient
        {"trust_region": "kpop", "trust_region_high": 1.0, "advantage_std": "mean"},
    ],
)
def test_every_mode_runs_through_the_training_loop(flags, tiny_checkpoint, tmp_path, monkeypatch):
    cfg = dataclasses.replace(SMALL, max_num_steps=3, local_rollout=False, lr=1e-2, **flags)
    cfg.validate()
    groups = [
        dataclasses.replace(g, versions=torch.zeros_like(g.versions)) for g in random_groups()
    ]
    for token_ids in (g.token_ids for g in groups):
        token_ids %= 16  # the tiny model's vocabulary is smaller than TINY's
    groups = [dataclasses.replace(g, prompt_ids=[t % 16 for t in g.prompt_ids]) for g in groups]
    groups[0] = dataclasses.replace(groups[0], rewards=torch.ones(4))  # no variance
    monkeypatch.chdir(tmp_path)
    cfg.run_dir.mkdir(parents=True)
    trained, passes = [], []
    counted = lambda model, mb, cfg: (
        passes.append(torch.is_grad_enabled()) or micro_batch_logprobs(model, mb, cfg)
    )
    updated = lambda model, opt, batches, *rest: (
        trained.extend(batches) or train_update(model, opt, batches, *rest)
    )
    for module, name, stand_in in [
        (rollouts, "start_hub", lambda *args: Standby()),
        (rollouts, "Publisher", lambda *args, **kwargs: Standby()),
        (rollouts, "wait_for_batch", lambda *args: (groups, "train")),
        (report, "sum_up", lambda run_dir, version, scores: None),
        (train_cispo, "micro_batch_logprobs", counted),
        (train_cispo, "train_update", updated),
    ]:
        monkeypatch.setattr(module, name, stand_in)
    prompts = Prompts([{}] * 100, seed=0)
    train_cispo.train(cfg, tiny_checkpoint, (prompts, Codec(tiny_checkpoint), {}))
    records = [
        json.loads(line) for line in (cfg.run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(records) == 3 and all(
        math.isfinite(r["train/loss"]) and r["train/grad_norm"] > 0 for r in records
    )
    assert all(r["train/tokens_per_s_per_gpu"] > 0 and r["train/mfu"] is None for r in records)
    assert [r["train/tokens_age_0"] > 0 for r in records] == [True, False, False]
    # A pass without gradient for prev and one for the reference, where the mode reads them, and
    # none elsewhere.
    wanted = cfg.algorithm.needs_prev + bool(cfg.reference_policy_kl_penalty)
    assert passes.count(False) == wanted * len(trained)
    assert [r["train/zero_variance_dropped"] for r in records] == [
        4 if cfg.drop_zero_variance else 0
    ] * 3
    assert all(0 < r["train/effective_sample_size"] <= 1 for r in records)
    if cfg.trust_region:
        assert all(0 < r["train/trust_masked"] < 1 for r in records)
    if cfg.reference_policy_kl_penalty:
        # it starts as its own reference
        assert records[0]["train/kl_penalty"] < records[2]["train/kl_penalty"]


def on_one_of_two(algorithm, skip_reduce):
    join_ranks(60)
    mesh = make_mesh(1, 1, TINY.num_key_value_heads)
    if skip_reduce:
        parallel._begin_reduce_scatter = lambda x, group: x.chunk(2)[mesh.rank].clone()
    return first_update(dataclasses.replace(SMALL, **algorithm), mesh)[:2]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_ranks_make_the_same_first_update_as_one(algorithm):
    metrics, norm, _ = first_update(dataclasses.replace(SMALL, **algorithm))
    for rank_metrics, rank_norm in on_ranks(2, on_one_of_two, algorithm, False):
        assert rank_norm == pytest.approx(norm, rel=1e-5)
        assert rank_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-7)


def test_without_the_gradient_reduction_two_ranks_do_differ():
    """The control of the test above: it can fail."""
    _, norm, _ = first_update(SMALL)
    assert all(
        abs(rank_norm / norm - 1) > 0.01 for _, rank_norm in on_ranks(2, on_one_of_two, {}, True)
    )
