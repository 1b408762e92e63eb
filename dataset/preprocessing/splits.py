"""Writing a data set in the published layout: splits, indices, texts and the description."""

import dataclasses
import hashlib
import io
import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import polars as pl

from common.errors import UserError, did_you_mean
from common.files import file_sha256, read_json, staged_folder, write_json
from dataset.preprocessing.interactions import (
    Interactions,
    OrderedInteractions,
    k_core,
    order_interactions,
    without_repeats,
)
from dataset.preprocessing.tables import MalformedRows
from dataset.preprocessing.texts import TEXT_HEADER, has_words, texts_sha256

INTER_HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token"
SPLITS = ("train", "valid", "test")
CUT_LENGTH = 50  # items of a history. Older items are cut off
MIN_INTERACTIONS = {"leave_one_out": 3, "time": 2}  # of a user: the first item, and the targets that it must have
MISSING_TEXT = ("error", "empty", "drop")
SHOW_END = ".show.parquet"  # of the file with the columns to show
_BLOCK = 1 << 20  # interactions written at once


@dataclasses.dataclass
class Rules:
    """Which interactions and items are kept, and how they are split.

    Attributes:
        user_k, item_k: the fewest interactions of a user and of an item. Users always need 3 for leave-one-out and 2
            for a split by time.
        missing_text: what happens to an item that is listed but has no text. `error`: the run stops. `empty`: the item
            is kept with an empty text. `drop`: the item is left out.
        split: `leave_one_out`: the last interaction of each user is for the test, the last but one for validation.
            `time`: the latest `test_share` of all interactions is for the test, the `valid_share` before it for
            validation. Each is predicted from all earlier interactions of its user.
        valid_share, test_share: shares of all interactions, for `time` only.
        all_items: items without interactions are part of the catalogue as well. They follow the other items.
        tie_seed: seed of the random order of the interactions of a user with the same timestamp. None: they are in file
            order.
    """

    user_k: int = 5
    item_k: int = 5
    missing_text: str = "error"
    split: str = "leave_one_out"
    valid_share: float = 0.1
    test_share: float = 0.1
    all_items: bool = False
    tie_seed: int | None = None

    def check(self) -> None:
        """Check the values.

        Raises:
            UserError: a value is not allowed.
        """
        for key, allowed in (("missing_text", MISSING_TEXT), ("split", tuple(MIN_INTERACTIONS))):
            value = getattr(self, key)
            if value not in allowed:
                raise UserError(f"--{key} {value}: expected {' or '.join(allowed)}{did_you_mean(value, allowed)}")
        for key in ("user_k", "item_k"):
            if getattr(self, key) < 0:
                raise UserError(f"--{key} {getattr(self, key)}: expected a whole number from 0 on")
        if self.tie_seed is not None and self.tie_seed < 0:
            raise UserError(f"--seed {self.tie_seed}: expected a whole number from 0 on")
        if not (self.valid_share > 0 and self.test_share > 0 and self.valid_share + self.test_share < 1):
            raise UserError(
                f"--valid_share {self.valid_share} --test_share {self.test_share}: expected two shares above 0 that "
                "leave something to train on"
            )


ReadTexts = Callable[[pl.Series, pl.Series], pl.DataFrame]


def write_data_set(
    name: str,
    output_path: str,
    interactions: Interactions,
    read_texts: ReadTexts,
    rules: Rules,
    describe_source: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Write the data set NAME and its description NAME.json into OUTPUT_PATH/NAME. The same input gives the same bytes.

    The steps, in this order:

    1. Of rows with the same user, item and timestamp, the first is kept. If the interactions have quantities, the rows
       must also have the same quantity.
    2. Items that the text table does not list are left out, with `missing_text` "drop" also those without a text.
    3. Users and items with too few interactions are left out, until there are no more of them.
    4. The rest is sorted and numbered as `interactions.order_interactions` describes.

    Args:
        name: the data set.
        output_path: the folder in which the data set's folder is created.
        interactions: all of them.
        read_texts: a function of the raw ids of all items, and of those whose text is needed. It returns the columns
            `item` (the ids that the source lists, each once) and `text` (null if it is not needed). With `all_items` it
            returns every item of the source, with its text. Further columns, to show with an item, are kept.
        rules: which interactions and items are kept.
        describe_source: called when everything has been read. Returns the entries of the description about the source.

    Returns:
        The description.

    Raises:
        UserError: nothing remains, an item has no text, a raw id holds a tab or a line break, or the folder is not
            writable. An existing data set is then left as it is.
    """
    rules.check()
    check_name(name)
    rows, texts, steps = select(name, interactions, read_texts, rules)
    ordered = order_interactions(rows, rules.tie_seed)
    items = _catalogue(ordered.items, texts, rules)
    items_without_text = _check_texts(name, items, rules)
    for kind, raw in (("user", ordered.users), ("item", items["item"])):
        _check_raw_ids(kind, raw)

    folder = os.path.join(output_path, name)
    with staged_folder(folder) as staging:
        stem = os.path.join(staging, name)
        row_counts, checksums = _write_inter_files(stem, name, ordered, rules)
        _write_table(f"{stem}.user2index", ordered.users.to_frame("raw").with_row_index("number"))
        _write_table(f"{stem}.item2index", items.select(raw="item").with_row_index("number"))
        _write_table(f"{stem}.text", items.select(number="text", raw="item"), TEXT_HEADER)
        _write_show_columns(f"{stem}{SHOW_END}", items)
        description = {
            "name": name,
            **describe_source(),
            "rules": dataclasses.asdict(rules) | {"window": CUT_LENGTH, "repeated_rows": interactions.key()},
            "steps": steps,
            "users": len(ordered.users),
            "items": len(items),
            "interactions": len(ordered.item),
            "rows": row_counts,
            "items_without_text": items_without_text,
            "texts_sha256": texts_sha256(items["text"]),
            "files": _files(staging, checksums),
            "versions": {"python": platform.python_version(), "polars": pl.__version__, "numpy": np.__version__},
        }
        description["features"] = _features_still_valid(os.path.join(folder, f"{name}.json"), description)
        write_json(f"{stem}.json", description)
    return description


def select(
    name: str, interactions: Interactions, read_texts: ReadTexts, rules: Rules
) -> tuple[Interactions, pl.DataFrame, list[dict[str, Any]]]:
    """Read the texts and keep the interactions that the rules allow.

    Returns:
        The interactions, the texts (columns `item` and `text`), and the counts of what was left after each step.
    """
    steps: list[dict[str, Any]] = [{"step": "read", **interactions.counts()}]

    def count(step: str, rows: Interactions) -> Interactions:
        steps.append({"step": step, **rows.counts()})
        return rows

    least = max(rules.user_k, MIN_INTERACTIONS[rules.split])
    rows = count("repeated rows", without_repeats(interactions))
    # Only items of this core can remain. The texts of other items need not be held in memory.
    core = k_core(rows, least, rules.item_k)
    all_items, core_items = rows.items_with_interactions(), core.items_with_interactions()
    texts = read_texts(rows.items.gather(all_items), rows.items.gather(core_items))
    rows = count("items without metadata", _of_items(rows, texts["item"]))
    if rules.missing_text == "drop":
        texts = texts.filter(pl.col("text").is_null() | _has_words(pl.col("text")))
        rows = count("items without text", _of_items(rows, texts["item"]))
    known = len(rows)
    core = k_core(_of_items(core, texts["item"]), least, rules.item_k)
    rows = count(f"fewer than {least} of a user, {rules.item_k} of an item", core)
    if not len(rows):
        raise UserError(
            f"{name}: none of the {len(interactions):,} interactions remains ({known:,} have an item with metadata; "
            f"user_k={rules.user_k}, item_k={rules.item_k}); check that both files belong together, or lower --user_k "
            "and --item_k"
        )
    return rows, texts, steps


def report(description: dict[str, Any]) -> str:
    """What was written and what each step removed, as lines for the terminal."""
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
        items = description["items_without_text"]
        lines.append(f"  {len(items):,} items without a text kept: {_first_names(items)}")
    return "\n".join(lines)


def _first_names(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def source_entry(malformed: MalformedRows) -> dict[str, Any]:
    """The entry of a description about a source file that has been read."""
    return {
        "file": os.path.basename(malformed.path),
        "bytes": os.path.getsize(malformed.path),
        "sha256": file_sha256(malformed.path),
        "rows": malformed.rows,
        "malformed": malformed.count,
        "first": "; ".join(malformed.examples),
    }


def check_name(name: str) -> None:
    """Check that a data set's name can be the name of its folder and the beginning of its files' names.

    Raises:
        UserError: it cannot.
    """
    if not name or name != os.path.basename(name) or name.startswith(".") or not name.isprintable():
        raise UserError(f"--dataset {name!r}: expected a plain folder name, such as Pantry")


def _of_items(rows: Interactions, items: pl.Series) -> Interactions:
    """The rows whose item is one of `items`, given as raw ids."""
    known = rows.items.is_in(items.implode()).to_numpy()
    return rows if known.all() else rows.take(known[rows.item])


def _has_words(column: pl.Expr) -> pl.Expr:
    return column.map_elements(has_words, return_dtype=pl.Boolean, skip_nulls=True)


def _catalogue(ordered_items: pl.Series, texts: pl.DataFrame, rules: Rules) -> pl.DataFrame:
    """The items in the order of their numbers: columns `item` and `text`."""
    found = ordered_items.to_frame("item").join(texts, on="item", how="left", maintain_order="left")
    if rules.all_items:
        found = pl.concat([found, texts.join(found, on="item", how="anti", maintain_order="left")])
    return found


def _check_texts(name: str, items: pl.DataFrame, rules: Rules) -> list[str]:
    """The raw ids of the items whose text is empty. An error if the rules do not allow such items."""
    empty = items.filter(~_has_words(pl.col("text")))["item"].to_list()
    if empty and rules.missing_text == "error":
        raise UserError(
            f"{name}: {len(empty)} of {len(items)} items have no text: {_first_names(empty)}; choose --missing_text "
            "drop (leave them out) or --missing_text empty (keep them)"
        )
    return empty


def _check_raw_ids(kind: str, raw: pl.Series) -> None:
    """Check that raw ids can be written to tab-separated files."""
    wrong = raw.filter(raw.str.contains(r"[\t\n\r]"))
    if len(wrong):
        raise UserError(f"{kind} id {wrong[0]!r}: holds a tab or a line break, expected none; change the id")


def _write_table(path: str, table: pl.DataFrame, header: str | None = None) -> None:
    """Write the columns `raw` and `number` as lines RAW<TAB>NUMBER."""
    with open(path, "wb") as file:
        file.write(f"{header}\n".encode() if header else b"")
        file.write(tab_separated(table.select("raw", "number")))


def _write_show_columns(path: str, items: pl.DataFrame) -> None:
    """Write the columns to show as Parquet, with the raw ids as `id`, if there are any."""
    table = items.select(pl.col("item").alias("id"), pl.exclude("item", "text"))
    if table.width > 1:
        buffer = io.BytesIO()
        table.write_parquet(buffer)
        with open(path, "wb") as file:
            file.write(buffer.getbuffer())


def read_show_columns(folder: str, name: str) -> pl.DataFrame | None:
    """The columns to show with the items of a data set, with the raw ids as `id`. None if it has none."""
    description, file = os.path.join(folder, f"{name}.json"), f"{name}{SHOW_END}"
    if not os.path.isfile(description) or file not in read_json(description).get("files", {}):
        return None  # a file that is not in the description is of an earlier version of the data set
    path = os.path.join(folder, file)
    try:
        return pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); process the data set again") from None


def tab_separated(table: pl.DataFrame) -> memoryview:
    """A table as tab-separated lines. They are not written to the file by Polars, whose errors hide a full disk."""
    buffer = io.BytesIO()
    table.write_csv(buffer, include_header=False, separator="\t", quote_style="never", line_terminator="\n")
    return buffer.getbuffer()


def _write_inter_files(
    stem: str, name: str, ordered: OrderedInteractions, rules: Rules
) -> tuple[dict[str, int], dict[str, str]]:
    """Write the `.inter` files, a block of users at a time. Returns the number of rows of each, and their checksums."""
    cuts = _cut_times(ordered, rules) if rules.split == "time" else None
    counts = dict.fromkeys(SPLITS, 0)
    checksums = {}
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
                written.result()  # this thread builds the next lines while the other one writes the last ones
                written = background.submit(write, lines)
            written.result()
        if not counts[split] and split != "train":  # a data set without training rows still allows zero-shot tests
            raise UserError(f"{name}: no row for {split}; lower --user_k and --item_k, or change the shares")
        checksums[f"{name}.{split}.inter"] = checksum.hexdigest()
    return counts, checksums


def _blocks(ordered: OrderedInteractions) -> "Iterator[_Block]":
    """All users, in blocks of about a million interactions."""
    ends, first = ordered.offsets[1:], 0
    while first < len(ends):
        last = max(first + 1, int(np.searchsorted(ends, ordered.offsets[first] + _BLOCK, side="right")))
        yield _Block(ordered, first, last)
        first = last


def _cut_times(ordered: OrderedInteractions, rules: Rules) -> list:
    """The timestamps from which on an interaction belongs to valid, and to test."""
    times = np.sort(ordered.timestamp)
    before = [1 - rules.valid_share - rules.test_share, 1 - rules.test_share]
    return [times[min(len(times) - 1, int(round(share * len(times))))] for share in before]


class _Block:
    """The interactions of the users `first` to `last` (excluded), and their rows in the `.inter` files."""

    def __init__(self, ordered: OrderedInteractions, first: int, last: int):
        start, end = ordered.offsets[first], ordered.offsets[last]
        self.item, self.timestamp = ordered.item[start:end], ordered.timestamp[start:end]
        self.first_user = first
        starts, ends = ordered.offsets[first:last] - start, ordered.offsets[first + 1 : last + 1] - start
        self.user = np.repeat(np.arange(last - first), ends - starts)  # of each interaction
        self.start, self.end = starts[self.user], ends[self.user]  # of its user

    def targets(self, split: str, cuts: list | None) -> np.ndarray:
        """The interactions to predict, as indices into `item`: user after user, the longest history first."""
        backwards = self.start + self.end - 1 - np.arange(len(self.item))  # each user's from the newest to the oldest
        if cuts is None:
            from_end = self.end - backwards
            chosen = {"train": from_end > 2, "valid": from_end == 2, "test": from_end == 1}[split]
        else:
            split_index = np.searchsorted(cuts, self.timestamp, side="right")  # into SPLITS
            chosen = split_index[backwards] == SPLITS.index(split)
        return backwards[chosen & (backwards > self.start)]

    def rows(self, targets: np.ndarray) -> pl.DataFrame:
        """The rows of these targets: user, history, target."""
        tokens = pl.Series(self.item).cast(pl.String)
        text = tokens.str.join(" ")[0].encode()  # every history is a slice of this text
        token_starts = np.concatenate([[0], np.cumsum(tokens.str.len_bytes().to_numpy().astype(np.int64) + 1)])
        start = token_starts[np.maximum(self.start[targets], targets - CUT_LENGTH)]
        pieces = pl.DataFrame({"start": start, "bytes": token_starts[targets] - 1 - start})
        return pieces.select(
            user=pl.Series(self.user[targets] + self.first_user),
            history=pl.lit(text).bin.slice(pl.col("start"), pl.col("bytes")).cast(pl.String),
            target=pl.Series(self.item[targets]),
        )


def _files(folder: str, checksums: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Sizes and checksums of the files in a folder. `checksums` holds those that are already known."""
    paths = {name: os.path.join(folder, name) for name in sorted(os.listdir(folder))}
    return {
        name: {"bytes": os.path.getsize(path), "sha256": checksums.get(name) or file_sha256(path)}
        for name, path in paths.items()
    }


def _features_still_valid(path: str, description: dict[str, Any]) -> dict[str, Any]:
    """The feature entries of the previous description, in `path`, whose features were made from the same texts."""
    if not os.path.isfile(path):
        return {}
    try:
        features = read_json(path).get("features", {})
        return {
            suffix: each for suffix, each in features.items() if each.get("texts_sha256") == description["texts_sha256"]
        }
    except (UserError, AttributeError):
        return {}  # the description is damaged and will be replaced
