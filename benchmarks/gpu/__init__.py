"""What an NVIDIA GPU computes and how fast, in one command: `python -m benchmarks.gpu`."""
