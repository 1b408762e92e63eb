"""What the commands that process a shop have in common: options, and the way from interactions to features."""

import os
import time

from dataset.preprocessing.encoding_options import NO_ENCODER, add_encoding_options, encoding_settings
from dataset.preprocessing.splits import MISSING_TEXT, Rules, check_name, report, source_entry, write_data_set
from dataset.preprocessing.tables import MAX_MALFORMED
from dataset.preprocessing.texts import TEXT_STYLES

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def add_processing_options(parser):
    """Add the options that every shop's command has to an argparse parser."""
    parser.add_argument("--output_path", default=os.path.join(PROJECT, "dataset", "downstream"), metavar="DIR",
                        help="default: dataset/downstream of the project")  # fmt: skip
    parser.add_argument("--user_k", type=int, default=5, metavar="N",
                        help="fewest interactions of a user (default: 5)")  # fmt: skip
    parser.add_argument("--item_k", type=int, default=5, metavar="N",
                        help="fewest interactions of an item (default: 5)")  # fmt: skip
    parser.add_argument("--text_style", choices=TEXT_STYLES, default="clean",
                        help="published: letter by letter as in the published data sets (default: clean)")  # fmt: skip
    parser.add_argument("--missing_text", choices=MISSING_TEXT, default="error",
                        help="what to do with items whose text is empty (default: error)")  # fmt: skip
    parser.add_argument("--max_malformed", type=float, default=MAX_MALFORMED, metavar="SHARE",
                        help="largest share of unreadable rows, which are left out (default: 0.01)")  # fmt: skip
    add_encoding_options(parser, allow_none=True)


def process(options, read_interactions, read_texts, malformed, recorded, left_out=None, **rules):
    """Write the data set that the command line asks for, say what was done, and encode its texts.

    Args:
        options (argparse.Namespace): of `add_processing_options`, and `dataset`.
        read_interactions (callable): without arguments, gives Interactions.
        read_texts (callable): see `splits.write_data_set`.
        malformed (list of Malformed): one for each source file.
        recorded (dict): options of the command that the description should name beside those above.
        left_out (dict, optional): numbers of rows that were left out while reading, by what they are.
        rules: further fields of `splits.Rules`.
    """
    rules = Rules(options.user_k, options.item_k, options.missing_text, **rules)
    rules.check()
    check_name(options.dataset)
    check_encoding_options(options)

    def made_from():
        return {
            "sources": [source_entry(each) for each in malformed],
            "options": recorded | {"text_style": options.text_style, "max_malformed": options.max_malformed},
            "left_out": left_out or {},
        }

    start = time.perf_counter()
    description = write_data_set(
        options.dataset, options.output_path, read_interactions(), read_texts, rules, made_from
    )
    print(report(description))
    folder = os.path.join(options.output_path, options.dataset)
    print(f"  {folder} written in {time.perf_counter() - start:.1f} s", flush=True)
    encode_as_asked(options.dataset, options.output_path, options)


def check_encoding_options(options):
    """Load the encoder and check its options before long work, unless they say `--plm_name none`.

    Args:
        options (argparse.Namespace): of `encoding_options.add_encoding_options`.

    Raises:
        UserError: the encoder cannot be loaded or used, or an option is out of range.
    """
    if options.plm_name != NO_ENCODER:
        from dataset.preprocessing.encode_text import check_settings  # here: takes 3.5 s to import

        check_settings(**encoding_settings(options))


def encode_as_asked(name, path, options):
    """Encode the texts of a data set, unless the options say `--plm_name none`.

    Args:
        name (str), path (str): see `encode_text.encode_dataset`.
        options (argparse.Namespace): of `encoding_options.add_encoding_options`.

    Returns:
        list of str: the feature files written.

    Raises:
        UserError: see `encode_text.encode_dataset`.
    """
    if options.plm_name == NO_ENCODER:
        return []
    from dataset.preprocessing.encode_text import encode_dataset

    return encode_dataset(name, path, **encoding_settings(options))
