"""Files: opening, reading, writing, with and without O_DIRECT; safetensors; scratch space."""
