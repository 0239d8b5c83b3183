"""The process in which a reward function runs: `python bridge/reward_process.py SPEC`.

A reward file and those beside it that it imports are read once, by whoever starts the processes: a
run goes on with what it has started with. reward_pool.py is the other end of the pipe.
"""

import ast
import asyncio
import concurrent.futures
import contextlib
import contextvars
import errno
import functools
import hashlib
import importlib.machinery
import importlib.util
import inspect
import json
import math
import mmap
import numbers
import os
import re
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple


# ---- the file of a function ----------------------------------------------------------------------
@functools.cache
def built_in() -> dict[str, Callable[[str, dict], float]]:
    """The functions of rewards.py by name. It is loaded by its path, as a user's file is: the
    process of a reward has no other module of ours on its path, where one would be in the place of
    a package of its name."""
    spec = importlib.util.spec_from_file_location(
        "built_in_rewards", Path(__file__).parent.parent / "rewards.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.REWARDS


def reward_sources(spec: str) -> dict[str, bytes]:
    """The file of `--reward FILE.py:FUNCTION`, and then those in its directory that it imports,
    theirs too, wherever in the text the import stands: absolute path, and what is in it. Nothing,
    if the function is one of ours.

    Raises: ValueError when the file is not there.
    """
    if spec in built_in():
        return {}
    file, colon, _ = spec.rpartition(":")
    if not colon or not file.endswith(".py") or not Path(file).is_file():
        missing = f"; there is no file {Path(file).absolute()}" if colon else ""
        names = ", ".join(built_in())
        raise ValueError(
            f"--reward {spec!r}: expected {names}, or FILE.py:FUNCTION with an existing "
            f"file{missing}"
        )
    # whoever imports that would get this one: Python itself, too
    if Path(file).stem in sys.stdlib_module_names:
        raise ValueError(
            f"--reward {spec!r}: Python has a module of its own called {Path(file).stem}; rename "
            "the file"
        )
    found, todo = {}, [Path(file).resolve()]
    root = todo[0].parent
    while todo:
        path = todo.pop()
        if str(path) not in found:
            found[str(path)] = path.read_bytes()
            for base in _imports(found[str(path)], path, root):
                beside = (base.with_name(base.name + ".py"), base / "__init__.py")
                todo += [p for p in beside if p.is_file() and root in p.parents]
    return found


def _imports(source: bytes, path: Path, root: Path) -> Iterator[Path]:
    """Where a module's imports would lie if they lay in this directory, without a suffix."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):
        return  # who loads it says so
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [(root, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1] if 0 < node.level <= len(path.parents) else root
            module = node.module or ""
            names = [(base, f"{module}.{alias.name}".strip(".")) for alias in node.names]
        else:
            continue
        for base, name in names:
            parts = name.split(".")
            yield from (base.joinpath(*parts[: n + 1]) for n in range(len(parts)))


def reward_digest(spec: str) -> str:
    """Of the files that the function is in, "" if it is one of ours: a node must run what the
    trainer means. Raises: ValueError when the file is not there."""
    sources = relative(reward_sources(spec))
    digests = {name: hashlib.sha256(source).hexdigest() for name, source in sources.items()}
    return (
        hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest() if sources else ""
    )


def relative(sources: dict[str, bytes]) -> dict[str, bytes]:
    """Sources by their path from the reward file's directory, so that another machine's may be
    compared."""
    return {
        os.path.relpath(path, Path(next(iter(sources))).parent): source
        for path, source in sources.items()
    }


class Kept(importlib.machinery.SourceFileLoader):
    """Finds and loads modules whose sources were read before; what is in their files by now does
    not matter."""

    sources: dict[str, bytes] = {}  # noqa: RUF012
    paths: dict[str, str] = {}  # noqa: RUF012

    @classmethod
    def install(cls, sources: dict[str, bytes]) -> str:
        """Returns the name of the first one's module, the reward file's."""
        root = Path(next(iter(sources))).parent
        names = []
        for path in sources:
            *packages, stem = Path(path).relative_to(root).with_suffix("").parts
            names.append(
                ".".join(
                    packages
                    if stem == "__init__" and packages
                    else [*packages, stem.replace(".", "_")]
                )
            )
        cls.sources |= sources
        cls.paths |= dict(zip(names, sources))
        if cls not in sys.meta_path:
            sys.meta_path.insert(0, cls)
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))  # for what is not among them, as extension modules
        return names[0]

    @classmethod
    def find_spec(cls, name: str, path=None, target=None):
        file = cls.paths.get(name)
        return file and importlib.util.spec_from_file_location(name, file, loader=cls(name, file))

    def get_data(self, path: str) -> bytes:
        return self.sources[path] if path in self.sources else super().get_data(path)

    def path_stats(self, path: str):
        raise OSError  # no byte code: it is the file's as it is now


def load_reward(spec: str, sources: dict[str, bytes] | None = None) -> Callable[[str, dict], float]:
    """The reward function of `--reward`. sources: of `reward_sources`, by default as they are now.

    Raises: ValueError when the file or the function is not there, or the file cannot be imported.
    """
    if spec in built_in():
        return built_in()[spec]
    file, _, function = spec.rpartition(":")
    name = Kept.install(sources or reward_sources(spec))
    sys.modules.pop(name, None)
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as e:  # any: the user's code
        raise ValueError(f"--reward {spec!r}: {file} cannot be imported: {told(e)}") from e
    if not callable(getattr(module, function, None)):
        raise ValueError(f"--reward {spec!r}: {file} has no function {function!r}")
    reward = getattr(module, function)
    try:
        inspect.signature(reward).bind("completion", {})
    except TypeError as e:
        raise ValueError(
            f"--reward {spec!r}: it is called with ({takes(reward)}, example): {e}"
        ) from None
    except ValueError:  # a builtin may not tell
        pass
    if takes(reward) == "sample" and not is_async(reward):
        raise ValueError(
            f"--reward {spec!r}: its first parameter is called sample, so it plays, and has to be "
            "`async def`"
        )
    return reward


def takes(reward) -> str:
    """What a function judges, by the name of its first parameter: a "completion", all "completions"
    of a prompt, or a "sample" that it makes itself, turn by turn."""
    try:
        first = next(iter(inspect.signature(reward).parameters), "")
    except ValueError:
        first = ""
    return first if first in ("completions", "sample") else "completion"


def is_async(reward) -> bool:
    while isinstance(reward, functools.partial):
        reward = reward.func
    return any(map(inspect.iscoroutinefunction, (reward, type(reward).__call__)))


# ---- the worker ----------------------------------------------------------------------------------
# names a file with the sources: the processes that a reward starts read it as well
KEPT = "CISPO_REWARD_SOURCES"

PART_NAME, MOST_PARTS = r"[A-Za-z0-9_-]{1,40}", 16


def shown(value) -> str:
    """What a function returned, in one short line: an array's repr has several."""
    return " ".join(repr(value).split())[:100]


def judge(value) -> dict:
    """What a reward function returned, as an answer: one number, or a dict of it and its parts."""
    if not isinstance(value, dict):
        return judge_number(value)
    wrong = [name for name in value if not re.fullmatch(PART_NAME, str(name))]
    if "reward" not in value or wrong or len(value) > MOST_PARTS + 1:
        what = (
            f"part {shown(wrong[0])}, expected a name of letters, digits, _ and -, 40 at most"
            if wrong
            else f"{shown(value)} (dict of {len(value)}), expected one number, or a dict of "
            f"'reward' and at most {MOST_PARTS} parts"
        )
        return {"error": f"it returned {what}", "kind": "wrong_type"}
    found = {str(name): judge_number(x) for name, x in value.items()}
    for name, answer in found.items():
        if "error" in answer:
            return {**answer, "error": f"{name!r} of what it returned: {answer['error']}"}
    reward = found.pop("reward")
    return {**reward, "parts": {name: answer["reward"] for name, answer in found.items()}}


def judge_number(value) -> dict:
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # an array or tensor of no dimensions, np.bool_
    if not isinstance(value, numbers.Real | Decimal):
        kind, sized = type(value).__name__, hasattr(value, "__len__")
        what = f"{kind} of {len(value)}" if sized else kind
        return {
            "error": f"it returned {shown(value)} ({what}), expected one number",
            "kind": "wrong_type",
        }
    try:
        reward = float(value)
    except (OverflowError, ValueError):  # an int of 400 digits; Decimal("sNaN")
        reward = math.nan
    if not abs(reward) <= 3.4028234e38:  # it travels as float32
        return {
            "error": f"it returned {shown(value)}, expected a number that is finite in float32",
            "kind": "not_finite",
        }
    return {"reward": reward}


def told(e: BaseException) -> str:
    """An exception in one line: its class, its words, cut in the middle since the cause often
    stands at their end, and where in the reward's own files it came up."""
    text = " ".join(f"{type(e).__name__}: {e}".split()).removesuffix(":")
    text = text if len(text) <= 240 else f"{text[:100]} ... {text[-135:]}"
    lines = [
        (Path(f.f_code.co_filename), n)
        for f, n in traceback.walk_tb(e.__traceback__)
        if f.f_code.co_filename in Kept.sources
    ]
    return f"{text} ({lines[-1][0].name} line {lines[-1][1]})" if lines else text


# classes by name, of aiohttp, requests, urllib3, httpx, httpcore, openai and their like
NETWORK = set(
    """
    ConnectionError ConnectError ConnectTimeout ReadTimeout WriteTimeout PoolTimeout
    gaierror ClientConnectionError ClientPayloadError TransportError NetworkError
    ProtocolError MaxRetryError NewConnectionError ChunkedEncodingError IncompleteRead
    APIConnectionError ConnectionClosed
    """.split()
)
NETWORK_ERRNO = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}
NETWORK_MODULES = set(
    "socket ssl http urllib urllib3 aiohttp requests httpx httpcore websockets".split()
)


def is_away(e: BaseException) -> bool:
    """Whether an exception says that a service did not answer, rather than that something is wrong
    here: an error of the network, or an HTTP status 408, 429 or 5xx, be it that of a library or one
    that was raised from it."""
    chain, modules, dubious = [], set(), False
    while e is not None and e not in chain:
        chain.append(e)
        modules |= {
            str(f.f_globals.get("__name__")).split(".")[0]
            for f, _ in traceback.walk_tb(e.__traceback__)
        }
        for status in (
            *(getattr(e, name, None) for name in ("status", "code", "status_code")),
            getattr(getattr(e, "response", None), "status_code", None),
        ):
            if isinstance(status, int) and 400 <= status < 600:
                return status >= 500 or status in (408, 429)
        if isinstance(e, TimeoutError | BrokenPipeError):
            dubious = True  # of a service, or of something here: whose code it came through decides
            # a socket's; asyncio.to_thread loses where
            if str(e) in ("timed out", "The read operation timed out"):
                return True
        elif (
            NETWORK & {cls.__name__ for cls in type(e).__mro__}
            or getattr(e, "errno", None) in NETWORK_ERRNO
        ):
            return True
        e = e.__cause__ or (None if e.__suppress_context__ else e.__context__)
    return dubious and bool(modules & NETWORK_MODULES)


def raised(e: BaseException) -> dict:
    try:
        kind = "away" if is_away(e) else "timed_out" if isinstance(e, TimeoutError) else "raised"
        return {"error": f"it raised {told(e)}", "kind": kind}
    except Exception:  # its __str__ and its properties are the user's code, too
        return {"error": f"it raised {type(e).__name__}", "kind": "raised"}


def answer_to(job: dict, value) -> dict:
    """What a function returned, as the answer to its job: of a judge of a whole group a list."""
    if "completions" not in job:
        return judge(value)
    wanted = len(job["completions"])
    if not hasattr(value, "__len__") or isinstance(value, str) or len(value) != wanted:
        what = f"{shown(value)}, expected a list of {wanted} numbers"
        return {"error": f"it returned {what}", "kind": "wrong_type"}
    return {"each": [judge(x) for x in value]}


def serve_rewards(spec: str, sources: dict[str, bytes] | None = None) -> None:
    """A line of JSON out once the function is loaded: what it `takes` (or why it cannot be loaded,
    and no more). Then a line in ("completion" or "completions", and "example") and one out
    ("reward", or "each" of the completions' answers, or "error" and "kind"), in the same order,
    until the jobs end; of a function that plays as `serve_episodes` says. What the function and its
    children read and print is not that: stdin is empty, and stdout goes to stderr."""
    # no child inherits these
    jobs, answers = (os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    try:
        reward = load_reward(spec, sources)
    except ValueError as e:
        answers.write(
            json.dumps({"error": str(e), "kind": "away" if is_away(e) else "raised"}) + "\n"
        )
        return
    with open(os.environ[RUNS], "r+b") as file:
        runs = mmap.mmap(file.fileno(), struct.calcsize(RUNNING))
    kind = takes(reward)
    answers.write(json.dumps({"takes": kind}) + "\n")
    if kind == "sample":
        asyncio.run(serve_episodes(reward, jobs, answers, runs))
        return
    if is_async(reward):
        asyncio.run(serve_async(reward, jobs, answers))
        return
    for line in jobs:
        job = json.loads(line)
        try:
            answer = answer_to(job, reward(job[kind], job["example"]))
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as e:  # any: the user's code; a panic in Rust is no Exception
            answer = raised(e)
        answers.write(json.dumps(answer) + "\n")


async def serve_async(reward, jobs_pipe, answers) -> None:
    """The same for a function that waits, for a judge model say: all jobs at hand run together."""
    jobs: asyncio.Queue[asyncio.Task] = asyncio.Queue()
    lines, kind = await lines_of(jobs_pipe), takes(reward)

    async def one(job: dict) -> dict:
        try:
            return answer_to(job, await reward(job[kind], job["example"]))
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as e:  # any: the user's code; a panic in Rust is no Exception
            return raised(e)

    async def answer() -> None:
        while True:
            answers.write(json.dumps(await (await jobs.get())) + "\n")
            jobs.task_done()

    teller = asyncio.create_task(answer())
    while line := await lines.readline():
        jobs.put_nowait(asyncio.create_task(one(json.loads(line))))
    await jobs.join()
    teller.cancel()


async def lines_of(pipe) -> asyncio.StreamReader:
    lines = asyncio.StreamReader(limit=1 << 28)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), pipe
    )
    return lines


# ---- episodes ------------------------------------------------------------------------------------
# names a file that the node reads: the episode whose code runs, 0 for none, and since when, in ns
# of the monotonic clock, which all processes share
RUNS, RUNNING = "CISPO_REWARD_RUNS", "<QQ"
MOST_CHARACTERS = 20_000_000  # of a text that is put in: a line of JSON holds 2**28 bytes
THREADS = 512  # for asyncio.to_thread: most only wait, and one that hangs keeps its own
MINE = contextvars.ContextVar("MINE", default=0)  # the episode that a task belongs to, 0 for none


class Turn(NamedTuple):
    """What the policy wrote."""

    text: str  # without the end token
    finish: str  # "stop": it ended by itself; "length": no token is left, or max_tokens are reached


class Episode:
    """One call of a function that plays, and its clock, which stands still while the policy
    writes."""

    def __init__(self, id: int, timeout_s: float, say):
        self.id, self.timeout_s, self.say = id, timeout_s, say
        self.turn: asyncio.Future | None = None

    async def sample(
        self,
        insert: str = "",
        *,
        user: str | None = None,
        tool: str | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Turn:
        """Put text into the context, and let the policy go on.

        insert: as it is; user, tool: as a message, with what the model's chat template puts around
        it. None of it is trained on. max_tokens: of this turn; stop: texts that end it, and stay in
        it. Raises: TypeError, ValueError for what it cannot take; RuntimeError while a call before
        has no answer, and for good once one was cancelled.
        """
        stop = [stop] if isinstance(stop, str) else list(stop)
        given = {"insert": insert or None, "user": user, "tool": tool}
        given = {name: text for name, text in given.items() if text is not None}
        for name, text in given.items():
            if not isinstance(text, str):
                raise TypeError(f"sample({name}=...) takes text, not {type(text).__name__}")
            if len(text) > MOST_CHARACTERS:
                raise ValueError(
                    f"sample({name}=...): a text of {len(text)} characters, {MOST_CHARACTERS} are "
                    "the most"
                )
        if len(given) > 1:
            raise ValueError(f"sample takes one of {' and '.join(given)} at a time")
        if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 1):
            raise ValueError(f"sample(max_tokens={max_tokens!r}): expected a whole number above 0")
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"sample(stop={stop!r}): expected texts that are not empty")
        if self.turn and self.turn.cancelled():
            raise RuntimeError(
                "sample was called after a call of it was cancelled, by a timeout around it say: "
                "the policy's turn cannot be taken back"
            )
        if self.turn and not self.turn.done():
            raise RuntimeError("sample was called again before it had answered")
        loop = asyncio.get_running_loop()
        left_s = self.clock.when() - loop.time()
        self.clock.reschedule(None)
        self.turn = loop.create_future()
        self.say({"id": self.id, "sample": {**given, "max_tokens": max_tokens, "stop": stop}})
        try:
            answer = await self.turn
        finally:
            with contextlib.suppress(RuntimeError):  # the episode is over
                self.clock.reschedule(loop.time() + left_s)
        if "refused" in answer:
            raise ValueError(answer["refused"])
        return Turn(answer["text"], answer["finish"])

    async def run(self, play, example: dict) -> None:
        """The function plays in a task of its own: one that catches its cancellation and goes on
        does not hold up the answer."""
        MINE.set(self.id)
        playing = asyncio.create_task(play(self.sample, example))
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.timeout_s) as self.clock:
                    await asyncio.wait([playing])
        finally:
            playing.cancel()
            if self.turn:  # another task of the episode may still wait for it
                self.turn.cancel()
        self.say({"id": self.id, **self.answer_of(playing)})

    def answer_of(self, playing: asyncio.Task) -> dict:
        if not playing.done():
            return {"error": f"no answer in {self.timeout_s:g} s of its own", "kind": "timed_out"}
        try:
            return judge(playing.result())
        except Exited as e:
            return {"error": str(e), "kind": "exited"}
        except BaseException as e:  # any: the user's code; a panic in Rust is no Exception
            return raised(e)


class Exited(Exception):
    """What sys.exit becomes in a task: as it is it would end the process."""


class Marked:
    """A coroutine that says in `runs` when its code runs: whoever ends or blocks the process can
    then be told from the others."""

    def __init__(self, coroutine, id: int, runs):
        self.coroutine, self.id, self.runs = coroutine, id, runs

    def __await__(self):
        step, given = self.coroutine.send, None
        while True:
            self.runs[:] = struct.pack(RUNNING, self.id, time.monotonic_ns())
            try:
                waits_for = step(given)
            except StopIteration as end:
                return end.value
            except (SystemExit, KeyboardInterrupt) as e:
                raise Exited(f"it raised {told(e)}") from None
            finally:
                self.runs[:] = struct.pack(RUNNING, 0, time.monotonic_ns())
            try:
                step, given = self.coroutine.send, (yield waits_for)
            except BaseException as e:
                step, given = self.coroutine.throw, e


def task_factory(runs):
    """Marks every task of an episode, those that it starts itself among them."""

    async def marked(coroutine, id: int):
        return await Marked(coroutine, id, runs)

    def new_task(loop, coroutine, **kwargs) -> asyncio.Task:
        id = MINE.get()
        if id and asyncio.iscoroutine(coroutine):
            coroutine = marked(coroutine, id)
        return asyncio.Task(coroutine, loop=loop, **kwargs)

    return new_task


async def serve_episodes(play, jobs_pipe, answers, runs) -> None:
    """Many episodes at once. In: {"id", "example", "timeout_s"} begins one, {"id", "text",
    "finish"} or {"id", "refused"} answers its `sample`, {"id"} drops it. Out: {"id", "sample":
    {...}}, and last {"id", "reward"} or {"id", "error", "kind"}."""
    episodes: dict[int, tuple[Episode, asyncio.Task]] = {}

    def say(message: dict) -> None:
        if message["id"] in episodes:  # else it was dropped
            answers.write(json.dumps(message) + "\n")

    loop = asyncio.get_running_loop()
    loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(THREADS))
    loop.set_task_factory(task_factory(runs))
    lines = await lines_of(jobs_pipe)
    while line := await lines.readline():
        message = json.loads(line)
        id = message.pop("id")
        if "example" in message:
            episode = Episode(id, message["timeout_s"], say)
            task = asyncio.create_task(episode.run(play, message["example"]))
            episodes[id] = episode, task
        elif id in episodes and message:
            turn = episodes[id][0].turn
            turn.done() or turn.set_result(message)  # it may have been cancelled
        elif id in episodes:
            episodes.pop(id)[1].cancel()


# the second: a process that the reward has started with multiprocessing
if __name__ in ("__main__", "__mp_main__"):
    kept = None
    if os.environ.get(KEPT):
        with open(os.environ[KEPT]) as file:
            kept = {path: source.encode("latin-1") for path, source in json.load(file).items()}
        kept and Kept.install(kept)
    if __name__ == "__main__":
        serve_rewards(sys.argv[1], kept)
