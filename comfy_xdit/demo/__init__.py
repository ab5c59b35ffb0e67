"""A tiny trained Flux, how it was made, and the demo that samples it through a pool."""
