"""The options of encoding, the same in every command. Loads no language model, so that `--help` answers at once."""

DEFAULT_ENCODER = "bert-base-uncased"  # the paper's
NO_ENCODER = "none"


def add_encoding_options(parser, allow_none=False):
    """Add the options of encoding to an argparse parser.

    Args:
        parser (argparse.ArgumentParser)
        allow_none (bool): offer `--plm_name none`, no encoding.
    """
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


def check_encoding_options(options):
    """Load the encoder and check the options before long work that encoding is to follow.

    Args:
        options (argparse.Namespace): of `add_encoding_options`.

    Raises:
        UserError: the encoder cannot be loaded or used, or an option is out of range.
    """
    if options.plm_name != NO_ENCODER:
        from dataset.preprocessing.encode_text import check_settings

        check_settings(**_settings(options))


def encode_as_asked(name, path, options):
    """Encode the texts of a data set, unless the options say `--plm_name none`.

    Args:
        name (str), path (str): see `encode_text.encode_dataset`.
        options (argparse.Namespace): of `add_encoding_options`.

    Returns:
        list of str: the feature files written.

    Raises:
        UserError: see `encode_text.encode_dataset`.
    """
    if options.plm_name == NO_ENCODER:
        return []
    from dataset.preprocessing.encode_text import encode_dataset

    return encode_dataset(name, path, **_settings(options))


def _settings(options):
    """The arguments of `encode_text.encode_dataset`."""
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
