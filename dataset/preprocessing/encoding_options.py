"""The options of encoding, the same in every command. Imports no language model, so that `--help` is fast."""

import argparse

DEFAULT_ENCODER = "bert-base-uncased"  # the paper's
NO_ENCODER = "none"


def add_encoding_options(parser: argparse.ArgumentParser, allow_none: bool = False) -> None:
    """Add the options of encoding to a parser; `allow_none` offers `--plm_name none`, no encoding."""
    none = f"; {NO_ENCODER}: do not encode" if allow_none else ""
    add = parser.add_argument_group("encoding of the texts").add_argument
    add("--plm_name", default=DEFAULT_ENCODER, metavar="NAME",
        help=f"the language model: minilm (installed all-MiniLM-L6-v2), a local folder, or a Hugging Face name{none} "
             f"(default: {DEFAULT_ENCODER})")  # fmt: skip
    add("--emb_type", metavar="CLS|Mean", help="default: Mean for minilm, CLS for any other")
    add("--word_drop_ratio", type=float, default=0.15, metavar="SHARE",
        help="of the words that feat2 leaves out (default: 0.15)")  # fmt: skip
    add("--variants", type=int, default=1, metavar="N",
        help="how many draws of words are left out, each in a file: feat2, feat3, ... (default: 1)")  # fmt: skip
    add("--seed", type=int, default=2020, metavar="N", help="of the word dropping (default: 2020)")
    add("--normalise", action="store_true", help="scale each vector to length 1")
    add("--gpu_id", type=int, metavar="N",
        help="GPU to encode on, -1: the CPU (default: the first; under torchrun each process its own)")  # fmt: skip
    add("--precision", default="auto", metavar="auto|fp32|bf16",
        help="default: auto, bf16 where the processor multiplies it natively")  # fmt: skip
    add("--batch_tokens", type=int, metavar="N",
        help="tokens of a batch (default: 1024 on the CPU, where each thread has its own, 65536 on a GPU)")  # fmt: skip


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
