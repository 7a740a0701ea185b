"""Plain data as JSON that every reader takes."""

import math
from collections.abc import Mapping
from typing import Any


def finite(data: Any) -> Any:
    """The data with None where a number is NaN or infinite, which JSON has no word for; tuples become lists."""
    if isinstance(data, Mapping):
        return {str(key): finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
