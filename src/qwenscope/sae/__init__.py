"""The sparse autoencoder itself, on tensors alone: model, activations, selection, files, formats of other libraries."""
