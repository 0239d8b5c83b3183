"""The operations of the model that no single call of torch covers on CPU and GPU alike: attention
over packed sequences and one GEMM per expert. On a GPU they are one kernel each; on a CPU they are
loops over data, which torch.compile cannot look into, so they are custom ops with a gradient of
their own.

Shapes are those of model.py.
"""

import functools
import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import activate_flash_attention_impl

from ranks.parallel import all_reduce, unread


def at_least_fp32(x):
    """fp32 for half precision; fp64 stays, for the tests that compare layouts to 1e-10."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- log-probs of a large vocabulary -------------------------------------------------------------
# A chunk's logits are the largest tensor of the program, so they live once: one GEMM writes them,
# an elementwise body turns them into d loss / d logits where they lie, two GEMMs read that. Nothing
# is recomputed, since the loss of a token gives its gradient as soon as its log-prob is known: 3
# GEMMs, 6*D*V FLOPs a token, forward and backward.
# target of a padding row; with a sharded vocabulary -1 can be a word of another rank
IGNORED = -(2**31)


def chunk_rows(vocab_rows: int, many: bool) -> int:
    """Tokens whose fp32 logits fit the budget: a power of two from 16 to 4096, as batches are
    multiples of such. On a GPU each chunk reads the weight twice and its fp32 gradient once, and
    writes that: with 256 rows of Qwen3's vocabulary this takes longer than the GEMMs, with 2,048 it
    does not (BENCHMARKS.md). So `many` is for a compiled body on a GPU: an eager one has five
    copies of the logits, and on a CPU it is the cache that counts."""
    budget_bytes = 2**31 if many else 2**28
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


@functools.cache
def _compiled_head_body():
    """Made at the first call, as torch's compiler takes two seconds to import: a run that is
    refused and what never compiles need not wait for it."""
    return torch.compile(_head_body, fullgraph=True)


def _run_head_body(compiled, logits_Cv, dlogits_Cv, targets_C, aux, *rest):
    """The body, compiled once for any number of rows but one (a compiler takes 1 for a
    constant)."""
    if not compiled:
        return _head_body(logits_Cv, dlogits_Cv, targets_C, aux, *rest)
    for x in (logits_Cv, dlogits_Cv, targets_C, *aux):
        torch._dynamo.mark_dynamic(x, 0)
    return _compiled_head_body()(logits_Cv, dlogits_Cv, targets_C, aux, *rest)


class _Head:
    """The vocabulary head over some tokens, with one chunk of logits alive at a time.

    Its arguments are those of `token_logprobs`. `logprobs` and `gradients` are the two ways over
    all chunks.
    """

    def __init__(
        self, hidden_ND, weight_vD, targets_N, temperature, chunk_tokens, compiled, tp_group
    ):
        self.hidden_ND, self.N = hidden_ND, len(hidden_ND)
        self.v, many = len(weight_vD), hidden_ND.is_cuda and compiled
        self.C = chunk_tokens or chunk_rows(self.v, many)
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


# On a GPU this is one call of the flash kernel of torch.nn.attention.varlen, which takes fewer kv
# heads than query heads, and for which `activate_flash_attention_impl` can put another in its
# place. On a CPU torch's varlen kernel does not exist and flex_attention has no backward, but the
# flash kernel behind SDPA does. Custom ops, since torch.compile cannot look into a loop over
# lengths that are data; and so that the log-sum-exp is at hand, without which the output alone
# could not be kept for the backward pass.
@torch.library.custom_op("cispo::attention", mutates_args=())
def attention(
    q_ThC: torch.Tensor, k_TgC: torch.Tensor, v_TgC: torch.Tensor, cu: torch.Tensor, max_len: int
) -> list[torch.Tensor]:
    if q_ThC.is_cuda:
        lengths = (cu, cu, max_len, max_len)
        flash = torch.ops.aten._flash_attention_forward
        return list(flash(q_ThC, k_TgC, v_TgC, *lengths, 0.0, True, False)[:2])
    out, lse = _like_attention(q_ThC)
    for rows, length in _sequences(cu.tolist()):
        q, k, v = (
            x[rows].unflatten(0, (-1, length)).transpose(1, 2) for x in (q_ThC, k_TgC, v_TgC)
        )
        o, s = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        out[rows], lse[rows] = o.transpose(1, 2).flatten(0, 1), s.transpose(1, 2).flatten(0, 1)
    return [out, lse]


@torch.library.custom_op("cispo::attention_backward", mutates_args=())
def attention_backward(
    grad_ThC: torch.Tensor, saved: list[torch.Tensor], cu: torch.Tensor, max_len: int
) -> list[torch.Tensor]:
    if grad_ThC.is_cuda:
        random = torch.empty(2, dtype=torch.uint64, device=cu.device)  # of dropout: there is none
        lengths = (cu, cu, max_len, max_len)
        flash = torch.ops.aten._flash_attention_backward
        return list(flash(grad_ThC, *saved, *lengths, 0.0, True, random, random))
    grads = [torch.empty_like(x) for x in saved[:3]]
    for rows, length in _sequences(cu.tolist()):
        g, q, k, v, o, s = (
            x[rows].unflatten(0, (-1, length)).transpose(1, 2) for x in (grad_ThC, *saved)
        )
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, o, s, 0.0, True
        )
        for whole, part in zip(grads, parts):
            whole[rows] = part.transpose(1, 2).flatten(0, 1)
    return grads


def _like_attention(q_ThC):
    """Output and log-sum-exp, which is at least fp32: (T, h), and (h, T) of the CUDA kernel."""
    shape = q_ThC.shape[1::-1] if q_ThC.is_cuda else q_ThC.shape[:2]
    dtype = torch.promote_types(q_ThC.dtype, torch.float32)
    return [torch.empty_like(q_ThC), q_ThC.new_empty(shape, dtype=dtype)]


@attention.register_fake
def _(q_ThC, k_TgC, v_TgC, cu, max_len):
    return _like_attention(q_ThC)


@attention_backward.register_fake
def _(grad_ThC, saved, cu, max_len):
    return [torch.empty_like(x) for x in saved[:3]]


def _attention_setup(ctx, inputs, output):
    *qkv, cu, ctx.max_len = inputs
    ctx.save_for_backward(*qkv, *output, cu)


def _attention_gradients(ctx, grads):
    *saved, cu = ctx.saved_tensors
    return *attention_backward(grads[0].contiguous(), saved, cu, ctx.max_len), None, None


attention.register_autograd(_attention_gradients, setup_context=_attention_setup)


@torch.library.custom_op("cispo::attention_again", mutates_args=())
def attention_again(
    q_ThC: torch.Tensor,
    k_TgC: torch.Tensor,
    v_TgC: torch.Tensor,
    out_ThC: torch.Tensor,
    lse: torch.Tensor,
    cu: torch.Tensor,
    max_len: int,
) -> torch.Tensor:
    """`attention` of the same q, k and v, whose results are known: its gradient costs no second
    forward pass."""
    return out_ThC.clone()  # an op may not return its argument


@attention_again.register_fake
def _(q_ThC, k_TgC, v_TgC, out_ThC, lse, cu, max_len):
    return torch.empty_like(out_ThC)


def _again_setup(ctx, inputs, output):
    *saved, ctx.max_len = inputs
    ctx.save_for_backward(*saved)


def _again_gradients(ctx, grad_ThC):
    *saved, cu = ctx.saved_tensors
    found = attention_backward(grad_ThC.contiguous(), saved, cu, ctx.max_len)
    return *found, None, None, None, None


attention_again.register_autograd(_again_gradients, setup_context=_again_setup)


FLASH_PACKAGES = {"3": "flash_attn_interface", "4": "flash_attn.cute"}


def use_flash_attention(version: str) -> None:
    """The flash kernel of all later calls on a GPU. Raises: ValueError without its package."""
    if version == "2":  # torch's own
        return
    try:
        activate_flash_attention_impl(f"FA{version}")
    except (ImportError, RuntimeError, ValueError) as e:
        package, said = FLASH_PACKAGES[version], " ".join(str(e).split())[:200]
        raise ValueError(
            f"--flash-attention {version}: torch cannot use the package {package} ({said}); "
            "--flash-attention 2 is torch's own"
        ) from None


def attend(q_ThC, k_TgC, v_TgC, cu_seqlens, max_seqlen: int, kept=None):
    """Causal attention inside each packed sequence.

    Shapes: q (T, h, C), k and v (T, g, C), h a multiple of g -> (T, h, C), and what to give as
    `kept` when the same is computed again in a backward pass.
    """
    if kept is None:
        kept = attention(q_ThC, k_TgC, v_TgC, cu_seqlens, max_seqlen)
        return kept[0], kept
    return attention_again(q_ThC, k_TgC, v_TgC, *kept, cu_seqlens, max_seqlen), kept


# ---- one GEMM per expert -------------------------------------------------------------------------
# One GEMM per expert over rows sorted by expert. torch's grouped_mm is that on a GPU, in bf16; its
# CPU version is this loop, but takes no fp64, and compiles in bf16 only. Hence a custom op around
# the two. ends_e: where each expert's rows end, int32; expert 0's come first.
def _sizes(ends_e) -> list[int]:
    ends = ends_e.tolist()
    return [end - start for start, end in zip([0, *ends], ends)]


@torch.library.custom_op("cispo::grouped_mm", mutates_args=())
def grouped_mm(
    x_NA: torch.Tensor, w_eAB: torch.Tensor, ends_e: torch.Tensor, is_read: bool = True
) -> torch.Tensor:
    """y = x @ w[expert], of each row's expert. Not read: only its gradient is wanted."""
    if not is_read:
        return x_NA.new_empty(len(x_NA), w_eAB.shape[2])
    if x_NA.is_cuda and x_NA.dtype == torch.bfloat16:
        return F.grouped_mm(x_NA, w_eAB, offs=ends_e)
    out, sizes = x_NA.new_empty(len(x_NA), w_eAB.shape[2]), _sizes(ends_e)
    for x, w, y in zip(x_NA.split(sizes), w_eAB, out.split(sizes)):
        torch.mm(x, w, out=y)
    return out


@torch.library.custom_op("cispo::grouped_outer", mutates_args=())
def grouped_outer(x_NA: torch.Tensor, g_NB: torch.Tensor, ends_e: torch.Tensor) -> torch.Tensor:
    """x^T @ g of each expert's rows, (e, A, B): the weight gradient. Zero for an expert without
    rows."""
    if x_NA.is_cuda and x_NA.dtype == torch.bfloat16:
        return F.grouped_mm(x_NA.t(), g_NB, offs=ends_e)
    out, sizes = x_NA.new_empty(len(ends_e), x_NA.shape[1], g_NB.shape[1]), _sizes(ends_e)
    for x, g, w in zip(x_NA.split(sizes), g_NB.split(sizes), out):
        torch.mm(x.t(), g, out=w)
    return out


grouped_mm.register_fake(lambda x, w, ends, *_: x.new_empty(x.shape[0], w.shape[2]))
grouped_outer.register_fake(lambda x, g, ends: x.new_empty(ends.shape[0], x.shape[1], g.shape[1]))


def _grouped_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])


def _grouped_backward(ctx, grad_NB):
    x_NA, w_eAB, ends_e = ctx.saved_tensors
    grad_NB = grad_NB.contiguous()
    dx_NA = grouped_mm(grad_NB, w_eAB.transpose(1, 2), ends_e) if ctx.needs_input_grad[0] else None
    # As (e, B, A) transposed: the layout of the parameter, which is a transposed w.
    dw_eAB = (
        grouped_outer(grad_NB, x_NA, ends_e).transpose(1, 2) if ctx.needs_input_grad[1] else None
    )
    return dx_NA, dw_eAB, None, None


grouped_mm.register_autograd(_grouped_backward, setup_context=_grouped_setup)


# ---- the last GEMM of a dense MLP ----------------------------------------------------------------
class _UnreadLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TA, w_BA):
        ctx.save_for_backward(x_TA, w_BA)
        return unread(x_TA, len(x_TA), len(w_BA))

    @staticmethod
    def backward(ctx, grad_TB):
        x_TA, w_BA = ctx.saved_tensors
        return grad_TB @ w_BA, grad_TB.t() @ x_TA


def linear(x_TA, w_BA, is_read: bool):
    """x @ w^T. Not read: only its gradient is wanted."""
    return F.linear(x_TA, w_BA) if is_read else _UnreadLinear.apply(x_TA, w_BA)
