"""Conversations of our own, with tools and without: sentences are data (`content/`), the generator is code."""

from qwenscope.corpus.tool_use.generate import (
    GENERATORS,
    chat_conversation,
    conversation_families,
    generate_tool_use,
    tool_use_conversation,
    write_tool_use,
)

__all__ = [
    "GENERATORS",
    "chat_conversation",
    "conversation_families",
    "generate_tool_use",
    "tool_use_conversation",
    "write_tool_use",
]
