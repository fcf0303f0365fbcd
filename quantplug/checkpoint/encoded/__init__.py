"""Checkpoints that are quantized already, read as the BF16 model that they stand for."""
