"""What ModelOpt does otherwise once our plugins are imported, each registered by a call of its own."""
