"""The model against transformers, a per-token loop, and itself: fp32, CPU, eager, gradients
included.

Weights are drawn at std 0.3 with norm weights in 0.5..1.5: the default init (0.02, ones) hides
swapped norms, wrong scales and wrong head sizes behind a residual stream that is almost only the
embedding.
"""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge.weights import WeightsError, load_hf
from model import ModelConfig, MoE, Qwen3MoE, rope_tables
from ranks.parallel import Mesh
from tools.export import check

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def transformers():
    import transformers  # 7 s: only for the tests that need it

    return transformers


def config(**changes) -> ModelConfig:
    """A small config in which no two widths agree; fp32 grouped_mm wants every width in multiples
    of 4."""
    sizes = dict(
        vocab_size=52,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return ModelConfig(**{**sizes, "head_dim": 12, "intermediate_size": 40, **changes})


def moe_config(**changes) -> ModelConfig:
    experts = dict(
        num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20, norm_topk_prob=True
    )
    return config(**{**experts, **changes})


@torch.no_grad()
def randomize(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.normal_(0.0, 0.3, generator=g) if p.dim() > 1 else p.uniform_(0.5, 1.5, generator=g)
    return module


def pack(sequences):
    lengths = torch.tensor([0] + [len(s) for s in sequences])
    return torch.cat(sequences), lengths.cumsum(0).to(torch.int32)


def random_sequences(lengths, vocab_size=52, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=g) for n in lengths]


def assert_same(ours, theirs, name, tolerance=1e-5):
    """Largest difference relative to the largest value of the tensor: single small elements are all
    rounding."""
    assert ours.shape == theirs.shape, name
    error, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= tolerance * scale, f"{name}: off by {error:.2e} on a scale of {scale:.2e}"


# ---- against transformers ------------------------------------------------------------------------
PARITY = {
    "dense, untied": config(),
    "dense, tied": config(tie_word_embeddings=True, rope_theta=1e4),
    "dense, every head its own kv": config(num_key_value_heads=4, head_dim=16),
    "dense, one kv head, 3 layers": config(
        num_attention_heads=6, num_key_value_heads=1, num_hidden_layers=3
    ),
    "moe, untied": moe_config(),
    "moe, tied": moe_config(tie_word_embeddings=True, rms_norm_eps=1e-5),
    "moe, weights not renormalized": moe_config(
        norm_topk_prob=False, num_attention_heads=8, rope_theta=5e3
    ),
    "moe, top-1": moe_config(num_experts_per_tok=1, norm_topk_prob=False),
    "moe, all experts": moe_config(num_experts=4, num_experts_per_tok=4),
    "moe, a dense layer by name": moe_config(num_hidden_layers=3, mlp_only_layers=(1,)),
    "moe, every other layer": moe_config(
        num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=(3,)
    ),
}


def reference(transformers, cfg: ModelConfig, attention: str):
    fields = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    fields["mlp_only_layers"] = list(cfg.mlp_only_layers)
    kind = "Qwen3Moe" if cfg.num_experts else "Qwen3"
    # experts: a loop, not our GEMM
    plain = dict(attn_implementation=attention, experts_implementation="eager")
    hf_config = getattr(transformers, kind + "Config")(**fields, **plain)
    return getattr(transformers, kind + "ForCausalLM")(hf_config)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", PARITY)
def test_logits_and_every_gradient_match_transformers(case, attention, transformers, tmp_path):
    hf = randomize(reference(transformers, PARITY[case], attention))
    hf.save_pretrained(tmp_path / "weights")
    cfg = ModelConfig.from_dir(tmp_path / "weights")  # transformers' own spelling of the config
    assert dataclasses.replace(cfg, initializer_range=0.02) == PARITY[case]
    ours = Qwen3MoE(cfg)
    # refuses any name or shape that differs from what transformers wrote
    load_hf(ours, tmp_path / "weights")

    sequences = random_sequences([7, 1, 12, 7, 4])
    tokens_T, cu_seqlens = pack(sequences)
    probe_TV = torch.randn(
        len(tokens_T), cfg.vocab_size, generator=torch.Generator().manual_seed(2)
    )
    logits_TV = ours(tokens_T, cu_seqlens, 12)[0] @ ours.head_weight.t()
    (logits_TV * probe_TV).sum().backward()
    theirs_TV = torch.cat([hf(s[None]).logits[0] for s in sequences])  # each alone, unpadded
    (theirs_TV * probe_TV).sum().backward()

    # Both sides compute the same formulas in fp32 and differ in the order of sums only: 1e-5 is 84
    # roundings.
    assert_same(logits_TV, theirs_TV, "logits")
    # Gradients take the road of the weights: written by transformers under the names on disk, read
    # under ours.
    for model in (hf, ours):
        for p in model.parameters():
            p.data = p.grad
    hf.save_pretrained(tmp_path / "gradients")
    theirs, mine = load_file(tmp_path / "gradients/model.safetensors"), dict(ours.hf_tensors())
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert_same(mine[name], gradient, name)
    assert all(
        mine[n].abs().max() > 0
        for n in mine
        if "q_norm" in n or "embed" in n or n.endswith("mlp.gate.weight")
    )


# ---- config.json ---------------------------------------------------------------------------------
OLD_SPELLING = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_position_embeddings": 262144,
    "initializer_range": 0.02,
    "output_router_logits": False,
    "torch_dtype": "bfloat16",
}


def test_both_spellings_of_a_config_mean_the_same():
    new = {
        k: v
        for k, v in OLD_SPELLING.items()
        if k not in ("num_experts", "rope_theta", "rope_scaling")
    }
    new |= {
        "num_local_experts": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7},
    }
    cfg = ModelConfig.from_hf(OLD_SPELLING)
    assert cfg == ModelConfig.from_hf(new)
    assert (cfg.num_experts, cfg.rope_theta, cfg.norm_topk_prob, cfg.head_dim) == (
        128,
        1e7,
        True,
        128,
    )


@pytest.mark.parametrize(
    "cfg", [config(tie_word_embeddings=True), moe_config(rope_theta=5e5, mlp_only_layers=(1,))]
)
def test_a_written_config_reads_back_the_same_here_and_in_transformers(cfg, transformers, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_hf(eos_token_id=7)))
    assert ModelConfig.from_dir(tmp_path) == cfg
    hf = transformers.AutoConfig.from_pretrained(tmp_path)
    assert ModelConfig.from_hf(json.loads(hf.to_json_string())) == cfg
    assert hf.eos_token_id == 7 and hf.rope_parameters["rope_theta"] == cfg.rope_theta


@pytest.mark.parametrize(
    "change, named",
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "rope type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_a_config_we_do_not_compute_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_hf({**OLD_SPELLING, **change})


# ---- mixture of experts --------------------------------------------------------------------------
def moe_by_hand(moe, x_TD):
    """One token and one expert at a time, each projection a matrix product."""
    experts, rows = moe.experts, []
    for x in x_TD:
        weights, ids = (moe.gate.weight @ x).softmax(0).topk(moe.num_experts_per_tok)
        if moe.norm_topk_prob:
            weights = weights / weights.sum()
        row = 0
        for weight, e in zip(weights, ids):
            gate, up = experts.gate_up_proj[e].chunk(2)
            hidden = torch.nn.functional.silu(gate @ x) * (up @ x)
            row = row + weight * (experts.down_proj[e] @ hidden)
        rows.append(row)
    return torch.stack(rows)


def routed(case):
    """A layer and tokens for a routing case. Feature 0 is 1 in every token, so a column of the
    router steers."""
    top1 = case == "all tokens to one expert"
    moe = randomize(
        MoE(moe_config(num_experts_per_tok=1 if top1 else 2, norm_topk_prob=not top1), Mesh())
    )
    x_TD = torch.randn(24, 32, generator=torch.Generator().manual_seed(3))
    x_TD[:, 0] = 1.0
    if top1:
        moe.gate.weight.data[3, 0] = 20.0
    if case == "an expert with none":
        moe.gate.weight.data[3, 0] = -20.0
    counts_E = torch.bincount(moe.route(x_TD)[1].flatten(), minlength=6)
    return moe, x_TD.requires_grad_(), counts_E.tolist()


@pytest.mark.parametrize("case", ["random", "all tokens to one expert", "an expert with none"])
def test_moe_matches_a_per_token_loop(case):
    moe, x_TD, counts_E = routed(case)
    assert {"random": min(counts_E) > 0, "all tokens to one expert": counts_E[3] == 24}.get(
        case, counts_E[3] == 0
    )
    ours_TD, loop_TD = moe(x_TD)[0], moe_by_hand(moe, x_TD)
    assert_same(ours_TD, loop_TD, "output")  # 1e-5: the same products, summed in another order
    probe_TD = torch.randn(24, 32, generator=torch.Generator().manual_seed(4))
    names = ["x", *(name for name, _ in moe.named_parameters())]
    inputs = [x_TD, *moe.parameters()]
    mine, theirs = (torch.autograd.grad((y * probe_TD).sum(), inputs) for y in (ours_TD, loop_TD))
    for name, a, b in zip(names, mine, theirs):
        assert_same(a, b, name)
    idle = [e for e in range(6) if counts_E[e] == 0]
    assert all((g[idle] == 0).all() for g in mine[2:])  # exactly: no row of theirs entered a GEMM


# ---- packing -------------------------------------------------------------------------------------
def test_positions_start_again_at_every_sequence():
    # Attention sees differences of positions only, so no other test notices; but fp32 angles lose
    # digits far out.
    cos_TC, sin_TC = rope_tables(torch.tensor([0, 3, 4, 8]), 8, head_dim=4, theta=100.0)
    # 1 and 100 ** -(2/4), both halves alike
    angles = [[p, p / 10, p, p / 10] for p in (0, 1, 2, 0, 0, 1, 2, 3)]
    # its default, 1.3e-6: single fp32 operations
    torch.testing.assert_close(cos_TC, torch.tensor(angles).cos())
    torch.testing.assert_close(sin_TC, torch.tensor(angles).sin())


@pytest.mark.parametrize("lengths", [[8, 8, 8, 8], [3, 11, 1, 6], [5, 9, 5, 9]])
@pytest.mark.parametrize("cfg", [config(), moe_config()], ids=["dense", "moe"])
def test_a_sequence_does_not_see_its_neighbours(cfg, lengths):
    model = randomize(Qwen3MoE(cfg))
    # Every sequence draws from its own 13 token ids, so its embedding gradient has rows of its own.
    sequences = [s + 13 * i for i, s in enumerate(random_sequences(lengths, vocab_size=13))]
    alone = [model(*pack([s]), 11)[0] for s in sequences]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 0]):
        packed = model(*pack([sequences[i] for i in order]), 11)[0].split(
            [lengths[i] for i in order]
        )
        for i, hidden_TD in zip(order, packed):
            # 1e-5: a GEMM of another height
            assert_same(hidden_TD, alone[i], f"sequence {i} of {order}")
            gradient_VD = torch.autograd.grad(
                hidden_TD.sum(), model.model["embed_tokens"].weight, retain_graph=True
            )[0]
            mine = torch.arange(52) // 13 == i
            assert (gradient_VD[~mine] == 0).all() and (gradient_VD[mine] != 0).any()


def test_without_boundaries_the_packing_test_would_fail():
    model = randomize(Qwen3MoE(config()))
    tokens_T, cu_seqlens = pack(random_sequences([5, 9]))
    right, wrong = model(tokens_T, cu_seqlens, 9)[0], model(tokens_T, cu_seqlens[[0, -1]], 14)[0]
    assert_same(wrong[:5], right[:5], "the first sequence has nothing before it")
    assert (wrong[5:] - right[5:]).abs().amax(
        -1
    ).min() > 0.01 * right.abs().max()  # every token of the second moves


# ---- the kinds of checkpoint that exist ----------------------------------------------------------
def resaved(path, tensors, **config):
    """The checkpoint in `path` with other tensors, in one file, and a changed config.json."""
    for old in path.glob("*.safetensors*"):
        old.unlink()
    save_file(
        {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()},
        path / "model.safetensors",
    )
    changed = {**json.loads((path / "config.json").read_text()), **config}
    (path / "config.json").write_text(json.dumps(changed))
    return path


def logits_of(path):
    model = Qwen3MoE(ModelConfig.from_dir(path))
    load_hf(model, path)
    with torch.no_grad():
        return (
            model(torch.arange(12), torch.tensor([0, 12], dtype=torch.int32), 12)[0]
            @ model.head_weight.t()
        )


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "cfg",
    [config(tie_word_embeddings=True), moe_config(tie_word_embeddings=True), moe_config()],
    ids=["dense, tied", "moe, tied", "moe"],
)
def test_every_form_in_which_transformers_and_trainers_write_a_model_gives_the_same_logits(
    cfg, dtype, transformers, tmp_path
):
    """One file, many, experts fused as in memory; tied: with the head stored as well, or the head
    alone; and with the rotary tables that older writers leave. To each, `tools/export.py --check`
    says that it is whole."""
    hf = randomize(reference(transformers, cfg, "eager")).to(dtype)
    for name, how in {
        "one": {},
        "many": {"max_shard_size": "20KB"},
        "fused": {"save_original_format": False},
    }.items():
        hf.save_pretrained(tmp_path / name, **how)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    plain = load_file(tmp_path / "one/model.safetensors")
    assert (
        not cfg.num_experts
        or not load_file(tmp_path / "fused/model.safetensors").keys() <= plain.keys()
    )
    others = {"rotary": {**plain, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}}
    if cfg.tie_word_embeddings:
        assert HEAD not in plain
        others["head as well"] = {**plain, HEAD: plain[EMBEDDING].clone()}
        others["head alone"] = {HEAD if name == EMBEDDING else name: t for name, t in plain.items()}
    for name, tensors in others.items():
        shutil.copytree(tmp_path / "one", tmp_path / name)
        resaved(tmp_path / name, tensors)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "fused", dtype=torch.float32
    )
    expected = theirs(torch.arange(12)[None]).logits[0].detach()
    for path in sorted(tmp_path.iterdir()):
        assert_same(logits_of(path), expected, path.name)
        (path / "tokenizer.json").write_text("{}")
        assert f"whole, {len(plain)} tensors" in check(path)


def test_a_tied_head_that_is_another_than_the_embedding_is_refused_by_name(transformers, tmp_path):
    reference(transformers, config(tie_word_embeddings=True), "eager").save_pretrained(tmp_path)
    plain = load_file(tmp_path / "model.safetensors")
    for head in (plain[EMBEDDING] * 1.001, plain[EMBEDDING][:-1], plain[EMBEDDING] * torch.nan):
        resaved(tmp_path, {**plain, HEAD: head})
        with pytest.raises(
            WeightsError, match=r"lm_head\.weight differs .* tie_word_embeddings"
        ) as e:
            logits_of(tmp_path)
        assert "\n" not in str(e.value)
    # then it is a head of its own
    resaved(tmp_path, {**plain, HEAD: plain[EMBEDDING] + 1}, tie_word_embeddings=False)
    assert logits_of(tmp_path).isfinite().all()


def test_weights_that_cannot_be_trained_are_refused_by_name(transformers, tmp_path):
    """Quantized, not finite, of no safetensors file, fused the other way round: one line each that
    names the tensor."""
    reference(transformers, moe_config(), "eager").save_pretrained(
        tmp_path, save_original_format=False
    )
    plain, norm, fused = (
        load_file(tmp_path / "model.safetensors"),
        "model.norm.weight",
        "model.layers.1.mlp.experts.",
    )
    for changed, why in [
        ({norm: plain[norm].to(torch.float8_e4m3fn)}, f"{norm} is F8_E4M3: quantized"),
        ({norm: plain[norm] * torch.inf}, f"{norm} is not finite"),
        (
            {fused + "up_gate": plain[fused + "gate_up_proj"].clone()},
            fused + "up_gate has no place",
        ),
        ({fused + "down_proj": plain[fused + "down_proj"].transpose(1, 2)}, "makes it (32, 20)"),
        (
            {fused + "gate_up_proj": plain[fused + "gate_up_proj"][:5]},
            "5.gate_proj.weight among them",
        ),
    ]:
        resaved(tmp_path, {**plain, **changed})
        with pytest.raises(WeightsError) as e:
            logits_of(tmp_path)
        assert why in str(e.value) and "\n" not in str(e.value)
    for text, why in [(b"<html>", "not a safetensors file"), (None, "no such file")]:
        (tmp_path / "model.safetensors").unlink()
        if text:
            (tmp_path / "model.safetensors").write_bytes(text)
        with pytest.raises(WeightsError, match=why):
            logits_of(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"index\.json: no index"):
        logits_of(tmp_path)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("method", ["fp8", "awq", "gptq", "compressed-tensors"])
def test_a_quantized_checkpoint_is_refused_by_its_config(key, method):
    with pytest.raises(ValueError, match=rf"{method}.*cannot be trained"):
        ModelConfig.from_hf({**OLD_SPELLING, key: {"quant_method": method}})


# ---- a fork's new parameters ---------------------------------------------------------------------
Q_BIAS, O_BIAS = (f"model.layers.0.self_attn.{name}_proj.bias" for name in "qo")


def with_biases(mesh=Mesh()):  # noqa: B008
    """The obvious edit, attention_bias, in one layer."""
    model = Qwen3MoE(config(), mesh)
    for name in ("q_proj", "o_proj"):
        layer = getattr(model.model["layers"][0].self_attn, name)
        layer.bias = torch.nn.Parameter(torch.full((len(layer.weight),), torch.nan))
    return randomize(model)


def test_fresh_biases_are_0_and_fresh_norms_1():
    model = with_biases()
    model.init_weights(torch.Generator().manual_seed(0))
    vectors = {n: p.unique().tolist() for n, p in model.named_parameters() if p.dim() == 1}
    assert vectors == {n: [0.0] if n in (Q_BIAS, O_BIAS) else [1.0] for n in vectors}
    assert {Q_BIAS, O_BIAS, "model.norm.weight"} < vectors.keys()


def test_biases_of_a_fork_are_loaded_and_where_a_tp_group_would_add_one_twice_it_says_so():
    """q's is cut like q, o's is whole on every rank."""
    ours, q, o = with_biases(), Q_BIAS, O_BIAS
    parts = {name: split for name, _, split in ours.hf_parts(o)}
    assert parts[o].of((32,)) == (slice(0, 32),)
    assert with_biases(Mesh(tp=2, rank=1)).split_of(q).of((48,)) == (slice(24, 48),)
    with pytest.raises(ValueError, match=rf"{o}.*--tp 2 .*split_of"):
        with_biases(Mesh(tp=2, rank=1)).split_of(o)
