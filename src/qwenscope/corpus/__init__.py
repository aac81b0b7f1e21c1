"""Conversations of every source: filtered, repaired, rendered, mixed by tokens, resumable at any conversation.

A row's way: `sources` (over `hub`, `shards`) -> `prepare` (`privacy`, `repair`, `chat` or `documents`), here or in
`workers` -> `feed`, one per source -> `stream`, which mixes them -> `batches`. `survey` measures all of it;
`tool_use` generates.
"""
