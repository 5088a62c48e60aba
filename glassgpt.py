"""GlassGPT: train a small GPT, and see what it learned.

The commands are `train.py`, `sample.py` and `attend.py`; the parts can be imported: `from model.gpt import GPT`.
"""

__version__ = "0.1.0"
