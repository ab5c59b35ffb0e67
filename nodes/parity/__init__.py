"""Stock against the pool, in one ComfyUI process: what the host tests and `comfy-xdit parity` measure."""
