"""What the formats are called, for a command line that does not wait for torch; `sae/formats` reads and writes them."""

from __future__ import annotations

from typing import Literal

OfSuites = Literal["saelens", "sparsify", "dictionary_learning", "neuronpedia"]
OfLatents = Literal["control-vector", "directions"]
Written = Literal[OfSuites, OfLatents]
Read = Literal["saelens", "sparsify", "dictionary_learning", "qwen-scope", "gemma-scope", "llama-scope", "qwenscope"]
