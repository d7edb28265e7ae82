"""Answering prompts from a run's latest checkpoint."""

from pathlib import Path

import torch

from armillary.data_pipeline.batch import assemble, whole_documents
from armillary.data_pipeline.document import Document, Picture, Role, Text
from armillary.data_pipeline.shards import Columns, schema_of
from armillary.data_pipeline.write import record_batch
from armillary.launcher.run import Run
from armillary.model.generation import generate
from armillary.training.delivery import DeviceBatch
from armillary.training.inference import load_model


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
        parts = (Text(prompt),) if image is None else (Picture(image), Text(prompt, learned=False))
        encoded = tokenizer.encode_document(Document(parts))
        # A document's last token is no input. Before it stand the prompt and, with an image, what asks for an answer.
        encoded.tokens = encoded.tokens[:-1] + ([tokenizer.answer] if image is not None else []) + [tokenizer.end]
        encoded.spans = [(len(encoded.tokens), Role.PROMPT)]
        columns = Columns.of(record_batch([encoded], schema_of(tokenizer.size)))
        length = len(encoded.tokens) - 1 + len(encoded.images) * (shape.positions - 1)
        batch = assemble(whole_documents(columns, length, shape, tokenizer.image), columns.tokens.dtype, shape)
        device = next(self._model.parameters()).device
        written = generate(
            self._model,
            DeviceBatch.of(batch, device).inputs,
            max_tokens,
            tokenizer.end,
            temperature,
            torch.Generator(device).manual_seed(seed),
        )
        return tokenizer.decode(written)
