"""What a run costs on a device, and the options that make it cost less."""
