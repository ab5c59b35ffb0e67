"""Weights: safetensors headers, mapped files, slice maps, and LoRA-like patches."""
