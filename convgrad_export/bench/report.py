"""Tables from a result file, as Markdown and for a terminal; plots beside them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import raise_missing
from ..files import write_atomically
from ..reference import FORWARD, INPUT, WEIGHT
from .contenders import CONV_GRAD, TORCH
from .plan import items
from .results import Results
from .summary import Group, groups, networks_of, restless, troubles

_COLUMNS = (
    ("layers", "layers", "{:d}"),
    ("eager", "torch", "{:.2f}"),
    ("eager, medians", "torch_median", "{:.2f}"),
    ("worst layer", "torch_worst", "{:.2f}"),
    ("at least 0.9", "torch_share", "{:.0%}"),
    ("ConvGrad", "conv_grad", "{:.2f}"),
    ("textbook", "textbook", "{:.2f}"),
    ("of GEMM, dense", "gemm", "{:.0%}"),
    ("file alone / eager", "file_torch", "{:.2f}"),
    ("fastest / eager", "best_torch", "{:.2f}"),
    ("tuned / eager", "tuned_torch", "{:.2f}"),
    ("error factor 8 / eager", "relaxed_torch", "{:.2f}"),
    ("within 10% of fastest", "near_best", "{:.0%}"),
)


@dataclass(frozen=True)
class Table:
    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def without_empty_columns(self) -> Table:
        """The table less the columns that have no figure in any row."""
        return self.only([name for i, name in enumerate(self.headings) if any(row[i] != "-" for row in self.rows)])

    def only(self, headings: Sequence[str]) -> Table:
        """The named columns, those that there are."""
        kept = [index for index, heading in enumerate(self.headings) if heading in headings]
        rows = [tuple(row[index] for index in kept) for row in self.rows]
        return Table(self.title, tuple(self.headings[index] for index in kept), rows)

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.headings) + " |", "|---" * len(self.headings) + "|"]
        return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in self.rows)])


def tables(results: Results) -> list[Table]:
    """Summary, by network, slowest layers, memory and coverage: those that the file has figures for."""
    found = groups(results)
    made = [summary_table(found), *(_by_network(group) for group in found), *(_slowest(group) for group in found)]
    made += [_memory(found), _forward(found), _coverage(found, results)]
    return [table.without_empty_columns() for table in made if table.rows]


def markdown(results: Results) -> str:
    """All tables, and what could not be timed."""
    parts = [machine_line(results), *(table.markdown() for table in tables(results))]
    if lines := troubles(results):
        parts.append("**Not timed**\n\n" + "\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts) + "\n"


def machine_line(results: Results) -> str:
    """Where and with what the figures were measured."""
    e = results.environment
    versions = ", ".join(f"{name} {version}" for name, version in e.get("versions", {}).items())
    peer = f", onnxruntime-training {e['ort_training']}" if e.get("ort_training") else ""
    commits = f"; commit {', '.join(results.commits)}" if results.commits else ""
    return f"{e.get('cpu')}, {e.get('cores')} cores; Python {e.get('python')}, {versions}{peer}{commits}."


def summary_table(found: Sequence[Group]) -> Table:
    """One row for each batch size, thread count and gradient."""
    rows = []
    for group in found:
        for operation in (INPUT, WEIGHT, None):
            part = group.select(operation)
            if part.rows:
                head = (str(group.batch), str(group.threads), f"{operation} gradient" if operation else "both")
                rows.append((*head, *_cells(part)))
    return Table(
        "Time of the peer / time of the policy's choice (geometric means over distinct layers; above 1 is faster)",
        ("batch", "threads", "gradient", *(heading for heading, _, _ in _COLUMNS)),
        rows,
    )


def _by_network(group: Group) -> Table:
    rows = []
    for network in networks_of(group):
        part = group.select(network=network)
        if part.rows:
            rows.append((network, *_cells(part)))
    title = f"By network, both gradients, batch {group.batch}, {_threads(group.threads)}"
    return Table(title, ("network", *(heading for heading, _, _ in _COLUMNS)), rows)


def _slowest(group: Group) -> Table:
    rows = []
    for row in group.select().slowest():
        conv_grad, share = row.ratio(CONV_GRAD), row.gemm_share()
        rows.append(
            (
                row.label,
                _number(row.ratio(TORCH), "{:.2f}"),
                str(row.record["choices"].get("policy")),
                _number(row.time("policy"), "{:.3g} ms"),
                f"{row.best} {_number(row.ratio(TORCH, 'best'), '{:.2f}')}",
                _number(conv_grad, "{:.2f}"),
                _number(share, "{:.0%}"),
            )
        )
    title = f"Slowest against eager, batch {group.batch}, {_threads(group.threads)}"
    headings = ("layer", "eager", "policy's choice", "time", "fastest form / eager", "ConvGrad", "of GEMM")
    return Table(title, headings, rows)


def _memory(found: Sequence[Group]) -> Table:
    rows = []
    for group in found:
        for operation in (INPUT, WEIGHT):
            figures = group.select(operation).figures()
            if figures["memory_worst"] is not None:
                rows.append(
                    (
                        str(group.batch),
                        str(group.threads),
                        operation,
                        _number(figures["memory_2"], "{:.0%}"),
                        _number(figures["memory_worst"], "{:.1f}"),
                    )
                )
    title = "Peak extra memory of the policy's choice, in units of the layer's input"
    return Table(title, ("batch", "threads", "gradient", "layers at most 2x", "largest"), rows)


def _forward(found: Sequence[Group]) -> Table:
    rows = []
    for group in found:
        part = group.select(FORWARD)
        if (mean := part.forward()) is not None:
            rows.append((str(group.batch), str(group.threads), str(len(part.rows)), f"{mean:.2f}"))
    return Table(
        "For context, the forward pass: time of PyTorch eager / time of onnxruntime's Conv",
        ("batch", "threads", "layers", "eager"),
        rows,
    )


def _coverage(found: Sequence[Group], results: Results) -> Table:
    total = {operation: len(items(operations=(operation,))) for operation in (INPUT, WEIGHT, FORWARD)}
    rows = []
    for group in found:
        counts = {name: sum(row.record["operation"] == name for row in group.rows) for name in total}
        records = [row.record for row in group.rows]
        kept = sum(record["rounds"]["kept"] for record in records)
        disturbed = sum(record["rounds"]["disturbed"] for record in records)
        discarded = sum(record["rounds"]["discarded"] for record in records)
        rows.append(
            (
                str(group.batch),
                str(group.threads),
                *(f"{counts[name]} of {total[name]}" for name in total),
                f"{kept / max(1, len(records)):.1f}",
                str(discarded),
                f"{disturbed / max(1, kept):.1%}",
                str(restless(results, group.batch, group.threads)),
            )
        )
    headings = (
        "batch",
        "threads",
        *total,
        "rounds a layer",
        "rounds discarded",
        "kept though disturbed",
        "left out: no quiet round",
    )
    return Table("Covered: distinct geometries of all networks, and how quiet the machine was", headings, rows)


def _cells(group: Group) -> tuple[str, ...]:
    figures = group.figures()
    return tuple(_number(figures[name], form) for _, name, form in _COLUMNS)


def _number(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def write_plots(results: Results, folder: Path, stem: str, *, overwrite: bool = False) -> list[Path]:
    """One PNG for each batch size and thread count: the ratio to each peer on every layer, sorted.

    Raises:
        MissingDependencyError: no matplotlib. OutputExistsError, OutputPathError: as `files.write_atomically`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise_missing(error)
    written = []
    for group in groups(results):
        if not group.select().rows:
            continue
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for axis, operation in zip(axes, (INPUT, WEIGHT), strict=True):
            part = group.select(operation)
            for peer, label, colour in (
                ("textbook", "textbook form", "#9aa0a6"),
                (CONV_GRAD, "onnxruntime-training", "#e08a1e"),
                (TORCH, "PyTorch eager", "#1f5fa8"),
            ):
                ratios = sorted(part.ratios(peer))
                if ratios:
                    places = [(index + 0.5) / len(ratios) * 100 for index in range(len(ratios))]
                    axis.plot(places, ratios, label=f"{label} ({len(ratios)})", color=colour, linewidth=1.6)
            if axis.lines:
                axis.legend(fontsize=8, loc="upper left")
            axis.axhline(1.0, color="black", linewidth=0.8)
            axis.axhline(0.9, color="black", linewidth=0.6, linestyle=":")
            axis.set_yscale("log")
            axis.set_yticks([0.25, 0.5, 1, 2, 4, 8, 16], ["1/4", "1/2", "1", "2", "4", "8", "16"], minor=False)
            axis.minorticks_off()
            axis.set_title(f"{operation} gradient", fontsize=10)
            axis.set_xlabel("layers, sorted (%)")
            axis.grid(alpha=0.25)
        axes[0].set_ylabel("time of peer / ours")
        figure.suptitle(f"Policy's choice on onnxruntime, batch {group.batch}, {_threads(group.threads)}", fontsize=11)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=110)
        path = folder / f"{stem}_batch{group.batch}_threads{group.threads}.png"
        written.append(write_atomically(path, stream.getvalue(), overwrite=overwrite))
    return written
