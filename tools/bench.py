"""Our numbers beside those of others.

    python tools/bench.py loss      vocabulary projection and CISPO loss, forward and backward
    python tools/bench.py model     the whole model, and one MoE block, against transformers
    python tools/bench.py weights   what a version of the weights costs (bench_weights.py)
    python tools/bench.py rl        whole runs, ours and TRL's (bench_rl.py)
    python tools/bench.py gpu       what one GPU does, beside what was predicted (bench_gpu.py)
    python tools/bench.py hub       what rank 0 takes in from many nodes (bench_hub.py)

One process per contender, on the same inputs; each first proves that it computes the same, then
they take turns, so that a noisy machine is noisy for all. Times are medians of --runs. CPU time is
that of all threads. Memory is the peak of another run above inputs and weights. The peers are
installed at their released version into .venv-bench, which is made here when it is missing.

Bounded: memory for logits does not grow with N. Those of the others that give a token's log-prob
have to make the logits twice, 8*D*V FLOPs a token; in one pass as here it is 6*D*V.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the program
import loss
from model import ModelConfig, MoE, Qwen3MoE
from ranks import ops
from ranks.parallel import Mesh
from tools import bench_gpu, bench_hub, bench_rl, bench_weights

REPO = Path(__file__).resolve().parent.parent
PEERS = ["liger-kernel==0.8.5", "cut-cross-entropy==25.1.1", "trl==1.16.0", "accelerate==1.15.0"]
# weights in [0, 6], NeMo RL's default; Liger has no lower bound, and a ratio is never below 0
CLIP = 6.0
SEQ = 32  # Liger takes one advantage per sequence, so everybody gets that


# ---- loss: a contender is a function of the inputs that gives a function that returns the loss ---
class LossInputs:
    """Logits of size 3, and previous log-probs near enough that clipped and unclipped ratios are
    both there."""

    def __init__(self, args, rand, g, device):
        self.args = args
        self.weight_VD = (0.1 * rand(args.V, args.D)).requires_grad_()
        self.hidden_ND = (30 * args.D**-0.5 * rand(args.N, args.D)).requires_grad_()
        self.targets_N = torch.randint(args.V, (args.N,), generator=g).to(device)
        with torch.no_grad():
            pieces = [self.hidden_ND[i : i + 64] @ self.weight_VD.t() for i in range(0, args.N, 64)]
            picked = zip(pieces, self.targets_N.split(64))
            logprobs = [z.float().log_softmax(-1).gather(1, t[:, None])[:, 0] for z, t in picked]
        self.prev_N = torch.cat(logprobs) + torch.randn(args.N, generator=g).to(device)
        self.advantages_N = (
            torch.randn(args.N // SEQ, generator=g).repeat_interleave(SEQ).to(device)
        )
        self.leaves = {"weight": self.weight_VD, "hidden": self.hidden_ND}


def cispo(logprobs_N, prev_N, advantages_N):
    """The loss as plain autograd, for those that give log-probs: the mean over tokens."""
    weight = (logprobs_N - prev_N).detach().exp().clamp(0, CLIP)
    return -(advantages_N * weight * logprobs_N).mean()


def our_loss(x, compiled=True):
    alg = loss.Algorithm(ratio_clip_max=CLIP - 1, use_importance_sampling_correction=False)
    mean = x.advantages_N / len(x.hidden_ND)

    def objective(logprobs, prev, advantages):
        return loss.cispo_loss(logprobs, prev, advantages, alg)[0]

    inputs = (
        x.hidden_ND,
        x.weight_VD,
        x.targets_N,
        objective,
        (x.prev_N, mean),
        1.0,
        x.args.chunk,
        compiled,
    )
    return lambda: ops.fused_head_loss(*inputs)[0]


def naive(x):
    def logprobs():
        return (x.hidden_ND @ x.weight_VD.t()).float().log_softmax(-1)

    return lambda: cispo(
        torch.gather(logprobs(), 1, x.targets_N[:, None])[:, 0], x.prev_N, x.advantages_N
    )


def trl(x):
    """As TRL's selective_log_softmax has it for fp32: log-sum-exp sequence by sequence."""

    def run():
        logits_BTV = (x.hidden_ND @ x.weight_VD.t()).view(-1, SEQ, x.weight_VD.shape[0])
        lse_BT = torch.stack([torch.logsumexp(row, -1) for row in logits_BTV])
        logprobs_BT = logits_BTV.gather(-1, x.targets_N.view(-1, SEQ, 1)).squeeze(-1) - lse_BT
        return cispo(logprobs_BT.flatten().float(), x.prev_N, x.advantages_N)

    return run


def torch_lce(x):
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    options = LinearCrossEntropyOptions(batch_chunk_size=x.args.chunk)

    def nll():
        return linear_cross_entropy(
            x.hidden_ND, x.weight_VD, x.targets_N, reduction="none", options=options
        )

    return lambda: cispo(-nll(), x.prev_N, x.advantages_N)


def cce(x):
    from cut_cross_entropy import linear_cross_entropy

    def nll():
        return linear_cross_entropy(
            x.hidden_ND, x.weight_VD, x.targets_N, reduction="none", impl="torch_compile"
        )

    return lambda: cispo(-nll(), x.prev_N, x.advantages_N)


def liger(x):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    rows = dict(chunk_size=max(1, x.args.chunk // SEQ))
    head = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="cispo", epsilon_high=CLIP, **rows
    )

    def per_sequence(x_N):
        return x_N.view(-1, SEQ)

    mask_BT = per_sequence(x.targets_N >= 0).long()
    advantages_B = per_sequence(x.advantages_N)[:, 0].contiguous()

    def hidden_BTD():
        return x.hidden_ND.view(-1, SEQ, x.hidden_ND.shape[1])

    targets_BT, prev_BT = per_sequence(x.targets_N), per_sequence(x.prev_N)
    return lambda: head(
        hidden_BTD(), x.weight_VD, targets_BT, mask_BT, advantages_B, old_per_token_logps=prev_BT
    )[0]


# ---- model and MoE block: ours, and transformers' with the same weights --------------------------
class ModelInputs:
    """A packed row of ragged sequences, and a probe: the loss is its product with the final hidden
    states."""

    def __init__(self, args, rand, g, device):
        # mean length 128, long-tailed
        shares = torch.empty(args.T // 128).exponential_(generator=g) + 0.05
        lengths = (args.T * shares / shares.sum()).int()
        lengths[0] += args.T - lengths.sum()
        self.lengths, self.cfg = (
            lengths.tolist(),
            ModelConfig(
                vocab_size=1024,
                hidden_size=256,
                num_hidden_layers=2,
                num_attention_heads=8,
                num_key_value_heads=2,
                head_dim=64,
                intermediate_size=512,
                num_experts=16,
                num_experts_per_tok=4,
                moe_intermediate_size=96,
                norm_topk_prob=True,
                initializer_range=0.06,
            ),
        )
        self.cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int().to(device)
        self.tokens_T = torch.randint(1024, (args.T,), generator=g).to(device)
        self.probe, self.ours = rand(args.T, 256), Qwen3MoE(self.cfg)
        self.ours.init_weights(g)
        named = self.ours.to(device, self.probe.dtype).named_parameters()
        # the loss has a bench of its own
        self.leaves = {name: p for name, p in named if name != "lm_head.weight"}


class MoEInputs:
    """Tokens that the router spreads evenly: that suits the batched GEMM best, which then has no
    padding."""

    def __init__(self, args, rand, g, device):
        T, D, E, K = 1024, 512, 32, 8
        self.cfg = ModelConfig(
            vocab_size=8,
            hidden_size=D,
            num_hidden_layers=1,
            num_attention_heads=8,
            num_key_value_heads=8,
            head_dim=64,
            intermediate_size=D,
            num_experts=E,
            num_experts_per_tok=K,
            moe_intermediate_size=256,
            norm_topk_prob=True,
        )
        self.ours, self.probe = (
            MoE(self.cfg, Mesh()).to(device, getattr(torch, args.dtype)),
            rand(T, D),
        )
        chosen_TK = (
            torch.stack([torch.randperm(E, generator=g) for _ in range(T * K // E)])
            .view(T, K)
            .to(device)
        )
        with torch.no_grad():
            for p in self.ours.parameters():
                p.copy_(rand(*p.shape) / p.shape[-1] ** 0.5)
            router_ED = torch.linalg.qr(rand(D, E).float())[0].t().to(self.probe.dtype)
            self.ours.gate.weight.copy_(0.3 * router_ED)
            self.x_TD = (rand(T, D) + 10 * router_ED[chosen_TK].sum(1)).requires_grad_()
            counts_E = self.ours.route(self.x_TD)[1].flatten().bincount(minlength=E)
        assert counts_E.min() == counts_E.max(), "the tokens were made to be balanced"
        self.leaves = {"x": self.x_TD, **dict(self.ours.named_parameters())}


def ours(x, compiled=True):
    """Blocks compiled as in training, one graph for any number of tokens."""
    if isinstance(x.ours, MoE):
        x.ours.compile(fullgraph=True, dynamic=True) if compiled else None
        return lambda: (x.ours(x.x_TD)[0] * x.probe).sum()
    x.ours.compile_blocks() if compiled else None
    return lambda: (x.ours(x.tokens_T, x.cu_seqlens, max(x.lengths))[0] * x.probe).sum()


def bmm_block(x):
    """Our block, each of its two grouped GEMMs a batched one. It needs equally many rows for
    every expert."""

    def experts(rows_ND, weights_N, counts_E, _):
        gate_up, down = (p.transpose(1, 2) for p in x.ours.experts.parameters())
        gate, up = (rows_ND.unflatten(0, (len(counts_E), -1)) @ gate_up).chunk(2, dim=-1)
        return ((F.silu(gate) * up * weights_N.view(len(counts_E), -1, 1)) @ down).flatten(0, 1)

    x.ours.experts.forward = experts
    return ours(x)


def hf(x, experts, padded=False, compiled=False):
    """transformers' model or block, with our weights. Packed: one row, its sequences known by their
    positions. Padded: a row a sequence; a padding token comes after all others of its row, so
    causal attention without a mask will do."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

    fields, is_block = {**vars(x.cfg), "mlp_only_layers": []}, isinstance(x.ours, MoE)
    config = Qwen3MoeConfig(**fields, attn_implementation="sdpa", experts_implementation=experts)
    module = (qwen3_moe.Qwen3MoeSparseMoeBlock if is_block else qwen3_moe.Qwen3MoeModel)(config)
    module.to(x.probe.device, x.probe.dtype)
    prefix, theirs = "" if is_block else "model.", {}
    with torch.no_grad():
        for name, p in module.named_parameters():
            theirs[prefix + name] = p
            p.copy_(x.leaves[prefix + name])
    x.leaves = {**theirs, **({"x": x.x_TD} if is_block else {})}
    if compiled:
        module.compile(dynamic=True)
    if is_block:
        return lambda: (module(x.x_TD[None])[0] * x.probe).sum()
    pieces = x.tokens_T.split(x.lengths)
    positions = torch.cat([torch.arange(n) for n in x.lengths])[None].to(x.tokens_T.device)
    ids_BT = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=-1)

    def run(ids, **where):
        return module(ids, use_cache=False, **where).last_hidden_state

    if padded:
        return lambda: (run(ids_BT.clamp(min=0))[ids_BT >= 0] * x.probe).sum()
    return lambda: (run(x.tokens_T[None], position_ids=positions)[0] * x.probe).sum()


SUITES = {  # inputs, flags that matter, {contender: (function, remark)}
    "loss": (
        LossInputs,
        ("V", "D", "N", "chunk"),
        {
            "ours": (our_loss, "bounded"),
            "ours, eager": (lambda x: our_loss(x, compiled=False), "bounded"),
            "torch linear_cross_entropy": (torch_lce, "bounded"),
            "liger chunked cispo": (liger, "bounded"),
            "cut-cross-entropy torch_compile": (cce, "full logits"),
            "TRL selective_log_softmax": (trl, "full logits"),
            "naive full logits": (naive, "full logits"),
        },
    ),
    "model": (
        ModelInputs,
        ("T",),
        {
            "ours": (ours, "ours"),
            "ours, eager": (lambda x: ours(x, compiled=False), "ours"),
            "transformers eager, packed": (lambda x: hf(x, "eager"), "transformers"),
            "transformers grouped_mm, packed": (lambda x: hf(x, "grouped_mm"), "transformers"),
            "transformers grouped_mm, padded": (
                lambda x: hf(x, "grouped_mm", padded=True),
                "transformers",
            ),
            "transformers grouped_mm, compiled": (
                lambda x: hf(x, "grouped_mm", compiled=True),
                "transformers",
            ),
            "transformers batched_mm, packed": (lambda x: hf(x, "batched_mm"), "transformers"),
        },
    ),
    "moe": (
        MoEInputs,
        (),
        {
            "ours": (ours, "ours"),
            "ours, eager": (lambda x: ours(x, compiled=False), "ours"),
            "transformers eager": (lambda x: hf(x, "eager"), "eager"),
            "transformers grouped_mm": (lambda x: hf(x, "grouped_mm"), "grouped_mm"),
            "transformers grouped_mm, compiled": (
                lambda x: hf(x, "grouped_mm", compiled=True),
                "grouped_mm",
            ),
            "balanced bmm": (bmm_block, "bmm"),
        },
    ),
}


# batched_mm is not in "moe": it copies an expert's weights for every row, 8192 * 1.5 MB.


# ---- one contender's process: a line in, a line out ----------------------------------------------
def memory_mib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def fingerprint(tensor):
    """A tensor's size, and its product with fixed random numbers: an error shows in the second as
    large as it is."""
    probe = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).to(tensor.device)
    return [
        torch.linalg.vector_norm(tensor, dtype=torch.float64).item(),
        (tensor.double() * probe).sum().item(),
    ]


def measure(run, x, trim):
    """One run: seconds, and MiB at its peak above what was there before it. trim: what malloc keeps
    for later goes back first, or the next run would seem to need little; that costs the run
    time."""
    cuda, leaves = torch.cuda.is_available(), x.leaves
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        if trim:
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = memory_mib("VmRSS")
    start, cpu_start = time.perf_counter(), time.process_time()
    value = run()
    value.backward()
    if cuda:
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else memory_mib("VmHWM")
    check = {"value": [abs(value.item()), value.item()]}
    for name, leaf in leaves.items():
        check[name], leaf.grad = fingerprint(leaf.grad), None
    return {"s": seconds, "cpu_s": cpu_seconds, "mib": peak - before, "check": check}


def contender(args):
    torch.set_num_threads(args.threads)
    g, device = torch.Generator().manual_seed(0), "cuda" if torch.cuda.is_available() else "cpu"

    def rand(*shape):
        return torch.randn(shape, generator=g).to(device, getattr(torch, args.dtype))

    make_inputs, _, contenders = SUITES[args.what]
    x = make_inputs(args, rand, g, device)
    run = contenders[args.contender][0](x)
    for line in sys.stdin:
        print(json.dumps(measure(run, x, trim=line == "memory\n")), flush=True)


# ---- the comparison ------------------------------------------------------------------------------
def peer_python() -> str:
    """The interpreter of the bench-only environment: the peers, and through a .pth file everything
    installed here."""
    env = REPO / ".venv-bench"
    python = env / "bin" / "python"
    if not (env / "ready").exists() or (env / "ready").read_text() != str(PEERS):
        print(f"installing {', '.join(PEERS)} into {env}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", env], check=True)
        paths = [
            sysconfig.get_path("purelib", vars={"base": p, "platbase": p})
            for p in (env, sys.prefix)
        ]
        Path(paths[0], "main.pth").write_text(paths[1] + "\n")
        has_triton = (
            subprocess.run(
                [python, "-c", "import triton"], capture_output=True, check=False
            ).returncode
            == 0
        )
        # which the peers import on a CPU, too
        packages = PEERS + ([] if has_triton else ["triton==3.6.0"])
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *packages], check=True)
        (env / "ready").write_text(str(PEERS))
    return str(python)


class Contender:
    """One way to compute, in a process of its own that waits for its turns."""

    def __init__(self, name: str, what: str, shape: dict, args):
        self.name = name
        python = peer_python() if what == "loss" else sys.executable
        flags = [f"--{key}={value}" for key, value in shape.items()]
        self.process = subprocess.Popen(
            [python, __file__, what, *flags, "--contender", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
            stderr=None if args.verbose else subprocess.DEVNULL,  # graph breaks fill pages
        )

    def turn(self, what: str = "time") -> dict:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        ended = f"{self.name}: its process ended with status"
        assert line, f"{ended} {self.process.wait()}; --verbose shows why"
        return json.loads(line)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def check_alike(checks: dict[str, dict], dtype: str) -> None:
    """All contenders must compute the same."""
    tolerance = 1e-4 if dtype == "float32" else 5e-2  # bf16: torch rounds its log-probs to that
    wanted = next(iter(checks.values()))
    for name, check in checks.items():
        assert check.keys() == wanted.keys(), f"{name}: {check.keys() ^ wanted.keys()}"
        for of, (size, found) in check.items():
            error = max(abs(size - wanted[of][0]), abs(found - wanted[of][1]))
            assert error <= tolerance * wanted[of][0], (
                f"{name} computes something else: {of} is off by {error}"
            )


def compare(args, what):
    """The suite's contenders in turns: {shape, seconds, mib, all_seconds}."""
    _, flags, contenders = SUITES[what]
    shape = {k: getattr(args, k) for k in (*flags, "dtype", "threads", "runs")}
    names = [n for n in contenders if not args.only or n in args.only.split("/")]
    running = {name: Contender(name, what, shape, args) for name in names}
    # Also the warm-up: compilation, page faults.
    checks = {name: running[name].turn()["check"] for name in names}
    check_alike(checks, args.dtype)
    mib = {name: running[name].turn("memory")["mib"] for name in names}
    runs = [{name: running[name].turn() for name in names} for _ in range(args.runs)]
    for contender in running.values():
        contender.end()

    def median(key):
        return {name: statistics.median(r[name][key] for r in runs) for name in names}

    return {
        "shape": shape,
        "load": os.getloadavg()[0],
        "checks": checks,
        "mib": mib,
        "seconds": median("s"),
        "cpu_seconds": median("cpu_s"),
        "all_seconds": {name: [r[name]["s"] for r in runs] for name in names},
    }


def show(result, what, args):
    seconds, mib, kinds = (
        result["seconds"],
        result["mib"],
        {n: kind for n, (_, kind) in SUITES[what][2].items()},
    )
    tokens, first = {"loss": args.N, "model": args.T, "moe": 1024}[what], next(iter(seconds))
    print(
        f"{what}: "
        + ", ".join(f"{k}={v}" for k, v in result["shape"].items())
        + f", load {result['load']:.1f}"
    )
    print(
        f"{'':33} {'s':>7} {'x ours':>7} {'CPU s':>7} {'x ours':>7} {'MiB':>7} {'x ours':>7} "
        f"{'tokens/s':>9}"
    )
    for name in seconds:
        columns = (seconds, result["cpu_seconds"], mib)
        cells = [cell for v in columns for cell in (v[name], v[name] / max(v[first], 1e-9))]
        row = "{:7.3f} {:7.2f} {:7.3f} {:7.2f} {:7.0f} {:7.2f}".format(*cells)
        kind = kinds[name] if what == "loss" else ""
        print(f"{name:33} {row} {tokens / seconds[name]:9,.0f}  {kind}".rstrip())
    for values, unit in ((seconds, "time"), (result["cpu_seconds"], "CPU time"), (mib, "memory")):
        for kind in dict.fromkeys(kinds.values()):
            if peers := [
                (v, n) for n, v in values.items() if not n.startswith("ours") and kinds[n] == kind
            ]:
                best, name = min(peers)
                print(
                    f"{unit}: the best {kind} peer, {name}, takes "
                    f"{best / max(values[first], 1e-9):.2f}x ours"
                )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what",
        choices=[*SUITES, "weights", "rl", "gpu", "hub"],
        help="model: the whole model, then moe",
    )
    sizes = (
        ("V", 151936),
        ("D", 1024),
        ("N", 512),
        ("chunk", 256),
        ("T", 2048),
        ("runs", 3),
        ("threads", 2),
        ("steps", 20),
    )
    parser.add_argument("--size", choices=list(bench_rl.SIZES), default="tiny", help="of rl")
    for flag, default in sizes:
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--only", default="", help="names of contenders, separated by /")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument(
        "--landed",
        action="store_true",
        help="weights: from the step's end until vLLM has them, by part",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="show what the contenders write to stderr"
    )
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    bench_hub.add_flags(parser)
    args = parser.parse_args()
    if args.contender:
        contender(args)
        return
    if args.what == "gpu":
        bench_gpu.main(args.only)
        return
    if args.what == "hub":
        bench_hub.main(args)
        return
    if args.what == "rl":
        bench_rl.main(args, peer_python)
        return
    if args.what == "weights":
        bench_weights.main(args)
        return
    results = {
        what: compare(args, what)
        for what in (("model", "moe") if args.what == "model" else (args.what,))
    }
    if args.json:
        print(json.dumps(results if args.what == "model" else results[args.what]))
    else:
        for what, result in results.items():
            show(result, what, args)


if __name__ == "__main__":
    main()
