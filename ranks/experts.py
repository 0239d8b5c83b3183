"""Tokens to the ranks that have their experts, and the experts' sums back (expert parallelism).

A token goes once to each rank that has any of its K experts. With its D values go its K weights
and, as numbers of the same dtype, which of that rank's experts they belong to: e, with weight 0,
for an expert elsewhere. That rank makes a copy for each expert, the expert applies the weight, and
what goes back is one row again, the sum of the copies.

A weight is applied to an expert's F hidden values, before its last GEMM. The result is the same,
there are fewer of them, and that GEMM's result need not be kept for the weight's gradient.

Shapes are those of model.py, and: M rows sent, n copies on this rank.
"""

import torch

from ranks.ops import at_least_fp32
from ranks.parallel import all_to_all, exchange_counts, unread


# ---- moving rows ---------------------------------------------------------------------------------
def sort_rows(ids_tK, bound: int):
    """The stable order (t*K,) of small numbers, at most `bound`, and each one's place in it (t, K).
    A GPU sorts a byte in one pass, int64 in eight; and the inverse of an order is a scatter, not
    another sort."""
    order_N = ids_tK.flatten().to(torch.uint8 if bound < 256 else torch.int16).argsort(stable=True)
    rows_N = torch.arange(len(order_N), device=order_N.device)
    at_N = torch.empty_like(order_N).index_put((order_N,), rows_N)
    return order_N, at_N.view_as(ids_tK)


def first_rows(order_N, at_tK, n: int):
    """Of an order only the first n: these, the places, and which of them are among the n. Each row
    must have one at least; its others get the first one's place, which costs no memory traffic."""
    here_tK = at_tK < n
    at_tK = torch.where(here_tK, at_tK, at_tK.amin(1, keepdim=True))
    return order_N.narrow(0, 0, n), at_tK, here_tK


def sum_rows(x_nD, at_tK, here_tK=None):
    """Row t of the result is the sum of the rows at_tK[t] of x that are here, taken in at least
    fp32. K is a constant of the compiled code, and one row comes after the other: a single
    loop over D with K loads. A reduction over K runs at a fifth of a GPU's bandwidth
    (BENCHMARKS.md)."""
    total_tD = 0
    for k in range(at_tK.shape[1]):
        rows_tD = at_least_fp32(x_nD[at_tK[:, k]])
        if here_tK is not None:
            rows_tD = rows_tD * here_tK[:, k, None]
        total_tD = total_tD + rows_tD
    # No cast that changes nothing: where an autograd.Function returns it, torch 2.11 compiles wrong
    # gradients, silently (tests/test_parallel.py, compiled against eager).
    return total_tD if total_tD.dtype == x_nD.dtype else total_tD.to(x_nD.dtype)


class _CopyRows(torch.autograd.Function):
    """Copy n is of row from_n[n] of x; backward each row of x adds up its copies' gradients, which
    are at at_tK: a gather, where autograd's own would be atomic additions, in an order of their
    own. here_tK: which of the K there are (`first_rows`)."""

    @staticmethod
    def forward(ctx, x_tD, from_n, at_tK, here_tK=None):
        ctx.save_for_backward(at_tK, here_tK)
        return x_tD[from_n]

    @staticmethod
    def backward(ctx, grad_nD):
        return sum_rows(grad_nD, *ctx.saved_tensors), None, None, None


class _SumRows(torch.autograd.Function):
    """The other way: row t of the result is the sum of its copies, and each copy gets its row's
    gradient. Not read: only the gradient is wanted."""

    @staticmethod
    def forward(ctx, y_nD, from_n, at_tK, here_tK=None, is_read=True):
        ctx.save_for_backward(from_n)
        if not is_read:
            return unread(y_nD, len(at_tK), y_nD.shape[1])
        return sum_rows(y_nD, at_tK, here_tK)

    @staticmethod
    def backward(ctx, grad_tD):
        (from_n,) = ctx.saved_tensors
        return grad_tD[from_n], None, None, None, None


class _InOrder(torch.autograd.Function):
    """Numbers (t, K) in an order of theirs, (n,). One that is not among the n gets a gradient that
    means nothing."""

    @staticmethod
    def forward(ctx, x_tK, order_n, at_tK):
        ctx.save_for_backward(at_tK)
        return x_tK.flatten()[order_n]

    @staticmethod
    def backward(ctx, grad_n):
        (at_tK,) = ctx.saved_tensors
        return grad_n[at_tK], None, None


copy_rows, add_rows, in_order = _CopyRows.apply, _SumRows.apply, _InOrder.apply


# ---- a layer's experts ---------------------------------------------------------------------------
def run_here(experts, x_tD, weights_tK, ids_tK, counts_E, is_read: bool):
    """The weighted sum over each token's experts, which are all on this rank. Not read: only its
    gradient is wanted."""
    order_N, at_tK = sort_rows(ids_tK, len(counts_E))
    from_N, weights_N = order_N // ids_tK.shape[1], in_order(weights_tK, order_N, at_tK)
    y_ND = experts(copy_rows(x_tD, from_N, at_tK), weights_N, counts_E, is_read)
    return add_rows(y_ND, from_N, at_tK, None, is_read)


def run_on_ranks(experts, x_tD, weights_tK, ids_tK, counts_E, is_read: bool, ep: int, group):
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
    order_M, at_tK, here_tK = first_rows(*sort_rows(to_tK, ep), M)
    from_M = order_M // K
    ids_MK = ids_tK[from_M] - e * to_tK.flatten()[order_M, None]
    here_MK = (ids_MK >= 0) & (ids_MK < e)
    weights_MK = torch.where(here_MK, copy_rows(weights_tK, from_M, at_tK, here_tK), 0.0)
    ids_MK = torch.where(here_MK, ids_MK, e).to(x_tD.dtype)
    notes_M2K = torch.cat([weights_MK, ids_MK], 1)
    weights_RK, ids_RK = all_to_all(notes_M2K, receive, send, group).chunk(2, 1)
    x_RD = all_to_all(copy_rows(x_tD, from_M, at_tK, here_tK), receive, send, group)
    # a copy for each expert
    order_n, at_RK, here_RK = first_rows(*sort_rows(ids_RK, e), n)
    from_n, weights_n = order_n // K, in_order(weights_RK, order_n, at_RK)
    x_nD = copy_rows(x_RD, from_n, at_RK, here_RK)
    y_nD = experts(x_nD, weights_n, counts_re.sum(0), is_read)
    # combine: the same way back
    y_RD = add_rows(y_nD, from_n, at_RK, here_RK, is_read)
    y_MD = all_to_all(y_RD, send, receive, group, is_read)
    return add_rows(y_MD, from_M, at_tK, here_tK, is_read)
