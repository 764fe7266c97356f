"""LoRA on a frozen base model: layers, bases, training, DP-SGD, PEFT folders."""
