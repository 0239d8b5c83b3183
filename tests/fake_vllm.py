"""A stand-in for vLLM's server: every route that rollout.py uses, real samples and log-probs, and
faults on order.

    python rollout.py HUB --vllm-command "python tests/fake_vllm.py"

It computes Qwen3-MoE a second time, apart from model.py, from the published files alone, so that a
wrong publish shows in gen_kl_error as it does with vLLM. A request is a batch of its own with a
random stream of its own, drawn from seed, weights' version and prompt: its samples depend on
nothing else that is in flight, which is what lets a test compare whole runs bit for bit.

    POST /fault {"kind": KIND, ...}      FAKE_VLLM_FAULT='{"kind": ...}' orders one from the start
        hang                   health says fine, no token moves
        crash                  the process ends, as after the kernel's OOM killer
        crash_update           it ends in the middle of the next weight update
        crash_checksum         it ends when its checksums are asked for, as after a weight update
        stall_update           the next weight update is never answered
        slow, "s": 0.1         every engine step takes so much longer
        drop, nan, null, empty, long, twice, odd, oom, "count": 3     the next so many requests: connection dropped; a
                               sample with a NaN or null log-prob, without tokens, with too many;
                               samples twice; one that is no sample; status 500
        poison, "token": 5     every request whose prompt holds this token gets status 500
        without, "routes": []  it never had these routes, as another version of vLLM
"""

import argparse
import asyncio
import base64
import io
import json
import math
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from aiohttp import web

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bridge.weights import describe, read_tensors
from model import ModelConfig

COUNTED = ("drop", "nan", "null", "empty", "long", "twice", "odd", "oom")


# ---- the model -----------------------------------------------------------------------------------
class Read(dict):
    """Tensors by name, and which of them were read."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.names: set[str] = set()

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)


class Policy:
    """Qwen3-MoE on the tensors of a checkpoint directory. A fork that changes model.py changes it
    here too. Shapes: B samples, L new tokens, T tokens in all.

    Raises: ValueError for a tensor that has no part in the logits."""

    def __init__(self, path: Path):
        self.cfg = vars(ModelConfig.from_dir(path))  # in whichever spelling it is
        self.w = Read((name, t.float()) for name, t in read_tensors(path))
        for i in range(self.cfg["num_hidden_layers"]):
            for p in ("gate_proj", "up_proj", "down_proj"):
                names = [
                    f"model.layers.{i}.mlp.experts.{e}.{p}.weight"
                    for e in range(self.cfg["num_experts"])
                ]
                self.w[f"{i}.{p}"] = torch.stack([self.w[name] for name in names])  # (E, out, in)
        self.logits(torch.tensor([[0]]), [])
        # beside a tied embedding a checkpoint may hold the same head once more
        spare = {"lm_head.weight"} if self.cfg["tie_word_embeddings"] else set()
        if unread := sorted(self.w.keys() - self.w.names - spare):
            raise ValueError(f"tests/fake_vllm.py does not compute {unread[0]}")

    def norm(self, x, name):
        return (
            self.w[name]
            * x
            * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.cfg["rms_norm_eps"])
        )

    @torch.inference_mode()
    def logits(self, ids_BL, cache: list) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, V) after the last token, and the experts of all, (B, L, layers, K); `cache` holds
        each layer's keys and values and grows by L."""
        experts = []
        c, w = self.cfg, self.w
        C, past = c["head_dim"], cache[0][0].shape[2] if cache else 0
        angles = torch.outer(
            torch.arange(past, past + ids_BL.shape[1]).float(),
            c["rope_theta"] ** (-torch.arange(0, C, 2).float() / C),
        ).repeat(1, 2)
        rope = lambda x: (
            x * angles.cos() + torch.cat((-x[..., C // 2 :], x[..., : C // 2]), -1) * angles.sin()
        )
        heads = lambda x: x.unflatten(-1, (-1, C)).transpose(1, 2)
        x = w["model.embed_tokens.weight"][ids_BL]
        for i in range(c["num_hidden_layers"]):
            at = f"model.layers.{i}."
            h = self.norm(x, at + "input_layernorm.weight")
            q, k, v = (heads(F.linear(h, w[f"{at}self_attn.{n}_proj.weight"])) for n in "qkv")
            q, k = (
                rope(self.norm(q, at + "self_attn.q_norm.weight")),
                rope(self.norm(k, at + "self_attn.k_norm.weight")),
            )
            if len(cache) > i:
                k, v = torch.cat((cache[i][0], k), 2), torch.cat((cache[i][1], v), 2)
            cache[i : i + 1] = [(k, v)]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=past == 0, enable_gqa=True)
            x = x + F.linear(out.transpose(1, 2).flatten(2), w[at + "self_attn.o_proj.weight"])
            h = self.norm(x, at + "post_attention_layernorm.weight")
            top, chosen = (
                F.linear(h, w[at + "mlp.gate.weight"]).softmax(-1).topk(c["num_experts_per_tok"])
            )
            experts.append(chosen)
            top = top / top.sum(-1, keepdim=True) if c["norm_topk_prob"] else top
            weights_BLE = torch.zeros(*h.shape[:2], c["num_experts"]).scatter(-1, chosen, top)
            gate, up = (
                torch.einsum("bld,efd->belf", h, w[f"{i}.{p}"]) for p in ("gate_proj", "up_proj")
            )
            # all experts: it is tiny
            y = torch.einsum("belf,edf->beld", F.silu(gate) * up, w[f"{i}.down_proj"])
            x = x + torch.einsum("beld,ble->bld", y, weights_BLE)
        head = "model.embed_tokens.weight" if c.get("tie_word_embeddings") else "lm_head.weight"
        logits = F.linear(self.norm(x[:, -1], "model.norm.weight"), w[head])
        return logits, torch.stack(experts, 2)


class Request:
    """All samples of a prompt, one token further with each step."""

    def __init__(self, prompt: list[int], sampling: dict, seed: int, version: str):
        self.prompt, self.n, self.limit = prompt, sampling.get("n", 1), sampling["max_tokens"]
        self.temperature, self.stop = (
            sampling.get("temperature", 1.0),
            set(sampling.get("stop_token_ids") or ()),
        )
        self.rng = torch.Generator().manual_seed(
            random.Random(f"{seed}/{version}/{prompt}").getrandbits(63)
        )
        self.preempted = False
        self.first_row = sampling.get("routed_experts_prompt_start", 0)
        self.experts: torch.Tensor | None = None  # of all tokens but the last, as first read
        self.tokens = torch.empty(self.n, 0, dtype=torch.long)
        self.logprobs, self.versions, self.cache = torch.empty(self.n, 0), [], []
        self.open = torch.ones(self.n, dtype=torch.bool)
        self.done = asyncio.get_running_loop().create_future()

    def step(self, policy: Policy, version: str) -> int:
        """Draw a token for each sample. Returns how many were still open."""
        if self.versions and self.versions[-1] != version:
            self.cache = []  # as vLLM does: keys and values of older weights are computed anew
        if self.cache:
            new = self.tokens[:, -1:]
        elif self.versions:
            new = torch.cat((torch.tensor(self.prompt).expand(self.n, -1), self.tokens), 1)
        else:
            new = torch.tensor([self.prompt])  # one prefill for all samples
        logits, experts = policy.logits(new, self.cache)
        experts = experts.expand(self.n, -1, -1, -1)
        known = 0 if self.experts is None else self.experts.shape[1]
        read = len(self.prompt) + self.tokens.shape[1]  # with `new`, whose end is the last token
        added = experts[:, experts.shape[1] - (read - known) :]
        self.experts = added if self.experts is None else torch.cat((self.experts, added), 1)
        if len(logits) < self.n:
            logits = logits.expand(self.n, -1)
            self.cache = [
                tuple(x.expand(self.n, -1, -1, -1) for x in layer) for layer in self.cache
            ]
        if self.temperature:
            logprobs = (logits / self.temperature).log_softmax(-1)
            drawn = torch.multinomial(logprobs.exp(), 1, generator=self.rng)
        else:
            logprobs = logits.log_softmax(-1)
            drawn = logits.argmax(-1, keepdim=True)
        self.tokens = torch.cat((self.tokens, drawn), 1)
        self.logprobs = torch.cat((self.logprobs, logprobs.gather(1, drawn)), 1)
        self.versions.append(version)
        moved = int(self.open.sum())
        self.open &= torch.tensor([token not in self.stop for token in drawn[:, 0].tolist()])
        if (not self.open.any() or len(self.versions) == self.limit) and not self.done.done():
            self.done.set_result(self.choices())
        return moved

    def choices(self) -> list[dict]:
        found = []
        for i, (tokens, logprobs) in enumerate(zip(self.tokens.tolist(), self.logprobs.tolist())):
            length = next(
                (at + 1 for at, token in enumerate(tokens) if token in self.stop), len(tokens)
            )
            edges = [
                at for at in range(length) if at == 0 or self.versions[at] != self.versions[at - 1]
            ]
            found.append(
                {
                    "index": i,
                    "token_ids": tokens[:length],
                    "finish_reason": "stop" if tokens[length - 1] in self.stop else "length",
                    "logprobs": {"content": [{"logprob": x} for x in logprobs[:length]]},
                    "weight_versions": [
                        {"version": self.versions[a], "start": a, "end": b}
                        for a, b in zip(edges, [*edges[1:], length])
                    ],
                    "routed_experts": self.rows_of(i, length),
                }
            )
        return found

    def rows_of(self, sample: int, length: int) -> str:
        """Its experts from first_row on, as vLLM sends them: a .npy file in base64."""
        rows = self.experts[sample, self.first_row : len(self.prompt) + length - 1]
        file = io.BytesIO()
        np.save(file, rows.to(torch.uint8).numpy())
        return base64.b64encode(file.getvalue()).decode()


# ---- the server ----------------------------------------------------------------------------------
class Server:
    def __init__(self, model: Path, seed: int, max_num_seqs: int):
        self.policy, self.version, self.seed, self.max_num_seqs = (
            Policy(model),
            "default",
            seed,
            max_num_seqs,
        )
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.paused, self.tokens, self.requests, self.preemptions = False, 0, 0, 0
        self.faults = {kind: 0 for kind in COUNTED}
        self.hang = self.crash_update = self.crash_checksum = self.stall_update = False
        self.slow_s, self.poison, self.without = 0.0, None, []
        self.work = asyncio.Event()

    async def engine(self):
        """Every engine step is one token of every running request."""
        while True:
            while self.waiting and len(self.running) * 16 < self.max_num_seqs:
                self.running.append(self.waiting.pop(0))
            if self.paused or self.hang or not self.running:
                self.work.clear()
                await self.work.wait()
                continue
            for request in self.running:
                self.tokens += request.step(self.policy, self.version)
                self.preemptions += request.n * request.preempted
                request.preempted = False
                await asyncio.sleep(0)  # /health and /pause are heard in between
                # between engine steps only, as in vLLM: `step` of the others comes after the pause
                if self.paused:
                    break
            self.running = [r for r in self.running if not r.done.done()]
            await asyncio.sleep(self.slow_s)

    def order(self, fault: dict):
        kind = fault["kind"]
        if kind == "crash":
            os._exit(1)
        elif kind in COUNTED:
            self.faults[kind] += fault.get("count", 1)
        elif kind == "slow":
            self.slow_s = fault["s"]
        elif kind == "without":
            self.without = fault["routes"]
        elif kind == "poison":
            self.poison = fault["token"]
        else:
            assert kind in ("hang", "crash_update", "crash_checksum", "stall_update"), kind
            setattr(self, kind, True)

    async def generate(self, http: web.Request):
        body = await http.json()
        # vLLM's own rule
        if set(body["cache_salt"]) & set("@/\\\0") or len(body["cache_salt"]) > 128:
            return web.json_response({"error": "Parameter 'cache_salt'"}, status=400)
        hit = {kind for kind in COUNTED if self.faults[kind]}
        for kind in hit:
            self.faults[kind] -= 1
        if "drop" in hit:
            http.transport.abort()
            return web.Response()
        if "oom" in hit or self.poison in body["token_ids"]:
            return web.json_response({"error": "torch.OutOfMemoryError: out of memory"}, status=500)
        request = Request(body["token_ids"], body["sampling_params"], self.seed, self.version)
        self.waiting.append(request)
        self.work.set()
        try:
            choices = await request.done
        except asyncio.CancelledError:  # the client is gone: vLLM aborts such requests too
            request.done.cancel()
            self.waiting = [r for r in self.waiting if r is not request]
            raise
        self.requests += 1
        first = choices[0]
        if hit & {"nan", "null"}:
            first["logprobs"]["content"][-1]["logprob"] = math.nan if "nan" in hit else None
        if "empty" in hit:
            first |= {"token_ids": [], "logprobs": {"content": []}, "weight_versions": []}
        if "odd" in hit:
            choices[0] = {"text": "of another version"}
        if "long" in hit:
            extra = request.limit
            first["token_ids"] += [0] * extra
            first["logprobs"]["content"] += [{"logprob": -1.0}] * extra
            first["weight_versions"][-1]["end"] += extra
        return web.json_response({"choices": choices * (2 if "twice" in hit else 1)})

    async def route(self, http: web.Request):
        name = http.path.strip("/")
        body = await http.json() if http.can_read_body else {}
        if name == "fault":
            self.order(body)
        elif name == "pause":
            self.paused = True
            if http.query.get("clear_cache") != "false":
                for request in self.running:  # computed again, and counted with the next token
                    request.preempted = True
        elif name == "update_weights":
            if self.crash_update:
                os._exit(1)
            if self.stall_update:
                print("stalled in mid-update", flush=True)
                await asyncio.Event().wait()
            try:
                self.policy = Policy(Path(body["update_info"]["path"]))
            except Exception as e:  # any: vLLM answers 500 too, with the weights half-loaded
                return web.json_response({"error": repr(e)}, status=500)
        elif name == "finish_weight_update":
            self.version = body["weight_version"]
        elif name == "resume":
            self.paused = False
            self.work.set()
        elif name == "weight_checker":
            if self.crash_checksum:
                os._exit(1)
            return web.json_response(
                {"checksums": {n: describe(t)["blake3"] for n, t in self.policy.w.items()}}
            )
        return web.json_response({})

    async def metrics(self, http: web.Request):
        used = sum(len(r.prompt) + len(r.versions) for r in self.running) * 16
        label = '{engine="0",model_name="fake"}'
        values = {
            "num_requests_running": sum(r.n for r in self.running),
            "generation_tokens_total": self.tokens,
            "num_requests_waiting": sum(r.n for r in self.waiting),
            "kv_cache_usage_perc": min(1.0, used / 65536),
            "prompt_tokens_total": 0,
            "num_preemptions_total": self.preemptions,
            "request_success_total": self.requests,
        }
        return web.Response(
            text="".join(f"vllm:{n}{label} {float(v)}\n" for n, v in values.items())
        )


async def serve(args):
    server = Server(args.model, args.seed, args.max_num_seqs)
    if fault := os.environ.get("FAKE_VLLM_FAULT"):
        server.order(json.loads(fault))
    app = web.Application()
    answers = {
        f"/{name}": server.route
        for name in (
            "pause",
            "start_weight_update",
            "update_weights",
            "finish_weight_update",
            "resume",
            "weight_checker",
            "fault",
        )
    } | {"/inference/v1/generate": server.generate}
    for path, answer in answers.items():
        if path not in server.without:
            app.router.add_post(path, answer)
    app.router.add_get("/health", lambda http: asyncio.sleep(0, web.Response()))
    app.router.add_get(
        "/version", lambda http: asyncio.sleep(0, web.json_response({"version": "0.32.0"}))
    )
    app.router.add_get("/metrics", server.metrics)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, args.host, args.port).start()
    print(f"fake vLLM on port {args.port}", flush=True)
    await server.engine()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-num-seqs", type=int, default=1024)
    args, _ = parser.parse_known_args()  # the rest is for the real one
    torch.set_num_threads(1)
    asyncio.run(serve(args))
