"""The promise to the reader: each file stays short enough to be read. Fails when one outgrows its budget, or when a
new file at the top or in inside_vllm has none. The numbers are in pyproject.toml; raising one is a commit of its own
that says why."""

import sys
import tomllib
from pathlib import Path

root = Path(__file__).resolve().parent.parent
budget = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["cispo"]["line-budget"]
files = [*root.glob("*.py"), *root.glob("inside_vllm/*.py"), *root.glob("*.sh")]
lines = {str(p.relative_to(root)): len(p.read_text().splitlines()) for p in files}
failed = False
for name, count in sorted(lines.items()):
    limit = budget.get(name)
    over = limit is None or count > limit
    failed |= over
    print(f"{name:26} {count:5} of {limit}{'   <-- over budget' if over else ''}")
print(f"{'all':26} {sum(lines.values()):5} of {sum(budget.values())}")
sys.exit(failed)
