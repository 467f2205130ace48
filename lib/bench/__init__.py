"""What the bench measures, on a GPU, with random weights of the real shapes: floors, ours, the plain loop, peers.
Public: RUNGS of scoring, attribution, store; shapes.machine. A rung takes (model, batch_tokens) and returns figures."""
