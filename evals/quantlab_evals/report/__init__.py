"""Records in, a page out: the variants of a model as one web page that needs no network, and as pictures."""

from .page import page
from .pictures import pictures
from .verdicts import Verdict, verdicts

__all__ = ["Verdict", "page", "pictures", "verdicts"]
