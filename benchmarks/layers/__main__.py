"""Write the tables of results.json into README.md and the plots beside it: `python -m benchmarks.layers`."""

from __future__ import annotations

from pathlib import Path

from convgrad_export.bench.report import markdown, write_plots
from convgrad_export.bench.results import load

FOLDER = Path(__file__).parent
RESULT, README = FOLDER / "results.json", FOLDER / "README.md"
BEGIN, END = "<!-- tables: python -m benchmarks.layers -->\n", "<!-- end -->\n"


def with_tables(text: str, tables: str) -> str:
    """The page with `tables` between its markers."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + tables + END + rest.split(END, 1)[1]


def main() -> int:
    results = load(RESULT)
    README.write_text(with_tables(README.read_text(), markdown(results)))
    for path in write_plots(results, FOLDER, "ratios", overwrite=True):
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
