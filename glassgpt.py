"""GlassGPT: train a small GPT, and see what it learned. Import its parts, as in `from model.gpt import GPT`."""

__version__ = "0.1.0"
