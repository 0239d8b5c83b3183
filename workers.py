"""The processes that others start, watch and end: vLLM and the reward workers of a rollout node, and the rollout node
that the trainer keeps on its own machine.

Each is ended with whoever started it, even by kill -9 (`with_parent`, and `guarded` for vLLM), and none gets the hub's
token but the node.
"""

import asyncio
import contextlib
import json
import os
import random
import re
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

from waits import Wait, WaitOver

REPO = Path(__file__).resolve().parent


def log(message: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] rollout: {message}", flush=True)


def with_parent(command: list[str]) -> list[str]:
    """The command, to end with SIGTERM when this process is gone (Linux), so that even kill -9 leaves no orphan.

    The child asks for it itself, and then becomes the command. A preexec_fn would ask in a fork of this process, whose
    other threads may hold any lock at that moment: such a child hangs, and whoever started it with it.
    """
    ask = f"import ctypes, os, sys; ctypes.CDLL(None).prctl(1, {signal.SIGTERM:d}); "  # 1 = PR_SET_PDEATHSIG
    ask += f"os.getppid() == {os.getpid()} or os._exit(1); os.execvp(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-I", "-S", "-c", ask, *command]


# vLLM is several processes, and may hang while it ends: a process that nothing can hang stands between it and the node.
GUARD = """
import ctypes, os, signal, subprocess, sys
def end(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit
signal.signal(signal.SIGTERM, end)
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG: when the node is gone
child = None
try:
    if os.getppid() == int(sys.argv[1]):
        child = subprocess.Popen(sys.argv[3:])
        status = child.wait()
        sys.exit(status if status >= 0 else 128 - status)
finally:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if child is None or child.poll() is None:
        os.killpg(0, signal.SIGTERM)
        try:
            child and child.wait(float(sys.argv[2]))
        finally:
            os.killpg(0, signal.SIGKILL)  # all that it started; this process too
"""


def guarded(command: list[str], grace_s: float = 10.0) -> list[str]:
    """The command under a guard. Start it in a session of its own: SIGTERM to the guard, or this process's death, ends
    all of the session, politely first, after grace_s by SIGKILL."""
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


class VLLMUnfit(Exception):
    """This vLLM lacks something, and would after every restart; the message says all that is missing."""


class VLLM:
    """One vLLM server process on the loopback address. All that depends on vLLM's version is here, its flags and its
    routes, but for the part that runs inside of it (vllm_engine.py)."""

    def __init__(self, cfg, run: dict, log_path: Path):
        self.cfg, self.run, self.log_path = cfg, run, log_path
        self.process: asyncio.subprocess.Process | None = None
        self.starting: asyncio.Task | None = None

    async def start(self, checkpoint: Path) -> None:
        """Start the server on a checkpoint directory and wait until it is healthy.

        Raises: RuntimeError with the end of vLLM's log when it exits or takes too long, VLLMUnfit.
        """
        await self.stop()
        with socket.socket() as s:  # a free port; vLLM binds it a moment later
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
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
            threads = self.cfg.vllm_threads or max(1, os.cpu_count() // 2)
            env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                    "OMP_NUM_THREADS": str(threads)}  # fmt: skip
            command.append("--enforce-eager")
            if not re.search("parallel|executor", self.cfg.vllm_args):
                # One process for engine and worker. As two they wait for each other in busy loops, which on two cores
                # take a third of the machine from the trainer. vLLM prefers two since it sets a worker's OpenMP
                # environment itself; here that is set above, and the variable makes vLLM accept it.
                env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
                command += ["--distributed-executor-backend", "uni"]
        self.session = aiohttp.ClientSession(
            f"http://127.0.0.1:{port}", timeout=aiohttp.ClientTimeout(total=self.cfg.request_timeout_s),
            # vLLM closes connections that are idle for 5 s; a request may meet that, and POST is not repeated.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
        )  # fmt: skip
        with open(self.log_path, "a") as out:
            self.starting = asyncio.create_task(asyncio.create_subprocess_exec(
                *guarded(command), env=env, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            ))  # fmt: skip
            self.process = await asyncio.shield(self.starting)  # cancelled here, it would be a process nobody knows
        wait, said = Wait("vllm start", self.cfg.vllm_start_timeout_s), 0.0
        while not await self.healthy():
            if self.process.returncode is not None or wait.over:
                tail = "\n".join(self.log_path.read_text(errors="replace").splitlines()[-30:])
                why = wait.message() if wait.over else f"vLLM ended with status {self.process.returncode}"
                await self.stop(kill=True)
                if unknown := re.search(r"unrecognized arguments: (.*)", tail):
                    raise VLLMUnfit(f"vLLM does not know the arguments {unknown[1]}; {MENDED_BY}")
                raise RuntimeError(f"vLLM is not up after {wait.waited_s:.0f} s: {why}; {self.log_path} ends:\n{tail}")
            if wait.waited_s > said + 5:
                said = wait.waited_s
                log(f"vLLM is starting ({said:.0f} s)")
            await asyncio.sleep(0.25)  # polling another process: there is no event to wait for
        version = await self.probe()
        log(f"vLLM is up after {wait.waited_s:.0f} s, pid {self.process.pid}, port {port}, version {version}")

    async def probe(self) -> str:
        """The server's version. Raises: VLLMUnfit naming every route that it lacks."""
        async with self.session.get("/version") as response:
            version = (await response.json())["version"] if response.status == 200 else "unknown"
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
        except (aiohttp.ClientError, TimeoutError, RuntimeError):  # RuntimeError: the session of a stopped server
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
        except (aiohttp.ClientError, TimeoutError):
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
        """Raises: RuntimeError when vLLM answers with an error, aiohttp.ClientError when it does not answer."""
        async with self.session.post(route, json=body) as response:
            text = await response.text()
            if response.status != 200:
                raise RuntimeError(f"vLLM answered {route} with {response.status}: {text[:500]}")
            return json.loads(text)

    async def load(self, checkpoint: Path, version: int) -> dict[str, float]:
        """Put the weights of a verified directory into the running model. Returns the seconds of each part.

        Between pause and resume no engine step runs, so no token is sampled from half-loaded weights. Requests in
        flight are kept; vLLM labels the tokens before and after. What they have in the KV cache is computed again by
        the new weights, unless the run says otherwise (vLLM counts that as preemptions).
        Raises: WaitOver when vLLM takes too long over it, RuntimeError and aiohttp.ClientError as `post`.
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
        return (await self.post("/weight_checker", {"action": "checksum"}))["checksums"]

    async def generate(self, prompt_ids: list[int], sampling: dict, version: int) -> list[dict]:
        """All samples of a prompt in one request; vLLM shares the prompt's prefill between them."""
        # The salt keeps a prefix that older weights computed from being reused under newer ones: version 40 of a
        # trainer that was started again is another one than before, hence the run's id.
        salt = f"{self.run.get('id', '')}-v{version}"
        body = {"token_ids": prompt_ids, "sampling_params": sampling, "cache_salt": salt}
        return (await self.post("/inference/v1/generate", body))["choices"]


# ---- rewards -------------------------------------------------------------------------------------------------
class RewardWorkers:
    """Reward functions in processes of their own (`python rewards.py SPEC`): one that raises, hangs, exits or prints
    costs a sample, and not the node. `failed` counts such samples by kind, until somebody takes the counts."""

    def __init__(self, spec: str, count: int, timeout_s: float):
        self.spec, self.timeout_s = spec, timeout_s
        self.processes: set[asyncio.subprocess.Process] = set()
        self.starting: set[asyncio.Task] = set()
        self.free: asyncio.Queue = asyncio.Queue()
        self.failed: Counter[str] = Counter()
        for _ in range(count):
            self.free.put_nowait(None)  # a worker that is started when it is first needed

    async def score(self, completions: list[str], example: dict) -> list[float | str]:
        """A reward for each completion, or a line that says why it has none."""
        worker = await self.free.get()
        try:
            rewards: list[float | str] = []
            while left := completions[len(rewards) :]:
                worker = worker or await self._start()
                # All at once: worker and node would else wait for each other's turn on the CPU at every sample.
                with contextlib.suppress(ConnectionError):  # it has died; its silence is dealt with below
                    for completion in left:
                        job = {"completion": completion, "example": example}
                        worker.stdin.write(json.dumps(job).encode() + b"\n")
                while worker is not None and len(rewards) < len(completions):
                    reward, worker = await self._answer(worker)
                    rewards.append(reward)
            return rewards
        except asyncio.CancelledError:
            self._kill(worker)  # its answer would be taken for the next one's
            worker = None
            raise
        finally:
            self.free.put_nowait(worker)

    async def _start(self) -> asyncio.subprocess.Process:
        env = {k: v for k, v in os.environ.items() if k != "CISPO_TOKEN"}
        command = with_parent([sys.executable, str(REPO / "rewards.py"), self.spec])
        start = asyncio.create_task(asyncio.create_subprocess_exec(
            *command, env=env, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        ))  # fmt: skip
        self.starting.add(start)
        worker = await asyncio.shield(start)  # a task that is cancelled here would leave a process that nobody knows
        self.starting.discard(start)
        self.processes.add(worker)
        return worker

    async def _answer(self, worker):
        """The worker's next line, or why there is none; and the worker, None if it is gone."""
        wait = Wait("reward", self.timeout_s)
        try:
            async with asyncio.timeout(self.timeout_s):  # not wait_for: in Python 3.11 it may swallow a cancellation
                line = await worker.stdout.readline()
        except TimeoutError:
            self._kill(worker)
            self.failed["timed_out"] += 1
            return wait.message(), None
        if not line:
            with contextlib.suppress(TimeoutError):  # it has closed its end: its own status, if it has one
                async with asyncio.timeout(2.0):
                    await worker.wait()
            self._kill(worker)
            self.failed["exited"] += 1
            return f"the reward function's process ended with status {await worker.wait()}", None
        answer = json.loads(line)
        if "error" in answer:
            self.failed[answer["kind"]] += 1
        return answer.get("reward", answer.get("error")), worker

    def _kill(self, worker) -> None:
        self.processes.discard(worker)
        if worker is not None and worker.returncode is None:
            worker.kill()

    async def close(self) -> None:
        for worker in [*self.processes, *[await start for start in self.starting]]:
            self._kill(worker)
            await worker.wait()
        self.processes, self.starting = set(), set()


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
        with open(self.log_path, "a") as out:
            print(f"[{time.strftime('%H:%M:%S')}] a rollout node is started", file=out, flush=True)
            self.process = subprocess.Popen(
                with_parent(self.command), env={**self.env, "CISPO_TOKEN": self.hub.token}, stdout=out, stderr=out,
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
            self.hub.release(f"{socket.gethostname()}:{self.process.pid}")
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
