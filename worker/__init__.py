"""What runs in a worker process: one per device, never with ComfyUI."""
