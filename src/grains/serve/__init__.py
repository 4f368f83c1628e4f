"""An OpenAI-compatible server: the base model and steered ones, in one running batch."""
