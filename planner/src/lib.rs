//! Memory, size and time of a fine-tuning run, and the GPU class that fits it.
