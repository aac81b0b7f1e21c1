"""Conversations of every source: filtered, repaired, rendered, mixed by tokens, resumable at any conversation."""

from qwenscope.corpus.batches import Batch, make_batches
from qwenscope.corpus.chat import ROLES, Conversation, Rendered, render
from qwenscope.corpus.privacy import PrivacyFilter
from qwenscope.corpus.repair import Dropped
from qwenscope.corpus.stream import CorpusStream
from qwenscope.corpus.survey import survey, write_privacy_report

__all__ = [
    "ROLES",
    "Batch",
    "Conversation",
    "CorpusStream",
    "Dropped",
    "PrivacyFilter",
    "Rendered",
    "make_batches",
    "render",
    "survey",
    "write_privacy_report",
]
