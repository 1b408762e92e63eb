"""Markdown and a figure of the table of an experiment. Everything is made from the content of table.json."""

import os
from typing import Any

from common.files import atomic_path, write_json

SIGNIFICANT = 0.01  # differences with a smaller p-value are marked
_UPPER = ("ndcg", "mrr", "map")
_GROUP_METRIC = "ndcg@10"
_CAPTION = "Mean and standard error over seeds. ▲▼ better, worse than a row in orange, p < .01 (table.md says which)."
_COLORS = {"UniSRec": "tab:blue", "other": "tab:gray", "compared": "tab:orange"}


def write_report(table: dict[str, Any], folder: str) -> None:
    """Write table.json, table.md and table.png.

    Args:
        table: from `experiments.summary.build_table`.
        folder: created if it is missing.
    """
    write_json(os.path.join(folder, "table.json"), table)
    title = f"# {table['title'] or table['experiment']}"
    state = f"{table['finished']} of {table['runs']} runs have finished."
    lines = [title, "", state, "", *format_table(table), *_format_groups(table)]
    with atomic_path(os.path.join(folder, "table.md")) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    draw(table, os.path.join(folder, "table.png"))


# -- Markdown -------------------------------------------------------------------------------------------------------


def format_table(table: dict[str, Any]) -> list[str]:
    """The lines of the main table as Markdown: one table per data set, and a paragraph that explains them."""
    lines = []
    for name, dataset in table["datasets"].items():
        lines += [*_format_dataset(table, name, dataset), ""]
    return [*lines, _explanation(table)]


def _format_dataset(table, name, dataset):
    rows = dataset["rows"]
    letters = _letters(rows)
    best = {column: _best(rows, column) for column in map(tuple, table["columns"])}
    all_test = all(split == "test" for split, _ in table["columns"])
    size = f" ({dataset['users']:,} users, {dataset['items']:,} items)" if dataset["users"] else ""
    heads = [
        f"{name}{', test' if all_test else ''}{size}",
        *map(_head, table["columns"]),
        "seeds",
        "best epoch",
        "seconds",
    ]
    heads += ["vs."] if letters else []
    lines = [_line(heads), _line(["---"] * len(heads))]
    for label, row in rows.items():
        cells = [
            label + (f" ({letters[label]})" if label in letters else "") + ("†" if row["runs_of_other_code"] else "")
        ]
        cells += [_cell(row, column, best[column]) for column in best]
        cells += [_seeds(row), _range(row["best_epoch"]), _range([sum(each.values()) for each in row["seconds"]])]
        compared = row["compared"]
        cells += [letters[compared["row"]] if compared else ""] if letters else []
        lines.append(_line(cells))
    return lines


def _letters(rows):
    """A letter for each row that others are compared with."""
    bases = dict.fromkeys(row["compared"]["row"] for row in rows.values() if row["compared"])
    return {label: "abcdefghijklmnopqrstuvwxyz"[number % 26] for number, label in enumerate(bases)}


def _best(rows, column):
    """The highest mean of a column. None if it is empty."""
    split, metric = column
    return max((row["metrics"][split][metric]["mean"] for row in rows.values() if row["seeds"]), default=None)


def _head(column):
    split, metric = column
    name, _, k = metric.partition("@")
    return f"{'valid ' if split == 'valid' else ''}{name.upper() if name in _UPPER else name.capitalize()}@{k}"


def _cell(row, column, best):
    """Mean ± standard error, and the mark of a significant difference."""
    split, metric = column
    if not row["seeds"]:
        return ""
    value = row["metrics"][split][metric]
    text = f"**{number(value['mean'])}**" if value["mean"] == best else number(value["mean"])
    text += f" ± {number(value['error'])}" if value["error"] is not None else ""
    return text + (f" {_mark(row, metric)}" if split == "test" else "").rstrip()


def _mark(row, metric):
    """▲ if the row is better than the row that it is compared with, ▼ if it is worse, at p < .01."""
    found = row["compared"]["metrics"][metric] if row["compared"] else None
    if not found or not found["p"] < SIGNIFICANT:
        return ""
    return "▲" if found["difference"] > 0 else "▼"


def _seeds(row):
    found, wanted = len(row["seeds"]), row["runs_wanted"]
    return str(found) if found == wanted else f"{found} of {wanted}"


def _range(values):
    """The lowest to the highest value, rounded."""
    values = [round(value) for value in values if value is not None]
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def number(value: float) -> str:
    """A metric with four decimals, without the zero in front of the point: .0680."""
    return f"{value:.4f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.4f}"


def _line(cells):
    return f"| {' | '.join(cells)} |"


def _explanation(table):
    """What the figures are, in sentences."""
    rows = [row for dataset in table["datasets"].values() for row in dataset["rows"].values()]
    sentences = [f"Mean ± standard error over the seeds {_list(table['seeds'])}."]
    if any(row["runs_wanted"] == 1 for row in rows) and len(table["seeds"]) > 1:
        sentences.append("A model that draws no random numbers ran once.")
    if any(row["compared"] for row in rows):
        sentences.append(
            "▲ better, ▼ worse than the row in the column “vs.”, p < .01 "
            "(paired t-test over users, whose metrics are averaged over the seeds)."
        )
    protocols = [row["protocol"] for row in rows if row["protocol"]]
    if protocols and all(map(_keeps_history, protocols)):
        sentences.append("Full ranking of all items, those of the history included.")
    encoders = {_encoder(row["text_encoder"]): None for row in rows if row["text_encoder"]}
    if encoders:
        sentences.append(f"Item texts: {'; '.join(encoders)}.")
    if any(row["runs_of_other_code"] for row in rows):
        sentences.append("† with an earlier state of the code (`--rerun` repeats these runs).")
    if table["dates"]:
        first, last = table["dates"]
        threads = sorted({each for row in rows for each in row["threads"]})
        when = first if first == last else f"{first} to {last}"
        on = f"{'; '.join(table['machines'])}; {_list(threads)} thread{'s' if threads != [1] else ''} per run"
        sentences.append(f"Measured {when} ({on}).")
    return " ".join(sentences)


def _keeps_history(protocol):
    """Whether all items are candidates, those of the history included."""
    mode = protocol["eval_args"]["mode"]  # RecBole turns `full` into {valid: full, test: full}
    return protocol["repeatable"] and (mode["test"] if isinstance(mode, dict) else mode) == "full"


def _encoder(about):
    encoder = about.get("encoder") or about["features"]
    return encoder + (f", {about['pooling'].lower()} pooling" if about.get("pooling") == "Mean" else "")


def _list(values):
    values = [str(value) for value in values]
    return " and ".join(filter(None, [", ".join(values[:-1]), values[-1]]))


def _format_groups(table):
    """One table per data set and kind of group: the metric of each row in each group."""
    lines = [f"## {_head(('test', _GROUP_METRIC))} by group"]
    for name, dataset in table["datasets"].items():
        rows = {label: row for label, row in dataset["rows"].items() if row["groups"]}
        for group, labels in next((row["groups"] for row in rows.values()), {}).items():
            heads = [f"{name}, by {group}", *(f"{label} ({about['users']:,} users)" for label, about in labels.items())]
            lines += ["", _line(heads), _line(["---"] * len(heads))]
            for label, row in rows.items():
                values = [row["groups"][group].get(each, {}).get(_GROUP_METRIC) for each in labels]
                lines.append(_line([label, *("" if value is None else number(value) for value in values)]))
    return ["", *lines] if len(lines) > 1 else []


# -- figure ---------------------------------------------------------------------------------------------------------


def draw(table: dict[str, Any], path: str) -> None:
    """Draw a figure, one panel per data set, and write it as PNG.

    If rows are points of a curve, the figure shows the curves over the share of the training users, else a bar for each
    row. The metric is test NDCG@10 if the table has it, else its first column.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = [tuple(column) for column in table["columns"]]
    split, metric = ("test", _GROUP_METRIC) if ("test", _GROUP_METRIC) in columns else columns[0]
    datasets = table["datasets"]
    has_curves = any(row["curve"] for dataset in datasets.values() for row in dataset["rows"].values())
    figure = (_figure_of_curves if has_curves else _figure_of_bars)(pyplot, datasets, split, metric)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


def _figure_of_bars(pyplot, datasets, split, metric):
    """A bar for each row."""
    size = (5 + 4 * len(datasets), 1.2 + 0.36 * max(len(dataset["rows"]) for dataset in datasets.values()))
    figure, panels = pyplot.subplots(1, len(datasets), figsize=size, squeeze=False, sharey=True)
    for axes, (name, dataset) in zip(panels[0], datasets.items(), strict=True):
        _draw_panel(axes, dataset["rows"], split, metric)
        axes.set_xlabel(f"{_head(('test', metric))} on {name} ({split})")
    panels[0][0].invert_yaxis()
    figure.suptitle(_CAPTION, fontsize=8, color="dimgray")
    return figure


def _figure_of_curves(pyplot, datasets, split, metric):
    """The curves over the share of the training users."""
    figure, panels = pyplot.subplots(1, len(datasets), figsize=(1 + 4.5 * len(datasets), 4.2), squeeze=False)
    for axes, (name, dataset) in zip(panels[0], datasets.items(), strict=True):
        _draw_curves(axes, dataset["rows"], split, metric)
        axes.set(title=f"{name}, {split}", xlabel="training users", ylabel=_head(("test", metric)))
    if panels[0][-1].get_legend_handles_labels()[1]:
        panels[0][-1].legend(fontsize=8, loc="lower right")
    return figure


def _draw_curves(axes, rows, split, metric):
    """Draw each curve over the share of the training users, and the rows of other models as dashed lines.

    The shares are drawn at equal distances, because those of interest differ by factors.
    """
    curves: dict[str, dict[float, dict]] = {}
    for label, row in rows.items():
        if row["curve"] and row["seeds"]:
            curves.setdefault(row["curve"], {})[_share_of_users(row)] = row["metrics"][split][metric]
        elif row["seeds"] and row["model"] != "UniSRec":
            value = row["metrics"][split][metric]["mean"]
            axes.axhline(value, color="gray", linestyle="dashed", linewidth=1)
            axes.annotate(label, (0, value), (0, 2), textcoords="offset points", fontsize=7, color="dimgray")
    shares = sorted({share for points in curves.values() for share in points})
    for name, points in curves.items():
        own = sorted(points)
        means, errors = ([points[share][key] or 0 for share in own] for key in ("mean", "error"))
        axes.errorbar([shares.index(share) for share in own], means, yerr=errors, marker="o", capsize=3, label=name)
    axes.set_xticks(range(len(shares)), [f"{100 * share:g}%" for share in shares])
    axes.spines[["top", "right"]].set_visible(False)


def _share_of_users(row):
    """The share of the training users from which the model of a row has learned."""
    given = row["given_settings"]
    return 0.0 if given.get("epochs") == 0 else given.get("train_fraction", 1.0)


def _draw_panel(axes, rows, split, metric):
    bases = {row["compared"]["row"] for row in rows.values() if row["compared"]}
    for position, (label, row) in enumerate(rows.items()):
        if not row["seeds"]:
            continue
        value = row["metrics"][split][metric]
        kind = "compared" if label in bases else "UniSRec" if row["model"] == "UniSRec" else "other"
        axes.barh(position, value["mean"], xerr=value["error"], color=_COLORS[kind], ecolor="black", capsize=2)
        mark = f" {_mark(row, metric)}" if split == "test" else ""
        end = value["mean"] + (value["error"] or 0)
        axes.annotate(number(value["mean"]) + mark, (end, position), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.margins(x=0.18)
    axes.spines[["top", "right"]].set_visible(False)
