"""What a run learns from: prompts, images, encoded prompts, and the bundled scenes."""
