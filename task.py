"""What is trained on: prompts and answers. FORK HERE: this is the file that every project replaces.

Three ways in, none of which needs an edit:
    --data NAME          a JSONL, JSON, CSV or Parquet file, a data set saved by `datasets`, or one on the Hub
    --reward NAME        exact, numeric, math, or FILE.py:FUNCTION (the contract is in rewards.py)
    --task reverse | add the built-in character tasks, small enough to be learned on a laptop in two minutes

A row's prompt is a text or a list of chat messages. Both go through the chat template of the model's tokenizer; where
it has none, or with --no-chat-template, a text is given to the model as it is. What would be lost on the way, as a
message of an unknown form or half of a character, is refused with its row when the data is read.

The built-in tasks come with a tokenizer of single characters and a supervised warm start, since from random weights
no sample is ever right and a policy gradient has nothing to reinforce.
"""

import csv
import datetime
import decimal
import gzip
import hashlib
import io
import json
import math
import mmap
import os
import random
import re
import secrets
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from blake3 import blake3

# ---- data ----------------------------------------------------------------------------------------------------
PROMPT_COLUMNS = ("prompt", "messages", "conversations", "problem", "question")
ANSWER_COLUMNS = ("answer", "expected_answer")


class Lines:
    """A file of rows, JSON lines or an array of them or CSV, any of them gzipped: parsed when asked for, so that it
    takes no memory but a number a row. It is copied to a file without a name in TMPDIR, since the run must end with
    the rows that it started with: to write into a file that is mapped changes the rows, to shorten it is a bus error.

    Raises: ValueError naming the file, and the line or row that is malformed.
    """

    def __init__(self, path: str, flag: str = "--data"):
        self.path, self.name, self.unit = path, f"{flag} {path}", "line"
        opened = gzip.open if path.endswith(".gz") else open
        try:
            with opened(path, "rb") as file, tempfile.TemporaryFile() as copy:
                array = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
                file.seek(0)
                if array or path.removesuffix(".gz").endswith(".csv"):
                    self.unit = "row"
                    for row in self._array(file) if array else self._csv(file):
                        copy.write(json.dumps(row).encode() + b"\n")
                else:
                    shutil.copyfileobj(file, copy, 1 << 20)
                copy.flush()
                if not copy.tell():
                    raise ValueError(f"{flag} {path!r}: holds no example")
                self.text = mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, EOFError, zlib.error) as e:
            where = tempfile.gettempdir()
            raise ValueError(f"{flag} {path!r}, of which a copy is made in {where} (TMPDIR): {e}") from None
        starts, number = [], 0
        while line := self.text.readline():
            number += 1
            if line.strip():
                starts.append((self.text.tell() - len(line), number))
        self.starts = np.array(starts, dtype=np.int64).reshape(-1, 2)

    def _array(self, file) -> list:
        try:
            return json.load(file)
        except ValueError as e:
            raise ValueError(f"{self.name}: begins with [, and is no JSON array ({e}); a row is a JSON object, on a "
                             "line of its own or in one array") from None  # fmt: skip

    def _csv(self, file):
        """Its rows; every value stays the text that it is."""
        csv.field_size_limit(sys.maxsize)
        rows = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
        try:
            if len(names := rows.fieldnames or []) != len(set(names)):
                raise ValueError("two columns have the same name")
            for row in rows:
                if None in row or None in row.values():
                    raise ValueError(f"a row has not the {len(names)} columns of the first")
                yield row
        except (ValueError, csv.Error) as e:
            raise ValueError(f"{self.name} line {rows.line_num}: not CSV ({e})") from None

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
            raise ValueError(f"{self.where(i)}: not JSON ({e}); a row is an object on a line of its own") from None
        if not isinstance(row, dict):
            raise ValueError(f"{self.where(i)}: not a JSON object")
        return row

    def where(self, i: int) -> str:
        return f"{self.name} {self.unit} {self.starts[i, 1]}"


def plain(value):
    """A value as JSON has it: dates and times as ISO text, decimals as numbers, NaN as null, arrays as lists.

    Raises: ValueError for what has no such form, as bytes and images.
    """
    if isinstance(value, dict):
        return {str(name): plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal) and value.is_finite():
        number = int(value) if value == value.to_integral_value() else float(value)
        return number if decimal.Decimal(str(number)) == value else str(value)
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biufMmUO":
        return plain(value.tolist())
    raise ValueError(f"a value of type {type(value).__name__} has no form in JSON")


def holds_bytes(kind) -> bool:
    """Whether values of an Arrow type are bytes, or hold some, as images and sounds do."""
    import pyarrow.types as of

    if of.is_binary(kind) or of.is_large_binary(kind) or of.is_fixed_size_binary(kind) or of.is_binary_view(kind):
        return True
    if hasattr(kind, "storage_type"):
        return holds_bytes(kind.storage_type)
    return any(holds_bytes(kind.field(i).type) for i in range(kind.num_fields))


ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


def chat_of(value: list) -> list[dict]:
    """Chat messages with a role and content that is text, up to the turn that is to be answered: what follows the last
    turn of the user's or a tool's is an answer. ShareGPT's from/value and parts of text are read.

    Raises: ValueError for what a chat template would pass over in silence.
    """
    chat = [_message(message) for message in value]
    while chat and chat[-1]["role"] == "assistant":
        chat.pop()
    if not chat or chat[-1]["role"] not in ("user", "tool"):
        raise ValueError("must have a user's message, and no system message behind it")
    return chat


def _message(message) -> dict:
    if not isinstance(message, dict):
        raise ValueError(f"must be messages with a role and content, not {message!r:.60}")
    # A column of Arrow has every key in every message, empty where a message has none.
    message = {name: x for name, x in message.items() if x is not None}
    role, content = message.pop("role", message.pop("from", None)), message.pop("content", message.pop("value", None))
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise ValueError(f"has a message of the role {role!r:.60}: expected system, user, assistant or tool")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
                 for part in content]  # fmt: skip
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"has a {role} message with a part that is not text: {content!r:.100}")
        content = "".join(parts)
    if content is None and role == "assistant" and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str) or (role == "user" and not content.strip()):
        raise ValueError(f"has a {role} message whose content is not text: {content!r:.60}")
    return {"role": role, "content": content, **message}


def prompt_of(value) -> str | list[dict]:
    """A prompt, text or a chat. Raises: ValueError."""
    if not value or not isinstance(value, str | list) or (isinstance(value, str) and not value.strip()):
        raise ValueError("must be a text or chat messages, not empty")
    if isinstance(value, str) and re.match(r"\s*\[\s*\{\s*['\"](role|from|content|value)['\"]\s*:", value):
        raise ValueError(f"is a chat written as one text, {value.strip()[:40]!r}...: a list of messages is wanted")
    check_text(value)
    return value if isinstance(value, str) else chat_of(value)


def check_text(value) -> None:
    """Raises: ValueError for half of a character, as a cut emoji leaves it: it has no form in UTF-8."""
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"holds half of a character, {e.object[e.start]!r}") from None


class Examples:
    """The rows of a data set as dicts, with "prompt" and "answer" set from their columns. They stay where they are,
    memory-mapped Arrow or a file: a row is read when it is asked for. `notes`: what a user should hear of them.

    Raises: ValueError naming the row without a prompt or an answer.
    """

    def __init__(self, rows, prompt_column: str = "", answer_column: str = "", name: str = "--data"):
        if not len(rows):
            raise ValueError(f"{name}: holds no example")
        self.rows, self.name, self.notes, self.num_chats = rows, name, [], 0
        self.templates: dict[str, str] = {}  # those that `template` has compared with every row
        without = []
        if hasattr(rows, "features"):
            without = [field.name for field in rows.features.arrow_schema if holds_bytes(field.type)]
            self.rows = rows.with_format(None).remove_columns(without)
        if without:
            self.notes.append(f"{name}: rewards do not get the columns {', '.join(without)}, which hold bytes")
        self.prompt_column = self._column("prompt", prompt_column, PROMPT_COLUMNS)
        self.answer_column = self._column("answer", answer_column, ANSWER_COLUMNS)
        num_cut = 0
        for i, (prompt, answer) in enumerate(self._values(self.prompt_column, self.answer_column)):
            try:
                column, given = self.prompt_column, prompt
                if isinstance(prompt := prompt_of(given), list):
                    self.num_chats, num_cut = self.num_chats + 1, num_cut + (len(prompt) < len(given))
                column = self.answer_column
                if (answer := plain(answer)) is None:
                    raise ValueError("is missing")
                check_text(answer)
                for column in self.rows[i] if isinstance(self.rows, list) else ():  # anything may be in there
                    plain(self.rows[i][column])
            except ValueError as e:
                raise self._error(i, column, e) from None
        if num_cut:
            self.notes.append(f"{name}: {num_cut} of {len(rows)} chats end with the assistant's answer, which is left "
                              "out of the prompt")  # fmt: skip

    def _column(self, what: str, wanted: str, usual: tuple[str, ...]) -> str:
        there = list(self.rows[0])
        found = [c for c in ((wanted,) if wanted else usual) if c in there]
        if len(found) != 1:
            raise ValueError(f"{self.name} has the columns {', '.join(there)}: which is the {what}? "
                             f"--{what}-column {wanted or '|'.join(found or usual)}"
                             f"{''.join(f' ({note})' for note in self.notes)}")  # fmt: skip
        return found[0]

    def _values(self, *names: str):
        """What every row has in these columns, in the order of the rows."""
        if not hasattr(self.rows, "select_columns"):
            return (tuple(row.get(c) for c in names) for row in self.rows)
        batches = self.rows.select_columns(list(dict.fromkeys(names))).iter(1000)  # others, long ones, are not read
        return (values for batch in batches for values in zip(*(batch[c] for c in names)))

    def _error(self, i: int, column: str, e: ValueError) -> ValueError:
        where = self.rows.where(i) if isinstance(self.rows, Lines) else f"{self.name} row {i}"
        return ValueError(f"{where}: {column!r} {e}")

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
        row = plain(self.rows[i])
        return {**row, "prompt": prompt_of(row[self.prompt_column]), "answer": row[self.answer_column]}

    def template(self, text: str) -> str:
        """A prompt template in which {problem} is the only name of the prompt.

        Raises: ValueError for a name that is no column, or a row that has no text for it.
        """
        if text not in self.templates:
            self.templates[text] = self._checked(text)
        return self.templates[text]

    def _checked(self, text: str) -> str:
        text = PLACE.sub(lambda m: "{problem}" if m[1] in ("prompt", self.prompt_column) else m[0], text)
        names, there = split_template(text)[1::2], list(self.rows[0])
        names = [name for name in names if name != "problem"]
        for name in names:
            if name in ("answer", self.answer_column):
                raise ValueError(f"--prompt-template: {{{name}}} would give the answer away; {{{{{name}}}}} is "
                                 f"that word in braces")  # fmt: skip
            if name not in there:
                raise ValueError(f"--prompt-template: {{{name}}} is no column of {self.name}, which has "
                                 f"{', '.join(there)}; {{{{{name}}}}} is that word in braces")  # fmt: skip
        for i, values in enumerate(self._values(*names) if names else ()):
            for name, value in zip(names, values):
                try:
                    check_text(filled_in(plain(value)))
                except ValueError as e:
                    raise self._error(i, name, e) from None
        return text

    def too_long(self, codec: "Codec", limit: int) -> set[int]:
        """The rows whose prompt has more than `limit` tokens."""
        names = [name for name in codec.parts[1::2] if name != "problem"]
        found = set()
        for i, (prompt, *values) in enumerate(self._values(self.prompt_column, *names)):
            example = {**dict(zip(names, map(plain, values))), "prompt": prompt_of(prompt)}
            try:  # few prompts have to be encoded to know: a million take seconds
                if codec.most_tokens(example) > limit and len(codec.encode(example)) > limit:
                    found.add(i)
            except ValueError as e:
                raise self._error(i, self.prompt_column, e) from None
        return found


ROW_FILES = tuple(f".{kind}{gz}" for gz in ("", ".gz") for kind in ("jsonl", "json", "csv"))


def read_data(name: str, split: str = "train", prompt_column: str = "", answer_column: str = "",
              flag: str = "--data") -> Examples:  # fmt: skip
    """The data set of `--data`. HF_HOME, HF_DATASETS_CACHE, HF_TOKEN and HF_HUB_OFFLINE are the library's to heed.

    Raises: ValueError with one line for what is missing, gated, out of reach or malformed.
    """
    path = Path(name)
    if not path.exists() and (name.endswith((*ROW_FILES, ".parquet")) or name.startswith((".", "/", "~"))):
        raise ValueError(f"{flag} {name!r}: no such file (looked for {path.absolute()})")
    if path.is_file() and not name.endswith((*ROW_FILES, ".parquet")):
        raise ValueError(f"{flag} {name!r}: the name of a file ends with {', '.join(ROW_FILES)} or .parquet")
    if path.is_file() and not name.endswith(".parquet"):
        if split != "train":
            raise ValueError(f"{flag}-split {split!r}: only Parquet files have splits")
        return Examples(Lines(name, flag), prompt_column, answer_column, f"{flag} {name}")
    import datasets  # takes seconds to import

    try:
        if name.endswith(".parquet"):
            rows = datasets.load_dataset("parquet", data_files=name, split=split)  # copied to the library's cache
        elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            # The library maps these files where they are: as in Lines, the run has a copy without a name.
            with tempfile.TemporaryDirectory() as copy:
                rows = datasets.load_from_disk(shutil.copytree(path, copy, dirs_exist_ok=True))
            rows = rows[split] if isinstance(rows, dict) else rows
        elif path.is_dir():
            rows = datasets.load_dataset(name, split=split)
        else:
            repo, _, config = name.partition(":")
            rows = datasets.load_dataset(repo, config or None, split=split)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as e:
        raise hub_error(f"{flag} {name!r}, {flag}-split {split!r}", e) from None
    return Examples(rows, prompt_column, answer_column, f"{flag} {name}")


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
    """A flag's text, or that of the file it names. Raises: ValueError for what looks like a file and is none."""
    if os.path.isfile(value):
        return Path(value).read_text(encoding="utf-8").rstrip("\n")
    if re.fullmatch(r"\S+\.(txt|md|jinja2?)", value):
        raise ValueError(f"{value!r}: no such file (looked for {Path(value).absolute()})")
    return value


# A name in braces. Empty ones, as in \\boxed{}, are the prompt's place only where no other is marked. {{name}} is the
# text {name}.
PLACE = re.compile(r"(?<!\{)\{([^\W\d]\w*|)\}(?!\})")


def split_template(template: str) -> list[str]:
    """Text and names in turn: what stands between the places, and what each is filled with, "problem" once.

    Raises: ValueError unless the prompt's place is marked once, by {problem} or a lone {}.
    """
    mark = "problem" if "{problem}" in template else ""
    parts = [""]
    for i, part in enumerate(PLACE.split(template)):
        if i % 2 == 0:
            parts[-1] += re.sub(r"\{\{([^\W\d]\w*)\}\}", r"{\1}", part)
        elif part == "" and mark:
            parts[-1] += "{}"
        else:
            parts += ["problem" if part == mark else part, ""]
    if parts[1::2].count("problem") != 1:
        raise ValueError(f"--prompt-template {template[:80]!r}: expected {{problem}}, or a lone {{}}, once")
    return parts


def filled_in(value) -> str:
    """A column's value as a part of a prompt: text, a number, or a list of them, a line each. Raises: ValueError."""
    if isinstance(value, list) and value and not any(isinstance(x, list) for x in value):
        return "\n".join(map(filled_in, value))
    if not isinstance(value, str | int | float):
        raise ValueError(f"is {value!r:.60}: what --prompt-template takes is a text, a number or a list of them")
    return str(value)


class Codec:
    """Text to token ids and back, from a checkpoint's tokenizer.json and its chat template.

    Raises: ValueError without a tokenizer.json, or for a system prompt where there is no chat template to take it.
    """

    def __init__(self, checkpoint: str | Path, system_prompt: str = "", template: str = "{problem}", chat: bool = True):
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
        config = self.path / "tokenizer_config.json"
        has_chat = (self.path / "chat_template.jinja").exists() or bool(
            config.exists() and json.loads(config.read_text(encoding="utf-8")).get("chat_template")
        )
        self.chat, self._hf, self._around = chat and has_chat, None, None
        if self.system and not self.chat:
            raise ValueError(f"--system-prompt: {checkpoint} has no chat template to take it, or it is switched off")

    def encode(self, example: dict) -> list[int]:
        """Raises: ValueError when the chat template refuses the chat or leaves a message out."""
        return self.tokenizer.encode(self._text(example), add_special_tokens=False).ids

    def most_tokens(self, example: dict) -> float:
        """A bound on them that is quickly known: a token is at least a byte of the text as the tokenizer sees it. What
        the chat template adds, and how often it shows the text, is taken from one that it cannot have."""
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
        values = (filled_in(example["prompt" if name == "problem" else name]) for name in self.parts[1::2])
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
            if self._hf is None:
                from transformers import AutoTokenizer  # takes seconds to import: only chats need it

                self._hf = AutoTokenizer.from_pretrained(self.path)
            text = self._hf.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        except (jinja2.TemplateError, OSError, TypeError, AttributeError, KeyError, ValueError) as e:
            raise ValueError(
                f"is refused by the chat template of {self.path}: {' '.join(str(e).split())[:300]}"
            ) from None
        for message in chat:
            if message["role"] in ("user", "system", "developer") and message["content"].strip() not in text:
                raise ValueError(f"loses its {message['role']} message {message['content']!r:.60} in the chat template "
                                 f"of {self.path}")  # fmt: skip
        return text

    def decode(self, ids: list[int], special: bool = False) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=not special)


def eos_token_ids(checkpoint: str | Path) -> list[int]:
    """The ids that end a completion: generation_config.json's, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        path = Path(checkpoint) / name
        ids = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if ids not in (None, []):
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
MAX_WARM_STEPS = 2000


def task_examples(task: str, count: int, seed: int) -> list[dict]:
    rng = random.Random(f"{task}/{seed}")
    return [TASKS[task][0](rng) for _ in range(count)]


def held_out_examples(task: str, count: int, seed: int, trained: list[dict]) -> list[dict]:
    """Examples of the task that are not among those trained on: fewer than `count` where a thousand draws for each
    find no more. Raises: ValueError when there is none."""
    rng, seen, found = random.Random(f"{task}/{seed}/held out"), {e["prompt"] for e in trained}, []
    for _ in range(1000 * count):
        if (example := TASKS[task][0](rng))["prompt"] not in seen:
            seen.add(example["prompt"])
            found.append(example)
            if len(found) == count:
                break
    if not found:
        raise ValueError(f"--task {task}: all of its {len(seen)} prompts are trained on, none is left for validation; "
                         "use --val-data, or --val-every-steps 0")  # fmt: skip
    return found


def task_digest(task: str) -> str:
    """Another one for another task, as its examples and its model show it: its warm start is made anew."""
    what = [task_examples(task, 100, 0), TASKS[task][1], tiny_config(task).to_hf(0)]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


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


def check_alphabet(task: str, seed: int) -> None:
    """Raises: ValueError for an example with a character that the task's entry does not name."""
    for example in task_examples(task, 1000, seed):
        if unknown := set(example["prompt"] + example["answer"]) - set(TASKS[task][1]):
            raise ValueError(f"--task {task}: {example} has {min(unknown)!r}, which is not among the task's characters")


def warm_start(path: Path, task: str, seed: int, until: float, progress: Callable[[str], None]) -> None:
    """Write a tiny Qwen3-MoE (0.5 M parameters) that has half learned the task.

    Supervised training on fresh examples, until a sample drawn from the model is right with probability `until`:
    that probability is exact, exp(sum of the answer's log-probs), and needs no sampling. Another process may write
    the same at the same time; who is done first has made it.

    Raises: ValueError when it is not reached.
    """
    import torch  # takes seconds, and the reward workers import this file too
    import torch.nn.functional as F

    from model import Qwen3MoE
    from weights import write_safetensors

    check_alphabet(task, seed)
    make, alphabet = TASKS[task]
    # Renamed as a whole, so that an interrupted warm start leaves no checkpoint.
    scratch = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    vocab, cfg = write_char_tokenizer(scratch, alphabet), tiny_config(task)
    (scratch / "config.json").write_text(json.dumps({**cfg.to_hf(vocab[EOS]), "dtype": "float32"}, indent=1))
    model, rng = Qwen3MoE(cfg), random.Random(f"warm start/{seed}")
    model.init_weights(torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    accuracy, max_steps = 0.0, MAX_WARM_STEPS
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
        shutil.rmtree(scratch)
        raise ValueError(f"--warm-start-accuracy {until}: --task {task} has {accuracy:.2f} after {max_steps} steps")
    progress(f"warm start on {task!r}: done after {step} steps, a sample is right with probability {accuracy:.2f}")
    write_safetensors(scratch / "model.safetensors", list(model.hf_tensors()))
    try:
        scratch.rename(path)
    except OSError:
        shutil.rmtree(scratch)
        if not path.is_dir():
            raise
