"""Drop-ins for other libraries."""

from . import irpe
from .patch import patch

__all__ = ["irpe", "patch"]
