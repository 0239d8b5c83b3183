"""The processes that others start, watch and end: vLLM and the reward workers of a rollout node, and the rollout node
that the trainer keeps on its own machine.

Each is ended with whoever started it, even by kill -9 (`with_parent`, and `guarded` for vLLM), and none gets the hub's
token but the node.
"""

import asyncio
import contextlib
import json
import os
import platform
import random
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import aiohttp
import torch

from rewards import KEPT, reward_sources
from waits import Wait, WaitOver, in_utf8
from weights import cores

REPO = Path(__file__).resolve().parent


def log(message: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] rollout: {in_utf8(message)}", flush=True)


def node_name(pid: int, mark: str) -> str:
    """Two containers may have the same host name and process id, hence a mark that is drawn."""
    return f"{socket.gethostname()}:{pid}:{mark}"


def with_parent(command: list[str]) -> list[str]:
    """The command, to end with SIGTERM when this process is gone (Linux), so that even kill -9 leaves no orphan.

    The child asks for it itself, and then becomes the command. A preexec_fn would ask in a fork of this process, whose
    other threads may hold any lock at that moment: such a child hangs, and whoever started it with it.
    """
    ask = f"import ctypes, os, sys; ctypes.CDLL(None).prctl(1, {signal.SIGTERM:d}); "  # 1 = PR_SET_PDEATHSIG
    ask += f"os.getppid() == {os.getpid()} or os._exit(1); os.execvp(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-I", "-S", "-c", ask, *command]


# What is started may be many processes, hang while it ends, or leave some behind: a process that nothing can hang
# stands between it and the node. Whoever loses its parent becomes the guard's child, in whatever session it is.
GUARD = """
import ctypes, os, signal, subprocess, sys, time
def end(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit
signal.signal(signal.SIGTERM, end)
prctl = ctypes.CDLL(None).prctl
prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG: when the node is gone
prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
def kill_children():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = open(f"/proc/{pid}/stat").read()
            if int(stat.rpartition(")")[2].split()[1]) == os.getpid():
                os.kill(int(pid), signal.SIGKILL)
        except OSError:
            pass
child = None
try:
    if os.getppid() == int(sys.argv[1]):
        child = subprocess.Popen(sys.argv[3:])
        while (ended := os.wait())[0] != child.pid:
            pass  # an orphan
        child.returncode = os.waitstatus_to_exitcode(ended[1])
        sys.exit(child.returncode if child.returncode >= 0 else 128 - child.returncode)
finally:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        if child and child.poll() is None and float(sys.argv[2]):
            os.killpg(0, signal.SIGTERM)
            child.wait(float(sys.argv[2]))
    except subprocess.TimeoutExpired:
        pass
    finally:
        give_up = time.monotonic() + 10
        while time.monotonic() < give_up:  # the children of those killed are next
            kill_children()
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                break
            time.sleep(0.01)
        else:
            os.killpg(0, signal.SIGKILL)
"""


def guarded(command: list[str], grace_s: float = 10.0) -> list[str]:
    """The command under a guard. Start it in a session of its own: its end, SIGTERM to the guard, or this process's
    death end all that it has started, the session politely first, after grace_s by SIGKILL."""
    return [sys.executable, "-I", "-S", "-c", GUARD, str(os.getpid()), str(grace_s), *command]


def backoff_s(attempt: int, most: float = 10.0) -> float:
    """Seconds before the next attempt: they double, and differ between those that failed at the same moment."""
    return min(most, 0.25 * 2**attempt) * random.uniform(0.5, 1.5)


# ---- vLLM ----------------------------------------------------------------------------------------------------
ROUTES = {  # what is used of vLLM, and what opens it
    "/health": "vLLM", "/metrics": "vLLM", "/inference/v1/generate": "--enable-scale-out",
    **dict.fromkeys(("/pause", "/resume", "/start_weight_update", "/update_weights", "/finish_weight_update",
                     "/weight_checker"), "VLLM_SERVER_DEV_MODE=1"),
}  # fmt: skip
MENDED_BY = "versions 0.32 and 0.33 have them (bash launch.sh install); check --vllm-command and --vllm-args too"


# What a request to a server on this machine or elsewhere may raise, besides its own refusal (RuntimeError).
NO_ANSWER = (aiohttp.ClientError, TimeoutError, OSError)


class VLLMUnfit(Exception):
    """This vLLM lacks something, and would after every restart; the message says all that is missing."""


def reason_of(output: str) -> str:
    """The line of vLLM's output that says why it did not start, or "": the last error that is not said to follow from
    another process's."""
    prefix = r"^\s*\(\w+ pid=\d+\)\s*(ERROR \S+ \S+ \[[^]]*\]\s*)?"
    lines, reason = [re.sub(prefix, "", line).strip() for line in output.splitlines()], ""
    for line, after in zip(lines, [*lines[1:], ""]):
        if re.match(r"[\w.]*(Error|Exception): |.*: error: argument |\S+: No module named ", line):
            if "initialization failed" not in line:  # else another process says why
                reason = f"{line}: {after.split(' [type=')[0]}" if "ValidationError: " in line else line
    return reason[:600]


HOPELESS = r"(Value|Import|ModuleNotFound|FileNotFound|NotImplemented)Error: |: No module "


class VLLM:
    """One vLLM server process on the loopback address. All that depends on vLLM's version is here, its flags and its
    routes, but for the part that runs inside of it (vllm_engine.py)."""

    def __init__(self, cfg, run: dict, log_path: Path):
        self.cfg, self.run, self.log_path = cfg, run, log_path
        self.process: asyncio.subprocess.Process | None = None
        self.starting: asyncio.Task | None = None
        self.was_up, self.version, self.why = False, "", ""  # why: it did not start the last time

    async def start(self, checkpoint: Path) -> None:
        """Start the server on a checkpoint directory and wait until it is healthy.

        Raises: RuntimeError with vLLM's own reason when it exits or takes too long, VLLMUnfit for one that stays.
        """
        await self.stop()
        with socket.socket() as s:  # a free port; vLLM binds it a moment later
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command, env = self._command(checkpoint, port)
        self.session = aiohttp.ClientSession(
            f"http://127.0.0.1:{port}", timeout=aiohttp.ClientTimeout(total=None, sock_connect=30.0),
            # vLLM closes connections that are idle for 5 s; a request may meet that, and POST is not repeated.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
        )  # fmt: skip
        with open(self.log_path, "a") as out:
            begin = out.tell()
            self.starting = asyncio.create_task(asyncio.create_subprocess_exec(
                *guarded(command), env=env, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            ))  # fmt: skip
            try:
                self.process = await asyncio.shield(self.starting)  # cancelled here, it would be one nobody knows
            except OSError:
                self.starting = None
                await self.session.close()
                raise
        wait, said = Wait("vllm start", self.cfg.vllm_start_timeout_s), 0.0
        while not await self.healthy():
            if self.process.returncode is not None or wait.over:
                why = wait.message() if wait.over else f"vLLM ended with status {self.process.returncode}"
                await self.stop(kill=True)
                self._give_up(why, begin)
            if wait.waited_s > said + 5:
                said = wait.waited_s
                log(f"vLLM is starting ({said:.0f} s)")
            await asyncio.sleep(0.25)  # polling another process: there is no event to wait for
        self.version = await self.probe()
        self.was_up, self.why = True, ""
        log(f"vLLM is up after {wait.waited_s:.0f} s, pid {self.process.pid}, port {port}, version {self.version}")

    def _command(self, checkpoint: Path, port: int) -> tuple[list[str], dict[str, str]]:
        """vLLM's command line and environment."""
        command = [
            *(shlex.split(self.cfg.vllm_command)
              or [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"]),
            "--model", str(checkpoint), "--host", "127.0.0.1", "--port", str(port),
            "--dtype", self.run["dtype"], "--max-model-len", str(self.run["max_model_len"]),
            "--seed", str(self.run["seed"]),
            "--enable-scale-out",  # opens /inference/v1/generate: token ids in, token ids out
            "--generation-config", "vllm",  # or the checkpoint's top_p and top_k would silently truncate sampling
            "--logprobs-mode", "processed_logprobs",  # at the sampling temperature, as the trainer computes them
            "--worker-extension-cls", "vllm_engine.WorkerExtension",
            "--weight-transfer-config", '{"backend": "safetensors"}',
            "--disable-uvicorn-access-log",
            *(["--hf-overrides", '{"head_dtype": "float32"}'] if self.run.get("fp32_lm_head") else []),
            *shlex.split(self.cfg.vllm_args),
        ]  # fmt: skip
        # The engine's folder alone, and by -P above not the directory that this was started in: a module there would
        # take the place of a package of its name that vLLM or transformers imports.
        path = os.pathsep.join(filter(None, (str(REPO / "inside_vllm"), os.environ.get("PYTHONPATH"))))
        env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
               "VLLM_SERVER_DEV_MODE": "1"}  # dev mode opens the weight update routes  # fmt: skip
        env.pop("CISPO_TOKEN", None)
        if not torch.cuda.is_available():
            threads = self.cfg.vllm_threads or max(1, cores() // 2)
            env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                    "OMP_NUM_THREADS": str(threads)}  # fmt: skip
            command.append("--enforce-eager")
            if not re.search("parallel|executor", self.cfg.vllm_args):
                # One process for engine and worker. As two they wait for each other in busy loops, which on two cores
                # take a third of the machine from the trainer. vLLM prefers two since it sets a worker's OpenMP
                # environment itself; here that is set above, and the variable makes vLLM accept it.
                env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
                command += ["--distributed-executor-backend", "uni"]
        return command, env

    def _give_up(self, why: str, begin: int) -> None:
        """Raises: VLLMUnfit where the next start would end as this one: vLLM has refused its settings, or has failed
        twice alike without ever having been up; RuntimeError otherwise. begin: of this start in vLLM's log."""
        with open(self.log_path, "rb") as file:
            file.seek(begin)
            output = file.read().decode(errors="replace")
        reason, before = reason_of(output), self.why
        tail = "\n".join(output.splitlines()[-30:])
        log(f"{self.log_path} ends:\n{tail}")
        if unknown := re.search(r"unrecognized arguments: (.*)", tail):
            raise VLLMUnfit(f"vLLM does not know the arguments {unknown[1]}; {MENDED_BY}")
        # Memory may be free a moment later: an old server's, or the trainer's.
        hopeless = re.search(HOPELESS, reason) and "memory" not in reason
        self.why = reason
        if re.search("ValidationError: |: error: argument ", reason):
            refused = re.sub(r".*?(ValidationError: \d+ .*?: |: error: )", "", reason)
            raise VLLMUnfit(f"vLLM refuses its settings: {refused}; see --vllm-args and the run's flags")
        if hopeless and not self.was_up and reason == before:
            raise VLLMUnfit(f"vLLM does not start: {reason} ({self.log_path})")
        raise RuntimeError(f"{why}: {reason or tail[-300:]} ({self.log_path})")

    def engine(self) -> str:
        """Of what kind it is: engines of one kind make the same of the same weights, to the bit."""
        card = [line for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
                for line in file.read_text().splitlines() if line.startswith("Model:")]  # fmt: skip
        device = " ".join(dict.fromkeys(card)) or f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        return f"vLLM {self.version} on {device}, {self.cfg.vllm_command} {self.cfg.vllm_args}"

    async def probe(self) -> str:
        """The server's version. Raises: VLLMUnfit naming every route that it lacks."""
        async with self.session.get("/version") as response:
            found = re.search(r'"version": *"([^"]*)"', await response.text())
        version = found[1] if found else "unknown"
        missing = []
        for route, opened_by in ROUTES.items():
            async with self.session.options(route) as response:  # a route that is there refuses the method: 405
                if response.status == 404:
                    missing.append(f"{route} (of {opened_by})")
        if missing:
            raise VLLMUnfit(f"vLLM of version {version} lacks the routes {', '.join(missing)}; {MENDED_BY}")
        return version

    async def healthy(self) -> bool:
        try:
            async with self.session.get("/health", timeout=aiohttp.ClientTimeout(total=30)) as response:
                return response.status == 200
        except (*NO_ANSWER, RuntimeError):  # RuntimeError: the session of a stopped server
            return False

    async def vitals(self) -> dict[str, float] | None:
        """What vLLM says of its load, and the tokens it has made so far; None when it does not answer.
        Raises: RuntimeError when its process or its engine is dead by its own account."""
        if self.process.returncode is not None:
            raise RuntimeError(f"vLLM ended with status {self.process.returncode}")
        names = {"vllm:num_requests_running": "running", "vllm:num_requests_waiting": "waiting",
                 "vllm:kv_cache_usage_perc": "kv", "vllm:num_preemptions_total": "preemptions",
                 "vllm:generation_tokens_total": "tokens", "vllm:prompt_tokens_total": "prompt_tokens"}  # fmt: skip
        found = dict.fromkeys(names.values(), 0.0)
        try:
            async with self.session.get("/health", timeout=aiohttp.ClientTimeout(total=5)) as response:
                if response.status >= 500:
                    raise RuntimeError(f"vLLM's /health answers {response.status}: its engine is dead")
            async with self.session.get("/metrics", timeout=aiohttp.ClientTimeout(total=5)) as response:
                for line in (await response.text()).splitlines():
                    name, _, rest = line.partition("{")
                    if name in names:  # one line for each engine of a data-parallel vLLM
                        found[names[name]] += float(rest.rsplit(" ", 1)[1])
        except (*NO_ANSWER, ValueError, IndexError):
            return None
        return found

    async def stop(self, kill: bool = False) -> None:
        """End the process and all it started: politely first, or at once where it no longer listens."""
        if self.starting is None:
            return
        self.process = await self.starting
        await self.session.close()
        with contextlib.suppress(ProcessLookupError, TimeoutError):
            if not kill:
                self.process.terminate()  # its guard ends the rest
                await asyncio.wait_for(self.process.wait(), 15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()
        self.process = self.starting = None

    async def post(self, route: str, body: dict | None = None) -> dict:
        """Raises: RuntimeError when vLLM answers with an error, or what is no JSON object; NO_ANSWER's when it does not
        answer."""
        async with self.session.post(route, json=body) as response:
            text = await response.text()
            if response.status != 200:
                raise RuntimeError(f"vLLM answered {route} with {response.status}: {text[:500]}")
            try:
                return dict(json.loads(text))
            except (ValueError, TypeError):
                raise RuntimeError(f"vLLM answered {route} with what is no JSON object: {text[:500]}") from None

    async def load(self, checkpoint: Path, version: int) -> dict[str, float]:
        """Put the weights of a verified directory into the running model. Returns the seconds of each part.

        Between pause and resume no engine step runs, so no token is sampled from half-loaded weights. Requests in
        flight are kept; vLLM labels the tokens before and after. What they have in the KV cache is computed again by
        the new weights, unless the run says otherwise (vLLM counts that as preemptions).
        Raises: WaitOver when vLLM takes too long over it, and as `post`.
        """
        wait, start = Wait("weight update", self.cfg.load_timeout_s), time.perf_counter()
        try:
            async with asyncio.timeout(self.cfg.load_timeout_s):
                recompute = str(self.run.get("recompute_kv_cache", True)).lower()
                await self.post(f"/pause?mode=keep&clear_cache={recompute}")
                paused = time.perf_counter()
                await self.post("/start_weight_update")
                await self.post("/update_weights", {"update_info": {"path": str(checkpoint)}})
                await self.post("/finish_weight_update", {"weight_version": str(version)})
                loaded = time.perf_counter()
                await self.post("/resume")
        except TimeoutError:
            raise WaitOver(wait.message(f"v{version}")) from None
        return {"pause_s": paused - start, "load_s": loaded - paused, "stopped_s": time.perf_counter() - start}

    async def checksums(self) -> dict[str, str]:
        """Raises: as `load`."""
        wait = Wait("weight update", self.cfg.load_timeout_s)
        try:
            async with asyncio.timeout(self.cfg.load_timeout_s):
                answer = await self.post("/weight_checker", {"action": "checksum"})
        except TimeoutError:
            raise WaitOver(wait.message("checksums")) from None
        return dict(answer.get("checksums") or {})

    async def generate(self, prompt_ids: list[int], sampling: dict, version: int) -> list[dict]:
        """All samples of a prompt in one request; vLLM shares the prompt's prefill between them."""
        # The salt keeps a prefix that older weights computed from being reused under newer ones: version 40 of a
        # trainer that was started again is another one than before, hence the run's id.
        salt = f"{self.run.get('id', '')}-v{version}"
        body = {"token_ids": prompt_ids, "sampling_params": sampling, "cache_salt": salt}
        return list((await self.post("/inference/v1/generate", body)).get("choices") or [])


# ---- rewards -------------------------------------------------------------------------------------------------
class RewardsEnd(ValueError):
    """The reward function cannot be loaded, or its service is away for too long: the run cannot go on."""


class Away(str):
    """Why a sample has no reward, where the service that judges it did not answer."""


class RewardWorkers:
    """Reward functions in processes of their own (`python rewards.py SPEC`): one that raises, hangs, exits or prints
    costs a sample, and not the node. Each runs the sources as they were when this was made, and ends with all that it
    has started. `failed` counts such samples by kind, and by "away" the calls that were made again, until somebody
    takes the counts. Raises: ValueError when there is no such file; from `start` and `score`: RewardsEnd."""

    PATIENCE_S = 60.0  # with a service that answers others, and this sample not

    def __init__(self, spec: str, count: int, timeout_s: float, start_timeout_s: float = 300.0,
                 away_timeout_s: float = 600.0):  # fmt: skip
        self.spec, self.count, self.timeout_s = spec, count, timeout_s
        self.start_timeout_s, self.away_timeout_s = start_timeout_s, away_timeout_s
        self.processes: set[asyncio.subprocess.Process] = set()
        self.starting: set[asyncio.Task] = set()
        self.free: asyncio.Queue = asyncio.Queue()
        self.failed: Counter[str] = Counter()
        self.judged, self.away, self.said = 0, None, 0.0  # rewards; the wait for a service; when that was last told
        for _ in range(count):
            self.free.put_nowait(None)  # a worker that is started when it is first needed
        self.kept = os.fdopen(os.memfd_create("rewards"), "w")  # a file that no kill -9 leaves behind
        json.dump({path: text.decode("latin-1") for path, text in reward_sources(spec).items()}, self.kept)
        self.kept.flush()

    async def start(self) -> None:
        """All workers, so that a file that cannot be imported is known before the first sample."""
        await asyncio.gather(*(self._score([], {}) for _ in range(self.count)))

    async def score(self, completions: list[str], example: dict) -> list[float | str]:
        """A reward for each completion, or a line that says why it has none (Away: not for want of a good function).
        While the service that the function asks is away, one of them asks again and again; then the others follow."""
        judged, patience, attempt = self.judged, Wait("reward away", self.PATIENCE_S), 0
        answers = await self._score(completions, example)
        while again := [i for i, answer in enumerate(answers) if answer.get("kind") == "away"]:
            if patience.over and self.judged > judged:
                self.failed["raised"] += len(again)
                break
            await self._be_patient(answers[again[0]]["error"], attempt)
            again, attempt = again[:1] if self.away else again, attempt + 1
            for i, answer in zip(again, await self._score([completions[i] for i in again], example)):
                answers[i] = answer
        return [answer["reward"] if "reward" in answer else (Away if answer["kind"] == "away" else str)(answer["error"])
                for answer in answers]  # fmt: skip

    async def _be_patient(self, why: str, attempt: int) -> None:
        """Before a service is asked again. Raises: RewardsEnd when it has answered nobody for too long."""
        if self.away and self.away.over:
            raise RewardsEnd(self.away.message(why))
        if self.away and self.away.waited_s > 1 and time.monotonic() > self.said + 10:
            self.said = time.monotonic()
            log(f"the reward function's service is away for {self.away.waited_s:.0f} s, asking it again: {why}")
        await asyncio.sleep(min(backoff_s(attempt), max(0.05, self.away_timeout_s / 4)))

    async def _score(self, completions: list[str], example: dict) -> list[dict]:
        worker = await self.free.get()
        try:
            answers: list[dict] = []
            worker = worker or await self._start()
            while left := completions[len(answers) :]:
                worker = worker or await self._start()
                # All at once: worker and node would else wait for each other's turn on the CPU at every sample.
                with contextlib.suppress(ConnectionError):  # it has died; its silence is dealt with below
                    for completion in left:
                        job = {"completion": completion, "example": example}
                        worker.stdin.write(json.dumps(job).encode() + b"\n")
                while worker is not None and len(answers) < len(completions):
                    answer, worker = await self._answer(worker)
                    answers.append(answer)
            return answers
        except asyncio.CancelledError:
            self._kill(worker)  # its answer would be taken for the next one's
            worker = None
            raise
        finally:
            self.free.put_nowait(worker)

    async def _start(self) -> asyncio.subprocess.Process:
        """A worker that has loaded the function."""
        env = {**os.environ, KEPT: f"/proc/{os.getpid()}/fd/{self.kept.fileno()}"}
        env.pop("CISPO_TOKEN", None)
        # -P: this directory is not on its path, or a module of ours would be in the place of a user's or a library's.
        command = guarded([sys.executable, "-P", str(REPO / "rewards.py"), self.spec], grace_s=0.0)
        attempt = 0
        while True:
            start = asyncio.create_task(asyncio.create_subprocess_exec(
                *command, env=env, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True
            ))  # fmt: skip
            self.starting.add(start)
            worker = await asyncio.shield(start)  # cancelled here, it would be a process nobody knows
            self.starting.discard(start)
            self.processes.add(worker)
            try:
                wait = Wait("reward start", self.start_timeout_s)
                said = await self._line(worker, wait)
            except asyncio.CancelledError:
                self._kill(worker)
                raise
            if said == {}:
                return worker
            await self._end(worker)
            if said is None:
                raise RewardsEnd(f"--reward {self.spec!r}: {wait.message()}")
            if isinstance(said, int):
                raise RewardsEnd(f"--reward {self.spec!r}: its process ended with status {said} while it was imported")
            self._count(said)
            if said["kind"] != "away":
                raise RewardsEnd(said["error"])
            await self._be_patient(said["error"], attempt)
            attempt += 1

    async def _line(self, worker, wait: Wait) -> dict | int | None:
        """The worker's next line; its status if it has ended; None if it takes too long."""
        try:
            async with asyncio.timeout(wait.deadline_s):  # not wait_for: in Python 3.11 it may swallow a cancellation
                line = await worker.stdout.readline()
        except TimeoutError:
            return None
        if line:
            return json.loads(line)
        with contextlib.suppress(TimeoutError):  # it has closed its end: its own status, if it has one
            async with asyncio.timeout(2.0):
                await worker.wait()
        self._kill(worker)
        return await worker.wait()

    async def _answer(self, worker) -> tuple[dict, asyncio.subprocess.Process | None]:
        """The worker's answer to a job, or why there is none; and the worker, None if it is gone."""
        wait = Wait("reward", self.timeout_s)
        answer = await self._line(worker, wait)
        if not isinstance(answer, dict):
            await self._end(worker)  # before the next one, which may need what it has
            ended = f"the reward function's process ended with status {answer}"
            kind, why = ("timed_out", wait.message()) if answer is None else ("exited", ended)
            answer, worker = {"kind": kind, "error": why}, None
        self._count(answer)
        return answer, worker

    def _count(self, answer: dict) -> None:
        if kind := answer.get("kind"):
            self.failed[kind] += 1
        if "reward" in answer:
            self.judged, self.away = self.judged + 1, None
        elif kind == "away" and self.away is None:
            self.away = Wait("reward away", self.away_timeout_s)

    def _kill(self, worker) -> None:
        self.processes.discard(worker)
        if worker is None:
            return
        worker.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            if worker.returncode is None:
                worker.terminate()  # its guard ends it, and all that it has started
            else:
                os.killpg(worker.pid, signal.SIGKILL)  # a guard that was killed itself

    async def _end(self, worker) -> None:
        """Kill a worker and see it gone."""
        self._kill(worker)
        try:
            async with asyncio.timeout(15.0):  # its guard has 10
                await worker.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)

    async def close(self) -> None:
        workers = [*self.processes, *[await start for start in self.starting]]
        for worker in workers:
            self._kill(worker)
        for worker in workers:
            await self._end(worker)
        self.processes, self.starting = set(), set()
        self.kept.close()


def check_reward(spec: str, start_timeout_s: float, away_timeout_s: float) -> None:
    """Load a reward function once, in a process of its own. Raises: ValueError that says why it cannot be."""

    async def load() -> None:
        workers = RewardWorkers(spec, 1, 0.0, start_timeout_s, away_timeout_s)
        try:
            await workers.start()
        finally:
            await workers.close()

    asyncio.run(load())


# ---- the rollout node on the trainer's machine -----------------------------------------------------------------
def rollout_gpus(visible: str, ranks: int) -> str:
    """CUDA_VISIBLE_DEVICES of the local rollout node: those that no rank of the trainer has, or all if none is left."""
    gpus = visible.split(",")
    return ",".join(gpus[ranks:] or gpus)


class LocalRollout:
    """rollout.py beside the trainer, started again when it ends, unless it ends again and again."""

    MAX_STARTS = 5  # in a row, without a new group between them

    def __init__(self, hub, directory: Path, args: str, log_path: Path):
        self.hub, self.log_path = hub, log_path
        self.command = [sys.executable, str(REPO / "rollout.py"), hub.url, "--dir", str(directory), *shlex.split(args)]
        torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
        self.env = {k: v for k, v in os.environ.items() if k not in torchrun and not k.startswith("TORCHELASTIC")}
        if torch.cuda.is_available():
            given = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
            self.env["CUDA_VISIBLE_DEVICES"] = rollout_gpus(given, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.starts, self.groups, self.not_before = 0, -1, 0.0
        self.process: subprocess.Popen | None = None
        self._start()

    def _start(self) -> None:
        self.starts += 1
        self.mark = secrets.token_hex(4)
        env = {**self.env, "CISPO_TOKEN": self.hub.token, "CISPO_NODE_MARK": self.mark}
        with open(self.log_path, "a") as out:
            print(f"[{time.strftime('%H:%M:%S')}] a rollout node is started", file=out, flush=True)
            self.process = subprocess.Popen(
                with_parent(self.command), env=env, stdout=out, stderr=out,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def keep(self, groups: int, say) -> None:
        """Called while the trainer waits. groups: that have come in so far.
        Raises: RuntimeError when the process has ended MAX_STARTS times and no group came between."""
        if groups > self.groups:
            self.groups, self.starts = groups, min(self.starts, 1)
        if (status := self.process.poll()) is None:
            return
        if not self.not_before:
            lines = self.log_path.read_text(errors="replace").strip().splitlines()
            why = f"the rollout process ended with status {status}: {lines[-1] if lines else ''} ({self.log_path})"
            self.hub.release(node_name(self.process.pid, self.mark))
            if self.starts >= self.MAX_STARTS or status == 2:  # 2: another start would end the same way
                raise RuntimeError(f"{why}; started {self.starts} times without a group")
            pause_s = backoff_s(self.starts)
            say(f"{why}; starting it again in {pause_s:.1f} s")
            self.not_before = time.monotonic() + pause_s
        elif time.monotonic() >= self.not_before:
            self.not_before = 0.0
            self._start()

    def stop(self, patience_s: float = 60.0) -> None:
        wait = Wait("rollout end", patience_s, whom=f"its rollout process, pid {self.process.pid},")
        self.process.terminate()
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            log(wait.message())
            self.process.kill()  # its vLLM and workers die with it
            self.process.wait()
