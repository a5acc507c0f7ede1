"""serving.translation turns texts into another language: lines and sentences in segments, the search in decoding."""
