"""The operations of the model that no single call of torch covers on CPU and GPU alike: attention
over packed sequences, one GEMM per expert, and moving rows. On a GPU the first two are one kernel
each; on a CPU they are loops over data, which torch.compile cannot look into, so they are custom
ops with a gradient of their own.

Shapes are those of model.py.
"""

import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from ranks.parallel import all_reduce

# ---- log-probs of a large vocabulary -------------------------------------------------------------
# A chunk's logits are the largest tensor of the program, so they live once: one GEMM writes them,
# an elementwise body turns them into d loss / d logits where they lie, two GEMMs read that. Nothing
# is recomputed, since the loss of a token gives its gradient as soon as its log-prob is known: 3
# GEMMs, 6*D*V FLOPs a token, forward and backward.
# target of a padding row; with a sharded vocabulary -1 can be a word of another rank
IGNORED = -(2**31)


def chunk_rows(vocab_rows: int, budget_bytes: int = 2**28) -> int:
    """Tokens whose fp32 logits fit the budget: a power of two from 16 to 4096, as batches are
    multiples of such."""
    return 1 << min(12, max(4, (budget_bytes // (4 * vocab_rows)).bit_length() - 1))


def _head_body(
    logits_Cv, dlogits_Cv, targets_C, aux, token_objective, temperature: float, tp_group
):
    """From a chunk's logits to its loss (0-D), log-probs and entropies; d loss / d logits goes to
    dlogits_Cv, which may be logits_Cv. Targets count from this rank's first word. Without an
    objective: no loss, dlogits untouched."""
    z_Cv = logits_Cv / temperature
    z_Cv = z_Cv - all_reduce(z_Cv.amax(-1), tp_group, dist.ReduceOp.MAX)[:, None]

    # 151,936 terms one by one in fp32 are wrong by 1e-5
    def sum64(x_Cv):
        return x_Cv.sum(-1, dtype=torch.float64)

    here_C = (targets_C >= 0) & (targets_C < z_Cv.shape[1])
    target_C = torch.where(
        here_C, z_Cv.gather(-1, torch.where(here_C, targets_C, 0)[:, None]).squeeze(-1), 0.0
    )
    packed_3C = torch.stack([sum64(z_Cv.exp()), sum64(z_Cv.exp() * z_Cv), target_C.double()])
    sum_C, weighted_C, target_C = all_reduce(packed_3C, tp_group).unbind()
    logprobs_C = (target_C - sum_C.log()).to(z_Cv.dtype)
    entropy_C = (sum_C.log() - weighted_C / sum_C).to(z_Cv.dtype)
    if token_objective is None:
        return None, logprobs_C, entropy_C

    def chunk_loss(logprobs_C):
        loss = token_objective(logprobs_C, *aux)
        loss = torch.where(targets_C != IGNORED, loss, 0.0).sum() if loss.ndim else loss
        return loss, loss

    coef_C, loss = torch.func.grad(chunk_loss, has_aux=True)(logprobs_C)
    coef_C = torch.where(targets_C != IGNORED, coef_C, 0.0) / temperature
    onehot_Cv = (
        torch.arange(z_Cv.shape[1], device=z_Cv.device, dtype=torch.int32)
        == targets_C.int()[:, None]
    )
    # another exp: kept, the first would be a buffer
    softmax_Cv = (z_Cv - sum_C.log().to(z_Cv.dtype)[:, None]).exp()
    dlogits_Cv.copy_(coef_C[:, None] * (onehot_Cv.to(z_Cv.dtype) - softmax_Cv))
    return loss, logprobs_C, entropy_C


_compiled_head_body = torch.compile(_head_body, fullgraph=True)


def _run_head_body(compiled, logits_Cv, dlogits_Cv, targets_C, aux, *rest):
    """The body, compiled once for any number of rows but one (a compiler takes 1 for a
    constant)."""
    if not compiled:
        return _head_body(logits_Cv, dlogits_Cv, targets_C, aux, *rest)
    for x in (logits_Cv, dlogits_Cv, targets_C, *aux):
        torch._dynamo.mark_dynamic(x, 0)
    return _compiled_head_body(logits_Cv, dlogits_Cv, targets_C, aux, *rest)


class _Head:
    """The vocabulary head over some tokens, with one chunk of logits alive at a time.

    Its arguments are those of `token_logprobs`. `logprobs` and `gradients` are the two ways over
    all chunks.
    """

    def __init__(
        self, hidden_ND, weight_vD, targets_N, temperature, chunk_tokens, compiled, tp_group
    ):
        self.hidden_ND, self.N = hidden_ND, len(hidden_ND)
        self.v, self.C = len(weight_vD), chunk_tokens or chunk_rows(len(weight_vD))
        self.temperature, self.compiled, self.tp_group = temperature, compiled, tp_group
        # Logits are fp32 whatever the inputs: rounded to bf16 they are wrong by 0.06 nats. Only
        # CUDA has a GEMM from bf16 to fp32; elsewhere (tests) the operands are made fp32. Gradients
        # are rounded to bf16 just for the tensor cores.
        is_narrow = hidden_ND.is_cuda and hidden_ND.dtype.itemsize < 4
        self.narrow = hidden_ND.dtype if is_narrow else None
        self.dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        self.to_fp32 = {"out_dtype": self.dtype} if self.narrow else {}
        self.weight = weight_vD if self.narrow else weight_vD.to(self.dtype)
        self.weight_dtype = weight_vD.dtype
        self.targets_N = targets_N
        if tp_group is not None:  # they count from this rank's first word
            self.targets_N = targets_N - self.v * dist.get_rank(tp_group)
        # One chunk at least: a rank without tokens takes part in the collectives.
        self.padded = -(-max(self.N, 1) // self.C) * self.C
        self.rows = max(2, min(self.N, self.C))  # of the logits' buffer

    def new(self, *shape: int, dtype=None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.hidden_ND.device)

    def chunks(self):
        """Of each chunk: its rows, their number, its hidden states and logits, and a function that
        cuts and pads a tensor of all tokens. The last chunk has as many rows as are left, at least
        2, the others as many as the buffer."""
        logits_Cv = self.new(self.rows, self.v)
        for start in range(0, self.padded, self.C):
            real = min(self.C, self.N - start)
            rows, c = slice(start, start + real), max(2, real)

            def pad(x, value=0, rows=rows, extra=c - real):
                return F.pad(x[rows], (0, extra), value=value)

            hidden = F.pad(self.hidden_ND[rows], (0, 0, 0, c - real)).to(dtype=self.weight.dtype)
            torch.mm(hidden, self.weight.t(), **self.to_fp32, out=logits_Cv[:c])
            yield rows, real, hidden, logits_Cv[:c], pad

    def body(self, logits_cv, dlogits_cv, pad, aux=(), objective=None):
        targets, aux = pad(self.targets_N, IGNORED), tuple(map(pad, aux))
        rest = (objective, self.temperature, self.tp_group)
        return _run_head_body(self.compiled, logits_cv, dlogits_cv, targets, aux, *rest)

    @torch.no_grad()
    def logprobs(self):
        """Log-probs and entropies, (N padded,)."""
        logprobs, entropy = self.new(self.padded).zero_(), self.new(self.padded).zero_()
        for rows, real, _, logits_cv, pad in self.chunks():
            _, logprobs_C, entropy_C = self.body(logits_cv, logits_cv, pad)
            logprobs[rows], entropy[rows] = logprobs_C[:real], entropy_C[:real]
        return logprobs, entropy

    @torch.no_grad()
    def gradients(self, objective, aux, needs, weight_grad=None):
        """needs: whether hidden states, and weight, want a gradient; weight_grad: to add the
        weight's to. Returns: loss, log-probs, entropies, (gradients)."""
        D = self.hidden_ND.shape[1]
        logprobs, entropy = self.new(self.padded).zero_(), self.new(self.padded).zero_()
        loss, dlogits_Cv = self.new(1).zero_()[0], None
        if self.narrow and any(needs):
            dlogits_Cv = self.new(self.rows, self.v, dtype=self.narrow)
        dhidden_ND = self.new(self.N, D, dtype=self.narrow) if needs[0] else None
        dweight_vD, beta = weight_grad, 1
        if needs[1] and weight_grad is None:
            dweight_vD, beta = self.new(self.v, D), 0  # the memory's old content counts for nothing
        for rows, real, hidden, logits_cv, pad in self.chunks():
            # Two views of one would be two inputs.
            dlogits_cv = logits_cv if dlogits_Cv is None else dlogits_Cv[: len(logits_cv)]
            chunk_loss, logprobs_C, entropy_C = self.body(
                logits_cv, dlogits_cv, pad, aux, objective
            )
            logprobs[rows], entropy[rows] = logprobs_C[:real], entropy_C[:real]
            loss += chunk_loss
            if needs[0]:
                torch.mm(dlogits_cv[:real], self.weight, out=dhidden_ND[rows])
            if needs[1]:
                parts = (dweight_vD, dlogits_cv.t(), hidden)
                torch.addmm(*parts, **self.to_fp32, beta=beta, out=dweight_vD)
                beta = 1
        dhidden_ND = dhidden_ND.to(self.hidden_ND.dtype) if needs[0] else None
        if weight_grad is not None or not needs[1]:
            dweight_vD = None
        else:
            dweight_vD = dweight_vD.to(self.weight_dtype)
        return loss, logprobs, entropy, (dhidden_ND, dweight_vD)


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known, forward; those times the upstream gradient, backward (once:
    in place)."""

    @staticmethod
    def forward(ctx, loss, hidden_ND, weight_vD, gradients, weight_grad_is_added):
        ctx.gradients, ctx.added = gradients, weight_grad_is_added
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        assert ctx.gradients is not None, (
            "a second backward through fused_head_loss: its gradients are used up"
        )
        # no reference stays, so autograd takes the memory, not a copy
        gradients, ctx.gradients = ctx.gradients, None
        if ctx.added:  # too late to scale that one
            torch._assert_async(
                upstream == 1, "fused_head_loss with weight_grad: scale its objective, not the loss"
            )
        if upstream.is_cuda or upstream != 1:  # on a CPU the comparison is free, on a GPU a sync
            gradients = tuple(
                None if g is None else g.mul_(upstream.to(g.dtype)) for g in gradients
            )
        return None, *gradients, None, None


def fused_head_loss(
    hidden_ND,
    weight_vD,
    targets_N,
    token_objective,
    aux=(),
    temperature: float = 1.0,
    chunk_tokens: int = 0,
    compiled: bool = True,
    tp_group=None,
    weight_grad=None,
):
    """The loss of the tokens, its gradients with it, and their log-probs, in one pass over the
    vocabulary.

    token_objective(logprobs_C, *aux_C): each token's loss, or their sum, from that token's own
    numbers; `aux` are its tensors, and on padding they are 0 (so must be a sum). A loss of whole
    sequences is one of `token_logprobs`. chunk_tokens: rows of logits alive at a time; 0: as
    `chunk_rows` has it. tp_group: the vocabulary is sharded over it in rank order, equal parts;
    weight_vD is this rank's, everything else the same on all ranks. The gradient of the hidden
    states is then this rank's words' share of it: the model adds the shares up where it gathers
    tokens. weight_grad (v, D), fp32: the weight's gradient is added to it at once, and autograd
    passes none on; the loss must then be differentiated as it is, with no factor. For a main
    gradient, or weight.grad of a leaf, tied or not.

    Shapes: hidden_ND (N, D), weight_vD (v, D) of the same dtype, targets_N (N,) -> loss (0-D, with
    gradient to hidden states and weight), logprobs and entropy as `token_logprobs` returns them,
    without gradient.
    """
    head = _Head(hidden_ND, weight_vD, targets_N, temperature, chunk_tokens, compiled, tp_group)
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (hidden_ND, weight_vD)]
    tensors = tuple(x.detach() for x in aux)
    loss, *results, gradients = head.gradients(token_objective, tensors, needs, weight_grad)
    added = weight_grad is not None and needs[1]
    return _WithGradients.apply(loss, hidden_ND, weight_vD, gradients, added), *results


class _TokenLogprobs(torch.autograd.Function):
    """Log-probs forward, keeping no logits; backward makes them again, with the coefficients that
    came from above: the two-pass mode, 8*D*V FLOPs a token."""

    @staticmethod
    def forward(ctx, *head):
        ctx.save_for_backward(*head[:3])
        ctx.rest = head[3:]
        logprobs, entropy = _Head(*head).logprobs()
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, coef, _):
        head = (*ctx.saved_tensors, *ctx.rest)
        needs = ctx.needs_input_grad[:2]
        *_, gradients = _Head(*head).gradients(torch.mul, (coef.contiguous(),), needs)
        return *gradients, *(None for _ in head[2:])


def token_logprobs(
    hidden_ND, weight_vD, targets_N, temperature, chunk_tokens, compiled, tp_group=None
):
    """log pi of each target token, and the entropy of each distribution, with one chunk of logits
    alive at a time.

    Differentiable in the log-probs, for losses that need them all before their gradient is known;
    under no_grad nothing is kept. The results are padded to whole chunks (mask them), which spares
    the callers reshapes.

    Shapes: hidden_ND (N, D), weight_vD (v, D), targets_N (N,) -> logprobs, entropy: (N padded to
    chunks,) fp32. Units: nats, at the sampling temperature.
    """
    return _TokenLogprobs.apply(
        hidden_ND, weight_vD, targets_N, temperature, chunk_tokens, compiled, tp_group
    )


# ---- attention over packed sequences -------------------------------------------------------------
def _sequences(cu_seqlens: list[int]):
    """The packed sequences by length, (rows, length): equal ones share a kernel call, exact and
    without padding, and a batch of short RL samples has few distinct lengths. A single one is a
    slice, which copies nothing."""
    by_length: dict[int, list[int]] = {}
    for start, end in itertools.pairwise(cu_seqlens):
        by_length.setdefault(end - start, []).append(start)
    for length, starts in by_length.items():
        rows = slice(starts[0], starts[0] + length)
        if len(starts) > 1:
            rows = (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()
        yield rows, length


# On a CPU: torch's varlen kernel does not exist there and flex_attention has no backward, but the
# flash kernel behind SDPA does. As custom ops, since torch.compile cannot look into a loop over
# lengths that are data.
def _lse_like(q_THC):
    """The kernel's log-sum-exp is at least fp32."""
    return q_THC.new_empty(q_THC.shape[:2], dtype=torch.promote_types(q_THC.dtype, torch.float32))


@torch.library.custom_op("cispo::attend_cpu", mutates_args=())
def attend_cpu(
    q_THC: torch.Tensor, k_THC: torch.Tensor, v_THC: torch.Tensor, cu: torch.Tensor
) -> list[torch.Tensor]:
    out, lse = torch.empty_like(q_THC), _lse_like(q_THC)
    for rows, length in _sequences(cu.tolist()):
        q, k, v = (
            x[rows].unflatten(0, (-1, length)).transpose(1, 2) for x in (q_THC, k_THC, v_THC)
        )
        o, s = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        out[rows], lse[rows] = o.transpose(1, 2).flatten(0, 1), s.transpose(1, 2).flatten(0, 1)
    return [out, lse]


@torch.library.custom_op("cispo::attend_cpu_backward", mutates_args=())
def attend_cpu_backward(
    grad: torch.Tensor, saved: list[torch.Tensor], cu: torch.Tensor
) -> list[torch.Tensor]:
    grads = [torch.empty_like(grad) for _ in range(3)]
    for rows, length in _sequences(cu.tolist()):
        g, q, k, v, o, s = (
            x[rows].unflatten(0, (-1, length)).transpose(1, 2) for x in (grad, *saved)
        )
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, o, s, 0.0, True
        )
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
    """Causal attention inside each packed sequence. Shapes: q (T, h, C), k and v (T, g, C) -> (T,
    h, C)."""
    # torch 2.11's kernel has no GQA argument: repeat the kv heads
    groups = q_ThC.shape[1] // k_TgC.shape[1]
    k_ThC, v_ThC = (x.repeat_interleave(groups, dim=1) for x in (k_TgC, v_TgC))
    if q_ThC.is_cuda:
        return varlen_attn(
            q_ThC, k_ThC, v_ThC, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0)
        )
    return attend_cpu(q_ThC, k_ThC, v_ThC, cu_seqlens)[0]


# ---- one GEMM per expert -------------------------------------------------------------------------
# One GEMM per expert over rows sorted by expert. torch's grouped_mm is that on a GPU, in bf16; its
# CPU version is this loop, but takes no fp64, and compiles in bf16 only. Hence a custom op around
# the two.
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
    """x^T @ g of each expert's rows, (e, A, B): the weight gradient. Zero for an expert without
    rows."""
    if x_NA.is_cuda and x_NA.dtype == torch.bfloat16:
        return F.grouped_mm(x_NA.t(), g_NB, offs=counts_e.cumsum(0).to(torch.int32))
    out = x_NA.new_empty(len(counts_e), x_NA.shape[1], g_NB.shape[1])
    for x, g, w in zip(x_NA.split(counts_e.tolist()), g_NB.split(counts_e.tolist()), out):
        torch.mm(x.t(), g, out=w)
    return out


grouped_mm.register_fake(lambda x, w, counts: x.new_empty(x.shape[0], w.shape[2]))
grouped_outer.register_fake(
    lambda x, g, counts: x.new_empty(counts.shape[0], x.shape[1], g.shape[1])
)


def _grouped_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _grouped_backward(ctx, grad_NB):
    x_NA, w_eAB, counts_e = ctx.saved_tensors
    grad_NB = grad_NB.contiguous()
    dx_NA = (
        grouped_mm(grad_NB, w_eAB.transpose(1, 2), counts_e) if ctx.needs_input_grad[0] else None
    )
    # As (e, B, A) transposed: the layout of the parameter, which is a transposed w.
    dw_eAB = (
        grouped_outer(grad_NB, x_NA, counts_e).transpose(1, 2) if ctx.needs_input_grad[1] else None
    )
    return dx_NA, dw_eAB, None


grouped_mm.register_autograd(_grouped_backward, setup_context=_grouped_setup)


# ---- moving rows ---------------------------------------------------------------------------------
class _CopyRows(torch.autograd.Function):
    """Row n of the result is row order_N[n] // K of x forward; backward each row of x adds up its K
    copies' gradients, found by the inverse order: a gather, where autograd's own would be atomic
    additions, in an order of their own."""

    @staticmethod
    def forward(ctx, x_tD, order_N, inverse_N, K):
        ctx.K = K
        ctx.save_for_backward(inverse_N)
        return x_tD[order_N // K]

    @staticmethod
    def backward(ctx, grad_ND):
        return grad_ND[ctx.saved_tensors[0]].unflatten(0, (-1, ctx.K)).sum(1), None, None, None


copy_rows = _CopyRows.apply
