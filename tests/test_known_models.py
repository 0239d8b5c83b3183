"""The models that are planned for by name: their shapes, and what wins over them."""

import json

import huggingface_hub.constants
import pytest

import prepare
from model import KNOWN_MODELS, ModelConfig
from presets import parse_config

# Model cards: billions of parameters, of those outside the vocabulary's two matrices, and of those
# that a token passes (of a MoE)
CARDS = {
    "0.6B": (0.6, 0.44, None),
    "1.7B": (1.7, 1.4, None),
    "4B": (4.0, 3.6, None),
    "8B": (8.2, 6.95, None),
    "14B": (14.8, 13.2, None),
    "32B": (32.8, 31.2, None),
    "30B-A3B": (30.5, 29.9, 3.3),
    "235B-A22B": (235, 234, 22),
}
# Where others have counted them in the files; a tied matrix once
COUNTED = {"0.6B": 596_049_920, "1.7B": 1_720_574_976, "30B-A3B": 30_532_122_624}


def size_of(name: str) -> str:
    """As "30B-A3B"."""
    found = [size for size in CARDS if size in name.removeprefix("Qwen/Qwen3-").split("-2507")[0]]
    return max(found, key=len)


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_a_known_model_has_the_parameters_of_its_card(name):
    m, size = KNOWN_MODELS[name], size_of(name)
    vocabulary = m.vocab_size * m.hidden_size * (1 if m.tie_word_embeddings else 2)
    idle = m.num_experts - m.num_experts_per_tok
    idle *= len(m.moe_layers) * 3 * m.hidden_size * m.moe_intermediate_size
    found = (m.num_parameters, m.num_parameters - vocabulary, m.num_parameters - idle)
    for number, card in zip(found, CARDS[size]):
        # the cards round, some down
        assert card is None or number / 1e9 == pytest.approx(card, rel=0.02)
    assert m.num_parameters == COUNTED.get(size, m.num_parameters)


def test_the_names_are_those_of_the_hub():
    sizes = ["0.6B", "1.7B", "4B", "8B", "14B", "32B", "30B-A3B", "235B-A22B"]
    later = [f"{size}-{kind}-2507" for size in ("4B", "30B-A3B", "235B-A22B")
             for kind in ("Instruct", "Thinking")]  # fmt: skip
    names = [*sizes, *later, "Coder-30B-A3B-Instruct"]
    assert set(KNOWN_MODELS) == {f"Qwen/Qwen3-{name}" for name in names}


# As they are on the Hub, less what `from_hf` does not read.
CONFIGS = {
    "Qwen/Qwen3-4B": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02,
        "intermediate_size": 9728, "max_position_embeddings": 40960, "max_window_layers": 36,
        "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 5472, "max_position_embeddings": 262144, "max_window_layers": 28,
        "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "qkv_bias": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000,
        "shared_expert_intermediate_size": 0, "sliding_window": None,
        "tie_word_embeddings": False, "use_qk_norm": True, "use_sliding_window": False,
        "vocab_size": 151936,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_known_model_is_what_its_config_json_says(name):
    assert KNOWN_MODELS[name] == ModelConfig.from_hf(CONFIGS[name])


def test_a_directory_and_the_hub_s_cache_win_over_the_table(tmp_path, monkeypatch, tiny_checkpoint):
    """The cache as huggingface_hub lays it out. What it has is not asked of the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    name, flags = "Qwen/Qwen3-8B", ["--dry-run", "--preset", "qwen3-0.6b", "--model"]
    cfg = parse_config([*flags, name])
    assert prepare.known_config(cfg) == KNOWN_MODELS[name]
    repository = tmp_path / "cache/models--Qwen--Qwen3-8B"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("c0ffee")
    (repository / "snapshots/c0ffee").mkdir(parents=True)
    cached = repository / "snapshots/c0ffee/config.json"
    cached.write_text((tiny_checkpoint / "config.json").read_text())
    tiny = ModelConfig.from_dir(tiny_checkpoint)
    assert prepare.known_config(cfg) == tiny != KNOWN_MODELS[name]
    cached.write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ValueError, match=r"^--model Qwen/Qwen3-8B: architecture 'Llama"):
        prepare.known_config(cfg)
    # of the same name as the Hub's
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen/Qwen3-8B").mkdir(parents=True)
    (tmp_path / "Qwen/Qwen3-8B/config.json").write_text(
        (tiny_checkpoint / "config.json").read_text()
    )
    assert prepare.known_config(parse_config([*flags, name])) == tiny


@pytest.mark.parametrize("name", ["nobody/x", "a/b/c", "Qwen/Qwen3-8B-"])
def test_a_name_that_nobody_knows_is_refused_with_those_that_are(name):
    cfg = parse_config(["--dry-run", "--preset", "qwen3-0.6b", "--model", name])
    with pytest.raises(ValueError, match=r"nor in the Hub's cache, nor Qwen/Qwen3-0\.6B, .*2507"):
        prepare.known_config(cfg)
