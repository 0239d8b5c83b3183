"""What is trained on: prompts and answers. FORK HERE: this is the file that every project replaces.

Three ways in, none of which needs an edit:
    --data NAME ...      JSONL, JSON, CSV or Parquet files, saved data sets, or some of the Hub
    --reward NAME        exact, numeric, math, or FILE.py:FUNCTION (the contract is in rewards.py)
    --task reverse | add the built-in character tasks, learned on a laptop in two minutes

A row's prompt is a text or a list of chat messages. Both go through the chat template of the
model's tokenizer; where it has none, or with --no-chat-template, a text is given to the model as it
is. What would be lost on the way, as a message of an unknown form or half of a character, is
refused with its row when the data is read.

The built-in tasks come with a tokenizer of single characters and a supervised warm start, since
from random weights no sample is ever right and a policy gradient has nothing to reinforce.
"""

import bisect
import collections
import contextlib
import functools
import hashlib
import json
import math
import random
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from blake3 import blake3

from data import Examples, chat_of, filled_in, split_template


class Several:
    """Several data sets as one: the rows of the first, then those of the next, and so on. counts:
    how many of each block of prompts they give (data.mix_of); none: one for each row."""

    def __init__(self, parts: list[Examples], counts: list[int]):
        self.parts, self.counts = parts, counts
        self.starts = np.cumsum([0, *map(len, parts)]).tolist()

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(i)
        part = self.part(i)
        return self.parts[part][i - self.starts[part]]

    def part(self, i: int) -> int:
        """Which of the data sets has row i."""
        return bisect.bisect_right(self.starts, i) - 1

    def names(self) -> list[str]:
        """Of the data sets, short where that tells them apart."""
        paths = [part.name.split(" ", 1)[-1] for part in self.parts]  # without the flag
        short = [Path(path).name for path in paths]
        return short if len(set(short)) == len(short) else paths

    def digest(self) -> str:
        """Of the rows and of how they are mixed."""
        mixed = [[part.digest() for part in self.parts], self.counts]
        return blake3(json.dumps(mixed).encode()).hexdigest()

    def template(self, text: str) -> str:
        """As Examples.template, for all of them."""
        for part in self.parts:
            text = part.template(text)
        return text


class Prompts:
    """An endless sequence of prompts: ordinal -> example. Each epoch is a permutation of its own,
    which depends on nothing but the seed, so an ordinal names the same prompt in every process and
    after every restart. So it is with data sets that are mixed by weight: a block of ordinals is
    dealt out to them in a seeded order, and each has epochs of its own. `skip`: rows that are not
    sampled; their ordinals are passed over by the ledger, so that the others' stay what they are.
    """

    def __init__(self, examples, seed: int, skip: set[int] = frozenset()):
        self.examples, self.seed, self.skip = examples, seed, skip
        self.counts = getattr(examples, "counts", [])  # of a block, by data set
        # the last two of each data set: one that is leased again may be of the epoch before
        self._order = functools.lru_cache(2 * len(self.counts) + 2)(self._order)

    def row(self, ordinal: int) -> int:
        """The row of the data set that an ordinal names."""
        if not self.counts:
            return self._in_turn(ordinal, len(self.examples))
        block, i = divmod(ordinal, sum(self.counts))
        num_sets = len(self.counts)
        owners = np.repeat(np.arange(num_sets), self.counts)
        dealt = owners[self._order(len(owners), block, num_sets)]
        mine = dealt[i]
        before = block * self.counts[mine] + np.count_nonzero(dealt[:i] == mine)
        first, end = self.examples.starts[mine : mine + 2]
        return first + self._in_turn(int(before), end - first, int(mine))

    def _in_turn(self, place: int, size: int, *data_set: int) -> int:
        """The row at a place of one data set's sequence."""
        epoch, position = divmod(place, size)
        return int(self._order(size, epoch, *data_set)[position])

    def _order(self, size: int, *key: int) -> np.ndarray:
        # RandomState, since numpy promises its stream for ever: a checkpoint of today resumes under
        # any numpy.
        return np.random.RandomState([self.seed % 2**32, *key]).permutation(size)

    def __getitem__(self, ordinal: int) -> dict:
        return self.examples[self.row(ordinal)]

    def by_data_set(self, groups: list) -> dict[str, float]:
        """Metrics of each data set where there are several: its samples' mean reward, and its share
        of all samples."""
        if not isinstance(self.examples, Several):
            return {}
        rewards, found = collections.defaultdict(list), {}
        for g in groups:
            rewards[self.examples.part(self.row(g.ordinal))] += g.rewards.tolist()
        for part, name in enumerate(self.examples.names()):
            mine = rewards[part]
            found[f"train/share/data/{name}"] = len(mine) / sum(len(g.rewards) for g in groups)
            if mine:
                found[f"train/reward/data/{name}"] = sum(mine) / len(mine)
        return found


class Codec:
    """Text to token ids and back, from a checkpoint's tokenizer.json and its chat template.

    Raises: ValueError without a tokenizer.json, or for a system prompt or kwargs where there is no
    chat template to take them.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        system_prompt: str = "",
        template: str = "{problem}",
        chat: bool = True,
        kwargs: dict | None = None,
    ):
        """kwargs: variables of the chat template."""
        from tokenizers import Tokenizer

        self.path = Path(checkpoint)
        if not (self.path / "tokenizer.json").is_file():
            raise ValueError(f"{checkpoint} has no tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        except Exception as e:  # the library raises nothing more special
            raise ValueError(f"{checkpoint}: tokenizer.json cannot be read: {e}") from None
        # What a script had switched on for its training comes with the file.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        if getattr(self.tokenizer.model, "dropout", None):
            self.tokenizer.model.dropout = None
        self.parts = split_template(template)
        self.system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self.kwargs = kwargs or {}
        config = self.path / "tokenizer_config.json"
        has_chat = (self.path / "chat_template.jinja").exists() or bool(
            config.exists() and json.loads(config.read_text(encoding="utf-8")).get("chat_template")
        )
        self.chat, self._around = chat and has_chat, None
        if self.system and not self.chat:
            raise ValueError(
                f"--system-prompt: {checkpoint} has no chat template to take it, or it is "
                "switched off"
            )
        if self.kwargs and not self.chat:
            raise ValueError(
                f"--chat-template-kwargs: {checkpoint} has no chat template, or it is switched off"
            )

    def encode(self, example: dict) -> list[int]:
        """Raises: ValueError when the chat template refuses the chat or leaves a message out."""
        return self.ids(self._text(example))

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def longest(self) -> int:
        """A bound on a token's characters."""
        return max(map(len, self.tokenizer.get_vocab()))

    def between(self, role: str, text: str) -> str:
        """What stands between two turns of the policy when a user or a tool says this: the chat
        template's own text, from the end of the turn before to where the next begins.

        Raises: ValueError when the template has no such role, or there is none.
        """
        if not self.chat:
            raise ValueError(
                f"sample({role}=...): {self.path} has no chat template, or it is switched off; "
                "use sample(insert=...)"
            )
        mark = "\ue000"  # for private use: the template has no such character
        said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
        try:
            chat = self._chat([*said, {"role": role, "content": text}])
        except ValueError as e:
            raise ValueError(f"sample({role}=...): the message {e}") from None
        _, found, after = chat.partition(mark)
        if not found or text.strip() not in after:
            raise ValueError(
                f"sample({role}=...): the chat template of {self.path} loses the "
                f"{role if found else 'assistant'}'s message"
            )
        return after

    def warm_up(self) -> None:
        """Import what the chat template needs, which takes seconds."""
        with contextlib.suppress(ValueError):
            self.between("user", "?")

    def most_tokens(self, example: dict) -> float:
        """A bound on them that is quickly known: a token is at least a byte of the text as the
        tokenizer sees it. What the chat template adds, and how often it shows the text, is taken
        from one that it cannot have."""
        if self._around is None:
            rare = "\ue000"
            text = self._chat([{"role": "user", "content": rare}]) if self.chat else rare
            self._around = len(text.encode()) + 16, text.count(rare)
        added, times = self._around
        if isinstance(example["prompt"], list) or not times:
            return math.inf
        text, normalizer = self._filled(example), self.tokenizer.normalizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        return added + times * len(text.encode())

    def _filled(self, example: dict) -> str:
        """The template with a prompt that is text, and the row's columns."""
        values = (
            filled_in(example["prompt" if name == "problem" else name]) for name in self.parts[1::2]
        )
        return "".join(part + next(values, "") for part in self.parts[::2])

    def _text(self, example: dict) -> str:
        prompt = example["prompt"]
        if not isinstance(prompt, str):
            return self._chat(chat_of(prompt))
        text = self._filled(example)
        return self._chat([{"role": "user", "content": text}]) if self.chat else text

    def _chat(self, chat: list[dict]) -> str:
        import jinja2

        if self.system and all(message["role"] != "system" for message in chat):
            chat = [*self.system, *chat]
        try:
            text = self._hf.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=False, **self.kwargs
            )
        except (
            jinja2.TemplateError,
            OSError,
            TypeError,
            AttributeError,
            KeyError,
            ValueError,
        ) as e:
            raise ValueError(
                f"is refused by the chat template of {self.path}: {' '.join(str(e).split())[:300]}"
            ) from None
        for message in chat:
            if (
                message["role"] in ("user", "system", "developer")
                and message["content"].strip() not in text
            ):
                raise ValueError(
                    f"loses its {message['role']} message {message['content']!r:.60} in the chat "
                    f"template of {self.path}"
                )
        return text

    @functools.cached_property
    def _hf(self):
        from transformers import AutoTokenizer  # takes seconds to import: only chats need it

        return AutoTokenizer.from_pretrained(self.path)

    def check_kwargs(self) -> None:
        """Raises: ValueError for one that the chat template would pass over in silence."""
        for name in self.kwargs:
            if not re.search(rf"\b{re.escape(name)}\b", str(self._hf.chat_template)):
                raise ValueError(
                    f"--chat-template-kwargs: the chat template of {self.path} has no {name!r}"
                )

    def decode(self, ids: list[int], special: bool = False) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=not special)


def eos_token_ids(checkpoint: str | Path) -> list[int]:
    """The ids that end a completion: generation_config.json's, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        path = Path(checkpoint) / name
        ids = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if ids not in (None, []):
            return ids if isinstance(ids, list) else [ids]
    raise ValueError(
        f"{checkpoint}: neither generation_config.json nor config.json names an eos_token_id"
    )


# ---- the built-in character tasks ----------------------------------------------------------------
def _reverse(rng: random.Random) -> dict:
    word = "".join(rng.sample(LETTERS, k=5))
    return {"prompt": word + ">", "answer": word[::-1]}


def _add(rng: random.Random) -> dict:
    a, b = rng.randrange(10, 100), rng.randrange(10, 100)
    return {"prompt": f"{a}+{b}=", "answer": str(a + b)}


def _rounds(rng: random.Random) -> dict:
    """Three words: rewards.rounds shows the next when the one before has been reversed. Up to two
    more are there already, with their answers."""
    words = ["".join(rng.sample(LETTERS, k=4)) for _ in range(3 + rng.randrange(3))]
    before, words = "".join(f"{word}>{word[::-1]}" for word in words[3:]), words[:3]
    return {"prompt": f"{before}{words[0]}>", "answer": words[0][::-1], "words": words}


# FORK HERE: an entry is a function that makes an example, and all characters of its prompts and
# answers; --task takes its name. An answer and its end must fit --max-new-tokens.
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TASKS = {
    "reverse": (_reverse, f"{LETTERS}>"),
    "add": (_add, "0123456789+="),
    "rounds": (_rounds, f"{LETTERS}>"),  # over several turns, with --reward rounds
}
PAD, EOS = "<pad>", "<eos>"
MAX_WARM_STEPS = 2000


def task_examples(task: str, count: int, seed: int) -> list[dict]:
    rng = random.Random(f"{task}/{seed}")
    return [TASKS[task][0](rng) for _ in range(count)]


def held_out_examples(task: str, count: int, seed: int, trained: list[dict]) -> list[dict]:
    """Examples of the task that are not among those trained on: fewer than `count` where a thousand
    draws for each find no more. Raises: ValueError when there is none."""
    rng, seen, found = random.Random(f"{task}/{seed}/held out"), {e["prompt"] for e in trained}, []
    for _ in range(1000 * count):
        if (example := TASKS[task][0](rng))["prompt"] not in seen:
            seen.add(example["prompt"])
            found.append(example)
            if len(found) == count:
                break
    if not found:
        raise ValueError(
            f"--task {task}: all of its {len(seen)} prompts are trained on, none is left for "
            "validation; use --val-data, or --val-every-steps 0"
        )
    return found


def task_digest(task: str) -> str:
    """Another one for another task, as its examples and its model show it: its warm start is made
    anew."""
    what = [task_examples(task, 100, 0), TASKS[task][1], tiny_config(task).to_hf(0)]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


def write_char_tokenizer(path: Path, alphabet: str) -> dict[str, int]:
    """tokenizer.json and tokenizer_config.json of one token per character, after <pad> = 0 and
    <eos> = 1."""
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
        vocab_size=math.ceil((2 + len(TASKS[task][1])) / 8) * 8,
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


def check_alphabet(task: str, seed: int) -> None:
    """Raises: ValueError for an example with a character that the task's entry does not name."""
    for example in task_examples(task, 1000, seed):
        if unknown := set(example["prompt"] + example["answer"]) - set(TASKS[task][1]):
            raise ValueError(
                f"--task {task}: {example} has {min(unknown)!r}, which is not among the task's "
                "characters"
            )


def supervised(model, examples: list[dict], vocab: dict[str, int]):
    """The model's logits for the answers' tokens, those tokens, and the mean probability that a
    sample drawn from it is the answer. Shapes: (N, V), (N,)."""
    import torch
    import torch.nn.functional as F

    prompts = [[vocab[c] for c in e["prompt"]] for e in examples]
    answers = [[*(vocab[c] for c in e["answer"]), vocab[EOS]] for e in examples]
    tokens = torch.tensor([t for p, a in zip(prompts, answers) for t in p + a])
    lengths = torch.tensor([len(a) for a in answers])
    ends = torch.tensor([len(p) + len(a) for p, a in zip(prompts, answers)]).cumsum(0)
    cu_seqlens = F.pad(ends, (1, 0)).to(torch.int32)
    rows = torch.cat([torch.arange(end - n, end) for end, n in zip(ends, lengths)])
    hidden, _ = model(tokens, cu_seqlens, max_seqlen=int(cu_seqlens.diff().max()))
    logits = hidden[rows - 1] @ model.head_weight.t()  # the state before a token predicts it
    logprobs = -F.cross_entropy(logits.detach(), tokens[rows], reduction="none")
    of_answers = torch.stack([x.sum() for x in logprobs.split(lengths.tolist())])
    return logits, tokens[rows], of_answers.exp().mean().item()


def warm_start(
    path: Path, task: str, seed: int, until: float, progress: Callable[[str], None]
) -> None:
    """Write a tiny Qwen3-MoE (0.5 M parameters) that has half learned the task.

    Supervised training on fresh examples, until a sample drawn from the model is right with
    probability `until`: that probability is exact, exp(sum of the answer's log-probs), and needs no
    sampling. Another process may write the same at the same time; who is done first has made it.

    Raises: ValueError when it is not reached.
    """
    import torch  # takes seconds, and the reward workers import this file too
    import torch.nn.functional as F

    from bridge.weights import write_safetensors
    from model import Qwen3MoE

    check_alphabet(task, seed)
    make, alphabet = TASKS[task]
    # Renamed as a whole, so that an interrupted warm start leaves no checkpoint.
    scratch = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    vocab, cfg = write_char_tokenizer(scratch, alphabet), tiny_config(task)
    (scratch / "config.json").write_text(
        json.dumps({**cfg.to_hf(vocab[EOS]), "dtype": "float32"}, indent=1)
    )
    model, rng = Qwen3MoE(cfg), random.Random(f"warm start/{seed}")
    model.init_weights(torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    accuracy = 0.0
    for step in range(MAX_WARM_STEPS):
        logits, targets, right = supervised(model, [make(rng) for _ in range(128)], vocab)
        accuracy = 0.9 * accuracy + 0.1 * right
        so_far = f"a sample is right with probability {accuracy:.2f}"
        if step % 25 == 0:
            progress(f"warm start on {task!r}: step {step}, {so_far}")
        if accuracy >= until:
            break
        optimizer.zero_grad()
        # Smoothed labels leave the policy unsure. Stopped half-way without them it is sure of wrong
        # answers; their groups are then wrong throughout, and a group without one right sample
        # teaches nothing.
        F.cross_entropy(logits, targets, label_smoothing=0.15).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    else:
        shutil.rmtree(scratch)
        raise ValueError(
            f"--warm-start-accuracy {until}: --task {task} has {accuracy:.2f} after "
            f"{MAX_WARM_STEPS} steps"
        )
    progress(f"warm start on {task!r}: done after {step} steps, {so_far}")
    write_safetensors(scratch / "model.safetensors", list(model.hf_tensors()))
    try:
        scratch.rename(path)
    except OSError:
        shutil.rmtree(scratch)
        if not path.is_dir():
            raise
