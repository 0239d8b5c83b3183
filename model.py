"""Qwen3 and Qwen3-MoE, written out by hand: about 250 lines from token ids to hidden states.

A batch is one packed row: the sequences lie end to end in `tokens_T`, and `cu_seqlens` (length sequences+1,
starting at 0) says where each begins. No padding token enters any GEMM and no token attends across a boundary.

The modules are named so that `named_parameters()` gives the Hugging Face names, with one exception: the experts
of a layer are stacked in one tensor per projection, since one grouped GEMM then serves them all. `hf_tensors()`
gives the names and shapes of the files on disk, where each expert has its own.

Shapes, for the whole repo (UPPER is the full size, lower is a rank's shard):
    B rows   T tokens in a row   D model dim    V vocab
    H query heads   G kv heads   C head dim     F expert hidden
    E experts   K experts per token   N = T*K copies   P prompts in a step   S samples per prompt

Source of the architecture: Qwen3 technical report (arXiv:2505.09388); RoPE arXiv:2104.09864, SwiGLU 2002.05202.
"""

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn


# ---- config --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ModelConfig:
    """What config.json says of the architecture. A dense Qwen3 is the special case num_experts = 0."""

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
            raise ValueError(f"architecture {arch!r} is not Qwen3ForCausalLM or Qwen3MoeForCausalLM")
        is_moe = arch in ("Qwen3MoeForCausalLM", "qwen3_moe")
        rope = hf.get("rope_parameters") or {}
        scaling = hf.get("rope_scaling") or rope
        sliding = hf.get("use_sliding_window", False) or "sliding_attention" in (hf.get("layer_types") or ())
        for key, wanted, found in [
            ("hidden_act", "silu", hf.get("hidden_act", "silu")),
            ("attention_bias", False, hf.get("attention_bias", False)),
            ("use_sliding_window", False, sliding),
            ("rope type", "default", scaling.get("rope_type", scaling.get("type", "default"))),
        ]:
            if found != wanted:
                raise ValueError(f"config.json: {key} = {found!r} is not supported, only {wanted!r}")
        known = {f.name: hf[f.name] for f in fields(ModelConfig) if hf.get(f.name) is not None}
        known["rope_theta"] = rope.get("rope_theta", hf.get("rope_theta"))
        # No defaults for what shapes the model: transformers' own differ between its versions and classes.
        for f in fields(ModelConfig):
            if known.get(f.name) is None and (f.default is MISSING or f.name == "rope_theta"):
                raise ValueError(f"config.json: {f.name} is missing")
        known["mlp_only_layers"] = tuple(hf.get("mlp_only_layers") or ())
        known["num_experts"] = hf.get("num_experts", hf.get("num_local_experts", 0)) if is_moe else 0
        return ModelConfig(**known)

    @staticmethod
    def from_dir(path: str | Path) -> "ModelConfig":
        return ModelConfig.from_hf(json.loads((Path(path) / "config.json").read_text()))

    def to_hf(self, eos_token_id: int) -> dict:
        """A config.json for vLLM and transformers, in the spelling that both read."""
        moe = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
               "decoder_sparse_step", "mlp_only_layers")  # fmt: skip
        hf = {f.name: getattr(self, f.name) for f in fields(self) if self.num_experts or f.name not in moe}
        name = "Qwen3MoeForCausalLM" if self.num_experts else "Qwen3ForCausalLM"
        kind = "qwen3_moe" if self.num_experts else "qwen3"
        return {"architectures": [name], "model_type": kind, "hidden_act": "silu", "eos_token_id": eos_token_id, **hf}


# ---- attention -----------------------------------------------------------------------------------------------
class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        # The mean is taken in fp32 and the product in the input's dtype: the order transformers and vLLM use.
        x32 = x.float()
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


def attend(q_THC, k_TGC, v_TGC, cu_seqlens, lengths: list[int]):
    """Causal attention inside each packed sequence. Shapes: q (T, H, C), k and v (T, G, C) -> (T, H, C).

    Half precision on CUDA takes torch's varlen kernel. Elsewhere (CPU has no such kernel, and flex_attention no
    backward there) sequences of equal length share one SDPA call: exact, no padding, and a batch of RL samples
    has few distinct lengths.
    """
    if q_THC.is_cuda and q_THC.dtype in (torch.bfloat16, torch.float16):
        groups = q_THC.shape[1] // k_TGC.shape[1]  # torch 2.11's kernel has no GQA argument: repeat the kv heads
        k_THC, v_THC = (x.repeat_interleave(groups, dim=1) for x in (k_TGC, v_TGC))
        return varlen_attn(q_THC, k_THC, v_THC, cu_seqlens, cu_seqlens, max(lengths), max(lengths), window_size=(-1, 0))
    starts = cu_seqlens[:-1]
    lengths_B = torch.tensor(lengths, device=q_THC.device)
    order, outputs = [], []
    for length in sorted(set(lengths)):
        rows = (starts[lengths_B == length][:, None] + torch.arange(length, device=starts.device)).flatten()
        q, k, v = (x[rows].unflatten(0, (-1, length)).transpose(1, 2) for x in (q_THC, k_TGC, v_TGC))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        order.append(rows)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.empty_like(q_THC).index_copy(0, torch.cat(order), torch.cat(outputs))


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        D, H, G, C = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.head_dim = C
        self.q_proj = nn.Linear(D, H * C, bias=False)  # (H*C, D)
        self.k_proj = nn.Linear(D, G * C, bias=False)  # (G*C, D)
        self.v_proj = nn.Linear(D, G * C, bias=False)  # (G*C, D)
        self.o_proj = nn.Linear(H * C, D, bias=False)  # (D, H*C)
        self.q_norm = RMSNorm(C, cfg.rms_norm_eps)  # per head: what Qwen3 added over Qwen2
        self.k_norm = RMSNorm(C, cfg.rms_norm_eps)

    def forward(self, x_TD, cos_TC, sin_TC, cu_seqlens, lengths):
        q_THC = self.q_norm(self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim)))
        k_TGC = self.k_norm(self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim)))
        v_TGC = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        q_THC, k_TGC = apply_rope(q_THC, cos_TC, sin_TC), apply_rope(k_TGC, cos_TC, sin_TC)
        return self.o_proj(attend(q_THC, k_TGC, v_TGC, cu_seqlens, lengths).flatten(1))


# ---- feed-forward --------------------------------------------------------------------------------------------
class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x_TD):
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Experts(nn.Module):
    """All experts of a layer: three grouped GEMMs over rows sorted by expert."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        E, F_, D = cfg.num_experts, cfg.moe_intermediate_size, cfg.hidden_size
        self.gate_proj = nn.Parameter(torch.empty(E, F_, D))  # (E, F, D)
        self.up_proj = nn.Parameter(torch.empty(E, F_, D))  # (E, F, D)
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))  # (E, D, F)

    def forward(self, x_ND, counts_E):
        """Rows of expert 0 first, then of expert 1, ...; counts_E rows each. (N, D) -> (N, D)."""
        ends_E = counts_E.cumsum(0).to(torch.int32)
        gate_NF = F.grouped_mm(x_ND, self.gate_proj.transpose(1, 2), offs=ends_E)
        up_NF = F.grouped_mm(x_ND, self.up_proj.transpose(1, 2), offs=ends_E)
        return F.grouped_mm(F.silu(gate_NF) * up_NF, self.down_proj.transpose(1, 2), offs=ends_E)


class MoE(nn.Module):
    """Router, then dispatch -> experts -> combine. With expert parallelism only dispatch and combine change."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.num_experts_per_tok, self.norm_topk_prob = cfg.num_experts_per_tok, cfg.norm_topk_prob
        self.gate = nn.Linear(cfg.hidden_size, cfg.num_experts, bias=False)  # (E, D): the router
        self.experts = Experts(cfg)

    def route(self, x_TD):
        """Each token's K experts and their weights: softmax over all experts in fp32, then top-k."""
        probs_TE = F.linear(x_TD, self.gate.weight).float().softmax(-1)
        weights_TK, ids_TK = probs_TE.topk(self.num_experts_per_tok, dim=-1)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return weights_TK.to(x_TD.dtype), ids_TK

    def forward(self, x_TD):
        weights_TK, ids_TK = self.route(x_TD)
        ids_N = ids_TK.flatten()
        order_N = ids_N.argsort(stable=True)  # dispatch: copies of tokens, sorted by expert
        counts_E = torch.bincount(ids_N, minlength=self.gate.weight.shape[0])
        tokens_N = order_N // self.num_experts_per_tok
        y_ND = self.experts(x_TD[tokens_N], counts_E)
        y_ND = y_ND * weights_TK.flatten()[order_N, None]  # combine: weigh, then add up each token's K copies
        return torch.zeros_like(x_TD).index_add(0, tokens_N, y_ND)


# ---- the model -----------------------------------------------------------------------------------------------
class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(cfg)
        self.mlp = MoE(cfg) if cfg.is_moe_layer(layer) else MLP(cfg)
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(self, x_TD, cos_TC, sin_TC, cu_seqlens, lengths):
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), cos_TC, sin_TC, cu_seqlens, lengths)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Qwen3MoE(nn.Module):
    """Token ids to final hidden states; the vocabulary projection belongs to the loss (loss.token_logprobs)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(cfg.vocab_size, cfg.hidden_size),  # (V, D)
            "layers": nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_hidden_layers)),
            "norm": RMSNorm(cfg.hidden_size, cfg.rms_norm_eps),
        })  # fmt: skip
        if not cfg.tie_word_embeddings:
            self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)  # (V, D)

    @property
    def head_weight(self) -> torch.Tensor:
        return self.model["embed_tokens"].weight if self.cfg.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens_T, cu_seqlens):
        """Shapes: tokens_T (T,) int64, cu_seqlens (sequences+1,) int32 -> hidden_TD (T, D)."""
        lengths = cu_seqlens.diff().tolist()  # sync: on CUDA, one per forward
        cos_TC, sin_TC = rope_tables(cu_seqlens, len(tokens_T), self.cfg.head_dim, self.cfg.rope_theta)
        x_TD = self.model["embed_tokens"](tokens_T)
        for layer in self.model["layers"]:
            x_TD = layer(x_TD, cos_TC, sin_TC, cu_seqlens, lengths)
        return self.model["norm"](x_TD)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None):
        """Fresh weights: normal with the config's initializer_range, norms at 1."""
        for p in self.parameters():
            if p.dim() > 1:
                p.normal_(0.0, self.cfg.initializer_range, generator=generator)
            else:
                p.fill_(1.0)

    def hf_tensors(self):
        """(name, tensor view) of everything in a Hugging Face checkpoint of this model, in layer order."""
        for name, p in self.named_parameters():
            if ".mlp.experts." not in name:
                yield name, p.detach()
                continue
            prefix, projection = name.rsplit(".", 1)
            for expert, weight in enumerate(p.detach()):
                yield f"{prefix}.{expert}.{projection}.weight", weight
