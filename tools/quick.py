"""The whole loop in about 20 s, for whoever changes it: `bash launch.sh --quick [FLAGS]`.

The tiny preset, 12 steps without torch.compile, on tests/fake_vllm.py in vLLM's place. Validation,
checkpoints, weight updates and rewards take the same path as in a real run, and print the same
lines. The stand-in computes the model by itself from the published weights, so a wrong update
shows as a KL between trainer and sampler. FLAGS are train_cispo.py's; they override those below.
Status 0: the loop ended well, every step is there, the two sides agree, and the reward rose.
"""

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the program
from bridge.logs import read_jsonl

REPO = Path(__file__).resolve().parent.parent
NAME, STEPS = "quick", 12
# Two float32 implementations of one policy differ by rounding alone (about 1e-12), but the stand-in
# gets the weights rounded to --publish-dtype.
MAX_KL, MAX_KL_OF_16_BITS = 1e-5, 1e-3


def command(flags: list[str]) -> list[str]:
    stand_in = shlex.join([sys.executable, str(REPO / "tests/fake_vllm.py")])
    values = {
        "--name": NAME,
        "--max-num-steps": STEPS,
        "--val-every-steps": 6,
        "--checkpoint-every-steps": 6,
        "--rollout-args": f"--vllm-command {shlex.quote(stand_in)}",
    }
    ours = [f"{flag}={value}" for flag, value in values.items()]
    return [sys.executable, str(REPO / "train_cispo.py"), "--no-compile", *ours, *flags]


def faults(run_dir: Path) -> list[str]:
    """What is wrong with a run that has ended with status 0."""
    config = json.loads((run_dir / "config.json").read_text())
    steps, sent_whole = config["max_num_steps"], config["publish_dtype"] in ("auto", "float32")
    max_kl = MAX_KL if sent_whole else MAX_KL_OF_16_BITS
    records = read_jsonl(run_dir / "metrics.jsonl")
    if [r["step"] for r in records] != list(range(steps)):
        return [f"metrics.jsonl has {len(records)} records of {steps} steps"]
    kl = max(r["train/gen_kl_error_same_version"] or 0.0 for r in records)
    found = []
    if kl > max_kl:
        found.append(
            f"KL between trainer and sampler {kl:.1e}, above {max_kl:g}: a wrong weight update, or "
            "model.py and tests/fake_vllm.py compute different models"
        )
    first, last = (sum(r["train/reward"] for r in part) for part in (records[:5], records[-5:]))
    if steps >= STEPS and last <= first:
        found.append(f"the reward did not rise: {first / 5:.3f}, then {last / 5:.3f}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--name", default=NAME)
    run_dir, began = Path("runs") / parser.parse_known_args()[0].name, time.time()
    run = subprocess.Popen(command(sys.argv[1:]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the run too, which ends in order
    signal.signal(signal.SIGTERM, lambda *_: run.terminate())
    status, found, log = run.wait(), [], run_dir / "metrics.jsonl"
    for aside in Path("runs").glob(f"{NAME}.[0-9]*"):  # quick runs before this one
        shutil.rmtree(aside, ignore_errors=True)
    if status:
        found = [f"the run ended with status {status}"]
    elif not log.exists() or log.stat().st_mtime < began:
        return 0  # --help, --dry-run
    else:
        found = faults(run_dir)
    word = "failed: " + "; ".join(found) if found else "passed"
    print(f"quick: {word}, {time.time() - began:.0f} s")
    return status or bool(found)


if __name__ == "__main__":
    sys.exit(main())
