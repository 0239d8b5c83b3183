"""The process in which a reward function runs: `python bridge/reward_process.py SPEC`.

A reward file and those beside it that it imports are read once, by whoever starts the processes: a
run goes on with what it has started with. reward_pool.py is the other end of the pipe.
"""

import ast
import asyncio
import errno
import functools
import hashlib
import importlib.machinery
import importlib.util
import inspect
import json
import math
import numbers
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path


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
        missing = f"; there is no file {file} in {Path.cwd()}" if colon else ""
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
            f"--reward {spec!r}: it is called with (completion, example): {e}"
        ) from None
    except ValueError:  # a builtin may not tell
        pass
    return reward


# ---- the worker ----------------------------------------------------------------------------------
# names a file with the sources: the processes that a reward starts read it as well
KEPT = "CISPO_REWARD_SOURCES"


def judge(value) -> dict:
    """What a reward function returned, as an answer."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # an array or tensor of no dimensions, np.bool_
    if not isinstance(value, numbers.Real | Decimal):
        what = (
            f"{type(value).__name__} of {len(value)}"
            if hasattr(value, "__len__")
            else type(value).__name__
        )
        return {
            "error": f"it returned {value!r:.100} ({what}), expected one number",
            "kind": "wrong_type",
        }
    try:
        reward = float(value)
    except (OverflowError, ValueError):  # an int of 400 digits; Decimal("sNaN")
        reward = math.nan
    if not abs(reward) <= 3.4028234e38:  # it travels as float32
        return {
            "error": f"it returned {value!s:.100}, expected a number that is finite in float32",
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
NETWORK = {
    "ConnectionError",
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "WriteTimeout",
    "PoolTimeout",
    "gaierror",
    "ClientConnectionError",
    "ClientPayloadError",
    "TransportError",
    "NetworkError",
    "ProtocolError",
    "MaxRetryError",
    "NewConnectionError",
    "ChunkedEncodingError",
    "IncompleteRead",
    "APIConnectionError",
    "ConnectionClosed",
}
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
    kind = "away" if is_away(e) else "timed_out" if isinstance(e, TimeoutError) else "raised"
    return {"error": f"it raised {told(e)}", "kind": kind}


def serve_rewards(spec: str, sources: dict[str, bytes] | None = None) -> None:
    """A line of JSON out once the function is loaded (or why it cannot be, and no more). Then a
    line in ("completion", "example") and one out ("reward", or "error" and "kind"), in the same
    order, until the jobs end. What the function and its children read and print is not that: stdin
    is empty, and stdout goes to stderr."""
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
    answers.write("{}\n")
    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__):
        asyncio.run(serve_async(reward, jobs, answers))
        return
    for line in jobs:
        job = json.loads(line)
        try:
            answer = judge(reward(job["completion"], job["example"]))
        except Exception as e:  # any: the user's code
            answer = raised(e)
        answers.write(json.dumps(answer) + "\n")


async def serve_async(reward, jobs_pipe, answers) -> None:
    """The same for a function that waits, for a judge model say: all jobs at hand run together."""
    jobs: asyncio.Queue[asyncio.Task] = asyncio.Queue()
    lines = asyncio.StreamReader(limit=1 << 28)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), jobs_pipe
    )

    async def one(job: dict) -> dict:
        try:
            return judge(await reward(job["completion"], job["example"]))
        except (Exception, asyncio.CancelledError) as e:  # any: the user's code
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


# the second: a process that the reward has started with multiprocessing
if __name__ in ("__main__", "__mp_main__"):
    kept = None
    if os.environ.get(KEPT):
        with open(os.environ[KEPT]) as file:
            kept = {path: source.encode("latin-1") for path, source in json.load(file).items()}
        kept and Kept.install(kept)
    if __name__ == "__main__":
        serve_rewards(sys.argv[1], kept)
