"""Readers: file, hub name or installed package -> validated records -> batches."""
