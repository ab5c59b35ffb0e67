"""A first draft of a new family's plan, from what its tiny models do. It is believed when the self-test holds."""
