"""A tiny trained Flux, and the demo that samples it through a pool."""
