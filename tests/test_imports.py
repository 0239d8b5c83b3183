"""What can be imported where: our modules have plain names, and none may stand in a package's
place."""

import ast
import asyncio
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bridge.processes import program_files
from bridge.vllm import VLLM
from config import RolloutConfig
from presets import parse_config
from ranks import run_dir

REPO = Path(__file__).resolve().parent.parent
OURS = sorted(
    [
        *(path.stem for path in REPO.glob("*.py")),
        *(path.parent.name for path in REPO.glob("*/__init__.py")),
    ]
)
# In a process: for each name the file that an import of it would read, or None.
LOOK = """
import importlib.util, json, sys
names = json.loads(sys.argv[1])
print(json.dumps({name: (spec := importlib.util.find_spec(name)) and spec.origin for name in names}))
"""


@pytest.fixture
def packages(tmp_path):
    """A directory of packages, in which `kernels` is Hugging Face's."""
    (tmp_path / "packages/kernels").mkdir(parents=True)
    (tmp_path / "packages/kernels/__init__.py").touch()
    return tmp_path / "packages"


def found_by_vllm(tmp_path, command: str = "") -> dict:
    """What a process in vLLM's place, which ends at once, has printed."""
    vllm = VLLM(
        RolloutConfig(hub="", vllm_command=command),
        {"dtype": "float32", "max_model_len": 64, "seed": 0},
        tmp_path / "log",
    )
    with pytest.raises(RuntimeError, match="ended with status 0"):
        asyncio.run(vllm.start(tmp_path))
    return json.loads(
        next(line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{"))
    )


def test_vllm_finds_the_engine_and_no_other_module_of_ours(tmp_path, packages):
    (tmp_path / "bin").mkdir()
    names = json.dumps([*OURS, "kernels", "vllm_engine"])
    (tmp_path / "bin/vllm.py").write_text(  # what is installed comes after PYTHONPATH
        f"import sys\nsys.argv[1:] = [{names!r}]\nsys.path.append({str(packages)!r})\n{LOOK}"
    )
    found = found_by_vllm(tmp_path, f"{sys.executable} {tmp_path / 'bin/vllm.py'}")
    assert found.pop("kernels") == str(packages / "kernels/__init__.py")
    assert found.pop("vllm_engine").endswith("vllm_engine.py")
    assert {name for name, file in found.items() if file} == set()


def test_vllm_finds_nothing_in_the_directory_that_a_run_is_started_in(
    tmp_path, packages, monkeypatch
):
    """As in a shell `python -m` looks there first; and packages that the user's PYTHONPATH names
    are still found."""
    server = packages / "vllm/entrypoints/openai/api_server.py"
    server.parent.mkdir(parents=True)
    (packages / "vllm/__init__.py").touch()
    server.write_text(f"import sys\nsys.argv[1:] = [{json.dumps([*OURS, 'kernels'])!r}]\n{LOOK}")
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    found = found_by_vllm(tmp_path)
    assert {name for name, file in found.items() if file} == {"kernels"}


def test_the_trainer_finds_a_package_kernels_that_is_installed(packages):
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(REPO)!r})\n{LOOK}",
        '["kernels", "model"]',
    ]
    env = {**os.environ, "PYTHONPATH": str(packages)}
    found = json.loads(
        subprocess.run(
            command, env=env, cwd=packages.parent, capture_output=True, check=True
        ).stdout
    )
    assert found == {
        "kernels": str(packages / "kernels/__init__.py"),
        "model": str(REPO / "model.py"),
    }


def test_no_module_has_the_name_of_a_package_that_what_we_import_imports():
    """Installed here or not: an optional package counts, as one day it is there."""
    # or a word of prose
    perhaps = re.compile(rb"^[ \t]*(?:import|from) (?:%s)\b" % "|".join(OURS).encode(), re.M)
    clashes = {}
    for package in "transformers vllm torch datasets huggingface_hub tokenizers safetensors wandb tensorboard".split():
        root = Path(importlib.util.find_spec(package).origin).parent
        for file in (file for file in root.rglob("*.py") if perhaps.search(file.read_bytes())):
            for node in ast.walk(ast.parse(file.read_bytes())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module]
                clashes |= {name: str(file) for name in names if name.split(".")[0] in OURS}
    assert clashes == {}


def test_the_screen_imports_no_torch():
    """It would take longer to start than to draw."""
    look = "import sys, watch; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", look], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_what_refuses_a_run_and_what_never_compiles_imports_no_compiler():
    """torch's takes two seconds."""
    look = "import sys, train_cispo, evaluate, rollout; print('torch._dynamo' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", look], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_a_run_keeps_all_of_its_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir.begin_run_dir(parse_config(["--name", "x"]), None, {}, print)
    kept = {
        str(path.relative_to(tmp_path / "runs/x/code"))
        for path in (tmp_path / "runs/x/code").rglob("*.py")
    }
    assert kept == {str(path.relative_to(REPO)) for path in program_files()}
    assert "vllm_engine.py" in {Path(path).name for path in kept}


def test_a_run_that_goes_on_keeps_the_sources_of_now_alone(tmp_path):
    """And of the rewards those of all of its steps."""
    for name in ("old/gone.py", "reward/mine.py", "reward-before-step-4/mine.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    run_dir.keep_code(tmp_path, {}, {})
    assert not (tmp_path / "old/gone.py").exists() and (tmp_path / "loss.py").exists()
    assert len(list(tmp_path.glob("reward*/mine.py"))) == 2
