"""Small data sets in the published format, written for the tests so that they need no other files.

`write_tiny` and `write_mix` write data sets with something to learn and with described features, for the commands.
`write_downstream` and `write_mixture` write random data of any size and return the rows, for comparisons with a slow
reference.
"""

import json
import os

import numpy as np

HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
SPLITS = ("train", "valid", "test")
WIDTH = 24  # of the features
SMALL = [  # command-line options of a model that trains in a moment
    "--hidden_size=16",
    "--inner_size=12",
    "--n_exps=3",
    "--n_layers=2",
    "--n_heads=2",
    f"--plm_size={WIDTH}",
    "--show_progress=false",
]


# -- rows ----------------------------------------------------------------------------------------------------------


def random_histories(users, items, shortest, longest, seed=0):
    """All interactions of each user, oldest first: list of lists of item indices, which may repeat."""
    random = np.random.default_rng(seed)
    return [random.integers(0, items, random.integers(shortest, longest + 1)).tolist() for _ in range(users)]


def prefix_rows(history, cut_length):
    """The rows (history, target) of one sequence as published: longest first, the newest `cut_length` items of each."""
    return [(history[max(0, end - cut_length) : end], history[end]) for end in range(len(history) - 1, 0, -1)]


def published_rows(histories, cut_length, user=lambda number: number):
    """Leave-one-out rows of all users: dict of split -> list of (user, history, target)."""
    rows = {split: [] for split in SPLITS}
    for number, items in enumerate(histories):
        for split, sequence in zip(SPLITS, (items[:-2], items[:-1], items), strict=True):
            pairs = prefix_rows(sequence, cut_length)
            rows[split] += [(user(number), *pair) for pair in (pairs if split == "train" else pairs[:1])]
    return rows


def mixture_rows(histories_by_domain, cut_length):
    """`published_rows` of the domains of a mixture, whose users and items are written `domain-index`."""
    rows = {split: [] for split in SPLITS}
    for domain, histories in enumerate(histories_by_domain):
        tokens = [[f"{domain}-{item}" for item in history] for history in histories]
        for split, part in published_rows(tokens, cut_length, lambda number, d=domain: f"{d}-{number}").items():
            rows[split] += part
    return rows


# -- files ---------------------------------------------------------------------------------------------------------


def write_inter(path, rows, end="\n"):
    """Write rows (user, history, target) as a `.inter` file."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(HEADER.replace("\n", end))
        for user, history, target in rows:
            file.write(f"{user}\t{' '.join(map(str, history))}\t{target}{end}")


def write_splits(folder, name, rows):
    """Write the three `.inter` files of a data set; `rows` as of `published_rows`."""
    for split in SPLITS:
        write_inter(os.path.join(folder, f"{name}.{split}.inter"), rows[split])


def write_list_of_domains(folder, name, domains):
    with open(os.path.join(folder, f"{name}.pt_datasets"), "w", encoding="utf-8") as file:
        file.write(",".join(domains))


def write_features(path, items, width=WIDTH, seed=0, dtype="float32"):
    """Write random text features; returns them, float [items, width]."""
    features = np.random.default_rng(seed).standard_normal((items, width)).astype(dtype)
    features.tofile(path)
    return features


# -- random data sets ----------------------------------------------------------------------------------------------


def write_downstream(folder, name="Small", users=30, items=40, cut_length=12, longest=20, repeat=()):
    """Write a data set of one domain into `folder`/`name`; returns its rows.

    Users have 4 to `longest` interactions, histories are cut to `cut_length` items, and the training rows whose numbers
    are in `repeat` stand twice.
    """
    folder = os.path.join(folder, name)
    os.makedirs(folder)
    rows = published_rows(random_histories(users, items, 4, longest), cut_length)
    rows["train"] = [row for number, row in enumerate(rows["train"]) for _ in range(2 if number in repeat else 1)]
    write_splits(folder, name, rows)
    write_features(os.path.join(folder, f"{name}.feat1CLS"), items)
    return rows


def write_mixture(
    folder, name="Mix", counts=(9, 14, 6), users=8, cut_length=6, longest=11, dtype="float32", width=WIDTH
):
    """Write a mixture of domains, each with full and shortened texts; returns its rows (tokens `domain-index`)."""
    folder = os.path.join(folder, name)
    os.makedirs(folder)
    histories = [random_histories(users, count, 4, longest, seed=domain) for domain, count in enumerate(counts)]
    rows = mixture_rows(histories, cut_length)
    write_splits(folder, name, rows)
    for domain, count in enumerate(counts):
        for view in (1, 2):
            path = os.path.join(folder, f"Domain{domain}.feat{view}CLS")
            write_features(path, count, width, seed=10 * domain + view, dtype=dtype)
    write_list_of_domains(folder, name, [f"Domain{domain}" for domain in range(len(counts))])
    return rows


# -- data sets with something to learn -----------------------------------------------------------------------------


def write_domain(folder, name, n_items=30, n_users=40, seed=0):
    """Write the items of a domain: features of both kinds, `.item2index`, `.text`. Returns its users' histories.

    The items lie on a ring, an item's text says where, and a user mostly walks along it: there is something to learn.
    """
    os.makedirs(folder, exist_ok=True)
    generator = np.random.default_rng(seed)
    angle = 2 * np.pi * np.arange(n_items)[:, None] / n_items * np.arange(1, WIDTH // 2 + 1)
    features = np.concatenate([np.cos(angle), np.sin(angle)], 1) + 0.1 * generator.normal(size=(n_items, WIDTH))
    for suffix, noise in (("feat1CLS", 0.0), ("feat2CLS", 0.2)):
        path = os.path.join(folder, f"{name}.{suffix}")
        (features + noise * generator.normal(size=features.shape)).astype(np.float32).tofile(path)
        description = {"encoder": "test", "pooling": "CLS", "width": WIDTH, "dtype": "float32", "items": n_items}
        with open(f"{path}.json", "w") as file:
            json.dump(description, file)
    with open(os.path.join(folder, f"{name}.item2index"), "w") as file:
        file.writelines(f"{name}{1000 + index}\t{index}\n" for index in range(n_items))
    with open(os.path.join(folder, f"{name}.text"), "w") as file:
        file.write("item_id:token\ttext:token_seq\n")
        file.writelines(f"{name}{1000 + index}\titem number {index}. \n" for index in range(n_items))
    steps = generator.integers(1, 4, (n_users, 12)).cumsum(1) + generator.integers(0, n_items, (n_users, 1))
    return [list(steps[user, : generator.integers(5, 13)] % n_items) for user in range(n_users)]


def write_tiny(data_path):
    """A data set of one domain, `Tiny`: 30 items, 40 users, features with descriptions. Returns `data_path`, str."""
    folder = os.path.join(data_path, "Tiny")
    write_splits(folder, "Tiny", published_rows(write_domain(folder, "Tiny"), cut_length=50))
    return str(data_path)


def write_mix(data_path):
    """A mixture `Mix` of the domains A (20 items) and B (25 items), 30 users each. Returns `data_path`, str."""
    folder = os.path.join(data_path, "Mix")
    histories = [write_domain(folder, "A", 20, 30, seed=1), write_domain(folder, "B", 25, 30, seed=2)]
    write_splits(folder, "Mix", mixture_rows(histories, cut_length=50))
    write_list_of_domains(folder, "Mix", ["A", "B"])
    return str(data_path)
