"""HQQ (being written)."""

from typing import Final

NAME: Final = "hqq"


def recognizes(contents: object) -> bool:
    """False."""
    return False
