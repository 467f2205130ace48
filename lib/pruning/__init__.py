"""SparC3's pruning: which neurons and weights go, taking them out of a loaded model, and a folder without them."""
