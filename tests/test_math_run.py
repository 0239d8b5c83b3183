"""The whole of it on math: a BPE tokenizer with a chat template, JSONL data, math-verify rewards,
validation, the best checkpoint exported, a real vLLM throughout."""

import asyncio
import json
import random
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from test_run import REPO, TRAIN, Run
from test_vllm import GREEDY, RUN, reference

import task
from bridge.vllm import VLLM
from bridge.weights import write_safetensors
from config import RolloutConfig
from model import ModelConfig, Qwen3MoE

pytestmark = pytest.mark.slow

# As Qwen3's, without tools: any roles, and the assistant's turn is opened.
CHAT = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"""
SYSTEM, TEMPLATE = "You add numbers.", "{problem} Put the sum in \\boxed{}."
INTERRUPT_AT, INTERRUPT_TEXT, MAX_NEW = 8, "\n</think>\n\n", 24


def problems():
    rows = [(a, b) for a in range(10) for b in range(10)]
    return [
        {"problem": f"What is {a} + {b}?", "expected_answer": str(a + b), "level": a * b}
        for a, b in rows
    ]


def thoughts(rng):
    """What the model was taught to think: of random length, so that some are ended for it."""
    return "<think>\n" + "hm " * rng.randrange(9) + "\n</think>\n\n"


def write_tokenizer(path):
    """Byte-level BPE trained here. <think> is a token and no special one, as Qwen3 has it: a reward
    sees it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    text = [
        f"system\n{SYSTEM}\n user\n{TEMPLATE.replace('{problem}', p['problem'])}\n assistant\n hm "
        "hm \n\n"
        for p in problems()
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_tokens(
        [AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)]
    )
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "chat_template.jinja").write_text(CHAT)
    return tokenizer


def half_taught(path, until, seed=0):
    """A Qwen3-MoE that has half learned to add: supervised until an answer is right with
    probability `until`."""
    scratch = path.with_name("scratch")
    tokenizer = write_tokenizer(scratch)
    eos, rng = tokenizer.token_to_id("<|im_end|>"), random.Random(seed)
    cfg = ModelConfig(
        vocab_size=(tokenizer.get_vocab_size() + 7) // 8 * 8,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        rope_theta=1e4,
        max_position_embeddings=512,
    )
    (scratch / "config.json").write_text(json.dumps(cfg.to_hf(eos)))
    codec = task.Codec(scratch, SYSTEM, TEMPLATE)
    prompts = [(codec.encode({"prompt": p["problem"]}), p["expected_answer"]) for p in problems()]
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    model = Qwen3MoE(cfg)
    model.init_weights(torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    accuracy = 0.0
    for _ in range(1500):
        batch = [
            (prompt, ids(thoughts(rng)), [*ids(f"\\boxed{{{answer}}}"), eos])
            for prompt, answer in rng.sample(prompts, 64)
        ]
        tokens = torch.tensor([t for parts in batch for part in parts for t in part])
        ends = torch.tensor([sum(map(len, parts)) for parts in batch]).cumsum(0).tolist()
        taught = [torch.arange(end - len(a) - len(t), end) for end, (_, t, a) in zip(ends, batch)]
        cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32)
        hidden, _ = model(tokens, cu_seqlens, max_seqlen=int(cu_seqlens.diff().max()))
        rows = torch.cat(taught)
        logits = hidden[rows - 1] @ model.head_weight.t()
        logprobs = -F.cross_entropy(logits.detach(), tokens[rows], reduction="none")
        pieces = zip(logprobs.split([len(x) for x in taught]), batch)
        right = (
            torch.stack([piece[-len(a) :].sum().exp() for piece, (_, _, a) in pieces]).mean().item()
        )
        accuracy = 0.9 * accuracy + 0.1 * right
        if accuracy >= until:
            break
        optimizer.zero_grad()
        # unsure, as in task.warm_start
        F.cross_entropy(logits, tokens[rows], label_smoothing=0.1).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert accuracy >= until, accuracy
    write_safetensors(scratch / "model.safetensors", list(model.hf_tensors()))
    scratch.rename(path)


def served(checkpoint, prompt, log):
    """vLLM's greedy tokens and their log-probs, from a server started on this directory."""

    async def ask():
        vllm = VLLM(RolloutConfig(hub=""), {**RUN, "max_model_len": 96}, log)
        await vllm.start(checkpoint)
        try:
            (choice,) = await vllm.generate(prompt, GREEDY, 0)
        finally:
            await vllm.stop()
        return choice["token_ids"], torch.tensor(
            [x["logprob"] for x in choice["logprobs"]["content"]]
        )

    return asyncio.run(ask())


def test_a_model_learns_math_from_a_file_through_its_chat_template(tmp_path):
    half_taught(tmp_path / "start", until=0.35)
    too_long = {"problem": "What is 1 + 1? " * 50, "expected_answer": "2", "level": 0}
    rows = random.Random(0).sample(problems(), 100)
    for name, part in (("train", [*rows[20:], too_long]), ("held_out", rows[:20])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "template.txt").write_text(TEMPLATE)
    flags = [
        "--model",
        "start",
        "--data",
        "train.jsonl",
        "--reward",
        "math",
        "--system-prompt",
        SYSTEM,
        "--prompt-template",
        "template.txt",
        "--max-new-tokens",
        str(MAX_NEW),
        "--max-total-sequence-length",
        "96",
        "--interrupt-at-tokens",
        str(INTERRUPT_AT),
        "--interrupt-text",
        INTERRUPT_TEXT,
        "--fp32-lm-head",
        "--overlong-filter",
        "--overlong-buffer-tokens",
        "4",
        "--overlong-penalty",
        "0.1",
        "--num-prompts-per-step",
        "16",
        "--num-generations-per-prompt",
        "8",
        "--train-global-batch-size",
        "32",
        "--max-num-steps",
        "50",
        "--val-data",
        "held_out.jsonl",
        "--val-every-steps",
        "25",
    ]
    with Run(tmp_path, [*TRAIN, *flags]) as run:
        records = run.finish()
    assert "1 of 81 prompts are left out: they have more than 72 tokens" in run.out
    assert records[-1]["hub"]["skipped"] >= 1  # every epoch has it once
    assert not [count for count in records[-1]["hub"]["counts"] if count.startswith("reward_")]
    assert all(r["train/interrupted_rate"] > 0.1 for r in records[:5])
    first, last = (sum(r["train/reward"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert first <= 0.5 and last >= first + 0.2, (first, last)  # 0.40 and 0.74 when it was written

    # before, half-way and after: 20 prompts x 4 samples; the best of them is the checkpoint that is
    # kept
    lines = (tmp_path / "runs/tiny/validation.jsonl").read_text().splitlines()
    scores = {r["version"]: r["validation/avg@4"] for r in map(json.loads, lines)}
    assert list(scores) == [0, 25, 50] and scores[50] > scores[0], scores
    best = max((25, 50), key=lambda version: (scores[version], version))
    found = re.search(r"best checkpoint: (\S+step-0*(\d+))", run.out)
    assert int(found[2]) == best and (tmp_path / found[1]).is_dir(), found[0]

    # exported: transformers opens it, a vLLM started on it says the same
    command = [sys.executable, str(REPO / "tools/export.py"), found[1], "exported"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    checkpoint = tmp_path / "exported"
    prompt = task.Codec(checkpoint, SYSTEM, TEMPLATE).encode({"prompt": rows[0]["problem"]})
    tokens, logprobs = served(checkpoint, prompt, tmp_path / "vllm.log")
    expected, greedy = reference(checkpoint, prompt + tokens, len(prompt))
    assert tokens == greedy
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-4)
