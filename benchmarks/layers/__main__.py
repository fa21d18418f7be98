"""Write the tables of results.json into both README.md files, and the plots: `python -m benchmarks.layers`."""

from __future__ import annotations

from pathlib import Path

from convgrad_export.bench.report import machine_line, markdown, summary_table, write_plots
from convgrad_export.bench.results import Results, load
from convgrad_export.bench.summary import groups

FOLDER = Path(__file__).parent
RESULT, README, ROOT_README = FOLDER / "results.json", FOLDER / "README.md", FOLDER.parents[1] / "README.md"
BEGIN, END = "<!-- layer tables: python -m benchmarks.layers -->\n", "<!-- end -->\n"
COLUMNS = (
    *("batch", "threads", "gradient", "layers", "eager", "worst layer", "at least 0.9", "ConvGrad", "textbook"),
    *("of GEMM, dense", "file alone / eager", "fastest / eager", "error factor 8 / eager"),
)


def with_tables(text: str, tables: str) -> str:
    """The page with `tables` between its markers."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + tables + END + rest.split(END, 1)[1]


def summary(results: Results) -> str:
    """What the repository's README shows."""
    table = summary_table(groups(results)).without_empty_columns().only(COLUMNS)
    return f"{machine_line(results)}\n\n{table.markdown()}\n"


def pages(results: Results) -> dict[Path, str]:
    """Both pages with the tables of `results`."""
    return {
        README: with_tables(README.read_text(), markdown(results)),
        ROOT_README: with_tables(ROOT_README.read_text(), summary(results)),
    }


def main() -> int:
    results = load(RESULT)
    for path, text in pages(results).items():
        path.write_text(text)
        print(f"written: {path}")
    for path in write_plots(results, FOLDER, "ratios", overwrite=True):
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
