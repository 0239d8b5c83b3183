"""Our numbers beside those of others: `python bench.py loss [--json]`.

`loss`: forward and backward of vocabulary projection and CISPO loss, the largest part of a step outside the model.
One process per contender, on the same inputs; each first proves that it computes the same loss and gradients, then
they take turns, so that a noisy machine is noisy for all. Time is the median of --runs; memory the peak during a run
above the inputs, which has to hold the gradients: V * D and N * D numbers. Others' code is installed at its released
version into .venv-bench, which is made here when it is missing and sees this environment's torch.

Bounded: memory for logits does not grow with N. Those of the others that give a token's log-prob have to make the
logits twice, 8*D*V FLOPs a token; with full logits, or in one pass as here, it is 6*D*V.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent
PEERS = ["liger-kernel==0.8.5", "cut-cross-entropy==25.1.1"]
CLIP = 6.0  # weights in [0, 6], the seed's default; Liger has no lower bound, and a ratio is never below 0
SEQ = 32  # Liger takes one advantage per sequence, so everybody gets that


# ---- contenders: a function of the inputs that returns the loss --------------------------------------------------
def cispo(logprobs_N, prev_N, advantages_N):
    """The loss as plain autograd, for those that give log-probs: the mean over tokens."""
    weight = (logprobs_N - prev_N).detach().exp().clamp(0, CLIP)
    return -(advantages_N * weight * logprobs_N).mean()


def ours(x, compiled=True):
    import loss

    alg = loss.Algorithm(ratio_clip_max=CLIP - 1, use_importance_sampling_correction=False)
    mean = x.advantages_N / len(x.hidden_ND)
    objective = lambda logprobs, prev, advantages: loss.cispo_loss(logprobs, prev, advantages, alg)[0]
    inputs = x.hidden_ND, x.weight_VD, x.targets_N, objective, (x.prev_N, mean), 1.0, x.args.chunk, compiled
    return lambda: loss.fused_head_loss(*inputs)[0]


def naive(x):
    import torch

    logprobs = lambda: (x.hidden_ND @ x.weight_VD.t()).float().log_softmax(-1)
    return lambda: cispo(torch.gather(logprobs(), 1, x.targets_N[:, None])[:, 0], x.prev_N, x.advantages_N)


def trl(x):
    """As TRL's selective_log_softmax has it for fp32: log-sum-exp sequence by sequence."""
    import torch

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
    nll = lambda: linear_cross_entropy(x.hidden_ND, x.weight_VD, x.targets_N, reduction="none", options=options)
    return lambda: cispo(-nll(), x.prev_N, x.advantages_N)


def cce(x):
    from cut_cross_entropy import linear_cross_entropy

    nll = lambda: linear_cross_entropy(x.hidden_ND, x.weight_VD, x.targets_N, reduction="none", impl="torch_compile")
    return lambda: cispo(-nll(), x.prev_N, x.advantages_N)


def liger(x):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    rows = dict(chunk_size=max(1, x.args.chunk // SEQ))
    head = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="cispo", epsilon_high=CLIP, **rows)
    per_sequence = lambda x_N: x_N.view(-1, SEQ)
    mask_BT = per_sequence(x.targets_N >= 0).long()
    advantages_B = per_sequence(x.advantages_N)[:, 0].contiguous()
    hidden_BTD = lambda: x.hidden_ND.view(-1, SEQ, x.hidden_ND.shape[1])
    targets_BT, prev_BT = per_sequence(x.targets_N), per_sequence(x.prev_N)
    return lambda: head(hidden_BTD(), x.weight_VD, targets_BT, mask_BT, advantages_B, old_per_token_logps=prev_BT)[0]


CONTENDERS = {  # name: (function, bounded memory)
    "ours": (ours, True),
    "ours, eager": (lambda x: ours(x, compiled=False), True),
    "torch linear_cross_entropy": (torch_lce, True),
    "liger chunked cispo": (liger, True),
    "cut-cross-entropy torch_compile": (cce, False),
    "TRL selective_log_softmax": (trl, False),
    "naive full logits": (naive, False),
}


# ---- one contender's process: a line in, a line out --------------------------------------------------------------
class Inputs:
    """Logits of size 3, and previous log-probs near enough that clipped and unclipped ratios are both there."""

    def __init__(self, args):
        import torch

        g = torch.Generator().manual_seed(0)
        dtype, device = getattr(torch, args.dtype), "cuda" if torch.cuda.is_available() else "cpu"
        rand = lambda *shape, scale: (torch.randn(shape, generator=g).mul_(scale)).to(device, dtype)
        self.args = args
        self.weight_VD = rand(args.V, args.D, scale=0.1).requires_grad_()
        self.hidden_ND = rand(args.N, args.D, scale=30 * args.D**-0.5).requires_grad_()
        self.targets_N = torch.randint(args.V, (args.N,), generator=g).to(device)
        with torch.no_grad():
            pieces = [self.hidden_ND[i : i + 64] @ self.weight_VD.t() for i in range(0, args.N, 64)]
            picked = zip(pieces, self.targets_N.split(64))
            logprobs = [z.float().log_softmax(-1).gather(1, t[:, None])[:, 0] for z, t in picked]
        self.prev_N = torch.cat(logprobs) + torch.randn(args.N, generator=g).to(device)
        self.advantages_N = torch.randn(args.N // SEQ, generator=g).repeat_interleave(SEQ).to(device)


def memory_mib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def measure(run, x):
    """One run: seconds, and MiB at its peak above what was there before it."""
    import torch

    cuda, leaves = x.weight_VD.is_cuda, (x.weight_VD, x.hidden_ND)
    for leaf in leaves:
        leaf.grad = None
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = memory_mib("VmRSS")
    start = time.perf_counter()
    value = run()
    value.backward()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else memory_mib("VmHWM")
    sizes = [torch.linalg.vector_norm(leaf.grad, dtype=torch.float32).item() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return {"s": seconds, "mib": peak - before, "check": [value.item(), *sizes]}


def contender(args):
    import torch

    torch.set_num_threads(args.threads)
    x = Inputs(args)
    run = CONTENDERS[args.contender][0](x)
    for _ in sys.stdin:
        print(json.dumps(measure(run, x)), flush=True)


# ---- the comparison ----------------------------------------------------------------------------------------------
def peer_python() -> str:
    """The interpreter of the bench-only environment: the peers, and through a .pth file everything installed here."""
    env = REPO / ".venv-bench"
    python = env / "bin" / "python"
    if not (env / "ready").exists():
        print(f"installing {', '.join(PEERS)} into {env}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", env], check=True)
        paths = [sysconfig.get_path("purelib", vars={"base": p, "platbase": p}) for p in (env, sys.prefix)]
        Path(paths[0], "main.pth").write_text(paths[1] + "\n")
        has_triton = subprocess.run([python, "-c", "import triton"], capture_output=True, check=False).returncode == 0
        packages = PEERS + ([] if has_triton else ["triton==3.6.0"])  # which the peers import on a CPU, too
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *packages], check=True)
        (env / "ready").touch()
    return str(python)


def compare(args):
    python, flags = peer_python(), [f"--{k}={getattr(args, k)}" for k in ("V", "D", "N", "dtype", "chunk", "threads")]
    names = [n for n in CONTENDERS if not args.only or n in args.only.split("/")]
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    procs = {}
    for name in names:
        command = [python, __file__, "loss", *flags, "--contender", name]
        procs[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def turn(name):
        procs[name].stdin.write("go\n")
        procs[name].stdin.flush()
        line = procs[name].stdout.readline()
        assert line, f"{name}: its process ended with status {procs[name].wait()}"
        return json.loads(line)

    checks = {name: turn(name)["check"] for name in names}  # also the warm-up: compilation, page faults
    tolerance = 1e-4 if args.dtype == "float32" else 5e-2  # bf16: torch rounds its log-probs to that
    for name, check in checks.items():
        for found, wanted in zip(check, checks[names[0]]):
            assert abs(found - wanted) <= tolerance * abs(wanted), f"{name} computes something else: {checks}"
    runs = [{name: turn(name) for name in names} for _ in range(args.runs)]
    for proc in procs.values():
        proc.stdin.close()
        proc.wait()
    median = lambda key: {name: statistics.median(r[name][key] for r in runs) for name in names}
    return {"shape": {k: getattr(args, k) for k in ("V", "D", "N", "dtype", "chunk", "threads", "runs")},
            "checks": checks, "seconds": median("s"), "mib": median("mib"),
            "all_seconds": {name: [r[name]["s"] for r in runs] for name in names}}  # fmt: skip


def show(result):
    seconds, mib = result["seconds"], result["mib"]
    print(", ".join(f"{k}={v}" for k, v in result["shape"].items()))
    print(f"{'':33} {'s':>7} {'x ours':>7} {'MiB':>7} {'x ours':>7}")
    for name in seconds:
        cells = (seconds[name], seconds[name] / seconds["ours"], mib[name], mib[name] / mib["ours"])
        row = "{:7.2f} {:7.2f} {:7.0f} {:7.2f}".format(*cells)
        print(f"{name:33} {row}  {'bounded' if CONTENDERS[name][1] else 'full logits'}")
    for values, what in ((seconds, "time"), (mib, "memory")):
        for kind, bounded in (("bounded-memory", True), ("full-logit", False)):
            best = min((v, n) for n, v in values.items() if not n.startswith("ours") and CONTENDERS[n][1] == bounded)
            print(f"{what}: ours is {values['ours'] / best[0]:.2f}x of the best {kind} peer, {best[1]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loss"])
    for flag, default in (("V", 151936), ("D", 1024), ("N", 512), ("chunk", 256), ("runs", 3), ("threads", 2)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--only", default="", help="names of contenders, separated by /")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        contender(args)
    else:
        result = compare(args)
        print(json.dumps(result)) if args.json else show(result)


if __name__ == "__main__":
    main()
