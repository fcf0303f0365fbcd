"""What a model computes with, beside its weights: read off a live model, and off a config, and held against another."""
