"""The demo on a small real chat model, SmolLM2-135M-Instruct."""
