"""The demo on a real small chat model: weights of SmolLM2-135M-Instruct, harmless data, and a rule instead of a judge.

Nothing in the core imports this package; it registers the addresses `smollm2://...` as a source.
"""
