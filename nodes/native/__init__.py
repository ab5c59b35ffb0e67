"""How a MODEL of the stock loaders is described to workers that run ComfyUI's own classes."""
