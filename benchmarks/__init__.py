"""Side by side: every way to feed Keras from Python, and the machine's limit. `python -m benchmarks --quick`."""
