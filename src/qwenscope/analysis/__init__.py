"""After training: which latents go with a behavior, a detector for it, and what differs between two corpora."""
