"""The demo: a small teacher with a planted habit, texts, and the whole path on a machine with nothing."""
