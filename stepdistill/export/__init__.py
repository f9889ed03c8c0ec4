"""From a finished student to files that plain Diffusers loads, and the proof that it does."""
