"""Encode the item texts of a data set with a frozen language model: NAME.text -> NAME.feat1CLS, NAME.feat2CLS.

`feat1` holds the vector of each item's text, `feat2` that of the text with a part of its words dropped: raw float32
rows in the order of `NAME.item2index`. A description stands beside each (`NAME.feat1CLS.json`). Nothing else of the
data set is touched, so its texts can be encoded again with another encoder.

    python dataset/preprocessing/encode_text.py -d Scientific                       # bert-base-uncased, CLS
    python dataset/preprocessing/encode_text.py -d Scientific --plm_name minilm     # Mean; needs no network
    torchrun --nproc_per_node=4 dataset/preprocessing/encode_text.py -d Scientific  # a GPU for each process

A run that was stopped goes on where it was when it is started again, and ends in the same bytes.
"""

import argparse
import datetime
import filecmp
import os
import shutil
import sys
import time

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, PROJECT)  # so that the script finds `common`, from whatever folder it is started

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
    name,
    path,
    encoder="minilm",
    pooling=None,
    word_drop_ratio=0.15,
    variants=1,
    seed=2020,
    normalise=False,
    gpu_id=None,
    precision="auto",
    batch_tokens=None,
    progress=True,
):
    """Write the feature files of a data set and their descriptions into PATH/NAME.

    A part that is finished stays, in a hidden folder beside the data set's files, until all is written: called again
    with the same settings after a kill, this goes on, and ends in the same bytes. Called by every process of a
    `torch.distributed` group, each encodes a share, and the first writes the files.

    `NAME.json`, the data set's description, gets an entry for each file under `features`; the rest of it stays.

    Args:
        name (str): the data set.
        path (str): the folder that holds the data set's folder.
        word_drop_ratio (float): probability with which each word is left out of the texts of feat2, feat3, ...
        variants (int): how many draws of words to leave out, from 0 on: feat2, feat3, ...
        seed (int): of the word dropping.
        normalise (bool): scale each vector to length 1.
        encoder, pooling, gpu_id, precision, batch_tokens: see `encoder.Encoder`.
        progress (bool): show texts per second and the time left on stderr.

    Returns:
        list of str: the feature files.

    Raises:
        UserError: the folder, its `.text` or its `.item2index` is missing, an item has no text, the disk is full; see
            also `encoder.Encoder`.
    """
    stem = os.path.join(path, name, name)
    texts = in_step(load_dataset_texts, name, path)
    in_step(_check_can_describe, stem)
    views = in_step(_views, texts, word_drop_ratio, variants, seed)
    model = in_step(Encoder, encoder, pooling, batch_tokens, gpu_id, precision)

    work = TokenisedTexts([text for view in views for text in view], model, progress)
    shards = Shards(os.path.join(path, name, f".{name}.{model.pooling}.shards"), model, work)
    in_step(lambda: shards.prepare() if is_main() else None)
    in_step(shards.encode_missing, progress)

    about = {
        "encoder": encoder, "pooling": model.pooling, "precision": model.precision, "width": model.width,
        "normalised": normalise, "dtype": "float32", "items": len(texts), "word_drop": 0.0, "seed": seed,
        "texts_sha256": texts_sha256(texts),  # of the texts before any word is dropped, in every description
    }  # fmt: skip
    descriptions = {
        f"feat{number}{model.pooling}": about | ({"word_drop": word_drop_ratio} if number > 1 else {})
        for number in range(1, len(views) + 1)
    }
    in_step(lambda: _write_features(stem, shards, work, descriptions) if is_main() else None)
    return [f"{stem}.{suffix}" for suffix in descriptions]


def check_settings(
    encoder, pooling, word_drop_ratio, variants, seed, normalise=False, gpu_id=None, precision="auto", batch_tokens=None
):
    """Find out before long work whether `encode_dataset` can use these settings; loads the encoder.

    Raises:
        UserError: see `encode_dataset`.
    """
    _views([], word_drop_ratio, variants, seed)
    Encoder(encoder, pooling, batch_tokens, gpu_id, precision)


def _views(texts, word_drop_ratio, variants, seed):
    """The texts to encode for each feature file, list of lists of str: the whole ones, and each draw of words."""
    if variants < 0:
        raise UserError(f"--variants {variants}: expected a whole number from 0 (feat1 only)")
    drop_words([], word_drop_ratio, seed)  # checks both
    spoken = [text if has_words(text) else UNKNOWN_TEXT for text in texts]
    return [spoken, *(drop_words(spoken, word_drop_ratio, seed, number) for number in range(1, variants + 1))]


def load_dataset_texts(name, path):
    """The texts of a data set's items in index order, list of str. Empty ones are named on stderr.

    Raises:
        UserError: the folder or a file is missing, there is no item, or an item has no line in `.text`.
    """
    folder = os.path.join(path, name)
    if not os.path.isdir(folder):
        near = did_you_mean(name, os.listdir(path)) if os.path.isdir(path) else ""
        raise UserError(f"{folder}: no such data set folder{near or '; process the data set first, or give --path'}")
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


def _check_can_describe(stem):
    check_can_write(f"{stem}.json")
    _read_description(stem)


def _read_description(stem):
    """What NAME.json says of the data set, dict; where there is none, its name."""
    source = f"{stem}.json"
    about = read_json(source) if os.path.isfile(source) else {"name": os.path.basename(stem)}
    if not isinstance(about, dict) or not isinstance(about.get("features", {}), dict):
        raise UserError(f"{source}: expected a JSON object, with features as one too; process the data set again")
    return about


def _write_features(stem, shards, work, descriptions):
    """Put the vectors of the shards in the order of the items and write all files; the shards go.

    Args:
        stem (str): PATH/NAME/NAME.
        descriptions (dict): suffix of each feature file (`feat1CLS`, ...) -> what its description says, dict.
    """
    normalise = next(iter(descriptions.values()))["normalised"]
    rows = work.rows.reshape(len(descriptions), -1)  # [files, items]
    for number, (suffix, about) in enumerate(descriptions.items()):
        # All are written before the first takes its place: what is stopped here leaves nothing beside the shards.
        assembled = os.path.join(shards.folder, suffix)
        blocks = shards.blocks(rows[number])
        write_rows(assembled, map(_normalised, blocks) if normalise else blocks)
        about |= {"bytes": os.path.getsize(assembled), "sha256": file_sha256(assembled), "versions": versions()}
    for suffix, about in descriptions.items():
        with writing(f"{stem}.{suffix}"):
            os.replace(os.path.join(shards.folder, suffix), f"{stem}.{suffix}")
        write_json(f"{stem}.{suffix}.json", about)
    whole = _read_description(stem)
    write_json(f"{stem}.json", whole | {"features": whole.get("features", {}) | descriptions})
    shards.remove()


def _normalised(rows):
    """Float rows [n, width] scaled to length 1."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def copy_split(name, source, path):
    """Copy the files of a published split (DIR/NAME.*, without features) into PATH/NAME.

    Raises:
        UserError: a file is missing at the source, or a different one already stands at the target.
    """
    target = os.path.join(path, name)
    pairs = [(os.path.join(source, f"{name}.{end}"), os.path.join(target, f"{name}.{end}")) for end in SPLIT_FILES]
    for old, new in pairs:
        if not os.path.isfile(old):
            raise UserError(f"{old}: no such file; --copy_from takes the folder of a published split of {name}")
        if os.path.exists(new) and not filecmp.cmp(old, new, shallow=False):
            raise UserError(f"{new}: differs from {old}; remove it, or give another --path")
    for old, new in pairs:
        if not os.path.exists(new):
            with atomic_path(new) as temporary:
                shutil.copyfile(old, temporary)


# -- the command -----------------------------------------------------------------------------------------------------


def _parser():
    parser = argparse.ArgumentParser(description="Encode the item texts of a data set with a frozen language model.")
    parser.add_argument("-d", "--dataset", required=True, metavar="NAME", help="the data set")
    parser.add_argument("--path", default=os.path.join(PROJECT, "dataset", "downstream"), metavar="DIR",
                        help="the folder of the data sets (default: dataset/downstream of the project)")  # fmt: skip
    parser.add_argument("--copy_from", metavar="DIR", help="first copy the published split in DIR to PATH/NAME")
    add_encoding_options(parser)
    return parser


def main(argv):
    """The command; see the top of the file."""
    options = _parser().parse_args(argv)
    # under torchrun only errors and shards' numbers are exchanged, and one process may wait long
    with process_group(timeout=datetime.timedelta(days=7)):
        try:
            _run(options)
        except UserError:
            if is_main():
                raise
            time.sleep(1)  # torchrun ends all processes when one has ended: the first is to tell the error before
            raise SystemExit(2) from None


def _run(options):
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
