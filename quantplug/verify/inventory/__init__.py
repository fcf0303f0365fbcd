"""What lies on disk, and what the config promises of it: read once, asked by every rule."""
