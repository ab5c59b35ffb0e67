"""ComfyUI's own workflow templates, and which of them a pool runs."""
