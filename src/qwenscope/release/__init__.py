"""A run becomes a folder for others: card, weights, formats, notebook; pushed to the Hub and pulled from it."""
