"""Models onto devices, chat rendering and token boundaries, batches of fixed shapes.
Public: chat.Renderer, batches.Shapes, load.load_model, load.load_tokenizer, tiny (the demo's and the tests' model)."""
