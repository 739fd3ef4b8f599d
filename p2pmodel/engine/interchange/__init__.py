"""What other programs read and write: adapters as `peft` has them, and whole checkpoints of transformers.

Nothing here imports peft: its files are a JSON of settings and a safetensors file.
"""
