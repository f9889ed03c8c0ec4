"""What a distilled model or LoRA is and how it wants to be called, read off its files alone."""
