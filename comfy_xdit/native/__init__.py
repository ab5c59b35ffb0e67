"""Models of ComfyUI's own classes on the workers. ComfyUI is imported in functions only, when a client asks for it."""
