"""What is measured: Frechet and kernel distances of features, CLIP score, and the shapes judge."""
