"""Fine-tune a model that fits in neither device memory nor RAM, exactly, with transformers, PEFT and TRL unmodified."""
