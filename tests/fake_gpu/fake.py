"""A fake H100 for programs that use torch's CUDA build: kernels compute nothing, all else on the
host is real. runtime.c stands for the CUDA runtime, cuBLAS and NCCL (LD_PRELOAD), driver.c for
libcuda, nvml.c for NVML; they log each kernel, copy, wait and collective.

A script of this folder calls `enter()` first, which starts it again on the fake GPU. For any other
program: `environment()`. It needs gcc and an environment that has a CUDA build of torch, which
.ci/cuda_venv makes; its directory is read from CISPO_CUDA_VENV.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
# torch's libraries: calls of theirs and of vLLM's that no source answers get a stub that returns 0
LIBRARIES = ("c10_cuda", "torch_cuda", "torch_python", "torch_nvshmem", "torch_cuda_linalg")
STUB = '__attribute__((visibility("default"))) long %s(void) { return 0; }\n'
LAUNCHES = ("KERNEL", "TRITON", "GEMM", "MEMSET")  # each is work that the device starts


def venv() -> Path:
    """Raises: RuntimeError, in one line, where CISPO_CUDA_VENV names no environment."""
    path = Path(os.environ.get("CISPO_CUDA_VENV", ""))
    if not (path / "bin/python").exists() or path == Path():
        raise RuntimeError(
            f"CISPO_CUDA_VENV={os.environ.get('CISPO_CUDA_VENV', '')!r} has no bin/python: make "
            "one with `bash .ci/cuda_venv DIRECTORY`"
        )
    return path


def symbols(*arguments) -> set[str]:
    """The names in nm's last column, without their version."""
    found = subprocess.run(["nm", *arguments], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1].split("@")[0] for line in found.splitlines() if " " in line}


def build(out: Path) -> None:
    """libfakecuda.so, libcuda.so.1 and libnvidia-ml.so.1 in this directory, for the torch of
    `venv()`, and its vLLM if it has one."""
    site = next(venv().glob("lib/python*/site-packages"))
    headers = [*site.glob("nvidia/cu*/include"), site / "triton/backends/nvidia/include"]
    gcc = ["gcc", "-fPIC", "-O1", *(f"-I{directory}" for directory in headers)]
    libraries = [site / f"torch/lib/lib{name}.so" for name in LIBRARIES]
    libraries += site.glob("vllm/**/*.abi3.so")
    wanted = symbols("-D", "--undefined-only", *libraries)

    def link(name: str, source: str, missing: str, *flags: str) -> None:
        """A library of a source, and of stubs for what it lacks of the functions that are wanted
        and match."""
        subprocess.run([*gcc, HERE / source, "-c", "-o", out / f"{source}.o"], check=True)
        lacking = wanted - symbols("--defined-only", out / f"{source}.o")
        stubs = "".join(STUB % call for call in sorted(lacking) if re.match(missing, call))
        (out / f"stubs_{source}").write_text(stubs)
        parts = [out / f"{source}.o", out / f"stubs_{source}"]
        subprocess.run([*gcc, "-shared", "-o", out / name, *parts, *flags], check=True)

    link("libfakecuda.so", "runtime.c", "(__)?cuda|cublas|nccl", "-lpthread")
    link("libcuda.so.1", "driver.c", "cu[A-Z]", "-Wl,-soname,libcuda.so.1", "-ldl")
    link("libnvidia-ml.so.1", "nvml.c", "nothing", "-Wl,-soname,libnvidia-ml.so.1")


def environment(out: Path, log: Path | None = None, **settings) -> dict[str, str]:
    """The variables of a process on the fake GPU that `build` put into `out`. Settings, by their
    names in lower case: GIB (its memory), DEVICES, ITEM (what a small copy from the device reads,
    as int64; of "1,2" the first half reads 1s, the second 2s), FLAG (what a copy of one byte
    reads), MAXCOPY (bytes; larger copies move nothing).
    """
    caches = {f"{name}_CACHE_DIR": str(out / name.lower()) for name in ("TORCHINDUCTOR", "TRITON")}
    return {
        **os.environ,
        **caches,
        "CISPO_FAKE_GPU": str(out),
        "LD_LIBRARY_PATH": str(out),
        "TRITON_LIBCUDA_PATH": str(out),
        "LD_PRELOAD": str(out / "libfakecuda.so"),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(settings.get("devices", 1)))),
        **({"FAKE_CUDA_LOG": str(log)} if log else {}),
        **{f"FAKE_CUDA_{name.upper()}": str(value) for name, value in settings.items()},
    }


def enter(**settings) -> Path:
    """Starts this script again on a fake GPU of its own, or, in there, returns its log."""
    if "CISPO_FAKE_GPU" in os.environ:
        return Path(os.environ["FAKE_CUDA_LOG"])
    with tempfile.TemporaryDirectory(prefix="fake-gpu-") as directory:
        out = Path(directory)
        build(out)
        env = environment(out, out / "log", **settings)
        sys.exit(subprocess.call([venv() / "bin/python", *sys.argv], env=env))


def even_rows(tokens: int, experts: int, chosen: int, ep: int) -> str:
    """ITEM for a layer's one read (ranks/experts.py), if all ranks and experts get alike: rows to a
    rank, rows from it, and copies of those."""
    elsewhere = math.comb(experts - experts // ep, chosen) / math.comb(experts, chosen)
    rows = round(tokens * (1 - elsewhere))
    return f"{rows},{rows},{tokens * chosen // ep}"


def sections(log: Path) -> dict[str, Counter]:
    """What the log has between each mark (fake_mark) and the next, by kind: KERNEL, TRITON, GEMM,
    NCCL, COPY, SYNC, ..."""
    found = {"": Counter()}
    current = found[""]
    for line in log.read_text().splitlines():
        kind, name, *_ = line.split("\t")
        if kind == "MARK":
            current = found.setdefault(name, Counter())
        else:
            current[kind] += 1
    return found


def syncs(counted: Counter) -> int:
    """How often the host waited for the device."""
    return counted["SYNC"] + counted["COPYSYNC"]
