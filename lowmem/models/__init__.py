"""The real Hugging Face model: found, matched with its checkpoint, built with absent blocks."""
