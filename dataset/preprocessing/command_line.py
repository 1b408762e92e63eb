"""Options and steps that all processing commands share, from interactions to features."""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from dataset.preprocessing.encoding_options import NO_ENCODER, add_encoding_options, encoding_settings
from dataset.preprocessing.interactions import Interactions
from dataset.preprocessing.splits import (
    MISSING_TEXT,
    ReadTexts,
    Rules,
    check_name,
    report,
    source_entry,
    write_data_set,
)
from dataset.preprocessing.tables import MAX_MALFORMED, MalformedRows
from dataset.preprocessing.texts import TEXT_STYLES

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def add_processing_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all processing commands share."""
    parser.add_argument("--output_path", default=os.path.join(PROJECT, "dataset", "downstream"), metavar="DIR",
                        help="where the data set's folder is created (default: dataset/downstream)")  # fmt: skip
    parser.add_argument("--user_k", type=int, default=5, metavar="N",
                        help="leave out users with fewer interactions (default: 5)")  # fmt: skip
    parser.add_argument("--item_k", type=int, default=5, metavar="N",
                        help="leave out items with fewer interactions (default: 5)")  # fmt: skip
    parser.add_argument("--text_style", choices=TEXT_STYLES, default="clean",
                        help="clean: without HTML; published: as in published data sets (default: clean)")  # fmt: skip
    parser.add_argument("--missing_text", choices=MISSING_TEXT, default="error",
                        help="items with an empty text: error stops, empty keeps them, drop leaves them out "
                             "(default: error)")  # fmt: skip
    parser.add_argument("--max_malformed", type=float, default=MAX_MALFORMED, metavar="SHARE",
                        help="leave out malformed rows; stop if their share is larger (default: 0.01)")  # fmt: skip
    add_encoding_options(parser, allow_none=True)


def process(
    options: argparse.Namespace,
    read_interactions: Callable[[], Interactions],
    read_texts: ReadTexts,
    malformed: Sequence[MalformedRows],
    recorded_options: dict[str, Any],
    left_out: dict[str, int] | None = None,
    **further_rules,
) -> None:
    """Write a data set, print what was done, and encode its texts.

    Args:
        options: `dataset` and the options of `add_processing_options`.
        read_interactions: reads all interactions.
        read_texts: see `splits.write_data_set`.
        malformed: one for each source file.
        recorded_options: further options of the command, for the description.
        left_out: reason -> number of rows that were left out while reading. `read_interactions` may fill it.
        further_rules: further fields of `splits.Rules`.

    Raises:
        UserError: an option is out of range, a file is missing or malformed, or no interaction remains.
    """
    rules = Rules(options.user_k, options.item_k, options.missing_text, **further_rules)
    rules.check()
    check_name(options.dataset)
    check_encoding_options(options)

    def describe_source() -> dict[str, Any]:
        return {
            "sources": [source_entry(each) for each in malformed],
            "options": recorded_options | {"text_style": options.text_style, "max_malformed": options.max_malformed},
            "left_out": left_out or {},
        }

    start = time.perf_counter()
    description = write_data_set(
        options.dataset, options.output_path, read_interactions(), read_texts, rules, describe_source
    )
    print(report(description))
    folder = os.path.join(options.output_path, options.dataset)
    print(f"  {folder} written in {time.perf_counter() - start:.1f} s", flush=True)
    encode_if_requested(options.dataset, options.output_path, options)


def check_encoding_options(options: argparse.Namespace) -> None:
    """Load the encoder and check its options before a long computation, unless `--plm_name none` is given.

    Args:
        options: those of `encoding_options.add_encoding_options`.

    Raises:
        UserError: the encoder cannot be loaded or used, or an option is out of range.
    """
    if options.plm_name != NO_ENCODER:
        from dataset.preprocessing.encode_text import check_settings  # torch and transformers: 3.5 s

        check_settings(**encoding_settings(options))


def encode_if_requested(name: str, path: str, options: argparse.Namespace) -> list[str]:
    """Encode the texts of a data set, unless `--plm_name none` is given.

    Args:
        name, path: see `encode_text.encode_dataset`.
        options: those of `encoding_options.add_encoding_options`.

    Returns:
        The feature files written.

    Raises:
        UserError: see `encode_text.encode_dataset`.
    """
    if options.plm_name == NO_ENCODER:
        return []
    from dataset.preprocessing.encode_text import encode_dataset  # torch and transformers: 3.5 s

    return encode_dataset(name, path, **encoding_settings(options))
