"""Data sets: files and sets of the Hub, whose rows become prompts and answers.

`read_data` opens one, `Examples` finds its columns, `chat_of` reads the usual forms of chats. What
would be lost on the way to the model, as a message of an unknown form or half of a character, is
refused with its row when the data is read.
"""

import csv
import datetime
import decimal
import gzip
import io
import json
import math
import mmap
import os
import re
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
from blake3 import blake3

# ---- data ----------------------------------------------------------------------------------------
PROMPT_COLUMNS = ("prompt", "messages", "conversations", "problem", "question")
ANSWER_COLUMNS = ("answer", "expected_answer")


class Lines:
    """A file of rows, JSON lines or an array of them or CSV, any of them gzipped: parsed when asked
    for, so that it takes no memory but a number a row. It is copied to a file without a name in
    TMPDIR, since the run must end with the rows that it started with: to write into a file that is
    mapped changes the rows, to shorten it is a bus error.

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
            raise ValueError(
                f"{flag} {path!r}, of which a copy is made in {where} (TMPDIR): {e}"
            ) from None
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
            raise ValueError(
                f"{self.name}: begins with [, and is no JSON array ({e}); a row is a JSON object, "
                "on a line of its own or in one array"
            ) from None

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
            raise ValueError(
                f"{self.where(i)}: not JSON ({e}); a row is an object on a line of its own"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{self.where(i)}: not a JSON object")
        return row

    def where(self, i: int) -> str:
        return f"{self.name} {self.unit} {self.starts[i, 1]}"


def plain(value):
    """A value as JSON has it: dates and times as ISO text, decimals as numbers, NaN as null, arrays
    as lists.

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

    if (
        of.is_binary(kind)
        or of.is_large_binary(kind)
        or of.is_fixed_size_binary(kind)
        or of.is_binary_view(kind)
    ):
        return True
    if hasattr(kind, "storage_type"):
        return holds_bytes(kind.storage_type)
    return any(holds_bytes(kind.field(i).type) for i in range(kind.num_fields))


ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


def chat_of(value: list) -> list[dict]:
    """Chat messages with a role and content that is text, up to the turn that is to be answered:
    what follows the last turn of the user's or a tool's is an answer. ShareGPT's from/value and
    parts of text are read.

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
    role, content = (
        message.pop("role", message.pop("from", None)),
        message.pop("content", message.pop("value", None)),
    )
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise ValueError(
            f"has a message of the role {role!r:.60}: expected system, user, assistant or tool"
        )
    if isinstance(content, list):
        parts = [
            part.get("text")
            if isinstance(part, dict) and part.get("type", "text") == "text"
            else part
            for part in content
        ]
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
    if (
        not value
        or not isinstance(value, str | list)
        or (isinstance(value, str) and not value.strip())
    ):
        raise ValueError("must be a text or chat messages, not empty")
    if isinstance(value, str) and re.match(
        r"\s*\[\s*\{\s*['\"](role|from|content|value)['\"]\s*:", value
    ):
        raise ValueError(
            f"is a chat written as one text, {value.strip()[:40]!r}...: a list of messages is "
            "wanted"
        )
    check_text(value)
    return value if isinstance(value, str) else chat_of(value)


def reach(row: dict, column: str):
    """What a row has in a column, or in NAME.IN.IT within one; None if that is not there."""
    if column in row:
        return row[column]
    for name in column.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row


def check_text(value) -> None:
    """Raises: ValueError for half of a character, as a cut emoji leaves it: it has no form in
    UTF-8."""
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"holds half of a character, {e.object[e.start]!r}") from None


class Examples:
    """The rows of a data set as dicts, with "prompt" and "answer" set from their columns. They stay
    where they are, memory-mapped Arrow or a file: a row is read when it is asked for. `notes`: what
    a user should hear of them.

    Raises: ValueError naming the row without a prompt or an answer.
    """

    def __init__(
        self, rows, prompt_column: str = "", answer_column: str = "", name: str = "--data"
    ):
        if not len(rows):
            raise ValueError(f"{name}: holds no example")
        self.rows, self.name, self.notes, self.num_chats = rows, name, [], 0
        self.parts, self.starts = [self], [0]  # as Several has them
        self.templates: dict[str, str] = {}  # those that `template` has compared with every row
        without = []
        if hasattr(rows, "features"):
            without = [
                field.name for field in rows.features.arrow_schema if holds_bytes(field.type)
            ]
            self.rows = rows.with_format(None).remove_columns(without)
        if without:
            self.notes.append(
                f"{name}: rewards do not get the columns {', '.join(without)}, which hold bytes"
            )
        self.prompt_column = self._column("prompt", prompt_column, PROMPT_COLUMNS)
        self.answer_column = self._column("answer", answer_column, ANSWER_COLUMNS)
        num_cut = 0
        for i, (prompt, answer) in enumerate(self._values(self.prompt_column, self.answer_column)):
            try:
                column, given = self.prompt_column, prompt
                if isinstance(prompt := prompt_of(given), list):
                    self.num_chats, num_cut = (
                        self.num_chats + 1,
                        num_cut + (len(prompt) < len(given)),
                    )
                column = self.answer_column
                if (answer := plain(answer)) is None:
                    raise ValueError("is missing")
                check_text(answer)
                # anything may be in there
                for column in self.rows[i] if isinstance(self.rows, list) else ():
                    plain(self.rows[i][column])
            except ValueError as e:
                raise self._error(i, column, e) from None
        if num_cut:
            self.notes.append(
                f"{name}: {num_cut} of {len(rows)} chats end with the assistant's answer, which "
                "is left out of the prompt"
            )

    def _column(self, what: str, wanted: str, usual: tuple[str, ...]) -> str:
        first = self.rows[0]
        there = list(first)
        found = [c for c in ((wanted,) if wanted else usual) if c in there]
        if wanted and reach(first, wanted) is not None:
            found = [wanted]
        if len(found) != 1:
            inner = [(c, x) for c, x in first.items() if isinstance(x, dict)]
            for c, x in inner:  # it grows by what is in them
                there += [f"{c}.{name}" for name in x]
                inner += [(f"{c}.{name}", y) for name, y in x.items() if isinstance(y, dict)]
            given = f"{wanted} is none of them" if wanted else "|".join(found or usual)
            if what == "answer" and not wanted + "".join(found):
                given += "; a reward that reads no answer needs one too: name any column"
            outer = wanted.partition(".")[0]
            if outer != wanted and isinstance(first.get(outer), str):
                given += f": {outer} is text, which has nothing in it"
            raise ValueError(
                f"{self.name} has the columns {', '.join(there)}: which is the {what}? "
                f"--{what}-column {given}"
                f"{''.join(f' ({note})' for note in self.notes)}"
            )
        return found[0]

    def _values(self, *names: str):
        """What every row has in these columns, in the order of the rows."""
        if not hasattr(self.rows, "select_columns"):
            return (tuple(reach(row, c) for c in names) for row in self.rows)
        # others, long ones, are not read
        there = self.rows.column_names
        top = [c if c in there else c.partition(".")[0] for c in names]
        batches = self.rows.select_columns(list(dict.fromkeys(top))).iter(1000)
        rows = (zip(*(batch[c] for c in top)) for batch in batches)
        return (
            tuple(reach({c: value}, name) for c, value, name in zip(top, values, names))
            for batch in rows
            for values in batch
        )

    def _error(self, i: int, column: str, e: ValueError) -> ValueError:
        where = self.rows.where(i) if isinstance(self.rows, Lines) else f"{self.name} row {i}"
        return ValueError(f"{where}: {column!r} {e}")

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> str:
        """Of the rows' content in their order, wherever they lie and whatever their columns are
        used for."""
        hasher = blake3()
        # Arrow's own bytes, which are far faster than a million dicts
        if hasattr(self.rows, "with_format"):
            import pyarrow as pa

            for table in self.rows.with_format("arrow").iter(10_000):
                with pa.ipc.new_stream(
                    sink := pa.BufferOutputStream(), table.schema.remove_metadata()
                ) as stream:
                    stream.write_table(table.replace_schema_metadata(None).combine_chunks())
                hasher.update(sink.getvalue())
        else:
            as_is = isinstance(self.rows, Lines)
            for i in range(len(self.rows)):
                hasher.update(
                    (self.rows.line(i) if as_is else json.dumps(self.rows[i]).encode()) + b"\n"
                )
        return hasher.hexdigest()

    def __getitem__(self, i: int) -> dict:
        row = plain(self.rows[i])
        return {
            **row,
            "prompt": prompt_of(reach(row, self.prompt_column)),
            "answer": reach(row, self.answer_column),
        }

    def template(self, text: str) -> str:
        """A prompt template in which {problem} is the only name of the prompt.

        Raises: ValueError for a name that is no column, or a row that has no text for it.
        """
        if text not in self.templates:
            self.templates[text] = self._checked(text)
        return self.templates[text]

    def _checked(self, text: str) -> str:
        text = PLACE.sub(
            lambda m: "{problem}" if m[1] in ("prompt", self.prompt_column) else m[0], text
        )
        names, there = split_template(text)[1::2], list(self.rows[0])
        names = [name for name in names if name != "problem"]
        for name in names:
            if name in ("answer", self.answer_column):
                raise ValueError(
                    f"--prompt-template: {{{name}}} would give the answer away; {{{{{name}}}}} is "
                    f"that word in braces"
                )
            if name not in there:
                raise ValueError(
                    f"--prompt-template: {{{name}}} is no column of {self.name}, which has "
                    f"{', '.join(there)}; {{{{{name}}}}} is that word in braces"
                )
        for i, values in enumerate(self._values(*names) if names else ()):
            for name, value in zip(names, values):
                try:
                    check_text(filled_in(plain(value)))
                except ValueError as e:
                    raise self._error(i, name, e) from None
        return text

    def too_long(self, codec, limit: int) -> set[int]:
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


PER_BLOCK = 1000  # prompts in which the weights of the data sets are kept


def mix_of(given: tuple[str, ...]) -> tuple[list[str], list[int]]:
    """What --data names: the data sets, and how many of PER_BLOCK prompts each of them gives, none
    where they have no weights. One alone has none: NAME:2024 is a set of the Hub.

    Raises: ValueError for a weight that is missing or too small, or a data set named twice.
    """
    found = [re.fullmatch(r"(.+):(-?(?:\d+\.?\d*|\.\d+))", text) for text in given]
    weighted = len(given) > 1 and any(found)
    if weighted and not all(found):
        bare = next(text for text, match in zip(given, found) if not match)
        raise ValueError(f"--data {bare}: has no weight, and others have; all or none, as {bare}:1")
    names = [match[1] for match in found] if weighted else list(given)
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"--data {twice[0]}: is named twice; give it a weight instead")
    if not weighted:
        return names, []
    weights = [float(match[2]) for match in found]
    exact = [PER_BLOCK * weight / (sum(weights) or 1) for weight in weights]
    counts = [int(x) for x in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_rest[: PER_BLOCK - sum(counts)]:
        counts[i] += 1
    if min(counts) < 1:
        i = counts.index(min(counts))
        raise ValueError(
            f"--data {given[i]}: a weight of {weights[i]:g} is below 1/{PER_BLOCK} of all"
        )
    return names, counts


def split_name(text: str) -> tuple[str, str]:
    """NAME=DATA in its parts; without a name, "" and the text. A file that is there is no name."""
    match = re.fullmatch(r"([\w-]{1,40})=(.+)", text)
    return match.groups() if match and not Path(text).exists() else ("", text)


def named(given: tuple[str, ...]) -> dict[str, str]:
    """What --val-data names: NAME=DATA, or DATA under the name of its file or set.

    Raises: ValueError where a name is there twice, or is one of our metrics'.
    """
    found = {}
    for text in given:
        name, what = split_name(text)
        if not name:
            last = Path(what).name.partition(":")[0]
            ending = next((e for e in (*ROW_FILES, ".parquet") if last.endswith(e)), "")
            name = re.sub(r"[^\w-]+", "-", last.removesuffix(ending))[:40]
        if name in found or name == "reward":
            why = "is the name of two data sets" if name in found else "is the name of a metric"
            raise ValueError(f"--val-data {text}: {name!r} {why}; give another, as NAME={what}")
        found[name] = what
    return found


ROW_FILES = tuple(f".{kind}{gz}" for gz in ("", ".gz") for kind in ("jsonl", "json", "csv"))


def is_row_file(name: str) -> bool:
    """Whether `Lines` reads it, which knows no splits."""
    return name.endswith(ROW_FILES) and Path(name).is_file()


def read_data(
    name: str,
    split: str = "train",
    prompt_column: str = "",
    answer_column: str = "",
    flag: str = "--data",
) -> Examples:
    """The data set of `--data`. HF_HOME, HF_DATASETS_CACHE, HF_TOKEN and HF_HUB_OFFLINE are the
    library's to heed.

    Raises: ValueError with one line for what is missing, gated, out of reach or malformed.
    """
    path = Path(name)
    if not path.exists() and (
        name.endswith((*ROW_FILES, ".parquet")) or name.startswith((".", "/", "~"))
    ):
        raise ValueError(f"{flag} {name!r}: no such file (looked for {path.absolute()})")
    if path.is_file() and not name.endswith((*ROW_FILES, ".parquet")):
        raise ValueError(
            f"{flag} {name!r}: the name of a file ends with {', '.join(ROW_FILES)} or .parquet"
        )
    if is_row_file(name):
        if split != "train":
            raise ValueError(f"{flag}-split {split!r}: only Parquet files have splits")
        return Examples(Lines(name, flag), prompt_column, answer_column, f"{flag} {name}")
    import datasets  # takes seconds to import

    try:
        if name.endswith(".parquet"):
            # copied to the library's cache
            rows = datasets.load_dataset("parquet", data_files=name, split=split)
        elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            # The library maps these files where they are: as in Lines, the run has a copy without a
            # name.
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
        text += (
            "; HF_HUB_OFFLINE is set: only what is in the cache (HF_HOME, HF_DATASETS_CACHE) can "
            "be read"
        )
    elif any(word in text.lower() for word in ("gated", "authenticated", "401", "403")):
        text += "; accept its terms on the Hub and set HF_TOKEN"
    elif "doesn't exist" in text or "404" in text:
        text += "; if it is private, set HF_TOKEN"
    return ValueError(f"{flag}: {type(e).__name__}: {text}")


# ---- text to token ids ---------------------------------------------------------------------------
def text_of(value: str) -> str:
    """A flag's text, or that of the file it names. Raises: ValueError for what looks like a file
    and is none."""
    if os.path.isfile(value):
        return Path(value).read_text(encoding="utf-8").rstrip("\n")
    if re.fullmatch(r"\S+\.(txt|md|jinja2?)", value):
        raise ValueError(f"{value!r}: no such file (looked for {Path(value).absolute()})")
    return value


# A name in braces. Empty ones, as in \\boxed{}, are the prompt's place only where no other is
# marked. {{name}} is the text {name}.
PLACE = re.compile(r"(?<!\{)\{([^\W\d]\w*|)\}(?!\})")


def split_template(template: str) -> list[str]:
    """Text and names in turn: what stands between the places, and what each is filled with,
    "problem" once.

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
        raise ValueError(
            f"--prompt-template {template[:80]!r}: expected {{problem}}, or a lone {{}}, once"
        )
    return parts


def filled_in(value) -> str:
    """A column's value as a part of a prompt: text, a number, or a list of them, a line each.
    Raises: ValueError."""
    if isinstance(value, list) and value and not any(isinstance(x, list) for x in value):
        return "\n".join(map(filled_in, value))
    if not isinstance(value, str | int | float):
        raise ValueError(
            f"is {value!r:.60}: what --prompt-template takes is a text, a number or a list of them"
        )
    return str(value)
