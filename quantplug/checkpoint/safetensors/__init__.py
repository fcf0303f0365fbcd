"""safetensors files, written row by row."""
