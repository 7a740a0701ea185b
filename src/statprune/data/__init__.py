"""Token windows: from text files, token files, `datasets`, the standard library's source, or the model's own samples."""

from statprune.data.documents import DATASET_NAMES, WIKITEXT, dataset_windows
from statprune.data.files import Text, read_text
from statprune.data.library import standard_library_text
from statprune.data.sources import (
    GENERATED,
    calibration_windows,
    evaluation_windows,
    generated_windows,
    how_drawn,
    needs_tokenizer,
    token_file_windows,
)
from statprune.data.tokens import tokenize
from statprune.data.windows import check_size, consecutive_windows, random_windows

__all__ = [
    "DATASET_NAMES",
    "GENERATED",
    "WIKITEXT",
    "Text",
    "calibration_windows",
    "check_size",
    "consecutive_windows",
    "dataset_windows",
    "evaluation_windows",
    "generated_windows",
    "how_drawn",
    "needs_tokenizer",
    "random_windows",
    "read_text",
    "standard_library_text",
    "token_file_windows",
    "tokenize",
]
