"""Decoding and rounding as the formats define them, and bounds of errors: arithmetic alone."""
