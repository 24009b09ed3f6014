"""Where a compressed checkpoint goes next: a GGUF file for llama.cpp, the hub."""
