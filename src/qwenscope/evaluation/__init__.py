"""How good the SAEs are: fidelity, effect on the language model, DeltaNet against attention, and the report."""
