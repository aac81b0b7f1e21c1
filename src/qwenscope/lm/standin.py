"""The stand-in: a small Qwen3.5-MoE language model with the full 40-layer hybrid pattern, shipped as package data."""

from __future__ import annotations

from pathlib import Path

STANDIN_FOLDER = Path(__file__).resolve().parent / "standin_model"
"""The shipped stand-in: loadable by AutoModelForCausalLM and AutoTokenizer, described in its DESCRIPTION.json."""
