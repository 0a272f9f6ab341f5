"""DataModules: toy activations with known features, and activations of real language models."""
