"""What is trained on: prompts, answers, rewards. FORK HERE: this is the file that every project replaces.

Three ways in, none of which needs an edit:
    --data FILE.jsonl           one JSON object a line: "prompt" (text) or "messages" (chat), and "answer"
    --reward FILE.py:FUNCTION   FUNCTION(completion: str, example: dict) -> float, run on the rollout node
    --task reverse | add        the built-in character tasks, small enough to be learned on a laptop in two minutes

The built-in tasks come with a tokenizer of single characters and a supervised warm start, since from random weights
no sample is ever right and a policy gradient has nothing to reinforce.
"""

import importlib.util
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path


# ---- rewards -------------------------------------------------------------------------------------------------
def exact_match(completion: str, example: dict) -> float:
    """1.0 if the completion is the answer, else 0.0."""
    return float(completion.strip() == str(example["answer"]).strip())


def load_reward(spec: str) -> Callable[[str, dict], float]:
    """The reward function of `--reward`: "" is exact_match, else FILE.py:FUNCTION.

    Raises: ValueError when the file or the function is not there.
    """
    if not spec:
        return exact_match
    file, colon, function = spec.rpartition(":")
    if not colon or not Path(file).is_file():
        raise ValueError(f"--reward {spec!r}: expected FILE.py:FUNCTION with an existing file")
    module_spec = importlib.util.spec_from_file_location("reward_module", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"--reward {spec!r}: {file} has no function {function!r}")
    return getattr(module, function)


def serve_rewards(spec: str) -> None:
    """A reward worker: a line of JSON in ("completion", "example") and one out ("reward" or "error"), until stdin ends.
    What the function prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    reward = load_reward(spec)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            value = float(reward(job["completion"], job["example"]))
            answer = {"reward": value} if math.isfinite(value) else {"error": f"it returned {value}"}
        except Exception as e:  # any: the user's code
            answer = {"error": f"it raised {e!r}"[:300]}
        answers.write(json.dumps(answer) + "\n")


# ---- prompts -------------------------------------------------------------------------------------------------
def read_examples(path: str) -> list[dict]:
    """Examples of a JSONL file. Raises: ValueError naming the line that is not one."""
    if not Path(path).is_file():
        raise ValueError(f"--data {path!r}: no such file")
    examples = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except json.JSONDecodeError as e:
            raise ValueError(f"--data {path} line {number}: not JSON ({e.msg})") from None
        if not isinstance(example, dict) or ("prompt" in example) == ("messages" in example):
            raise ValueError(f'--data {path} line {number}: expected an object with either "prompt" or "messages"')
        if "prompt" in example and not (isinstance(example["prompt"], str) and example["prompt"]):
            raise ValueError(f'--data {path} line {number}: "prompt" must be a non-empty text')
        if "answer" not in example:
            raise ValueError(f'--data {path} line {number}: "answer" is missing')
        examples.append(example)
    if not examples:
        raise ValueError(f"--data {path!r}: holds no example")
    return examples


class Prompts:
    """An endless sequence of prompts: ordinal -> example. Each epoch is a permutation of its own, which depends on
    nothing but the seed, so an ordinal names the same prompt in every process and after every restart."""

    def __init__(self, examples: list[dict], seed: int):
        self.examples, self.seed = examples, seed
        self._orders: dict[int, list[int]] = {}

    def __getitem__(self, ordinal: int) -> dict:
        epoch, position = divmod(ordinal, len(self.examples))
        if epoch not in self._orders:
            order = list(range(len(self.examples)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._orders[epoch] = order
        return self.examples[self._orders[epoch][position]]


class Codec:
    """Text to token ids and back, from a checkpoint's tokenizer.json; `messages` go through its chat template."""

    def __init__(self, checkpoint: str | Path):
        from tokenizers import Tokenizer

        self.path = Path(checkpoint)
        if not (self.path / "tokenizer.json").is_file():
            raise ValueError(f"{checkpoint} has no tokenizer.json")
        self.tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        self._chat = None

    def encode(self, example: dict) -> list[int]:
        if "prompt" in example:
            return self.tokenizer.encode(example["prompt"], add_special_tokens=False).ids
        if self._chat is None:
            from transformers import AutoTokenizer  # takes seconds to import: only chats need it

            self._chat = AutoTokenizer.from_pretrained(self.path)
        text = self._chat.apply_chat_template(example["messages"], add_generation_prompt=True, tokenize=False)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def eos_token_ids(checkpoint: str | Path) -> list[int]:
    """The ids that end a completion: generation_config.json's, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        path = Path(checkpoint) / name
        ids = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if ids is not None:
            return ids if isinstance(ids, list) else [ids]
    raise ValueError(f"{checkpoint}: neither generation_config.json nor config.json names an eos_token_id")


# ---- the built-in character tasks ----------------------------------------------------------------------------
def _reverse(rng: random.Random) -> dict:
    word = "".join(rng.sample("abcdefghijklmnopqrstuvwxyz", k=5))
    return {"prompt": word + ">", "answer": word[::-1]}


def _add(rng: random.Random) -> dict:
    a, b = rng.randrange(10, 100), rng.randrange(10, 100)
    return {"prompt": f"{a}+{b}=", "answer": str(a + b)}


TASKS = {"reverse": (_reverse, "abcdefghijklmnopqrstuvwxyz>"), "add": (_add, "0123456789+=")}
PAD, EOS = "<pad>", "<eos>"


def task_examples(task: str, count: int, seed: int) -> list[dict]:
    rng = random.Random(f"{task}/{seed}")
    return [TASKS[task][0](rng) for _ in range(count)]


def write_char_tokenizer(path: Path, alphabet: str) -> dict[str, int]:
    """tokenizer.json and tokenizer_config.json of one token per character, after <pad> = 0 and <eos> = 1."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate([PAD, EOS, *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(PAD, special=True), AddedToken(EOS, special=True)])
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return vocab


def warm_start(path: Path, task: str, seed: int, until: float, progress: Callable[[str], None]) -> None:
    """Write a tiny Qwen3-MoE (0.5 M parameters) that has half learned the task.

    Supervised training on fresh examples, until a sample drawn from the model is right with probability `until`:
    that probability is exact, exp(sum of the answer's log-probs), and needs no sampling.
    """
    import torch  # takes seconds, and the reward workers import this file too
    import torch.nn.functional as F

    from model import ModelConfig, Qwen3MoE
    from weights import write_version

    make, alphabet = TASKS[task]
    scratch = path.parent / f"{path.name}.tmp"  # renamed as a whole: an interrupted warm start leaves no checkpoint
    vocab = write_char_tokenizer(scratch, alphabet)
    cfg = ModelConfig(
        vocab_size=math.ceil(len(vocab) / 8) * 8, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, intermediate_size=256, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=64, norm_topk_prob=True, rope_theta=1e4, max_position_embeddings=512,
    )  # fmt: skip
    (scratch / "config.json").write_text(json.dumps(cfg.to_hf(vocab[EOS]), indent=1))
    model, rng = Qwen3MoE(cfg), random.Random(f"warm start/{seed}")
    model.init_weights(torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    accuracy, max_steps = 0.0, 2000
    for step in range(max_steps):
        examples = [make(rng) for _ in range(128)]
        prompts = [[vocab[c] for c in e["prompt"]] for e in examples]
        answers = [[*(vocab[c] for c in e["answer"]), vocab[EOS]] for e in examples]
        tokens = torch.tensor([t for p, a in zip(prompts, answers) for t in p + a])
        answer_lengths = torch.tensor([len(a) for a in answers])
        ends = torch.tensor([len(p) + len(a) for p, a in zip(prompts, answers)]).cumsum(0)
        cu_seqlens = F.pad(ends, (1, 0)).to(torch.int32)
        rows = torch.cat([torch.arange(end - n, end) for end, n in zip(ends, answer_lengths)])
        hidden, _ = model(tokens, cu_seqlens, max_seqlen=int(cu_seqlens.diff().max()))
        logits = hidden[rows - 1] @ model.head_weight.t()  # the state before a token predicts it
        logprobs = -F.cross_entropy(logits.detach(), tokens[rows], reduction="none")
        right = torch.stack([x.sum() for x in logprobs.split(answer_lengths.tolist())]).exp().mean().item()
        accuracy = 0.9 * accuracy + 0.1 * right
        if step % 25 == 0:
            progress(f"warm start on {task!r}: step {step}, a sample is right with probability {accuracy:.2f}")
        if accuracy >= until:
            break
        optimizer.zero_grad()
        # Smoothed labels leave the policy unsure. Stopped half-way without them it is sure of wrong answers; their
        # groups are then wrong throughout, and a group without one right sample teaches nothing.
        F.cross_entropy(logits, tokens[rows], label_smoothing=0.15).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    else:
        raise RuntimeError(f"warm start reached {accuracy:.2f} in {max_steps} steps, not {until}")
    progress(f"warm start on {task!r}: done after {step} steps, a sample is right with probability {accuracy:.2f}")
    written = write_version(scratch, 0, list(model.hf_tensors()), static=scratch)
    written.rename(path)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    serve_rewards(sys.argv[1])
