"""Encode the item texts of a data set with a frozen language model: NAME.text -> NAME.feat1CLS, NAME.feat2CLS.

`feat1` holds the vector of each item's text, `feat2` that of the text after random words were dropped. Both are raw
float32 rows in the order of `NAME.item2index`. Each has a description beside it (`NAME.feat1CLS.json`), and NAME.json
lists them. No other file is changed, so the texts can be encoded again with another encoder.

    python dataset/preprocessing/encode_text.py -d Scientific                       # bert-base-uncased, CLS
    python dataset/preprocessing/encode_text.py -d Scientific --plm_name minilm     # Mean; needs no network
    torchrun --nproc_per_node=4 dataset/preprocessing/encode_text.py -d Scientific  # a GPU for each process

A run that was stopped can be started again. It resumes where it stopped, and writes the same bytes.
"""

import argparse
import datetime
import filecmp
import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, PROJECT)  # so that the script finds `common` from any working folder

import numpy as np  # noqa: E402

from common.errors import UserError, did_you_mean, run_command  # noqa: E402
from common.files import atomic_path, check_can_write, file_sha256, read_json, write_json, writing  # noqa: E402
from common.processes import is_main, process_group  # noqa: E402
from dataset.preprocessing.encoder import (  # noqa: E402
    Encoder,
    Shards,
    TokenisedTexts,
    in_step,
    versions,
    write_rows,
)
from dataset.preprocessing.encoding_options import NO_ENCODER, add_encoding_options, encoding_settings  # noqa: E402
from dataset.preprocessing.texts import (  # noqa: E402
    UNKNOWN_TEXT,
    drop_words,
    has_words,
    read_item_order,
    read_texts,
    texts_sha256,
)

SPLIT_FILES = ("train.inter", "valid.inter", "test.inter", "text", "item2index", "user2index")


def encode_dataset(
    name: str,
    path: str,
    encoder: str = "minilm",
    pooling: str | None = None,
    word_drop_ratio: float = 0.15,
    variants: int = 1,
    seed: int = 2020,
    normalise: bool = False,
    gpu_id: int | None = None,
    precision: str = "auto",
    batch_tokens: int | None = None,
    progress: bool = True,
) -> list[str]:
    """Write the feature files of a data set and their descriptions into PATH/NAME.

    Finished shards are kept in a hidden folder beside the data set's files until everything is written. After a kill, a
    call with the same settings resumes from them, and writes the same bytes. In a process group, every process calls
    this and encodes a share. Process 0 writes the files.

    `NAME.json`, the description of the data set, gets an entry for each file under `features`. Its other entries stay
    unchanged.

    Args:
        name: the data set.
        path: the folder that holds the data set's folder.
        word_drop_ratio: the probability with which each word of a text is dropped for feat2, feat3, ...
        variants: the number of files with dropped words (feat2, feat3, ...), from 0 on.
        seed: of the dropped words.
        normalise: scale each vector to length 1.
        encoder, pooling, gpu_id, precision, batch_tokens: see `encoder.Encoder`.
        progress: show texts per second and the time left on stderr.

    Returns:
        The paths of the feature files.

    Raises:
        UserError: the folder, its `.text` or its `.item2index` is missing, an item has no text, or the disk is full.
            See also `encoder.Encoder`.
    """
    stem = os.path.join(path, name, name)
    texts = in_step(load_dataset_texts, name, path)
    in_step(_check_can_describe, stem)
    views = in_step(_views, texts, word_drop_ratio, variants, seed)
    model = in_step(Encoder, encoder, pooling, batch_tokens, gpu_id, precision)

    tokenised = TokenisedTexts([text for view in views for text in view], model, progress)
    shards = Shards(os.path.join(path, name, f".{name}.{model.pooling}.shards"), model, tokenised)
    in_step(lambda: shards.prepare() if is_main() else None)
    in_step(shards.encode_missing, progress)

    common = {
        "encoder": encoder, "pooling": model.pooling, "precision": model.precision, "width": model.width,
        "normalised": normalise, "dtype": "float32", "items": len(texts), "word_drop": 0.0, "seed": seed,
        "texts_sha256": texts_sha256(texts),  # of the whole texts, also for features of texts with dropped words
    }  # fmt: skip
    descriptions = {
        f"feat{number}{model.pooling}": common | ({"word_drop": word_drop_ratio} if number > 1 else {})
        for number in range(1, len(views) + 1)
    }
    in_step(lambda: _write_features(stem, shards, tokenised, descriptions) if is_main() else None)
    return [f"{stem}.{suffix}" for suffix in descriptions]


def check_settings(
    encoder: str,
    pooling: str | None,
    word_drop_ratio: float,
    variants: int,
    seed: int,
    normalise: bool = False,
    gpu_id: int | None = None,
    precision: str = "auto",
    batch_tokens: int | None = None,
) -> None:
    """Check before a long computation that `encode_dataset` can use these settings. Loads the encoder.

    Raises:
        UserError: see `encode_dataset`.
    """
    _views([], word_drop_ratio, variants, seed)
    Encoder(encoder, pooling, batch_tokens, gpu_id, precision)


def _views(texts: Sequence[str], word_drop_ratio: float, variants: int, seed: int) -> list[list[str]]:
    """The texts to encode for each feature file: the whole texts, then those with dropped words."""
    if variants < 0:
        raise UserError(f"--variants {variants}: expected a whole number from 0 (feat1 only) on")
    drop_words([], word_drop_ratio, seed)  # checks the ratio and the seed also if there are no variants
    whole = [text if has_words(text) else UNKNOWN_TEXT for text in texts]
    return [whole, *(drop_words(whole, word_drop_ratio, seed, number) for number in range(1, variants + 1))]


def load_dataset_texts(name: str, path: str) -> list[str]:
    """The texts of a data set's items, in the order of their indices. Items with an empty text are named on stderr.

    Raises:
        UserError: the folder or a file is missing, there is no item, or an item has no line in `.text`.
    """
    folder = os.path.join(path, name)
    if not os.path.isdir(folder):
        near = did_you_mean(name, os.listdir(path)) if os.path.isdir(path) else ""
        raise UserError(
            f"{folder}: no such data set folder{near or '; process the data set first, or name its folder with --path'}"
        )
    texts = read_texts(os.path.join(folder, f"{name}.text"))
    items = read_item_order(os.path.join(folder, f"{name}.item2index"))
    if not items:
        raise UserError(f"{folder}/{name}.item2index: holds no item; process the data set again")
    missing = [item for item in items if item not in texts]
    if missing:
        raise UserError(
            f"{folder}/{name}.text: no text for {len(missing)} of the {len(items)} items in {name}.item2index, "
            f"the first: {', '.join(missing[:3])}; add a line for each"
        )
    empty = [item for item in items if not has_words(texts[item])]
    if empty and is_main():
        print(f"note: {len(empty)} items have an empty text and are encoded as {UNKNOWN_TEXT!r}, the first: "
              f"{', '.join(empty[:3])}", file=sys.stderr)  # fmt: skip
    return [texts[item] for item in items]


# -- writing ---------------------------------------------------------------------------------------------------------


def _check_can_describe(stem: str) -> None:
    check_can_write(f"{stem}.json")
    _read_description(stem)


def _read_description(stem: str) -> dict[str, Any]:
    """The data set's description, NAME.json. Without this file, a new description that holds only the name."""
    path = f"{stem}.json"
    description = read_json(path) if os.path.isfile(path) else {"name": os.path.basename(stem)}
    if not isinstance(description, dict) or not isinstance(description.get("features", {}), dict):
        raise UserError(
            f"{path}: expected a JSON object in which features is a JSON object; process the data set again"
        )
    return description


def _write_features(
    stem: str, shards: Shards, tokenised: TokenisedTexts, descriptions: dict[str, dict[str, Any]]
) -> None:
    """Copy the vectors from the shards into the order of the items, write all files, and delete the shards.

    Args:
        stem: PATH/NAME/NAME.
        shards, tokenised: the vectors of the distinct texts, and which of them belongs to each item.
        descriptions: suffix of each feature file (`feat1CLS`, ...) -> its description, which is completed.
    """
    normalise = next(iter(descriptions.values()))["normalised"]
    rows = tokenised.rows.reshape(len(descriptions), -1)  # [files, items]
    for number, (suffix, description) in enumerate(descriptions.items()):
        # All files are written beside the shards before the first is moved: a run stopped here leaves no new file.
        temporary = os.path.join(shards.folder, suffix)
        blocks = shards.blocks(rows[number])
        write_rows(temporary, map(_normalise, blocks) if normalise else blocks)
        description |= {"bytes": os.path.getsize(temporary), "sha256": file_sha256(temporary), "versions": versions()}
    for suffix, description in descriptions.items():
        with writing(f"{stem}.{suffix}"):
            os.replace(os.path.join(shards.folder, suffix), f"{stem}.{suffix}")
        write_json(f"{stem}.{suffix}.json", description)
    data_set = _read_description(stem)
    write_json(f"{stem}.json", data_set | {"features": data_set.get("features", {}) | descriptions})
    shards.remove()


def _normalise(rows: np.ndarray) -> np.ndarray:
    """Scale float rows [n, width] to length 1."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def copy_split(name: str, source: str, path: str) -> None:
    """Copy the files SOURCE/NAME.* of a published split, without features, into PATH/NAME.

    Raises:
        UserError: a file is missing in SOURCE, or a different file already exists in PATH/NAME.
    """
    target = os.path.join(path, name)
    pairs = [(os.path.join(source, f"{name}.{end}"), os.path.join(target, f"{name}.{end}")) for end in SPLIT_FILES]
    for old, new in pairs:
        if not os.path.isfile(old):
            raise UserError(
                f"{old}: no such file; expected --copy_from to name the folder of a published split of {name}"
            )
        if os.path.exists(new) and not filecmp.cmp(old, new, shallow=False):
            raise UserError(f"{new}: differs from {old}; remove it, or choose another --path")
    for old, new in pairs:
        if not os.path.exists(new):
            with atomic_path(new) as temporary:
                shutil.copyfile(old, temporary)


# -- the command -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Encode the item texts of a data set with a frozen language model.")
    parser.add_argument("-d", "--dataset", required=True, metavar="NAME", help="the data set")
    parser.add_argument("--path", default=os.path.join(PROJECT, "dataset", "downstream"), metavar="DIR",
                        help="the folder of the data sets (default: dataset/downstream of the project)")  # fmt: skip
    parser.add_argument("--copy_from", metavar="DIR", help="first copy the published split in DIR to PATH/NAME")
    add_encoding_options(parser)
    return parser


def main(argv: list[str]) -> None:
    """Run the command. It is described at the top of the file."""
    options = _parser().parse_args(argv)
    # a long timeout: the processes communicate only before and after the encoding
    with process_group(timeout=datetime.timedelta(days=7)):
        try:
            _run(options)
        except UserError:
            if is_main():
                raise
            time.sleep(1)  # If one process exits, torchrun kills the others. Process 0 must print the error first.
            raise SystemExit(2) from None


def _run(options: argparse.Namespace) -> None:
    if options.plm_name == NO_ENCODER:
        raise UserError(f"--plm_name {NO_ENCODER}: nothing to do; expected minilm, a folder or a Hugging Face name")
    start = time.perf_counter()
    if options.copy_from:
        in_step(lambda: copy_split(options.dataset, options.copy_from, options.path) if is_main() else None)
    files = encode_dataset(options.dataset, options.path, **encoding_settings(options))
    if is_main():
        print(f"{', '.join(files)} written in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run_command(main)
