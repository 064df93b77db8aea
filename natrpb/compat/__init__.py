"""Drop-ins for other libraries."""

from . import irpe, natten
from .patch import patch

__all__ = ["irpe", "natten", "patch"]
