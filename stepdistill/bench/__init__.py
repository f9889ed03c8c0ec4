"""Measures exported models: prompts and seeds go in, a report comes out. Nothing here imports training code."""
