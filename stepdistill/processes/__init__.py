"""Many processes: who plays which part of a batch, how they are started, and how large networks are divided."""
