"""training turns data into model folders."""
