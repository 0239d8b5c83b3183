"""README.md, BENCHMARKS.md and docs/*.md against the program: links, flags, variables, files, names
and commands. Each check is a function of a page's text that returns what is wrong, and has a
planted fault as its control."""

import dataclasses
import functools
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import evaluate
from bridge.flags import parse_flags
from bridge.processes import program_files
from config import Config, RolloutConfig
from presets import parse_config

REPO = Path(__file__).resolve().parent.parent
PAGES = [REPO / "README.md", REPO / "BENCHMARKS.md", *sorted((REPO / "docs").glob("*.md"))]
MAX_README_LINES, FIRST_COMMAND_BY = 200, 25
FOREIGN_FLAGS = {  # of other programs that the pages name
    "torchrun": "nnodes nproc-per-node node-rank max-restarts",
    "sbatch": "nodes gpus-per-node exclusive wrap",
    "vllm": "tensor-parallel-size data-parallel-size gpu-memory-utilization hf-overrides "
    "enable-expert-parallel no-enable-prefix-caching pipeline-parallel-size quantization "
    "quantization-config speculative-config enable-eplb",
    "slime": "calculate-per-token-loss eps-clip eps-clip-high",
}
FOREIGN_VARIABLES = {"HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "TMPDIR"}
PLACEHOLDERS = {"FILE.py", "my.py"}


def files_of_the_repository() -> list[Path]:
    folders = (
        "",
        "ranks",
        "bridge",
        "bridge/inside_vllm",
        "tools",
        "tests",
        "tests/fake_gpu",
        "docs",
    )
    return [path for folder in folders for path in (REPO / folder).glob("*.*")]


@functools.cache
def sources() -> str:
    """The program's text, and that of this directory's tools and stand-ins."""
    files = [path for path in files_of_the_repository() if path.suffix in (".py", ".sh")]
    return "\n".join(path.read_text() for path in files if path.name != Path(__file__).name)


def in_backticks(text: str) -> list[str]:
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", prose)


# ---- links ---------------------------------------------------------------------------------------
def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def broken_links(text: str, page: Path) -> list[str]:
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            found.append(target)
    return found


# ---- flags, variables, files, names --------------------------------------------------------------
@functools.cache
def known_flags() -> set[str]:
    fields = [
        f.name.replace("_", "-")
        for c in (Config, RolloutConfig, evaluate.Evaluation)
        for f in dataclasses.fields(c)
    ]
    ours = {f"--{no}{name}" for name in fields for no in ("", "no-")}
    foreign = {f"--{name}" for names in FOREIGN_FLAGS.values() for name in names.split()}
    of_argparse = set(re.findall(r'add_(?:argument|option)\(\s*"(--[\w-]+)"', sources()))
    of_launch = set(re.findall(r"(?<![\w-])--[a-z-]+", (REPO / "launch.sh").read_text()))
    of_watch = set(re.findall(r'"(--\w+)"', (REPO / "watch.py").read_text()))
    return ours | foreign | of_argparse | of_launch | of_watch | {"--help", "--check", "--runs"}


def unknown_flags(text: str) -> list[str]:
    return sorted(set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text)) - known_flags())


def unknown_variables(text: str) -> list[str]:
    """Variables that a command sets or a page names, and neither launch.sh nor a source reads."""
    read = set(re.findall(r"\b[A-Z][A-Z_]+\b", (REPO / "launch.sh").read_text()))
    code = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    named = set(re.findall(r"(?<![\w{$-])([A-Z][A-Z_]+)=", "\n".join([*code, *in_backticks(text)])))
    named |= {word for word in in_backticks(text) if re.fullmatch(r"[A-Z]+_[A-Z_]+", word)}
    python = set(re.findall(r"^([A-Z][A-Z_]+)\b", sources(), re.M))
    python |= set(re.findall(r'environ(?:\.get\(|\[)"([A-Z_]+)"', sources()))
    return sorted(named - read - python - FOREIGN_VARIABLES)


def missing_files(text: str) -> list[str]:
    names = {path.name for path in files_of_the_repository()}
    found = []
    for word in in_backticks(text):
        for name in re.findall(r"(?<![\w/])([\w./-]+\.(?:py|sh|toml))\b", word):
            there = (REPO / name).exists() or ("/" not in name and name in names)
            found += [] if there or name in PLACEHOLDERS else [name]
    return found


def unknown_names(text: str) -> list[str]:
    """Python names in backticks, such as `token_loss` or `Node.generate`, that no source has."""
    words = {w.removesuffix("()") for w in in_backticks(text)}
    words = {w for w in words if re.fullmatch(r"[A-Za-z]\w*_\w+|[A-Z]\w+\.\w+", w)}
    known = set(re.findall(r"\w+", sources()))
    return sorted(w for w in words if not known.issuperset(w.split(".")))


def misplaced_names(text: str) -> list[str]:
    """In "`file.py`: ... `name`" of a table's cell: names that this file has not."""
    found = []
    cells = [c for line in text.splitlines() if line.startswith("|") for c in line.split("|")]
    for part in (part for cell in cells for part in cell.split("; ")):
        if match := re.match(r" ?`(\w+\.py)`: (.*)", part):
            source = (REPO / match[1]).read_text()
            names = re.findall(r"`([A-Za-z][\w.]*)`", match[2])
            last = [name.rpartition(".")[2] for name in names if not name.endswith(".json")]
            found += [f"{match[1]}: {n}" for n in last if not re.search(rf"\b{n}\b", source)]
    return found


# ---- commands ------------------------------------------------------------------------------------
def commands(text: str) -> list[str]:
    """Lines of bash blocks and of backticks that start one of our programs."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    starts = re.compile(r"(\w+=\S+ |[A-Z_]+=\".*?\" )*(python|bash|torchrun|sbatch) ")
    return [line.strip() for line in [*lines, *in_backticks(text)] if starts.match(line.strip())]


def check_command(line: str) -> None:
    """Raises: ValueError or AssertionError for one that its program would refuse."""
    words = [word for word in shlex.split(line, comments=True) if word not in ("...", "FLAGS")]
    while words and re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        if name == "ROLLOUT_ARGS":
            parse_flags(RolloutConfig, ["http://h:1", *shlex.split(value)])
    if words[0] == "sbatch":
        return check_command(words[words.index("--wrap") + 1])
    at = next((i for i, word in enumerate(words) if word.endswith((".py", ".sh"))), None)
    if at is None:
        return  # python -m, bash -s
    script, rest = words[at], words[at + 1 :]
    assert (REPO / script).is_file(), f"{script}: no such file"
    if script == "launch.sh":
        rest = rest[1:] if rest[:1] == ["--print"] else rest
        kind = rest[0] if rest else ""
        if kind in ("test", "install", "rollout") or rest == ["--help"]:
            assert kind == "test" or len(rest) == 1, rest
            return
        rest = rest[1:] if kind in ("trainer", "--quick", "--flags") else rest
    if script in ("launch.sh", "train_cispo.py"):
        parse_config([word for word in rest if word != "--help"])
    elif script == "evaluate.py":
        _, rest = evaluate.parse(rest)
        parse_config([*rest, "--model", "given"])
    elif script == "rollout.py":
        parse_flags(RolloutConfig, [word for word in rest if word != "--help"])
    else:
        own = (REPO / script).read_text()
        for flag in (word for word in rest if word.startswith("--")):
            assert flag in own or f'"{flag[2:]}' in own, f"{script} has no {flag}"


def refused_commands(text: str) -> list[str]:
    found = []
    for line in commands(text):
        try:
            check_command(line)
        except (ValueError, AssertionError, SystemExit) as e:
            found.append(f"{line}: {e}")
    return found


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Where a user's files are that the commands name."""
    (tmp_path / "my.py").write_text("def score(completion, example):\n    return 1.0\n")
    for name in ("FILE.jsonl", "problems.jsonl"):
        (tmp_path / name).write_text('{"problem": "1 + 1", "answer": "2"}\n')
    monkeypatch.chdir(tmp_path)


# ---- the pages -----------------------------------------------------------------------------------
TEXT_CHECKS = [
    unknown_flags,
    unknown_variables,
    missing_files,
    unknown_names,
    misplaced_names,
    refused_commands,
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_says_of_the_program_is_so(page, directory):
    text = page.read_text()
    wrong = {check.__name__: check(text) for check in TEXT_CHECKS}
    wrong["broken_links"] = broken_links(text, page)
    assert not any(wrong.values()), {name: faults for name, faults in wrong.items() if faults}


@pytest.mark.parametrize(
    ("check", "text", "fault"),
    [
        (unknown_flags, "give `--no-such-flag 3`", "--no-such-flag"),
        (unknown_variables, "```bash\nHUB_PORTS=1 bash launch.sh rollout\n```\n", "HUB_PORTS"),
        (unknown_variables, "set `CISPO_TOKENS`", "CISPO_TOKENS"),
        (missing_files, "see `bridge/tensors.py`", "bridge/tensors.py"),
        (missing_files, "see `metrics.py` and `loss.py`", "metrics.py"),
        (unknown_names, "called in `token_lost`", "token_lost"),
        (unknown_names, "in `Node.dream`", "Node.dream"),
        (misplaced_names, "| x | `loss.py`: see `rollout_metrics` |", "loss.py: rollout_metrics"),
        (refused_commands, "```bash\npython train_cispo.py --lr -1\n```\n", "--lr -1"),
        (refused_commands, "```bash\npython train_cispo.py --lrr 1\n```\n", "--lrr"),
        (refused_commands, "```bash\nA=1 bash launch.sh --quick --lrr 1\n```\n", "--lrr"),
        (refused_commands, '```bash\nROLLOUT_ARGS="--x 1" bash launch.sh rollout\n```\n', "--x"),
        (refused_commands, "```bash\npython bench.py loss\n```\n", "no such file"),
        (refused_commands, "run `python tools/soak.py --stepps 9`", "has no --stepps"),
        (refused_commands, "```bash\npython rollout.py http://h:1 --gpus 8\n```\n", "--gpus"),
    ],
)
def test_a_planted_fault_is_found(check, text, fault, directory):
    (found,) = check(text)
    assert fault in found


def test_a_planted_link_is_found():
    good = "[a](docs/nodes.md#will-it-fit) [b](https://example.org) ![c](docs/watch.png)"
    assert broken_links(good, REPO / "README.md") == []
    for target in ("docs/none.md", "docs/nodes.md#no-such-heading", "#no-such-heading"):
        assert broken_links(f"[x]({target})", REPO / "README.md") == [target]


def test_the_commands_of_the_pages_are_seen():
    seen = [line for page in PAGES for line in commands(page.read_text())]
    programs = (
        "launch.sh",
        "train_cispo.py",
        "rollout.py",
        "watch.py",
        "tools/",
        "NODES=",
        "sbatch",
    )
    for start in programs:
        assert any(start in line for line in seen), start
    assert len(seen) >= 40


# ---- the README ----------------------------------------------------------------------------------
def shape_faults(text: str) -> list[str]:
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines, 1) if line.startswith("bash launch.sh")), 999)
    found = [f"{len(lines)} lines"] if len(lines) > MAX_README_LINES else []
    found += [f"the first command is on line {first}"] if first > FIRST_COMMAND_BY else []
    wide = [i for i, line in enumerate(lines, 1) if len(line) > 100 and line[0] != "|"]
    return found + [f"line {i} is above 100 columns" for i in wide]


def test_the_readme_is_short_and_begins_with_a_command():
    text = (REPO / "README.md").read_text()
    assert shape_faults(text) == []
    assert shape_faults(text + "\n" * 200) and shape_faults("\n" * 30 + text)
    assert shape_faults("x" * 101 + "\n" + text)


def test_every_page_is_linked_from_the_readme():
    text = (REPO / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"{page.relative_to(REPO)}" not in text] == []


def unlisted(layout: str) -> list[str]:
    """Program files that docs/layout.md does not name, nor the README's reading order."""
    known = layout + (REPO / "README.md").read_text()
    files = [str(path.relative_to(REPO)) for path in program_files()]
    files += [f"tools/{path.name}" for path in (REPO / "tools").glob("*.py")]
    return [f for f in files if f"`{f}`" not in known and not f.endswith("__init__.py")]


def test_every_file_of_the_program_is_listed():
    layout = (REPO / "docs/layout.md").read_text()
    assert unlisted(layout) == []
    assert unlisted(layout.replace("`bridge/hub.py`", "")) == ["bridge/hub.py"]


# ---- launch.sh -----------------------------------------------------------------------------------
def unread_variables(usage: str, code: str) -> list[str]:
    foreign = {
        "FLAGS",
        "ARGS",
        "PIP_EXTRA_INDEX_URL",
        "NCCL_",
        "CPU",
        "GPU",
        "CUDA",
        "NODE",
        "NAME",
    }
    return sorted(
        set(re.findall(r"\b[A-Z][A-Z_]{2,}\b", usage)) - foreign - set(re.findall(r"\w+", code))
    )


def test_launch_sh_reads_every_variable_that_its_help_names():
    script = (REPO / "launch.sh").read_text()
    usage = re.search(r"<<'END'\n(.*?)^END", script, re.M | re.S)[1]
    shown = ["bash", "launch.sh", "--help"]
    assert subprocess.run(shown, cwd=REPO, capture_output=True, text=True).stdout == usage
    code = script.replace(usage, "")
    assert unread_variables(usage, code) == []
    assert unread_variables(f"{usage} HUB_PORTS=1", code) == ["HUB_PORTS"]
    assert max(map(len, script.splitlines())) <= 100
