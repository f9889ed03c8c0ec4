"""Guidance from small modules beside a frozen network's attention, instead of a second network call."""

ADAPTER_FILE = "adapter.safetensors"
HEADER = "guidance_adapter"  # the entry of the file's metadata that holds everything but the tensors
