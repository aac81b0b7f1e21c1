"""Requests that take several calls in a row; importing the package registers them."""

from qwenscope.corpus.tool_use.chains import errands, office
from qwenscope.corpus.tool_use.model import CHAINS

__all__ = ["CHAINS", "errands", "office"]
