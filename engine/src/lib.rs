//! Explicit forward and backward passes of decoder language models, LoRA and optimizers.
