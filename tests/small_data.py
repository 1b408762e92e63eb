"""Small data sets in the published format, written for the tests; the rows they return say what the files hold."""

import os

import numpy as np

HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
SPLITS = ("train", "valid", "test")


def random_histories(users, items, shortest, longest, seed=0):
    """All interactions of each user, oldest first: list of lists of item indices, which may repeat."""
    random = np.random.default_rng(seed)
    return [random.integers(0, items, random.integers(shortest, longest + 1)).tolist() for _ in range(users)]


def prefix_rows(history, window):
    """The rows (history, target) of one sequence as published: longest first, the newest `window` items of each."""
    return [(history[max(0, end - window) : end], history[end]) for end in range(len(history) - 1, 0, -1)]


def published_rows(histories, window, user=lambda number: number):
    """Leave-one-out rows of all users: dict of split -> list of (user, history, target)."""
    rows = {split: [] for split in SPLITS}
    for number, items in enumerate(histories):
        for split, sequence in zip(SPLITS, (items[:-2], items[:-1], items), strict=True):
            pairs = prefix_rows(sequence, window)
            rows[split] += [(user(number), *pair) for pair in (pairs if split == "train" else pairs[:1])]
    return rows


def write_inter(path, rows, end="\n"):
    """Write rows (user, history, target) as a `.inter` file."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(HEADER.replace("\n", end))
        for user, history, target in rows:
            file.write(f"{user}\t{' '.join(map(str, history))}\t{target}{end}")


def write_features(path, items, width=24, seed=0, dtype="float32"):
    """Write random text features; returns them, float [items, width]."""
    features = np.random.default_rng(seed).standard_normal((items, width)).astype(dtype)
    features.tofile(path)
    return features


def write_downstream(folder, name="Small", users=30, items=40, window=12, longest=20, repeat=()):
    """Write a data set of one domain into `folder`/`name`; returns its rows.

    Every item of 0..items - 1 occurs, users have 4 to `longest` interactions, and the training rows whose numbers
    are in `repeat` stand twice.
    """
    os.makedirs(os.path.join(folder, name))
    histories = random_histories(users, items, 4, longest)
    rows = published_rows(histories, window)
    rows["train"] = [row for number, row in enumerate(rows["train"]) for _ in range(2 if number in repeat else 1)]
    for split in SPLITS:
        write_inter(os.path.join(folder, name, f"{name}.{split}.inter"), rows[split])
    write_features(os.path.join(folder, name, f"{name}.feat1CLS"), items)
    return rows


def write_mixture(folder, name="Mix", counts=(9, 14, 6), users=8, window=6, longest=11, dtype="float32", width=24):
    """Write a mixture of domains, each with full and shortened texts; returns its rows (tokens `domain-index`)."""
    os.makedirs(os.path.join(folder, name))
    domains = [f"Domain{number}" for number in range(len(counts))]
    rows = {split: [] for split in SPLITS}
    for domain, (label, count) in enumerate(zip(domains, counts, strict=True)):
        histories = random_histories(users, count, 4, longest, seed=domain)
        tokens = [[f"{domain}-{item}" for item in history] for history in histories]
        for split, part in published_rows(tokens, window, lambda number, d=domain: f"{d}-{number}").items():
            rows[split] += part
        for view in (1, 2):
            path = os.path.join(folder, name, f"{label}.feat{view}CLS")
            write_features(path, count, width, seed=10 * domain + view, dtype=dtype)
    for split in SPLITS:
        write_inter(os.path.join(folder, name, f"{name}.{split}.inter"), rows[split])
    with open(os.path.join(folder, name, f"{name}.pt_datasets"), "w", encoding="utf-8") as file:
        file.write(",".join(domains))
    return rows
