"""The sparse autoencoder itself, on tensors alone: model, activations, selection, files, foreign formats."""
