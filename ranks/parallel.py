"""Which rank holds what, and everything the ranks say to each other.

The grid, for 16 ranks with tp = 2, ep = 4 (so dp = 8); rank = dp_rank * tp + tp_rank:

    rank       0  1   2  3   4  5   6  7   8  9  10 11  12 13  14 15
    tp_group  [0  1] [2  3] [4  5] [6  7] [8  9] ...                    a row of tokens, in slices
    ep_group  [0  1   2  3] [4  5   6  7] [8  9  10 11] [12 13 14 15]   all experts once
    dp_group   0 2 4 6 8 10 12 14 and 1 3 5 ... 15                      the same slice of a matrix
    replicas of an expert: 0 4 8 12 and 1 5 9 13 and ...                the same experts

Tokens are sharded over all ranks: over dp by sequence, inside a tp group by position (sequence
parallelism). So one rule covers every parameter: its gradient is the SUM over the ranks that hold
the same slice of it (`Split.replicas`), and AdamW's state is sharded over those same ranks
(ZeRO-1). Losses are divided by global counts beforehand; nothing is ever averaged. A group of one
rank is None, and its collectives are the identity.

Bytes that a rank sends, with b bytes per value and n ranks in the group:
    a layer, forward: attention (tp)  all-gather, reduce-scatter of (T, D) 2 * (n-1)/n * T*D*b
                      MoE (ep)        dispatch, combine of T/tp * d rows   2 * (n-1)/n * T/tp*d*D*b
    (d ranks of the group have any of a token's K experts: plan.ranks_of_a_token);
    backward the same, and once more forward with activation recompute;
    an update:         reduce-scatter of the gradients, all-gather of the parameters (replicas)

Sources: Megatron-LM arXiv:1909.08053, sequence parallelism arXiv:2205.05198, ZeRO arXiv:1910.02054.
"""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol


# ---- who is where --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Mesh:
    """This process's place in the grid. The default is a process alone, which needs no process
    group."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tp: int = 1
    ep: int = 1
    world_group: dist.ProcessGroup | None = None
    tp_group: dist.ProcessGroup | None = None
    ep_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None
    expert_group: dist.ProcessGroup | None = None  # ranks with the same experts
    # ranks with the same kv heads, where tp > kv heads; else dp_group
    kv_group: dist.ProcessGroup | None = None

    @property
    def dp(self) -> int:
        return self.world_size // self.tp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp

    @property
    def ep_rank(self) -> int:
        return self.rank % self.ep


@dataclass(frozen=True)
class Split:
    """Which slice of a whole tensor a parameter is: part `index` of `count` equal ones along
    `dim`."""

    dim: int
    index: int
    count: int
    replicas: dist.ProcessGroup | None  # the ranks with the very same slice

    def of(self, shape) -> tuple[slice, ...]:
        """The slice, of a whole tensor of this shape."""
        size = shape[self.dim] // self.count
        return (slice(None),) * self.dim + (slice(self.index * size, (self.index + 1) * size),)


def join_ranks(timeout_s: float) -> None:
    """Join the process group that torchrun describes; without torchrun, a group of one.

    timeout_s bounds every collective: a rank that dies must become an error of the others, not a
    hang.
    """
    rank, world_size, store = (
        int(os.environ.get("RANK", 0)),
        int(os.environ.get("WORLD_SIZE", 1)),
        dist.HashStore(),
    )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "MASTER_ADDR" in os.environ:
        # torchrun's store outlives the ranks that it starts again; without a prefix they would find
        # the addresses of the dead ones in it.
        store, _, _ = next(dist.rendezvous("env://", rank, world_size))
        store = dist.PrefixStore(
            f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
        )
    how = {"backend": "gloo", "timeout": timedelta(seconds=timeout_s)}
    if torch.cuda.is_available():
        # Without a device NCCL guesses one by the rank, and may take memory of a GPU that is not
        # this rank's: vLLM's, where a node has more GPUs than ranks.
        device = torch.device("cuda", torch.cuda.current_device())
        how |= {"backend": "nccl", "device_id": device}
    dist.init_process_group(store=store, rank=rank, world_size=world_size, **how)


def make_mesh(tp: int, ep: int, kv_heads: int, timeout_s: float = 600.0) -> Mesh:
    """Lay the grid over the ranks that have joined; all of them must call. The degrees must divide
    what they cut (plan.check_layout)."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    all_ranks = range(world_size)

    def group(keys: list[int]):
        """Mine of the groups of ranks with equal keys; keys: one for each rank."""
        mine = None
        for key in sorted(set(keys)):
            ranks = [r for r in all_ranks if keys[r] == key]
            if len(ranks) == world_size > 1:
                mine = dist.group.WORLD
            elif len(ranks) > 1:
                made = dist.new_group(ranks, timeout=timedelta(seconds=timeout_s))
                mine = made if rank in ranks else mine
        return mine

    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    tp_rank = [r % tp for r in all_ranks]
    kv_head = [r % tp * kv_heads // tp for r in all_ranks]  # with fewer kv heads than tp ranks
    dp_group = group(tp_rank)
    return Mesh(
        rank,
        world_size,
        device,
        tp,
        ep,
        world_group=group([0 for _ in all_ranks]),
        tp_group=group([r // tp for r in all_ranks]),
        ep_group=group([r // ep for r in all_ranks]),
        dp_group=dp_group,
        expert_group=group([r % ep for r in all_ranks]),
        kv_group=group(kv_head) if tp > kv_heads else dp_group,
    )


# ---- collectives of the forward pass, and what they are backward ---------------------------------
def group_size(group) -> int:
    return 1 if group is None else dist.get_world_size(group)


# The functional form, whose result is new: torch 2.11 compiles the in-place form in a backward pass
# to wrong gradients, silently (found by tests/test_parallel.py's comparison with eager; 2.13 is
# right with both). The first names are 2.13's, where the others warn.
_all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
_reduce_scatter = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor


def _gathered(x, group):
    return funcol.wait_tensor(_all_gather(x.contiguous(), 0, group))


def _begin_reduce_scatter(x, group):
    """funcol.wait_tensor of the result waits."""
    return _reduce_scatter(x.contiguous(), "sum", 0, group)


def _reduce_scattered(x, group):
    return funcol.wait_tensor(_begin_reduce_scatter(x, group))


def _exchanged(x, receive, send, group):
    return funcol.wait_tensor(funcol.all_to_all_single(x.contiguous(), receive, send, group))


@torch.library.custom_op("cispo::unread", mutates_args=())
def unread(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """In place of what would be computed from x where only the gradient is wanted: memory as it was
    found. An op of its own, as the compiler would otherwise see that the result needs no x, take
    x for a part of the backward pass, and compute some of it in both."""
    return x.new_empty(rows, columns)


unread.register_fake(lambda x, rows, columns: x.new_empty(rows, columns))


class _AllGather(torch.autograd.Function):
    """All-gather forward, reduce-scatter backward."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx, grad):
        return _reduce_scattered(grad, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    """Reduce-scatter forward, all-gather backward."""

    @staticmethod
    def forward(ctx, x, group, is_read):
        ctx.group = group
        if not is_read:
            return unread(x, len(x) // group_size(group), x.shape[1])
        return _reduce_scattered(x, group)

    @staticmethod
    def backward(ctx, grad):
        return _gathered(grad, ctx.group), None, None


class _AllToAll(torch.autograd.Function):
    """Rows to their ranks forward, their gradients back again backward."""

    @staticmethod
    def forward(ctx, x, receive, send, group, is_read):
        ctx.receive, ctx.send, ctx.group = receive, send, group
        if not is_read:
            return unread(x, sum(receive), x.shape[1])
        return _exchanged(x, receive, send, group)

    @staticmethod
    def backward(ctx, grad):
        return _exchanged(grad, ctx.send, ctx.receive, ctx.group), None, None, None, None


def all_gather(x_t, group):
    """(t, ...) of every rank -> (T, ...), in rank order."""
    return x_t if group is None else _AllGather.apply(x_t, group)


def reduce_scatter(x_TD, group, is_read: bool = True):
    """Each rank's partial sums (T, D) -> this rank's rows of their sum (t, D). Not read: only its
    gradient is wanted, and nothing is sent."""
    return x_TD if group is None else _ReduceScatter.apply(x_TD, group, is_read)


def all_to_all(x_ND, receive: list[int], send: list[int], group, is_read: bool = True):
    """The first send[0] rows go to rank 0, the next send[1] to rank 1, ...; receive[i] rows come
    from rank i. Not read: only its gradient is wanted, and nothing is sent."""
    return x_ND if group is None else _AllToAll.apply(x_ND, receive, send, group, is_read)


def exchange_counts(counts_E, group):
    """Rows per expert, mine for all -> everyone's for mine, (ranks * e,), by rank. Without
    gradient."""
    if group is None:
        return counts_E
    return funcol.wait_tensor(funcol.all_to_all_single(counts_E, None, None, group))


# ---- messages of the training loop ---------------------------------------------------------------
def broadcast_bytes(data: bytes | None, mesh: Mesh) -> bytes:
    """Rank 0's bytes on every rank (the others pass None). A safetensors blob travels so: no
    pickle."""
    if mesh.world_group is None:
        return data
    size = torch.tensor([len(data) if data is not None else 0], device=mesh.device)
    dist.broadcast(size, 0)
    buffer = torch.empty(int(size), dtype=torch.uint8, device=mesh.device)
    if data is not None:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(buffer, 0)
    return data if data is not None else buffer.cpu().numpy().tobytes()


def all_reduce(x: torch.Tensor, group, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """The sum (or op) over the group's ranks, in place."""
    if group is not None:
        dist.all_reduce(x, op, group=group)
    return x


class Reduction(NamedTuple):
    """How the parts of a metric become one: two of them, those of all ranks, and none."""

    combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    op: dist.ReduceOp
    nothing: float


SUM = Reduction(torch.add, dist.ReduceOp.SUM, 0.0)
REDUCTIONS = {  # by the ending of a metric's name; all others are added up
    "_min": Reduction(torch.minimum, dist.ReduceOp.MIN, math.inf),
    "_max": Reduction(torch.maximum, dist.ReduceOp.MAX, -math.inf),
}


def reduction_of(name: str) -> Reduction:
    return REDUCTIONS.get(name[-4:], SUM)


def merge(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Two sets of partial metrics as one."""
    if not (a and b):
        return {**a, **b}
    return {name: reduction_of(name).combine(a[name], b[name]) for name in b}


def reduce_metrics(metrics: dict[str, torch.Tensor], group) -> dict[str, torch.Tensor]:
    """Partial metrics of all ranks as one, in one collective for each reduction."""
    reduced = {}
    for reduction in (*REDUCTIONS.values(), SUM):
        names = [name for name in metrics if reduction_of(name) is reduction]
        if names:
            flat = torch.cat([metrics[name].double().flatten() for name in names])
            packed = all_reduce(flat, group, reduction.op)
            parts = packed.split([metrics[name].numel() for name in names])
            reduced |= {name: x.view(metrics[name].shape) for name, x in zip(names, parts)}
    return reduced


# ---- the optimizer -------------------------------------------------------------------------------
# With as many a bucket is full: enough that a collective is not all latency, and few enough that
# most of the model's gradients are on their way before the backward pass ends.
BUCKET_ELEMENTS = 1 << 24
# So many buckets' gradients may be on their way before one is waited for and given up: two to three
# layers of a MoE model, whose backward pass takes several times as long as their way.
BUCKETS_UNDER_WAY = 8


class Bucket:
    """Parameters of one dtype with the same replicas, flat: values, gradients, and this rank's
    shard of both.

    The sum over the replicas begins as soon as the last micro-batch's backward pass has given every
    gradient, and the new values are gathered while the next forward pass runs up to them
    (`await_values`). The gradients have memory from the first one until they are summed: in an
    update of one micro-batch they are never all there.

    under_way: the optimizer's buckets that are being summed, the oldest first.
    """

    def __init__(self, named, group, grad_dtype, under_way):
        self.group, self.names = group, [name for name, _ in named]
        self.under_way = under_way
        self.params = params = [p for _, p in named]
        # ids of those whose last gradient is awaited; None: this backward pass is not the last
        self.missing: set[int] | None = None
        self.reduced = self.gathering = None  # collectives under way
        self.starts = torch.tensor([0, *(p.numel() for p in params)]).cumsum(0).tolist()
        ranks, me = group_size(group), 0 if group is None else dist.get_rank(group)
        self.shard_size = -(-self.starts[-1] // ranks)
        self.shard_start = me * self.shard_size
        # padded, so that all shards are of one size
        self.values = params[0].new_zeros(ranks * self.shard_size)
        self.grads = torch.empty_like(self.values, dtype=grad_dtype)
        for p, start in zip(params, self.starts):
            view = self.values[start : start + p.numel()].view_as(p)
            view.copy_(p.detach())
            p.data, p.main_grad = view, self.grads[start : start + p.numel()].view_as(p)
            p.bucket = self
            p.register_post_accumulate_grad_hook(self.receive)
        self.give_up_grads()
        master_dtype = torch.promote_types(self.values.dtype, torch.float32)
        self.master = torch.nn.Parameter(self.my_shard(self.values).to(master_dtype, copy=True))

    def my_shard(self, flat):
        return flat[self.shard_start : self.shard_start + self.shard_size]

    def pieces(self):
        """(parameter name, range in that parameter, range in the shard), both flat, of what lies in
        my shard."""
        for name, start, end in zip(self.names, self.starts, self.starts[1:]):
            low, high = max(start, self.shard_start), min(end, self.shard_start + self.shard_size)
            if low < high:
                yield (
                    name,
                    (low - start, high - start),
                    (low - self.shard_start, high - self.shard_start),
                )

    def give_up_grads(self) -> None:
        """With their memory; the next update's are new."""
        self.unset = {id(p) for p in self.params}
        self.grads.untyped_storage().resize_(0)

    def make_room(self, p) -> bool:
        """Memory for p's gradient. Returns whether it is p's first in this update."""
        size = self.grads.numel() * self.grads.element_size()
        if self.grads.untyped_storage().nbytes() < size:
            self.grads.untyped_storage().resize_(size)
            self.grads[self.starts[-1] :].zero_()  # the padding, which is in the norm
        first = id(p) in self.unset
        self.unset.discard(id(p))
        return first

    @torch.no_grad()
    def grad_so_far(self, p) -> torch.Tensor:
        """p.main_grad, to be added to."""
        return p.main_grad.zero_() if self.make_room(p) else p.main_grad

    @torch.no_grad()
    def receive(self, p) -> None:
        """As soon as autograd has a parameter's gradient, add it to the main gradient, whose dtype
        is our choice."""
        is_second = self.missing is not None and id(p) not in self.missing
        if is_second or self.reduced is not None or self.master.grad is not None:
            name = next(n for n, mine in zip(self.names, self.params) if mine is p)
            raise RuntimeError(
                f"{name}: a second gradient in the last backward pass, when the sum over the ranks "
                "may have begun. Are its weights those of two blocks?"
            )
        if p.grad is not None:  # the fused head adds its own, and this is called all the same
            if self.make_room(p):  # two passes over memory less than zeros and a sum
                p.main_grad.copy_(p.grad)
            else:
                p.main_grad.add_(p.grad)
            p.grad = None
        if self.missing is None:
            return
        self.missing.remove(id(p))
        if not self.missing:
            self.begin_reducing()

    def begin_reducing(self) -> None:
        for p in self.params:
            self.grad_so_far(p)  # zeros where none came
        self.missing = None
        if self.group is None:
            self.reduced = self.grads
            return
        self.reduced = _begin_reduce_scatter(self.grads, self.group)
        self.under_way.append(self)
        if len(self.under_way) > BUCKETS_UNDER_WAY:
            self.under_way[0].end_reducing()

    def end_reducing(self) -> None:
        """master.grad becomes my shard of the SUM over the replicas."""
        grad, self.reduced = self.reduced, None
        if self.group is not None:
            self.under_way.remove(self)
            grad = funcol.wait_tensor(grad)
        self.master.grad = shard = grad.to(self.master.dtype)
        if shard is not self.grads:  # else `step` gives them up
            self.give_up_grads()

    def reduce_grads(self) -> None:
        """SUM over the replicas, what is left of it."""
        if self.master.grad is None:
            if self.reduced is None:
                self.begin_reducing()
            self.end_reducing()

    def gather_values(self) -> None:
        """Everyone's shards of the new values, back into the parameters; `await_values` waits."""
        mine = self.master.detach().to(self.values.dtype)
        if self.group is None:
            self.values.copy_(mine)
        else:
            # 2.13's name
            all_gather_into = (
                getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            )
            work = all_gather_into(self.values, mine, group=self.group, async_op=True)
            self.gathering = work, mine  # which must live until then


def await_values(params: Iterable[torch.nn.Parameter]) -> None:
    """Until these parameters hold their last update. On a GPU it is the stream that waits."""
    for p in params:
        bucket = getattr(p, "bucket", None)
        if bucket is not None and bucket.gathering is not None:
            bucket.gathering[0].wait()
            bucket.gathering = None


class ShardedAdamW(torch.optim.AdamW):
    """AdamW whose fp32 weights and moments, 12 bytes per parameter, are sharded over the
    parameter's replicas.

    `backward` adds to `p.main_grad`; `step` sums those over the replicas, clips by the norm of the
    whole model's gradient, updates, and begins to gather the parameters: whoever reads them without
    a forward pass calls `model.await_values()` first. `expect_last` lets the sums begin during the
    last backward pass.

    Every element of the model lies in exactly one rank's shard, so the norm needs no correction for
    what is replicated. A gradient that is not finite changes nothing: its norm is the same on all
    ranks, so all skip it, and with finite gradients, clipped, weights and moments stay finite.
    """

    def __init__(self, model, max_grad_norm: float, grad_dtype=torch.float32, **adamw):
        self.mesh, self.max_grad_norm = model.mesh, max_grad_norm
        found: list[tuple] = []  # ((replicas, dtype), parameters), in the order of their last one
        filling: dict[tuple, list] = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                key = (model.split_of(name).replicas, p.dtype)
                filling.setdefault(key, []).append((name, p))
                if sum(p.numel() for _, p in filling[key]) >= BUCKET_ELEMENTS:
                    found.append((key, filling.pop(key)))
        under_way: list[Bucket] = []
        self.buckets = [
            Bucket(
                members,
                group,
                torch.promote_types(grad_dtype, dtype) if dtype == torch.float64 else grad_dtype,
                under_way,
            )
            for (group, dtype), members in (*found, *filling.items())
        ]
        super().__init__([bucket.master for bucket in self.buckets], fused=True, **adamw)

    def expect_last(self) -> None:
        """The next backward pass is the last before `step`."""
        for bucket in self.buckets:
            bucket.missing = {id(p) for p in bucket.params}

    def zero_grad(self) -> None:
        for bucket in self.buckets:
            bucket.give_up_grads()

    def grad_so_far(self, p) -> torch.Tensor:
        """p.main_grad, for those who add to it themselves."""
        return p.bucket.grad_so_far(p)

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """One update, unless its gradient is not finite. Returns the gradient's norm before
        clipping, 0-D. It does not wait for the device."""
        for bucket in self.buckets:
            bucket.reduce_grads()
        # In pieces: the sum of squares of 10^9 values taken in one go loses digits in fp32.
        pieces = [piece for bucket in self.buckets for piece in bucket.master.grad.split(1 << 18)]
        norm = torch.nn.utils.get_total_norm(pieces).double()
        del pieces  # views, which would hold the gradients until the end of the step: its peak
        norm = all_reduce(norm.square(), self.mesh.world_group).sqrt()
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for bucket in self.buckets:
            bucket.master.grad.mul_(scale.to(bucket.master.dtype))
        # the fused kernel's own way to skip, made for GradScaler
        self.found_inf = 1.0 - norm.isfinite().float()
        super().step()
        for bucket in self.buckets:
            bucket.master.grad = None
            bucket.give_up_grads()
            bucket.gather_values()
        return norm
