"""Answering prompts from a run's latest checkpoint."""

from pathlib import Path

import numpy as np
import torch

from armillary.data_pipeline.batch import assemble, lay_out
from armillary.data_pipeline.sources import Picture, Text
from armillary.launcher.run import Run
from armillary.model.generation import generate
from armillary.training.inference import load_model
from armillary.training.step import to_inputs


class Answerer:
    """A run's model, loaded once for any number of prompts."""

    def __init__(self, path: Path):
        run = Run.open(path)
        self._tokenizer = run.tokenizer()
        self._model, self._job = load_model(run.latest())

    def answer(
        self, prompt: str, image: bytes | None, max_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> str:
        """With an image (a file's bytes) the answer to a question about it; without one, the text's continuation."""
        tokenizer, shape = self._tokenizer, self._job.image_shape
        if image is None:
            tokens, learned, images = np.asarray(tokenizer.encode(prompt), np.int32), None, []
        else:
            tokens, learned, images = tokenizer.encode_document((Picture(image), Text(prompt, learned=False)))
            tokens[-1] = tokenizer.answer  # in place of the document's end
        # A sequence's inputs end one token before its document: the last token has nothing to predict there.
        tokens = np.append(tokens, tokenizer.end).astype(np.int32)
        learned = np.zeros(len(tokens), np.uint8)
        sequence = lay_out(tokens, learned, images, tokenizer.image, shape.positions)
        batch = assemble([[sequence]], len(sequence.tokens), shape)
        parameter = next(self._model.parameters())
        written = generate(
            self._model,
            to_inputs(batch, parameter.device, parameter.dtype),
            max_tokens,
            tokenizer.end,
            temperature,
            torch.Generator(parameter.device).manual_seed(seed),
        )
        return tokenizer.decode(written)
