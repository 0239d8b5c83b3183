"""The operations of the model that no single call of torch covers on CPU and GPU alike: attention over packed
sequences, one GEMM per expert, and moving rows. On a GPU the first two are one kernel each; on a CPU they are loops
over data, which torch.compile cannot look into, so they are custom ops with a gradient of their own.

Shapes are those of model.py.
"""

import itertools

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn


# ---- attention over packed sequences -------------------------------------------------------------------------
def _sequences(cu_seqlens: list[int]):
    """The packed sequences by length, (rows, length): equal ones share a kernel call, exact and without padding, and
    a batch of short RL samples has few distinct lengths. A single one is a slice, which copies nothing."""
    by_length: dict[int, list[int]] = {}
    for start, end in itertools.pairwise(cu_seqlens):
        by_length.setdefault(end - start, []).append(start)
    for length, starts in by_length.items():
        rows = slice(starts[0], starts[0] + length)
        if len(starts) > 1:
            rows = (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()
        yield rows, length


# On a CPU: torch's varlen kernel does not exist there and flex_attention has no backward, but the flash kernel behind
# SDPA does. As custom ops, since torch.compile cannot look into a loop over lengths that are data.
def _lse_like(q_THC):
    """The kernel's log-sum-exp is at least fp32."""
    return q_THC.new_empty(q_THC.shape[:2], dtype=torch.promote_types(q_THC.dtype, torch.float32))


@torch.library.custom_op("cispo::attend_cpu", mutates_args=())
def attend_cpu(q_THC: torch.Tensor, k_THC: torch.Tensor, v_THC: torch.Tensor, cu: torch.Tensor) -> list[torch.Tensor]:
    out, lse = torch.empty_like(q_THC), _lse_like(q_THC)
    for rows, length in _sequences(cu.tolist()):
        q, k, v = (x[rows].unflatten(0, (-1, length)).transpose(1, 2) for x in (q_THC, k_THC, v_THC))
        o, s = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        out[rows], lse[rows] = o.transpose(1, 2).flatten(0, 1), s.transpose(1, 2).flatten(0, 1)
    return [out, lse]


@torch.library.custom_op("cispo::attend_cpu_backward", mutates_args=())
def attend_cpu_backward(grad: torch.Tensor, saved: list[torch.Tensor], cu: torch.Tensor) -> list[torch.Tensor]:
    grads = [torch.empty_like(grad) for _ in range(3)]
    for rows, length in _sequences(cu.tolist()):
        g, q, k, v, o, s = (x[rows].unflatten(0, (-1, length)).transpose(1, 2) for x in (grad, *saved))
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(g, q, k, v, o, s, 0.0, True)
        for whole, part in zip(grads, parts):
            whole[rows] = part.transpose(1, 2).flatten(0, 1)
    return grads


@attend_cpu.register_fake
def _(q_THC, k_THC, v_THC, cu):
    return [torch.empty_like(q_THC), _lse_like(q_THC)]


@attend_cpu_backward.register_fake
def _(grad, saved, cu):
    return [torch.empty_like(grad) for _ in range(3)]


def _attend_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])


def _attend_backward(ctx, grads):
    *saved, cu = ctx.saved_tensors
    return *attend_cpu_backward(grads[0].contiguous(), saved, cu), None


attend_cpu.register_autograd(_attend_backward, setup_context=_attend_setup)


def attend(q_ThC, k_TgC, v_TgC, cu_seqlens, max_seqlen: int):
    """Causal attention inside each packed sequence. Shapes: q (T, h, C), k and v (T, g, C) -> (T, h, C)."""
    groups = q_ThC.shape[1] // k_TgC.shape[1]  # torch 2.11's kernel has no GQA argument: repeat the kv heads
    k_ThC, v_ThC = (x.repeat_interleave(groups, dim=1) for x in (k_TgC, v_TgC))
    if q_ThC.is_cuda:
        return varlen_attn(q_ThC, k_ThC, v_ThC, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0))
    return attend_cpu(q_ThC, k_ThC, v_ThC, cu_seqlens)[0]


# ---- one GEMM per expert -------------------------------------------------------------------------------------
# One GEMM per expert over rows sorted by expert. torch's grouped_mm is that on a GPU, in bf16; its CPU version is this
# loop, but takes no fp64, and compiles in bf16 only. Hence a custom op around the two.
@torch.library.custom_op("cispo::grouped_mm", mutates_args=())
def grouped_mm(x_NA: torch.Tensor, w_eAB: torch.Tensor, counts_e: torch.Tensor) -> torch.Tensor:
    """Rows of expert 0 first, then of expert 1, ...; counts_e rows each: y = x @ w[expert]."""
    if x_NA.is_cuda and x_NA.dtype == torch.bfloat16:
        return F.grouped_mm(x_NA, w_eAB, offs=counts_e.cumsum(0).to(torch.int32))
    out = x_NA.new_empty(len(x_NA), w_eAB.shape[2])
    for x, w, y in zip(x_NA.split(counts_e.tolist()), w_eAB, out.split(counts_e.tolist())):
        torch.mm(x, w, out=y)
    return out


@torch.library.custom_op("cispo::grouped_outer", mutates_args=())
def grouped_outer(x_NA: torch.Tensor, g_NB: torch.Tensor, counts_e: torch.Tensor) -> torch.Tensor:
    """x^T @ g of each expert's rows, (e, A, B): the weight gradient. Zero for an expert without rows."""
    if x_NA.is_cuda and x_NA.dtype == torch.bfloat16:
        return F.grouped_mm(x_NA.t(), g_NB, offs=counts_e.cumsum(0).to(torch.int32))
    out = x_NA.new_empty(len(counts_e), x_NA.shape[1], g_NB.shape[1])
    for x, g, w in zip(x_NA.split(counts_e.tolist()), g_NB.split(counts_e.tolist()), out):
        torch.mm(x.t(), g, out=w)
    return out


grouped_mm.register_fake(lambda x, w, counts: x.new_empty(x.shape[0], w.shape[2]))
grouped_outer.register_fake(lambda x, g, counts: x.new_empty(counts.shape[0], x.shape[1], g.shape[1]))


def _grouped_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _grouped_backward(ctx, grad_NB):
    x_NA, w_eAB, counts_e = ctx.saved_tensors
    grad_NB = grad_NB.contiguous()
    dx_NA = grouped_mm(grad_NB, w_eAB.transpose(1, 2), counts_e) if ctx.needs_input_grad[0] else None
    # As (e, B, A) transposed: the layout of the parameter, which is a transposed w.
    dw_eAB = grouped_outer(grad_NB, x_NA, counts_e).transpose(1, 2) if ctx.needs_input_grad[1] else None
    return dx_NA, dw_eAB, None


grouped_mm.register_autograd(_grouped_backward, setup_context=_grouped_setup)


# ---- moving rows ---------------------------------------------------------------------------------------------
class _CopyRows(torch.autograd.Function):
    """Row n of the result is row order_N[n] // K of x forward; backward each row of x adds up its K copies' gradients,
    found by the inverse order: a gather, where autograd's own would be atomic additions, in an order of their own."""

    @staticmethod
    def forward(ctx, x_tD, order_N, inverse_N, K):
        ctx.K = K
        ctx.save_for_backward(inverse_N)
        return x_tD[order_N // K]

    @staticmethod
    def backward(ctx, grad_ND):
        return grad_ND[ctx.saved_tensors[0]].unflatten(0, (-1, ctx.K)).sum(1), None, None, None


copy_rows = _CopyRows.apply
