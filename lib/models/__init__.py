"""Models onto devices, chat rendering and token boundaries, rows packed into batches of one shape, the scoring decoder.
Public: chat.Renderer, packing.pack, decoder.Decoder, load.load_decoder, load.load_model, scorer.Scorer."""
