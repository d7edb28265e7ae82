"""The image+text transformer: dimensions, layers, image encoder, decoder, generation."""
