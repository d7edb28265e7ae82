"""Writing tokens one by one with a key-value cache."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from armillary.model.layers import KVCache
from armillary.model.multimodal import Inputs, MultimodalModel


@torch.no_grad()
def generate(
    model: MultimodalModel,
    prompt: Inputs,
    max_new_tokens: int,
    end: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """The tokens that follow one prompt, up to `max_new_tokens` of them or until `end` (which is not given out).

    temperature 0 takes the likeliest token each time; above, one is drawn from softmax(logits / temperature).
    The model must be whole in this process. The prompt goes through it once, each new token alone.
    """
    device, length = prompt.tokens_T.device, len(prompt.tokens_T)
    cache = KVCache(length + max_new_tokens, torch.zeros(1, dtype=torch.long, device=device))
    rows = torch.zeros(length, dtype=torch.long, device=device)
    logits = model(prompt, cache=cache, cache_rows=rows)[-1, 0]
    cache.lengths += length
    no_images = replace(prompt, patches_IND=prompt.patches_IND[:0], image_starts_I=prompt.image_starts_I[:0])
    for _ in range(max_new_tokens):
        token = _choose(logits.float(), temperature, generator)
        if token == end:
            return
        yield token
        new = replace(
            no_images,
            tokens_T=torch.tensor([token], device=device),
            positions_T=cache.lengths.clone(),
            cu_seqlens=torch.tensor([0, 1], dtype=torch.int32, device=device),
        )
        logits = model(new, cache=cache, cache_rows=rows[:1], decode=True)[-1, 0]
        cache.lengths += 1


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
