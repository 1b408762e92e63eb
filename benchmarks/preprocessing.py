"""Speed of turning ratings into splits, compared with plain dicts and sets, on generated ratings with a long tail.

    python benchmarks/preprocessing.py [--rows 20000000] [--users 2000000] [--items 500000] [--folder DIR]

The reference gets a tenth of the rows, and both must write the same bytes for that tenth. Each runs in a process of its
own, so that its peak memory is its own.
"""

import argparse
import csv
import filecmp
import json
import multiprocessing
import os
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np  # noqa: E402

from benchmarks.measuring import run_measurement  # noqa: E402

CORE = 5
VARIANTS = ("ours", "reference")


def generate(path: str, rows: int, users: int, items: int, seed: int = 0) -> None:
    """Write ratings in the format of Amazon 2018: item,user,rating,timestamp.

    The popularity of the items and the activity of the users follow power laws.
    """
    import polars as pl

    random = np.random.default_rng(seed)

    def draw(size, power, shift):
        cumulated = np.cumsum((np.arange(size) + shift) ** -power)
        return np.searchsorted(cumulated / cumulated[-1], random.random(rows))

    user, item = draw(users, 0.7, 300), draw(items, 0.9, 50)
    hour = random.integers(1_000_000_000 // 3600, 1_540_000_000 // 3600, rows)
    table = pl.DataFrame({"item": item, "user": user * 2_654_435_761 % 99_999_999_977, "hour": hour})
    table.select(
        pl.format("B{}", pl.col("item").cast(pl.String).str.zfill(9)).alias("item"),
        pl.format("A{}", pl.col("user").cast(pl.String).str.zfill(13)).alias("user"),
        pl.lit(5.0).alias("rating"),
        (pl.col("hour") * 3600).alias("timestamp"),
    ).write_csv(path, include_header=False)


def ours(ratings: str, folder: str) -> None:
    """Process the ratings with this code, as `process_amazon.py` does, with the same text for every item."""
    import polars as pl

    from dataset.preprocessing.process_amazon import read_ratings
    from dataset.preprocessing.splits import Rules, write_data_set
    from dataset.preprocessing.tables import MalformedRows

    def same_text(items, wanted):
        return pl.DataFrame({"item": items}).with_columns(text=pl.lit("A text."))

    interactions = read_ratings(ratings, "2018", MalformedRows(ratings))
    write_data_set("ours", folder, interactions, same_text, Rules(CORE, CORE), dict)


def reference(ratings: str, folder: str) -> None:
    """Process the ratings with dicts, sets and loops over rows."""
    rows, seen = [], set()
    with open(ratings, encoding="utf-8") as file:
        for item, user, _, timestamp in csv.reader(file):
            row = (user, item, int(timestamp))
            if row not in seen:
                seen.add(row)
                rows.append(row)
    while True:
        of_user, of_item = {}, {}
        for user, item, _ in rows:
            of_user[user] = of_user.get(user, 0) + 1
            of_item[item] = of_item.get(item, 0) + 1
        kept = [row for row in rows if of_user[row[0]] >= CORE and of_item[row[1]] >= CORE]
        if len(kept) == len(rows):
            break
        rows = kept
    histories = {}
    for user, item, timestamp in rows:
        histories.setdefault(user, []).append((timestamp, item))
    numbers = {}
    for history in histories.values():
        history.sort(key=lambda pair: pair[0])
        for place, (_, item) in enumerate(history):
            history[place] = str(numbers.setdefault(item, len(numbers)))
    os.makedirs(os.path.join(folder, "reference"))
    for split, targets in (
        ("train", lambda n: range(n - 3, 0, -1)),
        ("valid", lambda n: [n - 2]),
        ("test", lambda n: [n - 1]),
    ):
        with open(os.path.join(folder, "reference", f"reference.{split}.inter"), "w", encoding="utf-8") as file:
            file.write("user_id:token\titem_id_list:token_seq\titem_id:token\n")
            for user, history in enumerate(histories.values()):
                for target in targets(len(history)):
                    file.write(f"{user}\t{' '.join(history[max(0, target - 50) : target])}\t{history[target]}\n")


def measure(variant: str, ratings: str, folder: str) -> tuple[float, float]:
    """Run one of the two variants in a process of its own.

    The calling process must stay small: a process inherits the peak memory of its parent.

    Returns:
        (seconds, the start of the process included; peak memory in GB)
    """
    arguments = ["--variant", variant, "--ratings", ratings, "--folder", folder]
    result = run_measurement(os.path.abspath(__file__), arguments)
    return result["seconds"], result["peak_gb"]


def run_variant(options: argparse.Namespace) -> None:
    """Run one variant in this process and print its peak memory as JSON."""
    import resource

    {"ours": ours, "reference": reference}[options.variant](options.ratings, options.folder)
    print(json.dumps({"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))


def compare(options: argparse.Namespace, folder: str) -> None:
    """Print the table: this code on all rows and on a tenth of them, the reference on that tenth."""
    tenth = [number // 10 for number in (options.rows, options.users, options.items)]
    results = {}
    for label, sizes in (("all", (options.rows, options.users, options.items)), ("tenth", tenth)):
        ratings = os.path.join(folder, f"{label}.csv")
        worker = multiprocessing.get_context("spawn").Process(target=generate, args=(ratings, *sizes))
        worker.start()
        worker.join()
        print(f"{label}: {sizes[0]:,} rows, {os.path.getsize(ratings) / 1e6:,.0f} MB", flush=True)
        for variant in VARIANTS if label == "tenth" else VARIANTS[:1]:
            target = os.path.join(folder, label)
            seconds, peak_gb = results[label, variant] = measure(variant, ratings, target)
            print(f"  {variant:<10}{seconds:8.1f} s  {sizes[0] / seconds:12,.0f} rows/s  {peak_gb:6.2f} GB", flush=True)
        os.unlink(ratings)
    same = all(
        filecmp.cmp(*(os.path.join(folder, "tenth", name, f"{name}.{split}.inter") for name in VARIANTS), shallow=False)
        for split in ("train", "valid", "test")
    )
    ratio = results["tenth", "reference"][0] / results["tenth", "ours"][0]
    print(f"on the tenth: {ratio:.1f} times the speed of the reference; same bytes: {same}")
    if not same:
        raise SystemExit("the two variants wrote different splits")


def main() -> None:
    """Run the command. It is described at the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000_000, help="number of ratings (default: 20000000)")
    parser.add_argument("--users", type=int, default=2_000_000, help="number of users (default: 2000000)")
    parser.add_argument("--items", type=int, default=500_000, help="number of items (default: 500000)")
    parser.add_argument("--folder", help="folder for the generated files, 6 GB at full size (default: temporary)")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--ratings", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        run_variant(options)
    else:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            compare(options, folder)


if __name__ == "__main__":
    main()
