"""The sparse autoencoder, on tensors alone: model, activations, selection, files, other libraries' formats."""
