"""The options of encoding, the same in every command. Imports no language model, so that `--help` is fast."""

import argparse

DEFAULT_ENCODER = "bert-base-uncased"  # the paper's
NO_ENCODER = "none"


def add_encoding_options(parser: argparse.ArgumentParser, allow_none: bool = False) -> None:
    """Add the options of encoding to a parser. `allow_none` adds `--plm_name none`, which does not encode."""
    none = f"; {NO_ENCODER}: do not encode" if allow_none else ""
    add = parser.add_argument_group("encoding of the texts").add_argument
    add("--plm_name", default=DEFAULT_ENCODER, metavar="NAME",
        help=f"the language model: minilm (all-MiniLM-L6-v2, installed), a local folder, or a Hugging Face name{none} "
             f"(default: {DEFAULT_ENCODER})")  # fmt: skip
    add("--emb_type", metavar="CLS|Mean", help="pooling of the token vectors (default: Mean for minilm, else CLS)")
    add("--word_drop_ratio", type=float, default=0.15, metavar="SHARE",
        help="probability that feat2 drops a word of a text (default: 0.15)")  # fmt: skip
    add("--variants", type=int, default=1, metavar="N",
        help="number of feature files of texts with dropped words: feat2, feat3, ... (default: 1)")  # fmt: skip
    add("--seed", type=int, default=2020, metavar="N", help="seed of the dropped words (default: 2020)")
    add("--normalise", action="store_true", help="scale each vector to length 1")
    add("--gpu_id", type=int, metavar="N",
        help="GPU to encode on, -1 for the CPU (default: the first; with torchrun one per process)")  # fmt: skip
    add("--precision", default="auto", metavar="auto|fp32|bf16",
        help="auto: bf16 if the processor multiplies it natively, else fp32 (default: auto)")  # fmt: skip
    add("--batch_tokens", type=int, metavar="N",
        help="most tokens in a batch (default: 1024 per thread on the CPU, 65536 on a GPU)")  # fmt: skip


def encoding_settings(options: argparse.Namespace) -> dict:
    """Turn the options of `add_encoding_options` into keyword arguments of `encode_text.encode_dataset`."""
    return {
        "encoder": options.plm_name,
        "pooling": options.emb_type,
        "word_drop_ratio": options.word_drop_ratio,
        "variants": options.variants,
        "seed": options.seed,
        "normalise": options.normalise,
        "gpu_id": options.gpu_id,
        "precision": options.precision,
        "batch_tokens": options.batch_tokens,
    }
