"""Sets of token sequences, made once from datasets: general text, prompts of a behaviour, a text for perplexity.
Public: prepare.prepare (what `make fetch` and jobs/prepare_data.py call). What it leaves is read by lib.store."""
