"""Tokens to the ranks that have their experts, and the experts' sums back (expert parallelism).

A token goes once to each rank that has any of its K experts. With its D values go its K weights
and, as numbers of the same dtype, which of that rank's experts they belong to: e, with weight 0,
for an expert elsewhere. That rank makes a copy for each expert, and what goes back is one row
again, the weighted sum of the copies.

Shapes are those of model.py, and: M rows sent, n copies on this rank.
"""

import torch

from ranks.ops import combine_rows, copy_rows, first_rows, sort_rows
from ranks.parallel import all_to_all, exchange_counts


def run_here(experts, x_tD, weights_tK, ids_tK, counts_E):
    """The weighted sum over each token's experts, which are all on this rank."""
    order_N, at_tK = sort_rows(ids_tK, len(counts_E))
    y_ND = experts(copy_rows(x_tD, order_N, at_tK), counts_E)
    return combine_rows(y_ND, weights_tK, order_N, at_tK)


def run_on_ranks(experts, x_tD, weights_tK, ids_tK, counts_E, ep: int, group):
    """The same, of experts that are spread over the ranks of a group."""
    (t, K), e = ids_tK.shape, len(counts_E) // ep
    rank_tK = ids_tK // e
    again_tK = (rank_tK[:, :, None] == rank_tK[:, None, :]).tril(-1).any(-1)
    to_tK = torch.where(again_tK, ep, rank_tK)  # each rank once
    sent_r = (to_tK.flatten()[:, None] == torch.arange(ep, device=to_tK.device)).sum(0)
    # to each rank: the copies that its experts get, and the rows in which they come
    counts = torch.cat([counts_E.view(ep, e), sent_r[:, None]], 1)
    counts_re, received_r = exchange_counts(counts, group).split([e, 1], 1)
    # sync: one per layer; compiled, tolist alone would be one for each number
    numbers = torch.stack([sent_r, received_r.flatten(), counts_re.sum(1)]).cpu().tolist()
    for number in (*numbers[0], *numbers[1], *numbers[2]):
        # what torch.compile cannot know of numbers that come from a tensor
        torch._check(number >= 0)
    send, receive, copies = numbers
    M, n = sum(send), sum(copies)
    torch._check(M <= t * K)
    torch._check(n <= sum(receive) * K)

    # dispatch: to each rank its rows, in the order of the tokens
    sent = first_rows(*sort_rows(to_tK, ep), M)
    order_M, at_tK, first_tK = sent
    ids_MK = ids_tK[order_M // K] - e * to_tK.flatten()[order_M, None]
    here_MK = (ids_MK >= 0) & (ids_MK < e)
    weights_MK = torch.where(here_MK, copy_rows(weights_tK, *sent), 0.0)
    ids_MK = torch.where(here_MK, ids_MK, e).to(x_tD.dtype)
    notes_M2K = torch.cat([weights_MK, ids_MK], 1)
    weights_RK, ids_RK = all_to_all(notes_M2K, receive, send, group).chunk(2, 1)
    x_RD = all_to_all(copy_rows(x_tD, *sent), receive, send, group)
    # a copy for each expert
    kept = first_rows(*sort_rows(ids_RK, e), n)
    y_nD = experts(copy_rows(x_RD, *kept), counts_re.sum(0))
    y_RD = combine_rows(y_nD, weights_RK, *kept[:2])
    # combine: the same way back
    y_MD = all_to_all(y_RD, send, receive, group)
    return combine_rows(y_MD, first_tK, order_M, at_tK)
