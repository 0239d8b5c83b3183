"""What keeps the layout: which folder may import which, no circle, no file too long to be read, no
formatting by hand but for real tables. Fails with a line for each breach."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES, MAX_SKIPS = 600, 15
# imports between what a reader sees at the top: its files, and each folder as one. Four of them are
# evaluate.py's, a program that nothing imports.
MAX_ARROWS = 44
MAY_IMPORT = {  # folder: what its modules may import of ours; "" is the top
    "": {"", "ranks", "bridge"},
    "ranks": {"ranks", "bridge"},
    "bridge": {"bridge"},
    "bridge/inside_vllm": set(),
    "tools": {"tools", "", "ranks", "bridge"},
}

files = {
    p: str(p.parent.relative_to(ROOT)).strip(".")
    for d in MAY_IMPORT
    for p in (ROOT / d).glob("*.py")
}
module_of = {p: f"{d.replace('/', '.')}.{p.stem}".strip(".") for p, d in files.items()}
folder_of = {module_of[p]: d for p, d in files.items()}


def imported(path: Path) -> set[str]:
    """Our modules that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & folder_of.keys()


graph = {module_of[p]: imported(p) for p in files}
faults = [
    f"{module} imports {other}: {folder_of[module] or 'the top'} may not import from "
    f"{folder_of[other] or 'the top'}"
    for module, others in graph.items()
    for other in others
    if folder_of[other] not in MAY_IMPORT[folder_of[module]]
]


def seen_as(module: str) -> str:
    """A file of the top by its name, any other by its folder's."""
    return folder_of[module].split("/")[0] or module


arrows = {(seen_as(a), seen_as(b)) for a, others in graph.items() for b in others}
arrows = {(a, b) for a, b in arrows if a != b and a != "tools"}
if len(arrows) > MAX_ARROWS:
    faults.append(
        f"{len(arrows)} arrows between files of the top and folders, {MAX_ARROWS} is the most"
    )
try:
    TopologicalSorter(graph).prepare()
except CycleError as e:
    faults.append(f"imports in a circle: {' -> '.join(e.args[1])}")
sources = [*files, ROOT / "launch.sh", *(ROOT / "tests").rglob("*.py")]
lengths = {p: len(p.read_text().splitlines()) for p in sources}
faults += [
    f"{p.relative_to(ROOT)} has {n} lines, {MAX_LINES} is the most"
    for p, n in lengths.items()
    if n > MAX_LINES
]
skips = sum(line.endswith("# fmt: skip") for p in sources for line in p.read_text().splitlines())
faults += [f"{skips} times fmt: skip, {MAX_SKIPS} is the most"] if skips > MAX_SKIPS else []
program = {
    p: n
    for p, n in lengths.items()
    if folder_of.get(module_of.get(p), "tests") not in ("tools", "tests")
}
total = sum(program.values())
print(f"{total} lines in {len(program)} files, {len(arrows)} arrows, {skips} fmt: skip")
sys.exit("\n".join(faults) or 0)
