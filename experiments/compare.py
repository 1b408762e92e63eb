"""Compare models user by user: read two or more ranks files, print differences, intervals and p-values.

    python finetune.py -d Scientific --ranks_file text.parquet --train_stage=inductive_ft
    python run_baseline.py -m SASRec -d Scientific --ranks_file sasrec.parquet
    python experiments/compare.py sasrec.parquet text.parquet --metrics recall@10,ndcg@10

Each file is compared with the first one, on the same users and targets. The p-value is that of a paired t-test. The
interval contains 95% of the mean differences in 10,000 paired bootstrap samples of the users, drawn with a fixed seed.
"""

import argparse
import collections
import os
import sys

import numpy as np

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, PROJECT)  # so that the script finds `common` from any working folder

from common.errors import UserError, did_you_mean, run_command  # noqa: E402
from common.files import check_can_write, write_json  # noqa: E402
from engine.metrics import METRICS, RankTable  # noqa: E402

SAMPLES = 10_000
SEED = 2020
_DRAWS = 1 << 22  # numbers of a block of draws


def main(argv: list[str]) -> None:
    """Run the command. It is described at the top of the file."""
    options = _parser().parse_args(argv)
    if len(set(options.files)) < max(2, len(options.files)):
        raise UserError(f"found {' '.join(options.files)}, expected two or more different ranks files")
    metrics = [parse_metric(text) for text in options.metrics.split(",")]
    if options.json:
        if os.path.realpath(options.json) in map(os.path.realpath, options.files):
            raise UserError(f"option --json: found {options.json}, one of the ranks files, which it would replace")
        check_can_write(options.json)
    from engine.ranks_file import read_ranks  # imported here, so that --help is quick

    tables = {path: read_ranks(path) for path in options.files}
    check_same_rows(tables)
    result = compare(tables, metrics)
    print("\n".join(format_table(result)))
    if options.json:
        write_json(options.json, result)


def parse_metric(text: str, where: str = "option --metrics") -> tuple[str, int]:
    """Parse a metric, such as `recall@10` -> ("recall", 10).

    Args:
        where: the option, or the file and the key, for the message.

    Raises:
        UserError: the metric is unknown, or no whole number above 0 follows the @.
    """
    name, _, k = text.strip().lower().partition("@")
    if name not in METRICS or not k.isdecimal() or int(k) < 1:
        raise UserError(
            f"{where}: found {text!r}, expected METRIC@K, such as recall@10 (metrics: {', '.join(METRICS)})"
            + did_you_mean(name, METRICS)
        )
    return name, int(k)


def check_same_rows(tables: dict[str, RankTable]) -> None:
    """Check that all files have the same users with the same targets, and the same number of candidates.

    Args:
        tables: path -> table, sorted by user and target.

    Raises:
        UserError: the users, their targets or the numbers of candidates differ.
    """
    (first, reference), *rest = tables.items()
    if len(reference) < 2:
        raise UserError(f"{first}: holds {len(reference)} rows, expected two or more")
    advice = "compare models on the same data set, split and eval_args"
    for path, table in rest:
        for file, here, other, there in ((path, table, first, reference), (first, reference, path, table)):
            missing = _pairs(there) - _pairs(here)
            if missing:
                user, target = min(missing)
                raise UserError(f"{file}: has no row of user {user} with target {target}, but {other} has; {advice}")
        found, expected = table.candidates.max(), reference.candidates.max()
        if found != expected:
            raise UserError(f"{path}: found {found:,} candidates, expected {expected:,} as in {first}; {advice}")


def _pairs(table: RankTable) -> collections.Counter:
    """How often each pair of user and target occurs."""
    return collections.Counter(zip(table.user, table.target, strict=True))


def compare(tables: dict[str, RankTable], metrics: list[tuple[str, int]]) -> dict:
    """Compare each table with the first, metric by metric.

    Args:
        tables: name -> table, with the same users and targets in the same order.
        metrics: names of `METRICS` and k.

    Returns:
        dict: `users`, `samples`, `seed`, and `metrics`. `metrics` maps "recall@10" -> name -> a dict with `mean` and,
        except for the first table, `difference`, `p`, `low` and `high` (the 95% interval of the difference).
    """
    generator = np.random.default_rng(SEED)
    (first, reference), *rest = tables.items()
    compared = {}
    for name, k in metrics:
        base = METRICS[name](reference, k)
        found = compared[f"{name}@{k}"] = {first: {"mean": float(base.mean())}}
        for path, table in rest:
            values = METRICS[name](table, k)
            low, high = bootstrap_interval(values - base, generator)
            found[path] = {
                "mean": float(values.mean()),
                **paired_difference(values, base),
                "low": low,
                "high": high,
            }
    return {"users": len(reference), "samples": SAMPLES, "seed": SEED, "metrics": compared}


def paired_difference(values: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """The mean difference of two arrays, float [U], and the p-value of the paired t-test: `difference` and `p`."""
    return {"difference": float((values - base).mean()), "p": paired_p_value(values, base)}


def bootstrap_interval(differences: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """The middle 95% of the means of bootstrap samples of the differences, float [U].

    A metric has few distinct values, so there are few distinct differences. The multinomial distribution draws how
    often each of them occurs in a sample. So the work does not grow with the number of users.
    """
    values, counts = np.unique(differences, return_counts=True)
    block = max(1, _DRAWS // len(values))
    means = [
        generator.multinomial(len(differences), counts / len(differences), size) @ values / len(differences)
        for size in np.diff([*range(0, SAMPLES, block), SAMPLES])
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def paired_p_value(values: np.ndarray, base: np.ndarray) -> float:
    """The two-sided p-value of the paired t-test of two arrays, float [U]. 1 if all values are the same."""
    from scipy.stats import ttest_rel  # imported here: it takes a second

    return float(ttest_rel(values, base).pvalue) if (values != base).any() else 1.0


def format_table(result: dict) -> list[str]:
    """The lines of an aligned table of what `compare` returns."""
    names = short_names(list(next(iter(result["metrics"].values()))))
    width = max(len("model"), *map(len, names))
    lines = [f"{result['users']:,} users; differences from {names[0]}, with 95% intervals", ""]
    lines.append(f"{'metric':14}{'model':{width}}    mean  difference  {'interval':20}       p")
    for metric, found in result["metrics"].items():
        for number, (name, values) in enumerate(zip(names, found.values(), strict=True)):
            line = f"{metric if number == 0 else '':14}{name:{width}}  {values['mean']:6.4f}"
            if number:
                interval = f"[{values['low']:+.4f}, {values['high']:+.4f}]"
                p = f"{values['p']:.4f}" if values["p"] >= 1e-4 else f"{values['p']:.0e}"
                line += f"  {values['difference']:+10.4f}  {interval:20}  {p:>6}"
            lines.append(line)
    return lines


def short_names(paths: list[str]) -> list[str]:
    """The file names without folder and extension. If two of them are the same, the full paths."""
    names = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    return names if len(set(names)) == len(names) else paths


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__.rpartition("\n\n")[2].replace("\n", " ")
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="written with --ranks_file; the first is the reference"
    )
    parser.add_argument("--metrics", default="recall@10,ndcg@10", metavar="NAME@K,...",
                        help=f"of {', '.join(METRICS)} (default: recall@10,ndcg@10)")  # fmt: skip
    parser.add_argument("--json", metavar="PATH", help="also write the comparison as JSON")
    return parser


if __name__ == "__main__":
    run_command(main)
