"""Drop-ins for other libraries."""

from .patch import patch

__all__ = ["patch"]
