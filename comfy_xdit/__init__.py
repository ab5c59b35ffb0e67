"""Parallel diffusion transformers for ComfyUI: the pool client, the engine and the model families.

Importing this package starts no process and touches no GPU.
"""

__version__ = "0.1.0"
