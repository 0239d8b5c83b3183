"""Which rows travel between the ranks of a layer with experts, and what a recompute leaves out. That
the values are right is test_parallel.py's."""

import dataclasses
from collections import Counter
from unittest import mock

import pytest
import torch
from on_ranks import on_ranks
from test_parallel import MODEL

from model import Qwen3MoE
from ranks import parallel
from ranks.parallel import join_ranks, make_mesh


def rows_of_a_layer(ep):
    """On every rank: rows that it sends through each all-to-all of a layer, forward and backward,
    and its (token, rank) pairs."""
    join_ranks(120)
    mesh, sent = make_mesh(1, ep, MODEL.num_key_value_heads), []
    real = parallel._exchanged

    def counted(x, receive, send, group):
        sent.append([len(x), sum(send), *receive])
        return real(x, receive, send, group)

    cfg = dataclasses.replace(MODEL, num_experts_per_tok=4)
    layer = Qwen3MoE(cfg, mesh).model["layers"][0].mlp
    g = torch.Generator().manual_seed(mesh.rank)
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=g)
    x_tD = torch.randn(50, MODEL.hidden_size, generator=g, requires_grad=True)
    with mock.patch.object(parallel, "_exchanged", counted):
        y_tD, chosen_tK = layer(x_tD)
        y_tD.sum().backward()
    pairs = {(t, expert * ep // 8) for t, ids in enumerate(chosen_tK.tolist()) for expert in ids}
    return sent, [sum(rank == r for _, rank in pairs) for r in range(ep)]


def test_a_token_is_sent_once_to_each_rank_that_has_any_of_its_experts():
    found = on_ranks(4, rows_of_a_layer, 4)
    pairs = [of_rank for _, of_rank in found]
    for me, (sent, mine) in enumerate(found):
        received = [of_rank[me] for of_rank in pairs]
        out, back = [sum(mine)] * 2 + received, [sum(received)] * 2 + mine
        # dispatch (weights, rows), combine; backward combine's, then dispatch's
        assert sent == [out, out, back, out, back, back]
        assert sum(mine) < 50 * 4


def gradients(tp, ep, recompute):
    """Of a model of two kinds of layers: gradients by name, and how often ranks met backward."""
    mesh, met = make_mesh(tp, ep, MODEL.num_key_value_heads), Counter()

    def counted(name):
        real = getattr(parallel, name)

        def call(*args):
            met[name] += 1
            return real(*args)

        return mock.patch.object(parallel, name, call)

    model, g = Qwen3MoE(MODEL, mesh, recompute), torch.Generator().manual_seed(mesh.rank)
    for p in model.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=g)
    tokens = torch.randint(MODEL.vocab_size, (24,), generator=torch.Generator().manual_seed(0))
    hidden, _ = model(tokens, torch.tensor([0, 10, 24], dtype=torch.int32), 14)
    with counted("_exchanged"), counted("_reduce_scattered"), counted("_gathered"):
        hidden.square().sum().backward()
    named = model.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}, met


def recomputed_and_kept(tp, ep):
    """What two ways to the same gradients differ in, and how often ranks met in each."""
    join_ranks(120)
    torch.use_deterministic_algorithms(True)  # memory that nothing was written to is NaN
    (kept, met), (again, met_again) = gradients(tp, ep, False), gradients(tp, ep, True)
    assert kept.keys() == again.keys() and all(g.abs().max() > 0 for g in kept.values())
    return [name for name in kept if not torch.equal(kept[name], again[name])], met, met_again


@pytest.mark.parametrize(("tp", "ep"), [(1, 2), (2, 2)])
def test_a_recompute_leaves_out_what_only_the_blocks_result_needs(tp, ep):
    for differ, met, again in on_ranks(2, recomputed_and_kept, tp, ep):
        assert differ == []
        more = Counter(again)
        more.subtract(met)
        # Of a forward pass: two all-to-alls of three in the layers with experts, but not the way
        # back; the gathers of three attentions and of a dense MLP, the reduce-scatters of the
        # attentions, but not the MLP's.
        of_tp = {"_gathered": 4, "_reduce_scattered": 3} if tp > 1 else {}
        assert more == {"_exchanged": 2 * 2, **of_tp}
