"""The offline web browser for an index: server, static export, and the page itself."""
