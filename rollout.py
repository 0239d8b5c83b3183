"""A rollout node: answers the trainer's prompts with vLLM, and keeps vLLM on the trainer's newest weights.

    CISPO_TOKEN=... python rollout.py http://trainer:port

For every prompt: lease -> generate (all samples in one request) -> score -> push. Beside that, one task follows the
weights: fetch and verify while vLLM keeps generating, then pause -> load -> resume; requests in flight go on with
the new weights, and vLLM says of every token which version sampled it.

The node keeps nothing that matters. It only ever calls the hub, so it needs no open port, no data set and no shared
disk, and may be killed at any time: what it held is leased again. Its vLLM listens on the loopback address alone,
and is started again, on the current weights, whenever it dies.
"""

import asyncio
import ctypes
import json
import math
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import aiohttp
import torch
import tyro
from safetensors.torch import save

import weights
from task import Codec, load_reward

REPO = Path(__file__).resolve().parent


@dataclass
class RolloutConfig:
    """Flags of a rollout node."""

    hub: Annotated[str, tyro.conf.Positional]  # the trainer's address, as it prints it: http://host:port
    dir: str = ""  # local weights and vllm.log; default: a directory in /dev/shm, which is RAM
    max_groups: int = 64  # prompts in flight at once
    vllm_threads: int = 0  # OpenMP threads of vLLM on a CPU; 0: half of the cores
    vllm_args: str = ""  # further arguments for vLLM's server, e.g. "--tensor-parallel-size 4"
    vllm_start_timeout_s: float = 900.0  # for vLLM to load the model and answer
    request_timeout_s: float = 900.0  # for one generation request, and for one weight update
    hub_timeout_s: float = 600.0  # the trainer may be silent this long before the node gives up


class RunOver(Exception):
    """The hub says that the run has ended."""


def log(message: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] rollout: {message}", flush=True)


def die_with_parent() -> None:
    """In a child, before exec: SIGTERM when the parent is gone (Linux), so that even kill -9 leaves no orphan."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG


# ---- vLLM ----------------------------------------------------------------------------------------------------
class VLLM:
    """One vLLM server process on the loopback address, and the routes of it that are used here."""

    def __init__(self, cfg: RolloutConfig, run: dict, log_path: Path):
        self.cfg, self.run, self.log_path = cfg, run, log_path
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, checkpoint: Path) -> None:
        """Start the server on a checkpoint directory and wait until it is healthy.

        Raises: RuntimeError with the end of vLLM's log when it exits or takes too long.
        """
        await self.stop()
        with socket.socket() as s:  # a free port; vLLM binds it a moment later
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(checkpoint), "--host", "127.0.0.1", "--port", str(port),
            "--dtype", self.run["dtype"], "--max-model-len", str(self.run["max_model_len"]),
            "--seed", str(self.run["seed"]),
            "--enable-scale-out",  # opens /inference/v1/generate: token ids in, token ids out
            "--generation-config", "vllm",  # or the checkpoint's top_p and top_k would silently truncate sampling
            "--logprobs-mode", "processed_logprobs",  # at the sampling temperature, as the trainer computes them
            "--worker-extension-cls", "vllm_engine.WorkerExtension",
            "--weight-transfer-config", '{"backend": "safetensors"}',
            "--disable-uvicorn-access-log",
            *shlex.split(self.cfg.vllm_args),
        ]  # fmt: skip
        env = {**os.environ, "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
               "VLLM_SERVER_DEV_MODE": "1"}  # dev mode opens the weight update routes  # fmt: skip
        env.pop("CISPO_TOKEN", None)
        if not torch.cuda.is_available():
            threads = self.cfg.vllm_threads or max(1, os.cpu_count() // 2)
            env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                    "OMP_NUM_THREADS": str(threads)}  # fmt: skip
            command.append("--enforce-eager")
        with open(self.log_path, "a") as out:
            self.process = await asyncio.create_subprocess_exec(
                *command, env=env, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        self.session = aiohttp.ClientSession(
            f"http://127.0.0.1:{port}", timeout=aiohttp.ClientTimeout(total=self.cfg.request_timeout_s),
            connector=aiohttp.TCPConnector(limit=0),
        )  # fmt: skip
        start = time.monotonic()
        while not await self.healthy():
            waited = time.monotonic() - start
            if self.process.returncode is not None or waited > self.cfg.vllm_start_timeout_s:
                tail = "\n".join(self.log_path.read_text(errors="replace").splitlines()[-30:])
                await self.stop()
                raise RuntimeError(f"vLLM is not up after {waited:.0f} s; {self.log_path} ends with:\n{tail}")
            if int(waited) % 5 == 0:
                log(f"vLLM is starting ({waited:.0f} s)")
            await asyncio.sleep(1.0)  # polling another process: there is no event to wait for
        log(f"vLLM is up after {time.monotonic() - start:.0f} s, pid {self.process.pid}, port {port}")

    async def healthy(self) -> bool:
        try:
            async with self.session.get("/health", timeout=aiohttp.ClientTimeout(total=30)) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, RuntimeError):  # RuntimeError: the session of a stopped server
            return False

    async def stop(self) -> None:
        if self.process is None:
            return
        await self.session.close()
        for sig, patience_s in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            try:
                os.killpg(self.process.pid, sig)  # its engine processes too: they share the session
                await asyncio.wait_for(self.process.wait(), patience_s)
            except (ProcessLookupError, TimeoutError):
                pass
        self.process = None

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
        flight are kept; vLLM labels the tokens before and after.
        """
        start = time.perf_counter()
        await self.post("/pause?mode=keep")
        paused = time.perf_counter()
        await self.post("/start_weight_update")
        await self.post("/update_weights", {"update_info": {"path": str(checkpoint)}})
        await self.post("/finish_weight_update", {"weight_version": str(version)})
        loaded = time.perf_counter()
        await self.post("/resume")
        return {"pause_s": paused - start, "load_s": loaded - paused, "stopped_s": time.perf_counter() - start}

    async def checksums(self) -> dict[str, str]:
        return (await self.post("/weight_checker", {"action": "checksum"}))["checksums"]

    async def generate(self, prompt_ids: list[int], sampling: dict, version: int) -> list[dict]:
        """All samples of a prompt in one request; vLLM shares the prompt's prefill between them."""
        # The salt keeps a prefix that older weights computed from being reused under newer ones.
        body = {"token_ids": prompt_ids, "sampling_params": sampling, "cache_salt": f"v{version}"}
        return (await self.post("/inference/v1/generate", body))["choices"]


def pack_group(choices: list[dict], rewards: list[float], lease: str, gen_s: float) -> bytes:
    """The safetensors body of POST /groups; hub.Group says what each tensor is."""
    versions = [int(span["version"]) for c in choices for span in c["weight_versions"]
                for _ in range(span["start"], span["end"])]  # fmt: skip
    tensors = {
        "lengths": torch.tensor([len(c["token_ids"]) for c in choices], dtype=torch.int32),
        "token_ids": torch.tensor([t for c in choices for t in c["token_ids"]], dtype=torch.int32),
        "logprobs": torch.tensor([x["logprob"] for c in choices for x in c["logprobs"]["content"]]),
        "versions": torch.tensor(versions, dtype=torch.int32),
        "rewards": torch.tensor(rewards, dtype=torch.float32),
        "truncated": torch.tensor([c["finish_reason"] == "length" for c in choices], dtype=torch.uint8),
    }
    return save(tensors, metadata={"lease": lease, "gen_s": f"{gen_s:.6f}"})


def is_whole(choice: dict) -> bool:
    """Whether a sample has a finite log-prob and a version for each token; vLLM may send NaN, which JSON makes null."""
    tokens, entries = choice.get("token_ids") or [], (choice.get("logprobs") or {}).get("content") or []
    covered = sum(span["end"] - span["start"] for span in choice.get("weight_versions") or [])
    finite = all(isinstance(x["logprob"], float | int) and math.isfinite(x["logprob"]) for x in entries)
    return bool(tokens) and finite and len(entries) == len(tokens) == covered


async def ask(hub: aiohttp.ClientSession, method: str, route: str, patience_s: float, **kwargs) -> bytes:
    """A request to the hub, repeated for patience_s while the network fails: the trainer may be starting again.
    Raises: RunOver at the end of the run, RuntimeError for the hub's refusals and its silence."""
    give_up, pause_s = time.monotonic() + patience_s, 0.2
    while True:
        try:
            async with hub.request(method, route, **kwargs) as response:
                body = await response.read()
                if response.status == 410:
                    raise RunOver
                if response.status != 200:
                    raise RuntimeError(f"hub refused {route} with {response.status}: {body.decode()[:300]}")
                return body
        except (aiohttp.ClientError, TimeoutError) as e:
            if time.monotonic() > give_up:
                raise RuntimeError(f"hub does not answer {route} for {patience_s:.0f} s: {e!r}") from e
            if pause_s > 2:
                log(f"hub does not answer {route}, asking again: {e!r}")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 5.0)


# ---- the node ------------------------------------------------------------------------------------------------
class Node:
    """The tasks of a rollout node around one vLLM."""

    def __init__(self, cfg: RolloutConfig, hub: aiohttp.ClientSession, run: dict, reward: Callable[[str, dict], float]):
        self.cfg, self.hub, self.run, self.reward = cfg, hub, run, reward
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.root = Path(cfg.dir or f"/dev/shm/cispo-{os.getpid()}")
        self.root.mkdir(parents=True, exist_ok=True)
        self.vllm = VLLM(cfg, run, self.root / "vllm.log")
        self.ready = asyncio.Event()  # vLLM is up on the weights of self.version, and the hub knows
        self.engine = asyncio.Lock()  # held by whoever starts vLLM or loads weights into it
        self.version, self.checkpoint = -1, None

    async def ask(self, method: str, route: str, **kwargs) -> bytes:
        return await ask(self.hub, method, route, self.cfg.hub_timeout_s, **kwargs)

    async def follow_weights(self) -> None:
        """Fetch every newer version as it is published, and load it."""
        while True:
            body = await self.ask("GET", f"/weights/latest?after={self.version}")
            manifest = json.loads(body)
            if manifest:
                await self.update(manifest, weights.digest(body))

    async def update(self, manifest: dict, digest: str) -> None:
        version, start = manifest["version"], time.perf_counter()
        try:
            checkpoint = await weights.fetch(self.hub, manifest, self.root, have=self.checkpoint)
        except (weights.WeightsError, aiohttp.ClientError) as e:
            # Damaged, cut off, or pruned meanwhile: vLLM keeps what it has, and the next round asks anew.
            log(f"weights v{version} refused, still on v{self.version}: {e}")
            await asyncio.sleep(1.0)
            return
        timing = {"fetch_s": time.perf_counter() - start}
        async with self.engine:
            previous, self.checkpoint = self.checkpoint, checkpoint
            self.ready.clear()  # a request sent now would run on the new weights with the old ones' cache salt
            if self.vllm.process is None:
                await self._start(version)
            else:
                try:
                    timing |= await self.vllm.load(checkpoint, version)
                    self.version = version
                except (RuntimeError, aiohttp.ClientError, TimeoutError) as e:
                    # A load that broke off leaves the model in an unknown state: only a fresh start is safe.
                    log(f"loading v{version} failed, vLLM is started again: {e!r}")
                    await self._start(version)
        if previous is not None and previous != checkpoint:
            shutil.rmtree(previous)
        timing["total_s"] = time.perf_counter() - start
        receipt = {"node": self.name, "version": version, "digest": digest, "timing": timing}
        await self.ask("POST", "/receipts", json=receipt)
        self.ready.set()  # after the receipt, since the hub leases by the version it names

    async def _start(self, version: int) -> None:
        """Start vLLM on self.checkpoint, and prove that the reload path is sound before anything depends on it:
        reloading the very weights that it just loaded by itself must leave every runtime tensor as it is."""
        await self.vllm.start(self.checkpoint)
        fresh = await self.vllm.checksums()
        await self.vllm.load(self.checkpoint, version)  # also gives the weights their version label
        reloaded = await self.vllm.checksums()
        if changed := [name for name in fresh if fresh[name] != reloaded.get(name)]:
            raise RuntimeError(f"reloading the same weights changed {len(changed)} tensors in vLLM: {changed[:3]}")
        log(f"reloading v{version} onto itself leaves all {len(fresh)} tensors equal")
        self.version = version

    async def watch_vllm(self) -> None:
        """Start vLLM again when its process ends or its engine is reported dead."""
        while True:
            await self.ready.wait()
            try:
                await asyncio.wait_for(self.vllm.process.wait(), timeout=5.0)
            except TimeoutError:
                if self.engine.locked() or await self.vllm.healthy():
                    continue
            async with self.engine:
                if await self.vllm.healthy():  # the weight update that held the engine has started it again
                    continue
                log(f"vLLM is gone (exit code {self.vllm.process.returncode}); starting it again on v{self.version}")
                self.ready.clear()
                await self._start(self.version)
                self.ready.set()

    async def answer(self, lease: dict) -> None:
        """One prompt, from lease to push. A vLLM that dies under it only delays it."""
        sampling, gen_start = self.run["sampling"], time.perf_counter()
        deadline = time.monotonic() + lease["deadline_s"]
        while time.monotonic() < deadline:
            await self.ready.wait()
            try:
                choices = await self.vllm.generate(lease["prompt_ids"], sampling, self.version)
            except (aiohttp.ClientError, TimeoutError, RuntimeError) as e:
                log(f"lease {lease['lease']}: generation failed, trying again: {e!r}")
                await asyncio.sleep(2.0)  # time for watch_vllm to notice
                continue
            whole = [c for c in choices if is_whole(c)]
            if len(whole) < len(choices):
                log(f"lease {lease['lease']}: {len(choices) - len(whole)} samples without finite log-probs dropped")
            if len(whole) >= 2:  # a sample needs a sibling to be compared with
                break
        else:
            log(f"lease {lease['lease']} expired before it was answered")
            return
        gen_s = time.perf_counter() - gen_start
        rewards = await asyncio.to_thread(self.score, whole, lease["example"])
        body = pack_group(whole, rewards, lease["lease"], gen_s)
        try:
            await self.ask("POST", "/groups", data=body)
        except RuntimeError as e:
            log(f"lease {lease['lease']}: {e}")  # expired, most likely; the hub has counted it

    def score(self, choices: list[dict], example: dict) -> list[float]:
        try:
            return [float(self.reward(self.codec.decode(c["token_ids"]), example)) for c in choices]
        except Exception as e:
            raise RuntimeError(f"the reward function failed on {example}: {e!r}") from e

    async def answer_prompts(self) -> None:
        await self.ready.wait()
        self.codec = Codec(self.checkpoint)
        running: set[asyncio.Task] = set()
        while True:
            while len(running) >= self.cfg.max_groups:
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                running = {task for task in running if not _raise_if_failed(task)}
            wanted = {"node": self.name, "max": self.cfg.max_groups - len(running)}
            reply = await self.ask("POST", "/lease", json=wanted)
            running |= {asyncio.create_task(self.answer(lease)) for lease in json.loads(reply)["leases"]}
            running = {task for task in running if not _raise_if_failed(task)}


def _raise_if_failed(task: asyncio.Task) -> bool:
    """Whether the task is done; raises what it raised."""
    if task.done():
        task.result()
    return task.done()


async def main(cfg: RolloutConfig) -> None:
    token = os.environ.get("CISPO_TOKEN", "")
    headers, timeout = {"Authorization": f"Bearer {token}"}, aiohttp.ClientTimeout(total=None, sock_read=120)
    async with aiohttp.ClientSession(cfg.hub, headers=headers, timeout=timeout) as hub:
        run = json.loads(await ask(hub, "GET", "/run", cfg.hub_timeout_s))
        node = Node(cfg, hub, run, load_reward(run["reward"]))
        loop = asyncio.get_running_loop()
        me = asyncio.current_task()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, me.cancel)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(node.follow_weights())
                tasks.create_task(node.watch_vllm())
                tasks.create_task(node.answer_prompts())
        finally:
            await node.vllm.stop()
            if not cfg.dir:
                shutil.rmtree(node.root, ignore_errors=True)


if __name__ == "__main__":
    try:
        asyncio.run(main(tyro.cli(RolloutConfig)))
    except* (asyncio.CancelledError, RunOver) as why:
        log(f"stopped: {why.exceptions[0]!r}")
    except* RuntimeError as failed:
        for error in failed.exceptions:
            log(f"error: {error}")
        sys.exit(1)
