"""What is trained on: prompts and answers. FORK HERE: this is the file that every project replaces.

Three ways in, none of which needs an edit:
    --data NAME          a JSONL or Parquet file, a data set saved by `datasets`, or one on the Hugging Face Hub
    --reward NAME        exact, numeric, math, or FILE.py:FUNCTION (the contract is in rewards.py)
    --task reverse | add the built-in character tasks, small enough to be learned on a laptop in two minutes

A row's prompt is a text or a list of chat messages. Both go through the chat template of the model's tokenizer; where
it has none, or with --no-chat-template, a text is given to the model as it is.

The built-in tasks come with a tokenizer of single characters and a supervised warm start, since from random weights
no sample is ever right and a policy gradient has nothing to reinforce.
"""

import json
import math
import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from blake3 import blake3

# ---- data ----------------------------------------------------------------------------------------------------
PROMPT_COLUMNS, ANSWER_COLUMNS = ("prompt", "messages", "problem", "question"), ("answer", "expected_answer")


class Lines:
    """A JSONL file, line by line: parsed when asked for, so that it takes no memory but a number a line."""

    def __init__(self, path: str):
        with open(path, "rb") as file:
            if not file.seek(0, os.SEEK_END):
                raise ValueError(f"--data {path!r}: holds no example")
            self.path, self.text = path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        starts, number = [], 0
        while line := self.text.readline():
            number += 1
            if line.strip():
                starts.append((self.text.tell() - len(line), number))
        self.starts = np.array(starts, dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.starts)

    def line(self, i: int) -> bytes:
        start = int(self.starts[i, 0])  # IndexError past the end, which is what ends a loop over it
        end = self.text.find(b"\n", start)
        return self.text[start : end if end >= 0 else len(self.text)].strip()

    def __getitem__(self, i: int) -> dict:
        try:
            row = json.loads(self.line(i))
        except ValueError as e:
            raise ValueError(f"{self.where(i)}: not JSON ({e})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{self.where(i)}: not a JSON object")
        return row

    def where(self, i: int) -> str:
        return f"--data {self.path} line {self.starts[i, 1]}"


class Examples:
    """The rows of a data set as dicts, with "prompt" and "answer" set from their columns. They stay where they are,
    memory-mapped Arrow or a file: a row is read when it is asked for.

    Raises: ValueError naming the row without a prompt or an answer.
    """

    def __init__(self, rows, prompt_column: str = "", answer_column: str = "", name: str = "--data"):
        if not len(rows):
            raise ValueError(f"{name}: holds no example")
        self.rows, self.name = rows, name
        self.prompt_column = self._column("prompt", prompt_column, PROMPT_COLUMNS)
        self.answer_column = self._column("answer", answer_column, ANSWER_COLUMNS)
        for i, (prompt, answer) in enumerate(self._pairs()):
            if not prompt or not isinstance(prompt, str | list):
                raise ValueError(f"{self._where(i)}: {self.prompt_column!r} must be a text or chat messages, not empty")
            if answer is None:
                raise ValueError(f"{self._where(i)}: {self.answer_column!r} is missing")

    def _column(self, what: str, wanted: str, usual: tuple[str, ...]) -> str:
        there = list(self.rows[0])
        found = [c for c in ((wanted,) if wanted else usual) if c in there]
        if len(found) != 1:
            raise ValueError(f"{self.name} has the columns {', '.join(there)}: which is the {what}? "
                             f"--{what}-column {wanted or '|'.join(found or usual)}")  # fmt: skip
        return found[0]

    def _pairs(self):
        """Prompt and answer of every row, in the order of the rows."""
        names = (self.prompt_column, self.answer_column)
        if not hasattr(self.rows, "select_columns"):
            return (tuple(row.get(c) for c in names) for row in self.rows)
        batches = self.rows.select_columns(list(names)).iter(1000)  # the other columns, long ones, are not read
        return (pair for batch in batches for pair in zip(*(batch[c] for c in names)))

    def _where(self, i: int) -> str:
        return self.rows.where(i) if isinstance(self.rows, Lines) else f"{self.name} row {i}"

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> str:
        """Of the rows' content in their order, wherever they lie and whatever their columns are used for."""
        hasher = blake3()
        if hasattr(self.rows, "with_format"):  # Arrow's own bytes, which are far faster than a million dicts
            import pyarrow as pa

            for table in self.rows.with_format("arrow").iter(10_000):
                with pa.ipc.new_stream(sink := pa.BufferOutputStream(), table.schema.remove_metadata()) as stream:
                    stream.write_table(table.replace_schema_metadata(None).combine_chunks())
                hasher.update(sink.getvalue())
        else:
            as_is = isinstance(self.rows, Lines)
            for i in range(len(self.rows)):
                hasher.update((self.rows.line(i) if as_is else json.dumps(self.rows[i]).encode()) + b"\n")
        return hasher.hexdigest()

    def __getitem__(self, i: int) -> dict:
        row = self.rows[i]
        return {**row, "prompt": row[self.prompt_column], "answer": row[self.answer_column]}

    def too_long(self, codec: "Codec", limit: int) -> set[int]:
        """The rows whose prompt has more than `limit` tokens."""
        around = len(codec.encode({"prompt": "x"})) + 16
        # A token is at least a byte of the text, so few prompts have to be encoded to know: a million take seconds.
        long = lambda prompt: not isinstance(prompt, str) or around + len(prompt.encode()) > limit
        pairs = enumerate(self._pairs())
        return {i for i, (prompt, _) in pairs if long(prompt) and len(codec.encode({"prompt": prompt})) > limit}


def read_data(name: str, split: str = "train", prompt_column: str = "", answer_column: str = "") -> Examples:
    """The data set of `--data`. HF_HOME, HF_DATASETS_CACHE, HF_TOKEN and HF_HUB_OFFLINE are the library's to heed.

    Raises: ValueError with one line for what is missing, gated, out of reach or malformed.
    """
    path = Path(name)
    if name.endswith((".jsonl", ".json", ".parquet")) and not path.is_file():
        raise ValueError(f"--data {name!r}: no such file")
    if name.endswith((".jsonl", ".json")):
        if split != "train":
            raise ValueError(f"--data-split {split!r}: a JSONL file has no splits")
        return Examples(Lines(name), prompt_column, answer_column, f"--data {name}")
    import datasets  # takes seconds to import

    try:
        if name.endswith(".parquet"):
            rows = datasets.load_dataset("parquet", data_files=name, split=split)
        elif (path / "dataset_dict.json").exists():
            rows = datasets.load_from_disk(name)[split]
        elif (path / "state.json").exists():
            rows = datasets.load_from_disk(name)
        elif path.is_dir():
            rows = datasets.load_dataset(name, split=split)
        else:
            repo, _, config = name.partition(":")
            rows = datasets.load_dataset(repo, config or None, split=split)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as e:
        raise hub_error(f"--data {name!r}, --data-split {split!r}", e) from None
    return Examples(rows, prompt_column, answer_column, f"--data {name}")


def hub_error(flag: str, e: Exception) -> ValueError:
    """What a Hugging Face library raised, as one line with what would help."""
    text = " ".join(str(e).split())[:300]
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        text += "; HF_HUB_OFFLINE is set: only what is in the cache (HF_HOME, HF_DATASETS_CACHE) can be read"
    elif any(word in text.lower() for word in ("gated", "authenticated", "401", "403")):
        text += "; accept its terms on the Hub and set HF_TOKEN"
    elif "doesn't exist" in text or "404" in text:
        text += "; if it is private, set HF_TOKEN"
    return ValueError(f"{flag}: {type(e).__name__}: {text}")


class Prompts:
    """An endless sequence of prompts: ordinal -> example. Each epoch is a permutation of its own, which depends on
    nothing but the seed, so an ordinal names the same prompt in every process and after every restart. `skip`: rows
    that are not sampled; their ordinals are passed over by the ledger, so that the others' stay what they are."""

    def __init__(self, examples, seed: int, skip: set[int] = frozenset()):
        self.examples, self.seed, self.skip = examples, seed, skip
        self._orders: dict[int, np.ndarray] = {}

    def row(self, ordinal: int) -> int:
        """The row of the data set that an ordinal names."""
        epoch, position = divmod(ordinal, len(self.examples))
        if epoch not in self._orders:
            # RandomState, since numpy promises its stream for ever: a checkpoint of today resumes under any numpy.
            order = np.random.RandomState([self.seed % 2**32, epoch]).permutation(len(self.examples))
            self._orders = {**{e: o for e, o in self._orders.items() if e == epoch - 1}, epoch: order}
        return int(self._orders[epoch][position])

    def __getitem__(self, ordinal: int) -> dict:
        return self.examples[self.row(ordinal)]


# ---- text to token ids ---------------------------------------------------------------------------------------
def text_of(value: str) -> str:
    """A flag's text, or that of the file it names."""
    return Path(value).read_text().rstrip("\n") if os.path.isfile(value) else value


def split_template(template: str) -> tuple[str, str]:
    """What goes before and after a prompt. Raises: ValueError unless its place is marked once."""
    mark = "{problem}" if "{problem}" in template else "{}"
    if template.count(mark) != 1:
        raise ValueError(f"--prompt-template {template[:80]!r}: expected {{problem}}, or a lone {{}}, once")
    before, _, after = template.partition(mark)
    return before, after


class Codec:
    """Text to token ids and back, from a checkpoint's tokenizer.json and its chat template.

    Raises: ValueError without a tokenizer.json, or for a system prompt where there is no chat template to take it.
    """

    def __init__(self, checkpoint: str | Path, system_prompt: str = "", template: str = "{problem}", chat: bool = True):
        from tokenizers import Tokenizer

        self.path = Path(checkpoint)
        if not (self.path / "tokenizer.json").is_file():
            raise ValueError(f"{checkpoint} has no tokenizer.json")
        self.tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.before, self.after = split_template(template)
        self.system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        config = self.path / "tokenizer_config.json"
        has_chat = (self.path / "chat_template.jinja").exists() or (
            config.exists() and "chat_template" in json.loads(config.read_text())
        )
        self.chat, self._hf = chat and has_chat, None
        if self.system and not self.chat:
            raise ValueError(f"--system-prompt: {checkpoint} has no chat template to take it, or it is switched off")

    def encode(self, example: dict) -> list[int]:
        prompt = example["prompt"]
        if isinstance(prompt, str):
            text = self.before + prompt + self.after
            if not self.chat:
                return self.tokenizer.encode(text, add_special_tokens=False).ids
            prompt = [{"role": "user", "content": text}]
        if self.system and all(message["role"] != "system" for message in prompt):
            prompt = [*self.system, *prompt]
        if self._hf is None:
            from transformers import AutoTokenizer  # takes seconds to import: only chats need it

            self._hf = AutoTokenizer.from_pretrained(self.path)
        text = self._hf.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], special: bool = False) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=not special)


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


# FORK HERE: an entry is a function that makes an example, and all characters of its prompts and answers; --task takes
# its name. An answer and its end must fit --max-new-tokens.
TASKS = {"reverse": (_reverse, "abcdefghijklmnopqrstuvwxyz>"), "add": (_add, "0123456789+=")}
PAD, EOS = "<pad>", "<eos>"


def task_examples(task: str, count: int, seed: int) -> list[dict]:
    rng = random.Random(f"{task}/{seed}")
    return [TASKS[task][0](rng) for _ in range(count)]


def held_out_examples(task: str, count: int, seed: int, trained: list[dict]) -> list[dict]:
    """Examples of the task that are not among those trained on."""
    rng, seen, found = random.Random(f"{task}/{seed}/held out"), {e["prompt"] for e in trained}, []
    while len(found) < count:
        if (example := TASKS[task][0](rng))["prompt"] not in seen:
            seen.add(example["prompt"])
            found.append(example)
    return found


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


def tiny_config(task: str):
    """The ModelConfig of the model that `warm_start` makes for a built-in task."""
    from model import ModelConfig

    return ModelConfig(
        vocab_size=math.ceil((2 + len(TASKS[task][1])) / 8) * 8, hidden_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=256, num_experts=8,
        num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True, rope_theta=1e4,
        max_position_embeddings=512,
    )  # fmt: skip


def warm_start(path: Path, task: str, seed: int, until: float, progress: Callable[[str], None]) -> None:
    """Write a tiny Qwen3-MoE (0.5 M parameters) that has half learned the task.

    Supervised training on fresh examples, until a sample drawn from the model is right with probability `until`:
    that probability is exact, exp(sum of the answer's log-probs), and needs no sampling.
    """
    import torch  # takes seconds, and the reward workers import this file too
    import torch.nn.functional as F

    from model import Qwen3MoE
    from weights import write_safetensors

    make, alphabet = TASKS[task]
    scratch = path.parent / f"{path.name}.tmp"  # renamed as a whole: an interrupted warm start leaves no checkpoint
    vocab, cfg = write_char_tokenizer(scratch, alphabet), tiny_config(task)
    (scratch / "config.json").write_text(json.dumps({**cfg.to_hf(vocab[EOS]), "dtype": "float32"}, indent=1))
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
    write_safetensors(scratch / "model.safetensors", list(model.hf_tensors()))
    scratch.rename(path)
