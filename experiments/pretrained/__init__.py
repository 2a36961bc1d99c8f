"""SmolLM2-135M beyond its 8,192 tokens: `python -m experiments.pretrained`, see README.md."""
