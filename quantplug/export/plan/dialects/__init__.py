"""How quantized weights and their config are spelled on disk, one file a dialect."""
