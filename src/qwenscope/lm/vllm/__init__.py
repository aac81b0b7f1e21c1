"""vLLM as a source of rows: the engine, what it loads by name, and the gate that compares it with transformers."""
