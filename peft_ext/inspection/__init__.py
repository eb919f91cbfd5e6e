"""What is in an adapter, read from its files alone: no base model is built or downloaded.

`describe` and `compare` return plain dictionaries, which can be written as JSON; the command line shows them as tables.
"""

from ..core import Adapter, BadInput, Row
from .comparing import compare
from .describing import describe, rows_of, settings
from .pruned import describe_pruned
from .reading import by_site, directory_of, is_pruned, read_adapter
from .tables import PARAMETERS, totals, with_ratios


__all__ = [
    "PARAMETERS",
    "Adapter",
    "BadInput",
    "Row",
    "by_site",
    "compare",
    "describe",
    "describe_pruned",
    "directory_of",
    "is_pruned",
    "read_adapter",
    "rows_of",
    "settings",
    "totals",
    "with_ratios",
]
