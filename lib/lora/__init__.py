"""LoRA students: adapters trained on rows of chat, on a base that stays as it is."""
