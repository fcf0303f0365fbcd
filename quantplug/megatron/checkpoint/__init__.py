"""Megatron checkpoints of quantized models: saved at any layout, loaded at any other."""
