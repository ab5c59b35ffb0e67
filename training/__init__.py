"""How the tiny Flux of comfy_xdit/demo was made: its VAE, its transformer, its LoRA and its prompts, learnt anew."""
