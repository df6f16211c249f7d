"""Training files made of scenes."""
