"""Which rows travel between the ranks of a layer with experts. That their values are right is
test_parallel.py's."""

import dataclasses
from unittest import mock

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
