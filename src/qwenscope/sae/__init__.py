"""The sparse autoencoder itself, on tensors alone: model, activations, selection, files, and other libraries' formats."""
