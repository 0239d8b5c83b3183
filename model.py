"""Qwen3 and Qwen3-MoE, written out by hand, from token ids to hidden states, on any grid of ranks
(parallel.Mesh).

A batch is one packed row: the sequences lie end to end in `tokens_T`, and `cu_seqlens` (length
sequences+1, starting at 0) says where each begins. No padding token enters any GEMM and no token
attends across a boundary.

A layer, on a rank of a tp group that holds t = T/tp of the row's tokens (sequence parallelism) and
e = E/ep experts:

    x_tD -> norm -> all-gather -> q, k, v of h heads -> attention -> o_proj's partial sums
         -> reduce-scatter -> + x_tD
    x_tD -> norm -> router -> dispatch: one row to each rank that has any of the K experts
         -> e experts, and their sum for each row -> combine: back, and its sum -> + x_tD
    a dense MLP instead:     all-gather -> gate, up, down on F/tp columns -> reduce-scatter

The modules are named so that `named_parameters()` gives the Hugging Face names, with one
exception: the experts of a layer are stacked in one tensor per projection, since one grouped GEMM
then serves them all. `hf_tensors()` gives the names and shapes of the files on disk, where each
expert has its own.

Shapes, for the whole repo (UPPER is the full size, lower is a rank's shard):
    B rows   T tokens in a row   D model dim    V vocab
    H query heads   G kv heads   C head dim     F expert hidden
    E experts   K experts per token   N = t*K copies   R rows received by dispatch   L MoE layers
    P prompts in a step   S samples per prompt
    t = T/tp, h = H/tp, g = G/tp, v = V/tp, f = F/tp of a dense MLP, e = E/ep

Source of the architecture: Qwen3 technical report (arXiv:2505.09388); RoPE arXiv:2104.09864,
SwiGLU 2002.05202.
"""

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ranks.experts import run_here, run_on_ranks
from ranks.ops import at_least_fp32, attend, grouped_mm, linear
from ranks.parallel import Mesh, Split, all_gather, all_reduce, await_values, reduce_scatter


# ---- config --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ModelConfig:
    """What config.json says of the architecture. A dense Qwen3 is the special case num_experts =
    0."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int  # of the dense MLPs
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False  # the file's default; Qwen3-30B-A3B sets true
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    @property
    def expert_dtype(self) -> torch.dtype:
        """The smallest that holds an expert's number: there are L * K of them for each token."""
        return torch.uint8 if self.num_experts <= 256 else torch.int16

    @property
    def moe_layers(self) -> list[int]:
        return [i for i in range(self.num_hidden_layers) if self.is_moe_layer(i)]

    def is_moe_layer(self, layer: int) -> bool:
        sparse_here = self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
        return sparse_here and layer not in self.mlp_only_layers

    @staticmethod
    def from_hf(hf: dict) -> "ModelConfig":
        """Read a config.json, in the older spelling (num_experts, rope_theta) or transformers v5's
        (num_local_experts, rope_parameters).

        Raises: ValueError for another architecture, or for a variant this file does not compute.
        """
        arch = (hf.get("architectures") or [hf.get("model_type")])[0]
        if arch not in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "qwen3", "qwen3_moe"):
            raise ValueError(
                f"architecture {arch!r} is not Qwen3ForCausalLM or Qwen3MoeForCausalLM"
            )
        if quantized := hf.get("quantization_config") or hf.get("compression_config"):
            method = (
                quantized.get("quant_method", "a") if isinstance(quantized, dict) else quantized
            )
            raise ValueError(
                f"config.json: quantization_config ({method}): quantized weights cannot be "
                "trained; name the checkpoint in bf16, fp16 or fp32"
            )
        is_moe = arch in ("Qwen3MoeForCausalLM", "qwen3_moe")
        rope = hf.get("rope_parameters") or {}
        scaling = hf.get("rope_scaling") or rope
        sliding = hf.get("use_sliding_window", False) or "sliding_attention" in (
            hf.get("layer_types") or ()
        )
        for key, wanted, found in [
            ("hidden_act", "silu", hf.get("hidden_act", "silu")),
            ("attention_bias", False, hf.get("attention_bias", False)),
            ("use_sliding_window", False, sliding),
            ("rope type", "default", scaling.get("rope_type", scaling.get("type", "default"))),
        ]:
            if found != wanted:
                raise ValueError(
                    f"config.json: {key} = {found!r} is not supported, only {wanted!r}"
                )
        known = {f.name: hf[f.name] for f in fields(ModelConfig) if hf.get(f.name) is not None}
        known["rope_theta"] = rope.get("rope_theta", hf.get("rope_theta"))
        # No defaults for what shapes the model: transformers' own differ between its versions and
        # classes.
        for f in fields(ModelConfig):
            if known.get(f.name) is None and (f.default is MISSING or f.name == "rope_theta"):
                raise ValueError(f"config.json: {f.name} is missing")
        known["mlp_only_layers"] = tuple(hf.get("mlp_only_layers") or ())
        known["num_experts"] = (
            hf.get("num_experts", hf.get("num_local_experts", 0)) if is_moe else 0
        )
        return ModelConfig(**known)

    @staticmethod
    def from_dir(path: str | Path) -> "ModelConfig":
        return ModelConfig.from_hf(json.loads((Path(path) / "config.json").read_text()))

    def on_meta(self, tp: int = 1, ep: int = 1) -> "Qwen3MoE":
        """Rank 0's part of the model on a grid of tp x ep ranks, without memory."""
        with torch.device("meta"):
            return Qwen3MoE(self, Mesh(world_size=tp * ep, tp=tp, ep=ep))

    def checkpoint_shapes(self) -> dict[str, torch.Size]:
        """The names and shapes of the Hugging Face checkpoint of the whole model."""
        return {name: tensor.shape for name, tensor in self.on_meta().hf_tensors()}

    @property
    def num_parameters(self) -> int:
        return sum(shape.numel() for shape in self.checkpoint_shapes().values())

    def to_hf(self, eos_token_id: int) -> dict:
        """A config.json for vLLM and transformers, in the spelling that both read."""
        moe = (
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "norm_topk_prob",
            "decoder_sparse_step",
            "mlp_only_layers",
        )
        hf = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if self.num_experts or f.name not in moe
        }
        name = "Qwen3MoeForCausalLM" if self.num_experts else "Qwen3ForCausalLM"
        kind = "qwen3_moe" if self.num_experts else "qwen3"
        return {
            "architectures": [name],
            "model_type": kind,
            "hidden_act": "silu",
            "eos_token_id": eos_token_id,
            **hf,
        }


# ---- attention -----------------------------------------------------------------------------------
class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        # The mean is taken in fp32 and the product in the input's dtype: the order transformers and
        # vLLM use.
        x32 = at_least_fp32(x)
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def rope_tables(cu_seqlens: torch.Tensor, num_tokens: int, head_dim: int, theta: float):
    """cos and sin (T, C) of every token's position in its own sequence, in fp32."""
    lengths = cu_seqlens.diff()
    starts_T = cu_seqlens[:-1].repeat_interleave(lengths, output_size=num_tokens)
    positions_T = torch.arange(num_tokens, device=cu_seqlens.device) - starts_T
    inv_freq = theta ** (-torch.arange(0, head_dim, 2, device=cu_seqlens.device).float() / head_dim)
    angles_TC = torch.outer(positions_T.float(), inv_freq).repeat(1, 2)
    return angles_TC.cos(), angles_TC.sin()


def apply_rope(x_THC, cos_TC, sin_TC):
    first, second = x_THC.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x_THC * cos_TC[:, None] + rotated * sin_TC[:, None]).to(x_THC.dtype)


class Attention(nn.Module):
    """Column-parallel q, k, v; row-parallel o. With tp > G, tp/G ranks hold the same kv head."""

    def __init__(self, cfg: ModelConfig, mesh: Mesh):
        super().__init__()
        D, C, self.tp_group = cfg.hidden_size, cfg.head_dim, mesh.tp_group
        h, g = cfg.num_attention_heads // mesh.tp, max(1, cfg.num_key_value_heads // mesh.tp)
        self.head_dim = C
        self.q_proj = nn.Linear(D, h * C, bias=False)  # (h*C, D)
        self.k_proj = nn.Linear(D, g * C, bias=False)  # (g*C, D)
        self.v_proj = nn.Linear(D, g * C, bias=False)  # (g*C, D)
        self.o_proj = nn.Linear(h * C, D, bias=False)  # (D, h*C)
        self.q_norm = RMSNorm(C, cfg.rms_norm_eps)  # per head: what Qwen3 added over Qwen2
        self.k_norm = RMSNorm(C, cfg.rms_norm_eps)

    def forward(self, x_tD, cos_TC, sin_TC, cu_seqlens, max_seqlen: int, kept=None):
        x_TD = all_gather(x_tD, self.tp_group)
        q_ThC = self.q_norm(self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim)))
        k_TgC = self.k_norm(self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim)))
        v_TgC = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        q_ThC, k_TgC = apply_rope(q_ThC, cos_TC, sin_TC), apply_rope(k_TgC, cos_TC, sin_TC)
        out_ThC, kept = attend(q_ThC, k_TgC, v_TgC, cu_seqlens, max_seqlen, kept)
        return reduce_scatter(self.o_proj(out_ThC.flatten(1)), self.tp_group), kept


# ---- feed-forward --------------------------------------------------------------------------------
class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), on F/tp of the hidden columns."""

    def __init__(self, cfg: ModelConfig, mesh: Mesh):
        super().__init__()
        D, f, self.tp_group = cfg.hidden_size, cfg.intermediate_size // mesh.tp, mesh.tp_group
        self.gate_proj = nn.Linear(D, f, bias=False)  # (f, D)
        self.up_proj = nn.Linear(D, f, bias=False)  # (f, D)
        self.down_proj = nn.Linear(f, D, bias=False)  # (D, f)

    def forward(self, x_tD, is_read: bool = True):
        x_TD = all_gather(x_tD, self.tp_group)
        act_Tf = F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD)
        y_TD = linear(act_Tf, self.down_proj.weight, is_read)
        return reduce_scatter(y_TD, self.tp_group, is_read)


class Experts(nn.Module):
    """This rank's experts of a layer, each row times its weight: two grouped GEMMs over rows sorted
    by expert. Gate and up are one tensor, gate's rows first: one GEMM for both, and one for what
    they pass back."""

    def __init__(self, cfg: ModelConfig, mesh: Mesh):
        super().__init__()
        e, F_, D = cfg.num_experts // mesh.ep, cfg.moe_intermediate_size, cfg.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * F_, D))  # (e, 2F, D)
        self.down_proj = nn.Parameter(torch.empty(e, D, F_))  # (e, D, F)

    def forward(self, x_RD, weights_R, counts_e, is_read: bool = True):
        ends_e = counts_e.cumsum(0).to(torch.int32)
        gate_up_R2F = grouped_mm(x_RD, self.gate_up_proj.transpose(1, 2), ends_e)
        gate_RF, up_RF = gate_up_R2F.chunk(2, dim=-1)
        act_RF = F.silu(gate_RF) * up_RF * weights_R[:, None]
        return grouped_mm(act_RF, self.down_proj.transpose(1, 2), ends_e, is_read)


class MoE(nn.Module):
    """Router, then dispatch -> experts -> combine."""

    def __init__(self, cfg: ModelConfig, mesh: Mesh):
        super().__init__()
        self.num_experts_per_tok, self.norm_topk_prob = cfg.num_experts_per_tok, cfg.norm_topk_prob
        self.ep, self.ep_group, self.id_dtype = mesh.ep, mesh.ep_group, cfg.expert_dtype
        self.gate = nn.Linear(cfg.hidden_size, cfg.num_experts, bias=False)  # (E, D): the router
        self.experts = Experts(cfg, mesh)

    def route(self, x_tD, given_ids_tK=None):
        """Each token's K experts and their weights: fp32 softmax over all experts, then top-k, or
        the given experts (router replay), whose weights come from the same softmax. Last, what
        top-k chooses in either case."""
        probs_tE = at_least_fp32(F.linear(x_tD, self.gate.weight)).softmax(-1)
        chosen_tK = probs_tE.topk(self.num_experts_per_tok, dim=-1).indices
        # by view, since K is a constant of the compiled code and the argument's shape is not
        ids_tK = chosen_tK if given_ids_tK is None else given_ids_tK.long().view(chosen_tK.shape)
        weights_tK = probs_tE.gather(-1, ids_tK)
        if self.norm_topk_prob:
            weights_tK = weights_tK / weights_tK.sum(-1, keepdim=True)
        return weights_tK.to(x_tD.dtype), ids_tK, chosen_tK

    def forward(self, x_tD, given_ids_tK=None, is_read: bool = True):
        weights_tK, ids_tK, chosen_tK = self.route(x_tD, given_ids_tK)
        ids_N = ids_tK.flatten()
        counts_E = ids_N.new_zeros(self.gate.weight.shape[0])
        counts_E = counts_E.scatter_add(0, ids_N, torch.ones_like(ids_N))
        routed = (self.experts, x_tD, weights_tK, ids_tK, counts_E, is_read)
        if self.ep == 1:
            y_tD = run_here(*routed)
        else:
            y_tD = run_on_ranks(*routed, self.ep, self.ep_group)
        return y_tD, chosen_tK.to(self.id_dtype)


# ---- the model -----------------------------------------------------------------------------------
class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int, mesh: Mesh):
        super().__init__()
        self.is_moe = cfg.is_moe_layer(layer)
        self.self_attn = Attention(cfg, mesh)
        self.mlp = MoE(cfg, mesh) if self.is_moe else MLP(cfg, mesh)
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(
        self, x_tD, cos_TC, sin_TC, cu_seqlens, max_seqlen: int, given_ids_tK=None, kept=None
    ):
        """kept: what an earlier call with the same arguments returned last. Then only the gradient
        is wanted, and the first result is not made."""
        is_read = kept is None
        y_tD, kept = self.self_attn(
            self.input_layernorm(x_tD), cos_TC, sin_TC, cu_seqlens, max_seqlen, kept
        )
        x_tD = x_tD + y_tD
        if not self.is_moe:
            return x_tD + self.mlp(self.post_attention_layernorm(x_tD), is_read), None, kept
        y_tD, chosen_tK = self.mlp(self.post_attention_layernorm(x_tD), given_ids_tK, is_read)
        return x_tD + y_tD, chosen_tK, kept


class _Recompute(torch.autograd.Function):
    """A block that keeps its input and its attention's output, and runs again in the backward pass.
    Attention is what costs the most there and the least to keep. torch.utils.checkpoint keeps an
    operation's output too, but only with the checkpoint inside of what is compiled."""

    @staticmethod
    def forward(ctx, layer, x_tD, *rest):
        # detached: a pass without gradients is this very graph
        y_tD, chosen_tK, kept = layer(x_tD.detach(), *rest)
        ctx.layer, ctx.rest = layer, rest
        ctx.save_for_backward(x_tD, *kept)
        if chosen_tK is not None:
            ctx.mark_non_differentiable(chosen_tK)
        return y_tD, chosen_tK

    @staticmethod
    def backward(ctx, grad_tD, _):
        x_tD, *kept = ctx.saved_tensors
        x_tD = x_tD.detach().requires_grad_()
        with torch.enable_grad():
            y_tD, *_ = ctx.layer(x_tD, *ctx.rest, kept)
        torch.autograd.backward(y_tD, grad_tD)  # the parameters' gradients go where they belong
        return None, x_tD.grad, *(None for _ in ctx.rest)


class Qwen3MoE(nn.Module):
    """Token ids to final hidden states; the vocabulary projection belongs to the loss
    (ops.token_logprobs).

    recompute: keep only each block's input and its attention's output, and run the rest of the
    block again in backward.
    """

    def __init__(self, cfg: ModelConfig, mesh: Mesh | None = None, recompute: bool = False):
        super().__init__()
        self.cfg, self.mesh, self.recompute = cfg, mesh or Mesh(), recompute
        v = cfg.vocab_size // self.mesh.tp
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(v, cfg.hidden_size),  # (v, D)
                "layers": nn.ModuleList(
                    Block(cfg, layer, self.mesh) for layer in range(cfg.num_hidden_layers)
                ),
                "norm": RMSNorm(cfg.hidden_size, cfg.rms_norm_eps),
            }
        )
        if not cfg.tie_word_embeddings:
            self.lm_head = nn.Linear(cfg.hidden_size, v, bias=False)  # (v, D)

    @property
    def head_weight(self) -> torch.Tensor:
        return (
            self.model["embed_tokens"].weight
            if self.cfg.tie_word_embeddings
            else self.lm_head.weight
        )

    def await_values(self) -> None:
        """Until the parameters hold the last update."""
        await_values(self.parameters())

    def compile_blocks(self) -> None:
        """torch.compile each block: one graph serves all blocks of a kind, and any number of
        tokens."""
        torch._dynamo.config.capture_scalar_outputs = True  # the all-to-all's row counts
        # A sum over K rows is one loop, not pieces with fp32 sums in between, which are not put
        # together again where the number of rows is data.
        one_loop = {"realize_acc_reads_threshold": 64, "realize_opcount_threshold": 300}
        one_loop["realize_reads_threshold"] = 8  # indices are computed where they are used
        for layer in self.model["layers"]:
            layer.compile(fullgraph=True, dynamic=True, options=one_loop)

    def embed(self, tokens_T):
        """Vocabulary-parallel: each rank looks up its own words, and the sum is this rank's tokens'
        rows."""
        weight_vD = self.model["embed_tokens"].weight
        ids_T = tokens_T - self.mesh.tp_rank * len(weight_vD)
        here_T = (ids_T >= 0) & (ids_T < len(weight_vD))
        x_TD = F.embedding(torch.where(here_T, ids_T, 0), weight_vD) * here_T[:, None]
        return reduce_scatter(x_TD, self.mesh.tp_group)

    def forward(self, tokens_T, cu_seqlens, max_seqlen: int, given_ids_LtK=None):
        """The row's final hidden states, whole on every rank of the tp group, and the experts that
        the routers would choose.

        The hidden states' gradient is this rank's share: the ranks' shares are added up on the way
        back. Shapes: tokens_T (T,) int64, T a multiple of tp; cu_seqlens (sequences+1,) int32;
        given_ids_LtK: experts to use instead, of the layers that have any -> hidden_TD (T, D) in
        the head's dtype, ids_LtK (L, t, K); both ids in `ModelConfig.expert_dtype`.
        """
        cos_TC, sin_TC = rope_tables(
            cu_seqlens, len(tokens_T), self.cfg.head_dim, self.cfg.rope_theta
        )
        norm, ids = self.model["norm"], []
        await_values(self.model["embed_tokens"].parameters())
        x_tD = self.embed(tokens_T).to(norm.weight.dtype)
        for layer in self.model["layers"]:
            given_ids_tK = (
                given_ids_LtK[len(ids)] if given_ids_LtK is not None and layer.is_moe else None
            )
            args = (x_tD, cos_TC, sin_TC, cu_seqlens, max_seqlen, given_ids_tK)
            await_values(layer.parameters())
            if self.recompute and torch.is_grad_enabled():
                if not x_tD.requires_grad:  # a frozen embedding: the block's weights may want some
                    args = (x_tD.detach().requires_grad_(), *args[1:])
                x_tD, ids_tK = _Recompute.apply(layer, *args)
            else:
                x_tD, ids_tK, _ = layer(*args)
            ids += [ids_tK] if layer.is_moe else []
        self.await_values()  # norm, and the head that comes next
        hidden_TD = all_gather(norm(x_tD), self.mesh.tp_group)
        return hidden_TD.to(self.head_weight.dtype), torch.stack(ids) if ids else None

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None):
        """Fresh weights: normal with the config's initializer_range, norms at 1, biases at 0."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() > 1:
                p.normal_(0.0, self.cfg.initializer_range, generator=generator)
            else:
                p.fill_(1.0)

    def split_of(self, name: str) -> Split:
        """What this rank holds of a parameter: the one table of what is sharded, how, and who has
        the same."""
        mesh, layer_kind = self.mesh, name.split(".")[-2]
        if ".experts." in name:
            return Split(0, mesh.ep_rank, mesh.ep, mesh.expert_group)
        if layer_kind in ("k_proj", "v_proj"):
            count = min(mesh.tp, self.cfg.num_key_value_heads)
            return Split(0, mesh.tp_rank * count // mesh.tp, count, mesh.kv_group)
        if layer_kind in ("q_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"):
            return Split(0, mesh.tp_rank, mesh.tp, mesh.dp_group)
        if layer_kind in ("o_proj", "down_proj"):
            if name.endswith(".bias") and mesh.tp > 1:
                raise ValueError(
                    f"{name}: with --tp {mesh.tp} each rank would add it to its partial sum; add "
                    "it on one, and give it a rule of its own in split_of"
                )
            if name.endswith(".bias"):
                return Split(0, 0, 1, mesh.world_group)
            return Split(1, mesh.tp_rank, mesh.tp, mesh.dp_group)
        # norms and router: they see this rank's tokens only, or its heads
        return Split(0, 0, 1, mesh.world_group)

    def hf_parts(self, name: str):
        """A parameter as parts of Hugging Face tensors: (HF name, this rank's view, which slice of
        the whole it is)."""
        p, split = self.get_parameter(name), self.split_of(name)
        await_values([p])
        p = p.detach()
        if ".experts." in name:  # an expert is a tensor of its own there, and whole on its rank
            for hf_name, expert in self.hf_views(name, p, first_expert=split.index * len(p)):
                yield hf_name, expert, Split(0, 0, 1, split.replicas)
        else:
            yield name, p, split

    def hf_tensors(self):
        """(name, tensor view) of what this rank holds of the model's Hugging Face checkpoint, in
        layer order."""
        for name, _ in self.named_parameters():
            yield from ((hf_name, tensor) for hf_name, tensor, _ in self.hf_parts(name))

    @staticmethod
    def hf_views(name: str, tensor: torch.Tensor, first_expert: int = 0):
        """A parameter's Hugging Face names and views: itself, or, for stacked experts, those of
        each expert; in the order in which they lie in memory."""
        if ".experts." not in name:
            yield name, tensor
            return
        prefix, projection = name.rsplit(".", 1)
        projections = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
        for expert, weight in enumerate(tensor, start=first_expert):
            for kind, part in zip(projections, weight.chunk(len(projections))):
                yield f"{prefix}.{expert}.{kind}.weight", part


# ---- how evenly the router spreads the tokens ----------------------------------------------------
def expert_stats(chosen_LtK, mb, num_tokens, model) -> dict[str, torch.Tensor]:
    """Of a micro-batch on this rank: the rows that it sent to each expert of each layer, (L, E),
    padding left out; and, where experts are replayed, the share of them that the routers would have
    chosen, of the tokens that predict a sampled one, over all num_tokens of the update.

    Shapes: chosen_LtK (L, t, K), the routers' choice. Both are sums; the second over the tp group.
    """
    used_LtK = chosen_LtK if mb.expert_ids is None else mb.expert_ids
    (L, t, _), first = chosen_LtK.shape, model.mesh.tp_rank * chosen_LtK.shape[1]
    mine = max(0, mb.num_tokens - first)  # the row's padding is at its end
    ids_LN = used_LtK[:, :mine].flatten(1).long()
    tokens_LE = ids_LN.new_zeros(L, model.cfg.num_experts)
    # on a GPU bincount would wait for the largest number
    stats = {"expert_tokens": tokens_LE.scatter_add_(1, ids_LN, torch.ones_like(ids_LN))}
    if mb.expert_ids is not None:
        at_N = mb.rows_N[mb.mask[: len(mb.rows_N)]] - first
        at_n = at_N[(at_N >= 0) & (at_N < t)]
        same_LnK = (used_LtK[:, at_n, :, None] == chosen_LtK[:, at_n, None, :]).any(-1)
        share = same_LnK.float().mean((0, 2)).sum() / num_tokens
        stats["router_agreement"] = all_reduce(share, model.mesh.tp_group)
    return stats


def expert_load(metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ "expert_tokens" (L, E), rows that each layer sent to each expert, as what one looks at: the
    busiest expert's share of an even one, layer by layer (1 is balanced, E / K is everything to the
    same experts), and the share of experts that got nothing."""
    if "expert_tokens" not in metrics:
        return metrics
    tokens_LE = metrics["expert_tokens"].double()
    rest = {name: value for name, value in metrics.items() if name != "expert_tokens"}
    busiest_L = tokens_LE.amax(1) / tokens_LE.mean(1).clamp(min=1e-9)  # no token at all: 0
    return {
        **rest,
        "moe_busiest_by_layer": busiest_L,
        "moe_busiest_max": busiest_L.max(),
        "moe_idle_share": (tokens_LE == 0).double().mean(),
    }


# ---- shapes that are known without a download ----------------------------------------------------
# As https://huggingface.co/Qwen/Qwen3-NAME/raw/main/config.json says, read on 2026-11-27 in copies
# of these files and tables of their values on GitHub. The shapes agree with torchtitan's
# models/qwen3/__init__.py (0310b49), the later RoPE bases with radixark/miles (scripts/models, pull
# request 327), the parameters with the model cards (tests/test_known_models.py). All have 151,936
# words, heads of 128 values and eps 1e-6; where there are experts, a token takes 8 of 128.
_SHAPES = {
    # layers, D, H, G, width of a dense MLP and of an expert (0: none), tied, positions, RoPE's base
    "0.6B": (28, 1024, 16, 8, 3072, 0, True, 40_960, 1e6),
    "1.7B": (28, 2048, 16, 8, 6144, 0, True, 40_960, 1e6),
    "4B": (36, 2560, 32, 8, 9728, 0, True, 40_960, 1e6),
    "8B": (36, 4096, 32, 8, 12_288, 0, False, 40_960, 1e6),
    "14B": (40, 5120, 40, 8, 17_408, 0, False, 40_960, 1e6),
    "32B": (64, 5120, 64, 8, 25_600, 0, False, 40_960, 1e6),
    "30B-A3B": (48, 2048, 32, 4, 6144, 768, False, 40_960, 1e6),
    "235B-A22B": (94, 4096, 64, 4, 12_288, 1536, False, 40_960, 1e6),
    "4B-2507": (36, 2560, 32, 8, 9728, 0, True, 262_144, 5e6),
    "30B-A3B-2507": (48, 2048, 32, 4, 6144, 768, False, 262_144, 1e7),
    "235B-A22B-2507": (94, 4096, 64, 4, 12_288, 1536, False, 262_144, 5e6),
    "Coder-30B-A3B-Instruct": (48, 2048, 32, 4, 5472, 768, False, 262_144, 1e7),
}


def _known(layers, D, H, G, dense, expert, tied, positions, theta) -> ModelConfig:
    experts = {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": expert,
        "norm_topk_prob": True,
    }
    return ModelConfig(
        vocab_size=151_936,
        hidden_size=D,
        num_hidden_layers=layers,
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=128,
        intermediate_size=dense,
        rope_theta=theta,
        tie_word_embeddings=tied,
        max_position_embeddings=positions,
        **(experts if expert else {}),
    )


KNOWN_MODELS = {
    f"Qwen/Qwen3-{name.replace('-2507', kind)}": _known(*shape)
    for name, shape in _SHAPES.items()
    for kind in (("-Instruct-2507", "-Thinking-2507") if "-2507" in name else ("",))
}
