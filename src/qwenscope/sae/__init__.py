"""The sparse autoencoder itself, on tensors alone: model, activations, selection, files, other libraries' formats."""
