"""Interactions and item texts to a data set in the published layout: splits, indices, texts, and its description."""

import dataclasses
import hashlib
import io
import os
import platform
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl

from common.errors import UserError, did_you_mean
from common.files import file_sha256, read_json, staged_folder, write_json
from dataset.preprocessing.interactions import k_core, walk, without_repeats
from dataset.preprocessing.texts import TEXT_HEADER, has_words, texts_sha256

INTER_HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token"
SPLITS = ("train", "valid", "test")
MAX_ITEMS = 50  # of a prefix; older items are cut
MIN_INTERACTIONS = {"leave_one_out": 3, "time": 2}  # of a user: one to start from, and one for each split it must have
MISSING_TEXT = ("error", "empty", "drop")
_BLOCK = 1 << 20  # interactions written at a time


@dataclasses.dataclass
class Rules:
    """What stays, and how it is split.

    Attributes:
        user_k, item_k (int): the fewest interactions of a user and of an item; users always need 3 for leave-one-out
            and 2 for a split by time.
        missing_text (str): an item that is listed but has no text is an `error`, stays with an `empty` text, or is
            left out (`drop`).
        split (str): `leave_one_out`: of each user the last interaction for the test, the last but one for validation.
            `time`: the latest `test_share` of all interactions for the test, the `valid_share` before it for
            validation; each is predicted from everything that its user did before it.
        valid_share, test_share (float): of the interactions, for `time` only.
        all_items (bool): items without interactions are part of the catalogue too (they follow the others).
    """

    user_k: int = 5
    item_k: int = 5
    missing_text: str = "error"
    split: str = "leave_one_out"
    valid_share: float = 0.1
    test_share: float = 0.1
    all_items: bool = False

    def check(self):
        """Raises a `UserError` for a value that is none of the above."""
        for key, allowed in (("missing_text", MISSING_TEXT), ("split", tuple(MIN_INTERACTIONS))):
            value = getattr(self, key)
            if value not in allowed:
                raise UserError(f"--{key} {value}: expected {' or '.join(allowed)}{did_you_mean(value, allowed)}")
        for key in ("user_k", "item_k"):
            if getattr(self, key) < 0:
                raise UserError(f"--{key} {getattr(self, key)}: expected a whole number from 0 on")
        if not (self.valid_share > 0 and self.test_share > 0 and self.valid_share + self.test_share < 1):
            raise UserError(
                f"--valid_share {self.valid_share} --test_share {self.test_share}: expected two shares above 0 that "
                "leave something to train on"
            )


def write_data_set(name, output_path, interactions, read_texts, rules, made_from):
    """Write the data set NAME and its description NAME.json into OUTPUT_PATH/NAME. The same input gives the same bytes.

    In this order: rows with the same user, item and timestamp count once; items that no text table lists are left out,
    with `missing_text` "drop" also those without a text; users and items with too few interactions are left out until
    none is left. `interactions.walk` says how the rest is ordered and numbered.

    Args:
        name (str): the data set.
        output_path (str): the folder in which the data set's folder is made.
        interactions (Interactions): all of them.
        read_texts (callable): (raw ids of all items, those whose text is wanted), both polars.Series, to a
            polars.DataFrame with the columns `item` (each id once, of those listed in the source) and `text` (null
            where it was not wanted). With `all_items`: every item of the source, all with a text.
        rules (Rules): what stays.
        made_from (callable): without arguments, called when all has been read: what the description says of the
            source, dict.

    Returns:
        dict: the description.

    Raises:
        UserError: nothing remains, an item has no text, a raw id holds a tab or a line break, or the folder cannot be
            written to. What stood there before is left as it is.
    """
    rules.check()
    check_name(name)
    rows, texts, steps = select(name, interactions, read_texts, rules)
    ordered = walk(rows)
    items = _catalogue(ordered.items, texts, rules)
    empty = _check_texts(name, items, rules)
    for kind, raw in (("user", ordered.users), ("item", items["item"])):
        _check_raw_ids(kind, raw)

    folder = os.path.join(output_path, name)
    with staged_folder(folder) as staging:
        stem = os.path.join(staging, name)
        row_counts, checksums = _write_inter_files(stem, name, ordered, rules)
        _write_table(f"{stem}.user2index", ordered.users.to_frame("raw").with_row_index("number"))
        _write_table(f"{stem}.item2index", items.select(raw="item").with_row_index("number"))
        _write_table(f"{stem}.text", items.select(number="text", raw="item"), TEXT_HEADER)
        description = {
            "name": name,
            **made_from(),
            "rules": dataclasses.asdict(rules) | {"window": MAX_ITEMS},
            "steps": steps,
            "users": len(ordered.users),
            "items": len(items),
            "interactions": len(ordered.item),
            "rows": row_counts,
            "items_without_text": empty,
            "texts_sha256": texts_sha256(items["text"]),
            "files": _files(staging, checksums),
            "versions": {"python": platform.python_version(), "polars": pl.__version__, "numpy": np.__version__},
        }
        description["features"] = _features_still_valid(os.path.join(folder, f"{name}.json"), description)
        write_json(f"{stem}.json", description)
    return description


def select(name, interactions, read_texts, rules):
    """What remains of the interactions, and the texts.

    Returns:
        (Interactions, polars.DataFrame `item`, `text`, list of dict): the last says what was left after each step.
    """
    steps = [{"step": "read", **interactions.counts()}]

    def then(step, rows):
        steps.append({"step": step, **rows.counts()})
        return rows

    least = max(rules.user_k, MIN_INTERACTIONS[rules.split])
    rows = then("repeated rows", without_repeats(interactions))
    # Whatever the texts will be, only items of this core can remain; the texts of all others need not be held.
    core = k_core(rows, least, rules.item_k)
    texts = read_texts(rows.items.gather(rows.items_left()), rows.items.gather(core.items_left()))
    rows = then("items without metadata", _of_items(rows, texts["item"]))
    if rules.missing_text == "drop":
        texts = texts.filter(pl.col("text").is_null() | _has_words(pl.col("text")))
        rows = then("items without text", _of_items(rows, texts["item"]))
    known = len(rows)
    core = k_core(_of_items(core, texts["item"]), least, rules.item_k)
    rows = then(f"fewer than {least} of a user, {rules.item_k} of an item", core)
    if not len(rows):
        raise UserError(
            f"{name}: none of the {len(interactions):,} interactions remains ({known:,} have an item with metadata; "
            f"user_k={rules.user_k}, item_k={rules.item_k}); check that both files belong together, or lower the limits"
        )
    return rows, texts, steps


def report(description):
    """What was written and what each step took, for the terminal. Returns str."""
    counts = ", ".join(f"{description[kind]:,} {kind}" for kind in ("users", "items", "interactions"))
    rows = ", ".join(f"{count:,} {split}" for split, count in description["rows"].items())
    lines = [f"{description['name']}: {counts}; rows: {rows}"]
    steps = description["steps"]
    width = max(len(step["step"]) for step in steps)
    lines.append(f"  {'':{width}}{'interactions':>15}{'users':>12}{'items':>12}")
    for before, step in zip([None, *steps], steps, strict=False):
        changes = [step[kind] - (before[kind] if before else 0) for kind in ("interactions", "users", "items")]
        numbers = "".join(f"{change:{'>' if before is None else '>+'}{size},}" for change, size in
                          zip(changes, (15, 12, 12), strict=True))  # fmt: skip
        lines.append(f"  {step['step']:{width}}{numbers}")
    for reason, count in description.get("left_out", {}).items():
        if count:
            lines.append(f"  {count:,} {reason} left out")
    for source in description.get("sources", []):
        if source["malformed"]:
            lines.append(f"  {source['file']}: {source['malformed']:,} malformed rows left out; {source['first']}")
    if description["items_without_text"]:
        named = description["items_without_text"]
        lines.append(f"  {len(named):,} items without a text kept: {_first_names(named)}")
    return "\n".join(lines)


def _first_names(names):
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def source_entry(malformed):
    """What a description says of a source file that has been read, told by its `Malformed`. Returns dict."""
    return {
        "file": os.path.basename(malformed.path),
        "bytes": os.path.getsize(malformed.path),
        "sha256": file_sha256(malformed.path),
        "rows": malformed.rows,
        "malformed": malformed.count,
        "first": "; ".join(malformed.first),
    }


def check_name(name):
    """A data set's name is a folder's name and the beginning of its files' names."""
    if not name or name != os.path.basename(name) or name.startswith(".") or not name.isprintable():
        raise UserError(f"--dataset {name!r}: expected a plain name, such as Pantry")


def _of_items(rows, items):
    """The rows whose item is one of `items` (polars.Series of raw ids)."""
    known = rows.items.is_in(items.implode()).to_numpy()
    return rows if known.all() else rows.take(known[rows.item])


def _has_words(column):
    return column.map_elements(has_words, return_dtype=pl.Boolean, skip_nulls=True)


def _catalogue(walked, texts, rules):
    """The items in the order of their numbers: polars.DataFrame `item`, `text`."""
    found = walked.to_frame("item").join(texts, on="item", how="left", maintain_order="left")
    if rules.all_items:
        found = pl.concat([found, texts.join(found, on="item", how="anti", maintain_order="left")])
    return found


def _check_texts(name, items, rules):
    """The raw ids of the items whose text is empty; an error where the rules do not allow any."""
    empty = items.filter(~_has_words(pl.col("text")))["item"].to_list()
    if empty and rules.missing_text == "error":
        raise UserError(
            f"{name}: {len(empty)} of {len(items)} items have no text: {_first_names(empty)}; choose --missing_text "
            "drop (leave them out) or --missing_text empty (keep them)"
        )
    return empty


def _check_raw_ids(kind, raw):
    """Raw ids stand in tab-separated files."""
    wrong = raw.filter(raw.str.contains(r"[\t\n\r]"))
    if len(wrong):
        raise UserError(f"{kind} id {wrong[0]!r}: holds a tab or a line break, which the data set's files cannot hold")


def _write_table(path, table, header=None):
    """Two columns, `raw` and `number`, as lines RAW<TAB>NUMBER."""
    with open(path, "wb") as file:
        file.write(f"{header}\n".encode() if header else b"")
        file.write(tab_separated(table.select("raw", "number")))


def tab_separated(table):
    """A table as tab-separated lines, bytes. Written to memory first: a full disk is then Python's error to report."""
    buffer = io.BytesIO()
    table.write_csv(buffer, include_header=False, separator="\t", quote_style="never", line_terminator="\n")
    return buffer.getbuffer()


def _write_inter_files(stem, name, ordered, rules):
    """Write the `.inter` files, some users at a time. Returns the number of rows of each, and their checksums."""
    cuts = _cut_times(ordered, rules) if rules.split == "time" else None
    counts, checksums = dict.fromkeys(SPLITS, 0), {}
    for split in SPLITS:
        checksum = hashlib.sha256()
        with open(f"{stem}.{split}.inter", "wb") as file, ThreadPoolExecutor(1) as background:

            def write(lines, file=file, checksum=checksum):
                checksum.update(lines)
                file.write(lines)

            written = background.submit(write, f"{INTER_HEADER}\n".encode())
            for block in _blocks(ordered):
                targets = block.targets(split, cuts)
                lines = tab_separated(block.rows(targets))
                counts[split] += len(targets)
                written.result()  # one thread makes the next lines while the other writes the last ones
                written = background.submit(write, lines)
            written.result()
        if not counts[split] and split != "train":  # without training rows it is still good for a zero-shot test
            raise UserError(f"{name}: no row for {split}; lower --user_k and --item_k, or change the shares")
        checksums[f"{name}.{split}.inter"] = checksum.hexdigest()
    return counts, checksums


def _blocks(ordered):
    """All users in parts of about a million interactions."""
    ends, first = ordered.offsets[1:], 0
    while first < len(ends):
        last = max(first + 1, int(np.searchsorted(ends, ordered.offsets[first] + _BLOCK, side="right")))
        yield _Block(ordered, first, last)
        first = last


def _cut_times(ordered, rules):
    """The times from which on an interaction belongs to valid and to test."""
    times = np.sort(ordered.timestamp)
    before = [1 - rules.valid_share - rules.test_share, 1 - rules.test_share]
    return [times[min(len(times) - 1, int(round(share * len(times))))] for share in before]


class _Block:
    """The interactions of some users, and the rows of the `.inter` files made of them."""

    def __init__(self, ordered, first, last):
        start, end = ordered.offsets[first], ordered.offsets[last]
        self.item, self.timestamp = ordered.item[start:end], ordered.timestamp[start:end]
        self.first_user = first
        starts, ends = ordered.offsets[first:last] - start, ordered.offsets[first + 1 : last + 1] - start
        self.user = np.repeat(np.arange(last - first), ends - starts)  # of each interaction
        self.start, self.end = starts[self.user], ends[self.user]  # of its user

    def targets(self, split, cuts):
        """The interactions to predict, indices into `item`: user by user, the longest prefix first."""
        backwards = self.start + self.end - 1 - np.arange(len(self.item))  # each user's from the newest to the oldest
        if cuts is None:
            from_end = self.end - backwards
            chosen = {"train": from_end > 2, "valid": from_end == 2, "test": from_end == 1}[split]
        else:
            part = np.searchsorted(cuts, self.timestamp, side="right")  # 0 before both, 1 between, 2 from the second on
            chosen = part[backwards] == SPLITS.index(split)
        return backwards[chosen & (backwards > self.start)]

    def rows(self, targets):
        """The lines of these targets as a polars.DataFrame: user, history, target."""
        tokens = pl.Series(self.item).cast(pl.String)
        text = tokens.str.join(" ")[0].encode()  # a history is a piece of this
        at = np.concatenate([[0], np.cumsum(tokens.str.len_bytes().to_numpy().astype(np.int64) + 1)])
        oldest = np.maximum(self.start[targets], targets - MAX_ITEMS)
        pieces = pl.DataFrame({"start": at[oldest], "bytes": at[targets] - 1 - at[oldest]})
        return pieces.select(
            user=pl.Series(self.user[targets] + self.first_user),
            history=pl.lit(text).bin.slice(pl.col("start"), pl.col("bytes")).cast(pl.String),
            target=pl.Series(self.item[targets]),
        )


def _files(folder, checksums):
    """Sizes and checksums of the files written so far; `checksums` holds those that are known already."""
    paths = {name: os.path.join(folder, name) for name in sorted(os.listdir(folder))}
    return {
        name: {"bytes": os.path.getsize(path), "sha256": checksums.get(name) or file_sha256(path)}
        for name, path in paths.items()
    }


def _features_still_valid(path, description):
    """What an earlier description says of features that were made from the very same texts."""
    if not os.path.isfile(path):
        return {}
    try:
        features = read_json(path).get("features", {})
        return {
            suffix: each for suffix, each in features.items() if each.get("texts_sha256") == description["texts_sha256"]
        }
    except (UserError, AttributeError):
        return {}  # a damaged description is written anew
