"""A terminal with its colours as a picture: `python watch.py runs/NAME --once | python
docs/screenshot.py OUT.png`."""

import re
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {31: "#f07178", 32: "#a5d66a", 33: "#ffcb6b", 36: "#7fd1e0"}
lines = sys.stdin.read().rstrip("\n").split("\n")
columns = max(len(re.sub(r"\x1b\[\d*m", "", line)) for line in lines)
cell_w, cell_h = 0.078, 0.165  # inches of a character at 9.5 points
fig = plt.figure(figsize=((columns + 4) * cell_w, (len(lines) + 2) * cell_h), facecolor="#16191f")
for row, line in enumerate(lines):
    column, style = 2, {"color": "#d5d8de"}
    for code, text in re.findall(r"(?:\x1b\[(\d*)m)?([^\x1b]*)", line):
        if code:
            style = {
                "color": COLOURS.get(
                    int(code), {1: "#ffffff", 2: "#7b8190"}.get(int(code), "#d5d8de")
                ),
                "fontweight": "bold" if code == "1" else "normal",
            }
        for character in text:  # one by one, on a grid, as a terminal does
            if character != " ":
                fig.text(
                    (column + 0.5) / (columns + 4),
                    1 - (row + 1.6) / (len(lines) + 2),
                    character,
                    fontsize=9.5,
                    family="DejaVu Sans Mono",
                    ha="center",
                    va="baseline",
                    **style,
                )
            column += 1
fig.savefig(sys.argv[1], dpi=130, facecolor=fig.get_facecolor())
