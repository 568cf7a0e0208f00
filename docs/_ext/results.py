"""Tables and figures of the pages on benchmarks, from ``benchmarks/results``: no number is typed.

``.. results:: NAME`` shows columns of ``NAME.csv``, and below them which command, seeds, commit and
machine the figures are of. The figures are drawn when a build begins.
"""

import csv
import io
from pathlib import Path

import numpy as np
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
INK, OURS = "#5b6472", "#5b3b8c"


def read(name):
    """Rows of a file of results, a dict each."""
    with open(RESULTS / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def _signed(text):
    return text if text.startswith("-") or not text else f"+{text}"


class Results(SphinxDirective):
    """``:columns:`` says "heading=column" (or the column alone), ``:best:`` what to set in bold."""

    required_arguments = 1
    option_spec = {
        "columns": directives.unchanged_required,
        "best": directives.unchanged,
        "signed": directives.unchanged,
        "only": directives.unchanged,  # "column=value"
        "known": directives.unchanged,  # a column that has to have a value
    }

    def run(self):
        name = self.arguments[0]
        self.env.note_dependency(str(RESULTS / f"{name}.csv"))
        rows = read(name)
        if "only" in self.options:
            column, value = self.options["only"].split("=")
            rows = [row for row in rows if row[column] == value]
        if "known" in self.options:
            rows = [row for row in rows if row[self.options["known"]]]
        if not rows:
            return self.parse_text_to_nodes("*Not measured yet.*")
        columns = [part.strip().rpartition("=") for part in self.options["columns"].split(",")]
        heads = [head or column for head, _, column in columns]
        best = [part.strip() for part in self.options.get("best", "").split(",") if part]
        signed = [part.strip() for part in self.options.get("signed", "").split(",")]
        text = io.StringIO()
        table = csv.writer(text)
        for row in rows:
            top = max((float(row[c]) for c in best), default=None)
            cells = []
            for _, _, column in columns:
                cell = _signed(row[column]) if column in signed else row[column].replace("_", " ")
                cells.append(
                    f"**{cell}**" if column in best and float(row[column]) == top else cell
                )
            table.writerow(cells)
        lines = [".. csv-table::", f"   :header: {','.join(heads)}", "   :class: results", ""]
        lines += [f"   {line}" for line in text.getvalue().splitlines()]
        commits = sorted({row["commit"] for row in rows})
        seeds = sorted({row["seeds"] for row in rows}, key=len)
        lines += [
            "",
            ".. rst-class:: measured",
            "",
            f"``{rows[0]['command']}`` · seeds {'; '.join(seeds)} · recorded in "
            f"{', '.join(commits)} · {rows[0]['machine']} · "
            f"``benchmarks/results/{name}.csv``",
        ]
        return self.parse_text_to_nodes("\n".join(lines))


class Costs(SphinxDirective):
    """Processor seconds of a fit, by table and estimator, out of the files of results."""

    FILES = {
        "NCEDensity": "tables",
        "ScoreMatchingEBM": "score_matching",
        "ContrastiveDivergenceEBM": "divergence",
        "FlowContrastiveDensity": "games_tables",
    }

    def run(self):
        seconds = {}
        for name in self.FILES.values():
            self.env.note_dependency(str(RESULTS / f"{name}.csv"))
            rows = read(name)
            seconds[name] = {row.get("case") or row["table"]: row["fit_cpu_s"] for row in rows}
        cases = sorted(read("tables"), key=lambda row: int(row["rows"]))
        heads = (
            "table,rows,columns,NCEDensity,score matching,contrastive divergence,flow contrastive"
        )
        lines = [".. csv-table::", f"   :header: {heads}", "   :class: results", ""]
        for row in cases:
            found = [seconds[name][row["case"]] for name in self.FILES.values()]
            cells = [row["case"].replace("_", " "), row["rows"], row["columns"], *found]
            lines.append("   " + ",".join(cells))
        return self.parse_text_to_nodes("\n".join(lines))


def _numbers(rows, *columns):
    return np.array([[float(row[c]) for c in columns] for row in rows])


def draw_gains(ax):
    """Per table, NCEDensity minus the best peer, with two standard errors."""
    rows = sorted(read("tables"), key=lambda row: float(row["over_best"]))
    gain, error = _numbers(rows, "over_best", "gain_std_error").T
    place = np.arange(len(rows))
    ax.errorbar(gain, place, xerr=2 * error, fmt="o", color=OURS, ecolor=INK, elinewidth=1)
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.set_xscale("symlog", linthresh=0.1, linscale=0.5)
    ticks = [-0.1, 0, 0.1, 1, 10]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    names = [f"{row['case'].replace('_', ' ')} ({row['rows']}, {row['columns']})" for row in rows]
    ax.set_yticks(place, names)
    ax.set_xlabel("NCEDensity minus the best of four peers, nats per row")


def draw_divergences(ax):
    """KL to the truth on distributions with 1,000 rows."""
    rows = [row for row in read("distributions") if row["rows"] == "1000"]
    methods = {"GMM": "s", "KDE": "^", "NSF": "v", "MAF": "D", "NCEDensity": "o"}
    truth = _numbers(rows, "truth")[:, 0]
    order = np.argsort(truth - _numbers(rows, "NCEDensity")[:, 0])
    place = np.arange(len(rows))
    for i, (method, marker) in enumerate(methods.items()):
        ours = method == "NCEDensity"
        kl = (truth - _numbers(rows, method)[:, 0])[order]
        color = OURS if ours else ["#c45f1d", "#2a9d8f", "#b08900", "#8a94a6"][i]
        style = {"marker": marker, "linestyle": "", "color": color, "markersize": 7 if ours else 5}
        ax.plot(np.minimum(kl, 9), place, label=method, **style)
    ax.set_xscale("log")
    ax.set_yticks(place, [rows[i]["case"].replace("_", " ") for i in order])
    ax.set_xlabel("Kullback-Leibler divergence from the truth, nats; one of 1,430 is drawn at 9")
    ax.figure.legend(loc="outside upper center", ncols=5, frameon=False)


def draw_ranks(ax):
    """Mean rank by area under the ROC curve over the tables of the anomaly benchmark."""
    methods = ["OCSVM", "PCA", "COPOD", "ECOD", "LOF", "GMM(5)", "IForest", "KDE", "KNN", "DTE-NP"]
    methods.append("OutlierDetector")
    for name, marker, filled in (("one_class", "o", True), ("unsupervised", "s", False)):
        rows = [row for row in read(f"anomalies_{name}") if not row["table"].startswith("mean")]
        auc = _numbers(rows, *methods)
        rank = 1 + (auc[:, :, None] < auc[:, None, :]).sum(2)
        rank = rank + ((auc[:, :, None] == auc[:, None, :]).sum(2) - 1) / 2
        colors = [OURS if m == "OutlierDetector" else INK for m in methods]
        place = np.arange(len(methods)) + (0.12 if filled else -0.12)
        face = colors if filled else "none"
        label = name.replace("_", "-")
        ax.scatter(
            rank.mean(0), place, marker=marker, facecolor=face, edgecolor=colors, label=label
        )
    ax.set_yticks(range(len(methods)), methods)
    ax.set_xlabel("mean rank among eleven by area under the ROC curve, over 14 tables; 1 is best")
    ax.figure.legend(loc="outside upper center", ncols=2, frameon=False)


def draw(app):
    import matplotlib.pyplot as plt

    folder = Path(app.srcdir, "generated")
    folder.mkdir(exist_ok=True)
    for figure_of in (draw_gains, draw_divergences, draw_ranks):
        figure, ax = plt.subplots(figsize=(8, 4.2), layout="constrained")
        figure_of(ax)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.92")
        ax.set_axisbelow(True)
        figure.savefig(folder / f"benchmarks_{figure_of.__name__[5:]}.png", dpi=130)
        plt.close(figure)


def setup(app):
    app.add_directive("results", Results)
    app.add_directive("costs", Costs)
    app.connect("builder-inited", draw)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
