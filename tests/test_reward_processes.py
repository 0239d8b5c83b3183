"""Own reward functions in their processes: what they may import, start, read, print and return, and
who ends it all."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from programs import run_program

from bridge import reward_process
from bridge.reward_pool import RewardWorkers, check_reward
from config import Config
from presets import parse_config
from ranks.run_dir import begin_run_dir

REPO = Path(__file__).resolve().parent.parent


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return f"{path}:score"


async def scored(spec, completions, example=None, timeout_s=60.0, then=None, **flags):
    """What one worker says; `then` is a second batch, after a call of its first element."""
    workers = RewardWorkers(spec, 1, timeout_s, **flags)
    try:
        found = await workers.score(completions, example or {})
        if then:
            then[0]()
            found += await workers.score(then[1], example or {})
        return found
    finally:
        await workers.close()


def score(*args, **flags):
    return asyncio.run(scored(*args, **flags))


# ---- what is read and printed --------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_program_that_a_reward_starts_neither_reads_its_jobs_nor_writes_its_answers(
    tmp_path, kind
):
    spec = write(
        tmp_path / "my.py",
        (
            "import os, subprocess, sys\n"
            f"{kind} score(completion, example):\n"
            "    os.system('echo 7; echo 8 >&2')\n"
            "    read = subprocess.run([sys.executable, '-c', 'print(len(input()))'], stdout=sys.stderr, timeout=20)\n"
            "    subprocess.run(['cat'], timeout=20)\n"
            "    return float(completion) if read.returncode else -1.0\n"
        ),
    )
    numbers = [str(n) for n in range(6)]
    assert score(spec, numbers, {"tests": "t" * 30_000}) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


# ---- what is started -----------------------------------------------------------------------------
STARTS = """
import multiprocessing, os, subprocess, sys, time
from pathlib import Path
def hang():
    Path({pids!r}).open("a").write(f"{{os.getpid()}}\\n")
    time.sleep(600)
def score(completion, example):
    if completion == "fine":
        return 1.0
    for own_session in (False, True):
        child = subprocess.Popen(["sh", "-c", "sleep 600 & echo $! >> {pids}; wait"], start_new_session=own_session)
        Path({pids!r}).open("a").write(f"{{child.pid}}\\n")
    multiprocessing.get_context("fork").Process(target=hang).start()
    while len(Path({pids!r}).read_text().split()) < 5:
        time.sleep(0.01)
    if completion == "exit":
        os._exit(3)
    if completion == "hang":
        time.sleep(600)
    return 0.5
"""


def gone(pids: list[int]) -> list[list[str]]:
    """Command lines of those still there after a while; they are ended."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    _, alive = psutil.wait_procs(found, timeout=10)
    lines = [p.cmdline() for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    for p in alive:
        p.kill()
    return lines


@pytest.mark.parametrize("how", ["hang", "exit", "close"])
def test_all_that_a_reward_has_started_ends_when_it_hangs_exits_or_is_closed(tmp_path, how):
    spec, ended = write(tmp_path / "my.py", STARTS.format(pids=str(tmp_path / "pids"))), []
    pids = lambda: list(map(int, (tmp_path / "pids").read_text().split()))
    # After a time-out and an exit all is gone before the next worker starts, at close when that
    # returns.
    found = score(
        spec,
        [how],
        timeout_s=8.0,
        then=(
            lambda: ended.extend(pids()) if how == "close" else ended.append(gone(pids())),
            ["fine"],
        ),
    )
    assert found[-1] == 1.0 and len(pids()) == 5
    assert (gone(pids()) if how == "close" else ended[0]) == []
    assert (
        found[0] == 0.5
        if how == "close"
        else {"hang": "wait 'reward'", "exit": "status 3"}[how] in found[0]
    )


def test_all_that_a_reward_has_started_ends_with_a_node_that_is_killed(tmp_path):
    spec = write(tmp_path / "my.py", STARTS.format(pids=str(tmp_path / "pids")))
    node = f"""
import asyncio, sys
sys.path.insert(0, {str(REPO)!r})
from bridge.reward_pool import RewardWorkers
async def main():
    await RewardWorkers({spec!r}, 1, 600.0).score(["hang"], {{}})
asyncio.run(main())
"""
    node = subprocess.Popen([sys.executable, "-c", node])
    file, deadline = tmp_path / "pids", time.monotonic() + 60
    while not file.exists() or len(file.read_text().split()) < 5:
        assert node.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)  # polling another process
    workers = [p.pid for p in psutil.Process(node.pid).children(recursive=True)]
    node.send_signal(signal.SIGKILL)
    node.wait()
    assert gone([*map(int, file.read_text().split()), *workers]) == []


# ---- what is loaded ------------------------------------------------------------------------------
KINDS = {
    "dataclass": "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Verdict:\n"
    "    right: bool\n    why: str = ''\n"
    "def score(completion, example):\n    return float(Verdict(completion == 'a').right)\n",
    "pool": "from concurrent.futures import ProcessPoolExecutor\ndef right(c):\n    return float(c == 'a')\n"
    "def score(completion, example):\n"
    "    with ProcessPoolExecutor(1) as pool:\n        return pool.submit(right, completion).result(60)\n",
    **{
        method: "import multiprocessing\nfrom neighbour import right\ndef put(queue, c):\n    queue.put(right(c))\n"
        "def score(completion, example):\n"
        f"    context = multiprocessing.get_context({method!r})\n    queue = context.Queue()\n"
        "    context.Process(target=put, args=(queue, completion)).start()\n    return queue.get(timeout=60)\n"
        for method in ("spawn", "forkserver")
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["my.py", "my-reward.v2.py", "rewards.py", "task.py"])
def test_a_reward_file_is_a_module_of_its_own_name_for_dataclasses_and_pickle(tmp_path, kind, name):
    if name != "my.py" and kind not in ("spawn", "dataclass"):
        return
    write(tmp_path / "neighbour.py", "def right(c):\n    return float(c == 'a')\n")
    assert score(write(tmp_path / name, KINDS[kind]), ["a", "b"]) == [1.0, 0.0]


OURS = ["metrics", "task", "rewards", "loss", "utils", "batch", "model", "waits", "datasets"]


def test_neighbours_of_a_reward_file_may_be_called_like_ours_and_are_not_imported_by_the_trainer(
    tmp_path,
):
    for name in OURS:
        write(
            tmp_path / f"{name}.py",
            f"VALUE = {len(name)}\ndef right(c):\n    return float(c == 'a')\n",
        )
    imports = "".join(f"from {name} import VALUE as {name}_VALUE, right\n" for name in OURS)
    values = " + ".join(f"{name}_VALUE" for name in OURS)
    spec = write(
        tmp_path / "of_mine.py", f"{imports}def score(completion, example):\n    return {values}\n"
    )
    before = list(sys.path)
    assert parse_config(["--reward", spec]).reward == spec
    assert sys.path == before and "of_mine" not in sys.modules
    assert score(spec, ["a"]) == [float(sum(map(len, OURS)))]


def test_our_own_modules_are_not_there_in_a_worker(tmp_path):
    names = [path.stem for path in REPO.glob("*.py")]
    spec = write(
        tmp_path / "my.py",
        "import importlib.util\ndef score(completion, example):\n"
        "    return float(importlib.util.find_spec(completion) is not None)\n",
    )
    assert "loss" in names
    assert dict(zip(names, score(spec, names))) == dict.fromkeys(names, 0.0)


def test_a_reward_file_named_like_a_module_of_python_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="Python has a module of its own called json; rename the file"
    ):
        parse_config(
            [
                "--reward",
                write(tmp_path / "json.py", "def score(completion, example):\n    return 1.0\n"),
            ]
        )


def test_the_time_that_an_import_takes_is_not_the_first_sample_s(tmp_path):
    spec = write(
        tmp_path / "my.py",
        "import time\ntime.sleep(3)\ndef score(completion, example):\n    return 1.0\n",
    )
    assert score(spec, ["a"], timeout_s=1.5) == [1.0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import time\ntime.sleep(600)\n", "wait 'reward start': "),
        (
            "import no_such\n",
            "cannot be imported: ModuleNotFoundError: No module named 'no_such' (my.py line 1)",
        ),
    ],
)
def test_a_reward_file_that_cannot_be_loaded_is_one_line_before_anything_starts(
    tmp_path, text, reason
):
    flags = ["--reward", write(tmp_path / "my.py", text)]
    flags += ["--rollout-args", "--reward-start-timeout-s 3"]
    ended = run_program(REPO / "train_cispo.py", *flags, cwd=tmp_path, timeout_s=300)
    (line,) = ended.stderr.splitlines()
    assert (
        ended.returncode == 2
        and line.startswith("train_cispo.py: error: --reward ")
        and reason in line
    ), line
    assert not (tmp_path / "runs/tiny").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def score(:\n", "cannot be imported: SyntaxError: "),
        ("import sys\nsys.exit('no key')\n", "SystemExit: no key"),
        ("import os\nos._exit(4)\n", "its process ended with status 4 while it was imported"),
        ("x = 1\n", "no function"),
    ],
)
def test_what_cannot_be_loaded_is_no_matter_of_samples(tmp_path, text, reason):
    with pytest.raises(ValueError, match=reason):
        score(write(tmp_path / "my.py", text), ["a"])


def test_a_run_keeps_the_reward_that_it_started_with(tmp_path):
    """Its file and its neighbours are edited, or are gone, when a worker has to start again."""
    late = "def score(completion, example):\n    import late\n    from package.inner import TWO\n"
    spec = write(
        tmp_path / "my.py",
        f"from near import ONE\n{late}    if completion == 'exit':\n        exit(1)\n"
        "    return ONE + TWO + late.FOUR\n",
    )
    for name, text in [
        ("near", "ONE = 1"),
        ("late", "FOUR = 4"),
        ("package/inner", "from .deep import TWO"),
        ("package/deep", "TWO = 2"),
    ]:
        write(tmp_path / f"{name}.py", text)
    digest = reward_process.reward_digest(spec)

    def edit():
        for file in (tmp_path / "my.py", tmp_path / "late.py", tmp_path / "package/deep.py"):
            file.write_text("TWO = FOUR = 100\ndef score(completion, example):\n    return 100.0\n")
        (tmp_path / "near.py").unlink()

    first, exited, last = score(spec, ["a"], then=(edit, ["exit", "a"]))
    assert (first, last) == (7.0, 7.0) and "status 1" in exited
    assert reward_process.reward_digest(spec) != digest


def test_the_digest_is_of_the_neighbours_too_and_not_of_the_place(tmp_path):
    specs = [write(tmp_path / place / "my.py", "import near\n") for place in "ab"]
    for place in "ab":
        write(tmp_path / place / "near.py", "ONE = 1\n")
        write(tmp_path / place / "other.py", f"# not imported: {place}\n")
    assert reward_process.reward_digest(specs[0]) == reward_process.reward_digest(specs[1]) != ""
    write(tmp_path / "b" / "near.py", "ONE = 2\n")
    assert reward_process.reward_digest(specs[0]) != reward_process.reward_digest(specs[1])


def test_the_reward_and_its_neighbours_are_among_the_sources_that_a_run_keeps(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    spec = write(tmp_path / "mine/metrics.py", "from package import near\n")
    write(tmp_path / "mine/package/near.py", "ONE = 1\n")
    cfg = replace(Config(), name="a", reward=spec)
    begin_run_dir(cfg, None, {}, print)
    code = cfg.run_dir / "code"
    assert (code / "reward/metrics.py").read_text() == "from package import near\n"
    assert (code / "reward/package/near.py").read_text() == "ONE = 1\n"
    assert (code / "loss.py").read_text() == (REPO / "loss.py").read_text()
    write(tmp_path / "mine/package/near.py", "ONE = 2\n")  # and the run goes on with that
    begin_run_dir(cfg, cfg.run_dir / "checkpoints/step-000003", {"step": 3}, print)
    assert (code / "reward/package/near.py").read_text() == "ONE = 2\n"
    assert (code / "reward-before-step-3/package/near.py").read_text() == "ONE = 1\n"


# ---- what is returned and raised -----------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "answer"),
    [
        *[
            (value, 1.0)
            for value in (
                True,
                1,
                np.isclose(1.0, 1.0),
                np.array(1.0),
                torch.tensor(1.0),
                Decimal(1),
                Fraction(1),
                np.float32(1),
                np.int64(1),
                torch.tensor(True),
            )
        ],
        (np.array([1.0, 2.0]), "wrong_type"),
        (np.eye(2), "wrong_type"),  # its repr has two lines
        (torch.tensor([1.0]), "wrong_type"),
        (np.array("1"), "wrong_type"),
        (None, "wrong_type"),
        ("1", "wrong_type"),
        (1j, "wrong_type"),
        (torch.tensor(1j), "wrong_type"),
        (np.array(np.nan), "not_finite"),
        (Decimal("sNaN"), "not_finite"),
        (10**400, "not_finite"),
        (1e39, "not_finite"),
        (-np.inf, "not_finite"),
    ],
)
def test_one_number_of_whatever_class_is_a_reward_and_nothing_else_is(value, answer):
    found = reward_process.judge(value)
    assert found.get("reward", found.get("kind")) == answer and found.get(
        "error", "it returned"
    ).startswith("it returned")
    assert "\n" not in found.get("error", "")


def test_what_a_judge_of_a_group_returns_is_told_in_one_line():
    found = reward_process.answer_to({"completions": ["a", "b", "c"]}, np.eye(2))
    assert found["error"].startswith("it returned array([[1., 0.], [0., 1.]])")


def test_an_error_is_told_with_its_class_its_last_words_and_its_place(tmp_path):
    spec = write(
        tmp_path / "my.py",
        "def score(completion, example):\n"
        "    raise RuntimeError('url ' + 'x' * 1000 + '\\nstatus 499: no such judge')\n",
    )
    (found,) = score(spec, ["a"])
    assert found.startswith("it raised RuntimeError: url xxx") and len(found) < 300
    assert found.endswith("xxx status 499: no such judge (my.py line 2)")


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_an_exception_that_is_no_exception_or_cannot_be_shown_costs_its_sample_alone(
    tmp_path, kind
):
    spec = write(
        tmp_path / "my.py",
        "class Panic(BaseException):\n"
        "    pass\n"
        "class Mute(TimeoutError):\n"
        "    def __str__(self):\n"
        "        raise ValueError('no words')\n"
        f"{kind} score(completion, example):\n"
        "    if completion != 'fine':\n"
        "        raise globals()[completion]()\n"
        "    return 1.0\n",
    )
    found = score(spec, ["Panic", "Mute", "fine"], timeout_s=10.0)
    assert found == ["it raised Panic (my.py line 8)", "it raised Mute", 1.0]


def test_a_worker_that_cannot_be_started_does_not_keep_the_others_from_their_end(
    tmp_path, monkeypatch
):
    async def no_memory(*command, **flags):
        raise OSError(12, "Cannot allocate memory")

    async def run():
        workers = RewardWorkers(write(tmp_path / "my.py", "score = float"), 1, 5.0)
        monkeypatch.setattr(asyncio, "create_subprocess_exec", no_memory)
        with pytest.raises(OSError, match="Cannot allocate"):
            await workers.start()
        await workers.close()

    asyncio.run(run())


# ---- a service that is away ----------------------------------------------------------------------
@pytest.fixture
def service():
    """An HTTP server whose first answers are of the statuses in `.statuses`; None drops the
    connection."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked += 1
            status = server.statuses.pop(0) if server.statuses else 200
            if status is None:
                self.connection.close()
                return
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"0.25")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    server.asked, server.statuses = 0, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


ASKS = {
    "urllib": "import urllib.request\ndef score(completion, example):\n"
    "    return float(urllib.request.urlopen(URL, timeout=20).read())\n",
    "requests": "import requests\ndef score(completion, example):\n"
    "    answer = requests.get(URL, timeout=20)\n    answer.raise_for_status()\n"
    "    return float(answer.text)\n",
    "httpx": "import httpx\ndef score(completion, example):\n"
    "    return float(httpx.get(URL, timeout=20).raise_for_status().text)\n",
    "aiohttp": "import aiohttp\nasync def score(completion, example):\n"
    "    async with aiohttp.ClientSession(raise_for_status=True) as session:\n"
    "        async with session.get(URL) as response:\n            return float(await response.text())\n",
    "wrapped": "import urllib.request\ndef score(completion, example):\n    try:\n"
    "        return float(urllib.request.urlopen(URL, timeout=20).read())\n"
    "    except Exception as e:\n        raise RuntimeError('no verdict') from e\n",
}


@pytest.mark.parametrize("how", ASKS)
def test_a_service_that_is_away_is_asked_again(tmp_path, service, how):
    url = f"URL = 'http://127.0.0.1:{service.server_address[1]}/'\n"
    service.statuses = [None, 503, 429, 200, 500]
    assert score(write(tmp_path / "my.py", url + ASKS[how]), ["a", "b", "c"]) == [0.25] * 3


@pytest.mark.parametrize("how", ASKS)
def test_a_service_where_nobody_listens_yet_is_asked_again(tmp_path, how):
    port = tmp_path / "port"
    url = f"URL = 'http://127.0.0.1:' + open({str(port)!r}).read() + '/'\n"
    body = ASKS[how].replace(
        "(completion, example):\n",
        f"(completion, example):\n    {url}    open({str(port)!r} + '.asked', 'w')\n",
    )
    port.write_text("1")  # nobody listens there

    def listen():
        deadline = time.monotonic() + 60
        while not Path(f"{port}.asked").exists() and time.monotonic() < deadline:
            time.sleep(0.02)  # polling another process
        port.write_text(str(server.server_address[1]))
        server.handle_request()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"0.25")

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    assert score(write(tmp_path / "my.py", body), ["a"]) == [0.25]
    thread.join(60)
    server.server_close()


@pytest.mark.parametrize("how", ASKS)
def test_a_status_that_says_that_the_question_is_wrong_is_an_error_and_not_asked_again(
    tmp_path, service, how
):
    url = f"URL = 'http://127.0.0.1:{service.server_address[1]}/'\n"
    service.statuses = [404]
    first, second = score(write(tmp_path / "my.py", url + ASKS[how]), ["a", "b"])
    assert first.startswith("it raised ") and second == 0.25 and service.asked == 2


def test_what_a_service_never_answers_is_dropped_when_it_answers_others(tmp_path, monkeypatch):
    monkeypatch.setattr(RewardWorkers, "PATIENCE_S", 0.2, raising=False)
    spec = write(
        tmp_path / "my.py",
        "def score(completion, example):\n    if completion == 'a':\n"
        "        raise ConnectionError('too long for me')\n    return 1.0\n",
    )
    assert score(spec, ["a", "b"]) == [
        "it raised ConnectionError: too long for me (my.py line 3)",
        1.0,
    ]


def test_the_token_of_the_run_is_not_in_the_environment_of_a_reward(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "CISPO_TOKEN", "secret")
    spec = write(
        tmp_path / "my.py",
        "import os\ndef score(completion, example):\n"
        "    return float('secret' in ' '.join(os.environ.values()))\n",
    )
    assert score(spec, ["a"]) == [0.0]


def test_a_function_that_cannot_be_called_as_a_reward_is_refused_when_it_is_loaded(tmp_path):
    (tmp_path / "r.py").write_text(
        "def one(completion): return 1.0\ndef both(completion, example, scale=2): return 1.0\n"
    )
    check_reward(f"{tmp_path}/r.py:both", 60.0, 60.0)
    with pytest.raises(
        ValueError,
        match=r"r.py:one'.*called with \(completion, example\): too many positional arguments",
    ):
        check_reward(f"{tmp_path}/r.py:one", 60.0, 60.0)
