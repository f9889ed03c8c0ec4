"""Guidance from small modules beside a frozen network's attention, instead of a second network call."""
