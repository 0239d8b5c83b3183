"""vLLM's process: how it is started, asked and ended, and all that depends on its version but for
the part inside of its worker (inside_vllm/).

It ends with the node that started it, even when that is killed by -9, and it does not get the hub's
token.
"""

import asyncio
import contextlib
import json
import os
import platform
import re
import shlex
import signal
import socket
import sys
import time
from pathlib import Path

import aiohttp
import torch

from bridge.processes import REPO, cores, gpus_of_vllm, guarded, log
from bridge.waits import Wait, WaitOver

# ---- vLLM ----------------------------------------------------------------------------------------
ROUTES = {  # what is used of vLLM, and what opens it
    "/health": "vLLM",
    "/metrics": "vLLM",
    "/inference/v1/generate": "--enable-scale-out",
    **dict.fromkeys(
        (
            "/pause",
            "/resume",
            "/start_weight_update",
            "/update_weights",
            "/finish_weight_update",
            "/weight_checker",
        ),
        "VLLM_SERVER_DEV_MODE=1",
    ),
}
MENDED_BY = (
    "version 0.32 has them (bash launch.sh install); check --vllm-command and --vllm-args too"
)


# What a request to a server on this machine or elsewhere may raise, besides its own refusal
# (RuntimeError).
NO_ANSWER = (aiohttp.ClientError, TimeoutError, OSError)


class VLLMUnfit(Exception):
    """This vLLM lacks something, and would after every restart; the message says all that is
    missing."""


def reason_of(output: str) -> str:
    """The line of vLLM's output that says why it did not start, or "": the last error that is not
    said to follow from another process's."""
    prefix = r"^\s*\(\w+ pid=\d+\)\s*(ERROR \S+ \S+ \[[^]]*\]\s*)?"
    lines, reason = [re.sub(prefix, "", line).strip() for line in output.splitlines()], ""
    for line, after in zip(lines, [*lines[1:], ""]):
        if re.match(r"[\w.]*(Error|Exception): |.*: error: argument |\S+: No module named ", line):
            if "initialization failed" not in line:  # else another process says why
                reason = (
                    f"{line}: {after.split(' [type=')[0]}" if "ValidationError: " in line else line
                )
    return reason[:600]


HOPELESS = r"(Value|Import|ModuleNotFound|FileNotFound|NotImplemented)Error: |: No module "


def no_replay(vllm_args: str) -> str:
    """Why a vLLM with these arguments cannot tell its experts, or ""."""
    args = " ".join(shlex.split(vllm_args.replace("=", " ")))
    if re.search(r"--pipeline-parallel-size (?!1\b)|-pp (?!1\b)", args):
        return "--router-replay sampler: vLLM has no experts to tell with --pipeline-parallel-size"
    if "--no-enable-prefix-caching" in args:
        return "--router-replay sampler: vLLM needs its prefix cache; no --no-enable-prefix-caching"
    return ""


KEEP_ROUTERS = """--quantization-config '{"ignore": ["*.mlp.gate"]}'"""


def unsound(vllm_args: str, experts: bool) -> str:
    """Why samples of a vLLM with these arguments are not to be trained on, or "". experts: the
    model has some."""
    args = " ".join(shlex.split(vllm_args.replace("=", " ")))
    if re.search(r"--spec|-sc ", args) and not torch.cuda.is_available():
        # measured: -9999 where transformers has -0.1 to -5
        return (
            "--vllm-args: with drafts vLLM 0.32 returns wrong log-probs on a CPU; leave "
            "speculative decoding out"
        )
    if re.search(r"--enable[-_]eplb", args):
        return (
            "--vllm-args: --enable-eplb moves experts between GPUs, so that what a reload leaves "
            "in vLLM could not be proven"
        )
    online = r"(--quantization|-q) (fp8|mxfp)|--quantization[-_]config .*\"(linear|targets)\""
    if experts and re.search(online, args) and "mlp.gate" not in args:
        return (
            "--vllm-args: this quantizes the router too, which then chooses other experts; add "
            + KEEP_ROUTERS
        )
    overrides = re.search(r"--hf[-_]overrides", args) and "head_dtype" not in args
    if overrides and torch.cuda.is_available():
        return (
            "--vllm-args: --hf-overrides takes the place of the node's own, without which logits "
            """are bf16; put "head_dtype": "float32" in it"""
        )
    if re.search(r"rejection[-_]sample[-_]method\W+synthetic", args):
        return "--vllm-args: rejection_sample_method synthetic takes tokens the model did not draw"
    return ""


def fill_gpus(vllm_args: str, gpus: int, shared: bool, config: dict) -> list[str]:
    """What makes a vLLM with these arguments use all GPUs that it sees: --data-parallel-size, or
    nothing. The user's own parallel size of data stays. shared: it has the GPUs beside the trainer;
    config: the model's. Raises: VLLMUnfit when more are asked for than there are."""
    asked = gpus_of_vllm(vllm_args)
    several = r"--nnodes|(?:^| )-n[ =]|--headless|--data[-_]parallel[-_](?!size[ =])|-dp[a-z]"
    if not gpus or re.search(several, vllm_args):  # an engine over machines is the user's own
        return []
    if asked > gpus:
        raise VLLMUnfit(
            f"--vllm-args {vllm_args!r} asks for {asked} GPUs by its parallel sizes, and {gpus} "
            "are visible here"
        )
    if shared or re.search(r"--data[-_]parallel[-_]size|-dp", vllm_args):
        return []
    engines = gpus // asked
    # Without --enable-expert-parallel vLLM cuts each expert over all of its GPUs.
    whole = re.search("enable[-_]expert[-_]parallel|-ep", vllm_args)
    width = 0 if whole else config.get("moe_intermediate_size") or 0
    engines = max(n for n in range(1, engines + 1) if width % (n * asked) == 0 or n == 1)
    if engines == 1:
        return []
    log(f"vLLM uses {engines * asked} of {gpus} GPUs: --data-parallel-size {engines}")
    return ["--data-parallel-size", str(engines)]


class VLLM:
    """One vLLM server process on the loopback address. All that depends on vLLM's version is here,
    its flags and its routes, but for the part that runs inside of it (vllm_engine.py)."""

    def __init__(self, cfg, run: dict, log_path: Path):
        self.cfg, self.run, self.log_path = cfg, run, log_path
        self.process: asyncio.subprocess.Process | None = None
        self.starting: asyncio.Task | None = None
        self.gpus = gpus_of_vllm(cfg.vllm_args)  # that it uses
        self.was_up, self.version, self.why = False, "", ""  # why: it did not start the last time

    async def start(self, checkpoint: Path) -> None:
        """Start the server on a checkpoint directory and wait until it is healthy.

        Raises: RuntimeError with vLLM's own reason when it exits or takes too long, VLLMUnfit for
        one that stays.
        """
        await self.stop()
        with socket.socket() as s:  # a free port; vLLM binds it a moment later
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command, env = self._command(checkpoint, port)
        self.session = aiohttp.ClientSession(
            f"http://127.0.0.1:{port}",
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=30.0),
            # vLLM closes connections that are idle for 5 s; a request may meet that, and POST is
            # not repeated.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
        )
        with open(self.log_path, "a") as out:
            begin = out.tell()
            self.starting = asyncio.create_task(
                asyncio.create_subprocess_exec(
                    *guarded(command),
                    env=env,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )
            try:
                # cancelled here, it would be one nobody knows
                self.process = await asyncio.shield(self.starting)
            except OSError:
                self.starting = None
                await self.session.close()
                raise
        wait, said = Wait("vllm start", self.cfg.vllm_start_timeout_s), 0.0
        while not await self.healthy():
            if self.process.returncode is not None or wait.over:
                why = (
                    wait.message()
                    if wait.over
                    else f"vLLM ended with status {self.process.returncode}"
                )
                await self.stop(kill=True)
                self._give_up(why, begin)
            if wait.waited_s > said + 5:
                said = wait.waited_s
                log(f"vLLM is starting ({said:.0f} s)")
            await asyncio.sleep(0.25)  # polling another process: there is no event to wait for
        self.version = await self.probe()
        self.was_up, self.why = True, ""
        log(
            f"vLLM is up after {wait.waited_s:.0f} s, pid {self.process.pid}, port {port}, "
            f"version {self.version}"
        )

    def _command(self, checkpoint: Path, port: int) -> tuple[list[str], dict[str, str]]:
        """vLLM's command line and environment."""
        server = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"]
        flags = {
            "--model": str(checkpoint),
            "--host": "127.0.0.1",
            "--port": str(port),
            "--dtype": self.run["dtype"],
            "--max-model-len": str(self.run["max_model_len"]),
            "--seed": str(self.run["seed"]),
            # Or the checkpoint's top_p and top_k would silently truncate sampling.
            "--generation-config": "vllm",
            # At the sampling temperature, as the trainer computes them.
            "--logprobs-mode": "processed_logprobs",
            "--worker-extension-cls": "vllm_engine.WorkerExtension",
            "--weight-transfer-config": '{"backend": "safetensors"}',
        }
        # A GPU has a GEMM from bf16 to fp32, so the trainer's logits are fp32 there at no cost, and
        # so are vLLM's by this. Its default, bf16 logits, moves log-probs by 0.01 nats.
        if self.run.get("fp32_lm_head") or torch.cuda.is_available():
            flags["--hf-overrides"] = '{"head_dtype": "float32"}'
        if self.run.get("experts") and (why := no_replay(self.cfg.vllm_args)):
            raise VLLMUnfit(why)
        replay = ["--enable-return-routed-experts"] if self.run.get("experts") else []
        command = [
            *(shlex.split(self.cfg.vllm_command) or server),
            *(word for flag_and_value in flags.items() for word in flag_and_value),
            "--enable-scale-out",  # opens /inference/v1/generate: token ids in, token ids out
            "--disable-uvicorn-access-log",
            *replay,
            *shlex.split(self.cfg.vllm_args),
        ]
        config = checkpoint / "config.json"
        config = json.loads(config.read_text()) if config.exists() else {}
        if why := unsound(self.cfg.vllm_args, bool(config.get("num_experts"))):
            raise VLLMUnfit(why)
        if torch.cuda.is_available():
            shared = "CISPO_GPUS_SHARED" in os.environ
            fill = fill_gpus(self.cfg.vllm_args, torch.cuda.device_count(), shared, config)
            self.gpus = gpus_of_vllm(" ".join([self.cfg.vllm_args, *fill]))
            command += fill
        # The engine's folder alone, and by -P above not the directory that this was started in: a
        # module there would take the place of a package of its name that vLLM or transformers
        # imports.
        folders = (str(REPO / "bridge/inside_vllm"), os.environ.get("PYTHONPATH"))
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, folders)),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # it opens the weight update routes
        }
        env.pop("CISPO_TOKEN", None)
        if not torch.cuda.is_available():
            self._use_cpu(command, env)
        return command, env

    def _use_cpu(self, command: list[str], env: dict[str, str]) -> None:
        """What vLLM needs besides on a machine without a GPU is added to both."""
        command.append("--enforce-eager")
        env |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(self.cfg.vllm_threads or max(1, cores() // 2)),
        }
        if not re.search("parallel|executor", self.cfg.vllm_args):
            # One process for engine and worker. As two they wait for each other in busy loops,
            # which on two cores take a third of the machine from the trainer. vLLM prefers two
            # since it sets a worker's OpenMP environment itself; here that is set above, and the
            # variable makes vLLM accept it.
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            command += ["--distributed-executor-backend", "uni"]

    def _give_up(self, why: str, begin: int) -> None:
        """Raises: VLLMUnfit where the next start would end as this one: vLLM has refused its
        settings, or has failed twice alike without ever having been up; RuntimeError otherwise.
        begin: of this start in vLLM's log."""
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
            raise VLLMUnfit(
                f"vLLM refuses its settings: {refused}; see --vllm-args and the run's flags"
            )
        if hopeless and not self.was_up and reason == before:
            raise VLLMUnfit(f"vLLM does not start: {reason} ({self.log_path})")
        raise RuntimeError(f"{why}: {reason or tail[-300:]} ({self.log_path})")

    def engine(self) -> str:
        """Of what kind it is: engines of one kind make the same of the same weights, to the bit."""
        card = [
            line
            for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
            for line in file.read_text().splitlines()
            if line.startswith("Model:")
        ]
        device = (
            " ".join(dict.fromkeys(card))
            or f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        )
        gpus = f"{self.gpus} x " if self.gpus > 1 else ""  # each worker has checksums of its own
        asked = f"{self.cfg.vllm_command} {self.cfg.vllm_args}"
        return f"vLLM {self.version} on {gpus}{device}, {asked}"

    async def probe(self) -> str:
        """The server's version. Raises: VLLMUnfit naming every route that it lacks."""
        async with self.session.get("/version") as response:
            found = re.search(r'"version": *"([^"]*)"', await response.text())
        version = found[1] if found else "unknown"
        missing = []
        for route, opened_by in ROUTES.items():
            # a route that is there refuses the method: 405
            async with self.session.options(route) as response:
                if response.status == 404:
                    missing.append(f"{route} (of {opened_by})")
        if missing:
            raise VLLMUnfit(
                f"vLLM of version {version} lacks the routes {', '.join(missing)}; {MENDED_BY}"
            )
        return version

    async def healthy(self) -> bool:
        try:
            async with self.session.get(
                "/health", timeout=aiohttp.ClientTimeout(total=30)
            ) as response:
                return response.status == 200
        except (*NO_ANSWER, RuntimeError):  # RuntimeError: the session of a stopped server
            return False

    async def vitals(self) -> dict[str, float] | None:
        """What vLLM says of its load, and the tokens it has made so far; None when it does not
        answer. Raises: RuntimeError when its process or its engine is dead by its own account."""
        if self.process.returncode is not None:
            raise RuntimeError(f"vLLM ended with status {self.process.returncode}")
        names = {
            "vllm:num_requests_running": "running",
            "vllm:num_requests_waiting": "waiting",
            "vllm:kv_cache_usage_perc": "kv",
            "vllm:num_preemptions_total": "preemptions",
            "vllm:generation_tokens_total": "tokens",
            "vllm:prompt_tokens_total": "prompt_tokens",
        }
        found = dict.fromkeys(names.values(), 0.0)
        try:
            async with self.session.get(
                "/health", timeout=aiohttp.ClientTimeout(total=5)
            ) as response:
                if response.status >= 500:
                    raise RuntimeError(
                        f"vLLM's /health answers {response.status}: its engine is dead"
                    )
            async with self.session.get(
                "/metrics", timeout=aiohttp.ClientTimeout(total=5)
            ) as response:
                for line in (await response.text()).splitlines():
                    name, _, rest = line.partition("{")
                    if name not in names:
                        continue
                    # A line for each engine of a data-parallel vLLM; the fullest cache is what
                    # bounds the prompts.
                    key, value = names[name], float(rest.rsplit(" ", 1)[1])
                    found[key] = max(found[key], value) if key == "kv" else found[key] + value
        except (*NO_ANSWER, ValueError, IndexError):
            return None
        return found

    async def stop(self, kill: bool = False) -> None:
        """End the process and all it started: politely first, or at once where it no longer
        listens."""
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
        """Raises: RuntimeError when vLLM answers with an error, or what is no JSON object;
        NO_ANSWER's when it does not answer."""
        async with self.session.post(route, json=body) as response:
            text = await response.text()
            if response.status != 200:
                raise RuntimeError(f"vLLM answered {route} with {response.status}: {text[:500]}")
            try:
                return dict(json.loads(text))
            except (ValueError, TypeError):
                raise RuntimeError(
                    f"vLLM answered {route} with what is no JSON object: {text[:500]}"
                ) from None

    async def load(self, checkpoint: Path, version: int) -> dict[str, float]:
        """Put the weights of a verified directory into the running model. Returns the seconds of
        each part.

        Between pause and resume no engine step runs, so no token is sampled from half-loaded
        weights. Requests in flight are kept; vLLM labels the tokens before and after. What they
        have in the KV cache is computed again by the new weights, unless the run says otherwise
        (vLLM counts that as preemptions). Raises: WaitOver when vLLM takes too long over it, and as
        `post`.
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
        return {
            "pause_s": paused - start,
            "load_s": loaded - paused,
            "stopped_s": time.perf_counter() - start,
        }

    async def checksums(self) -> dict[str, str]:
        """Of every weight inside vLLM. Raises: as `load`; VLLMUnfit where a router is quantized,
        which its arguments do not always show."""
        wait = Wait("weight update", self.cfg.load_timeout_s)
        try:
            async with asyncio.timeout(self.cfg.load_timeout_s):
                answer = await self.post("/weight_checker", {"action": "checksum"})
        except TimeoutError:
            raise WaitOver(wait.message("checksums")) from None
        sums = dict(answer.get("checksums") or {})
        if routers := [name for name in sums if re.search(r"\.mlp\.gate\.\w*scale", name)]:
            raise VLLMUnfit(
                f"vLLM has quantized {len(routers)} routers, such as {routers[0]}, which then "
                f"choose other experts; add {KEEP_ROUTERS} to --vllm-args"
            )
        return sums

    async def generate(self, prompt_ids: list[int], sampling: dict, version: int) -> list[dict]:
        """All samples of a prompt in one request; vLLM shares the prompt's prefill between them."""
        # The salt keeps a prefix that older weights computed from being reused under newer ones:
        # version 40 of a trainer that was started again is another one than before, hence the run's
        # id.
        salt = f"{self.run.get('id', '')}-v{version}"
        body = {"token_ids": prompt_ids, "sampling_params": sampling, "cache_salt": salt}
        return list((await self.post("/inference/v1/generate", body)).get("choices") or [])
