"""Weights in and out: checkpoints as safetensors, in our own layout or in Hugging Face's.

config.json         Llama's configuration, ours under "armillary" (model table, step); of our own layout that alone
model*.safetensors  the decoder's weights under Llama's names; of our own layout all weights under their own names
image.safetensors   beside Llama's layout: the image encoder and the projector, under their own names
tokenizer.json      of a run's latest checkpoint, with tokenizer_config.json
"""

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.mixture import ORDER
from armillary.data_pipeline.tokenizer import Tokenizer
from armillary.errors import CheckpointError
from armillary.model.config import ModelConfig
from armillary.model.coordinates import Block, placements
from armillary.model.hugging_face import from_llama, is_decoder, llama_config, model_config, sources, to_llama
from armillary.storage import LocalStorage, Storage
from armillary.training.checkpoint.commit import commit
from armillary.training.checkpoint.load import Reader
from armillary.training.checkpoint.manifest import MOMENTS, State
from armillary.training.checkpoint.saver import Saver
from armillary.training.config import TrainJob
from armillary.training.layout import Layout
from armillary.training.loop import build_model
from armillary.training.process_group import Rank, join

SHARD_BYTES = 4 << 30
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IMAGE_KEYS = ("image_", "patch_", "vision_")  # how keys of the [model] table begin that are the image part's
IMAGE_FILE, CONFIG = "image.safetensors", "config.json"


def export(checkpoint: Storage, tokenizer: Tokenizer | None, folder: Path, llama: bool, dtype: str) -> dict:
    """Write a checkpoint's weights into a new folder; its config.json. CheckpointError where there is something
    already, or Llama's layout does not hold the model."""
    reader = Reader(checkpoint)
    job = TrainJob.model_validate(reader.manifest.state.job)
    config = llama_config(job.model, job.data.seq_length) | {"dtype": dtype} if llama else {}
    config |= {"armillary": {"model": job.model.model_dump(), "step": reader.manifest.state.step}}
    if folder.exists():
        raise CheckpointError("there is something already", folder, "name a folder that is not there yet")
    names = sorted(key.removeprefix("weight/") for key in reader.keys if key.startswith("weight/"))

    def weights(decoder: bool) -> Iterator[tuple[str, torch.Tensor]]:
        for name in (name for name in names if not llama or is_decoder(name) == decoder):
            weight = reader.whole(f"weight/{name}").to(DTYPES[dtype])
            yield from to_llama(job.model, name, weight) if llama and decoder else [(name, weight)]

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        making = Path(name) / folder.name
        making.mkdir()
        _write_shards(making, weights(True))
        if llama:
            save_file(dict(weights(False)), making / IMAGE_FILE, {"format": "pt"})
        if tokenizer is not None:
            (making / "tokenizer.json").write_text(tokenizer.to_json())
            (making / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
        (making / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        making.rename(folder)
    return config


def import_(folder: Path, target: Path) -> ModelConfig:
    """Make a checkpoint of step 0 of an exported folder, or of any Llama in Hugging Face's layout, whose image part
    then has its initial weights; the model. CheckpointError where it cannot be read, or is another kind of model."""
    if target.exists():
        raise CheckpointError("there is something already", target, "name a folder that is not there yet")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no configuration can be read: {error}", folder / CONFIG, "name an exported folder"
        ) from None
    ours = config.get("armillary", {}).get("model", {})
    llama = "architectures" in config
    image = {key: value for key, value in ours.items() if key.startswith(IMAGE_KEYS)}
    model = model_config(config, image, str(folder / CONFIG)) if llama else ModelConfig.model_validate(ours)
    job = TrainJob(model=model, parallel=Layout())
    join(Rank(), job.parallel)
    (built,) = build_model(job, torch.device("cpu"))
    tensors = _Tensors(folder)

    def state() -> Iterator[tuple[str, Block]]:
        for parameter, place in placements([built]):
            weight = parameter.detach().float()
            if llama and is_decoder(place.name):
                weight = from_llama(model, place.name, [tensors.get(name) for name in sources(place.name)])
            elif place.name in tensors or not llama:
                weight = tensors.get(place.name)
            if weight.shape != place.shape:
                raise CheckpointError(
                    f"{place.name} has shape {list(weight.shape)}, by the configuration {list(place.shape)}", folder,
                    "see that config.json belongs to the weights",
                )  # fmt: skip
            start = (0,) * len(place.shape)
            yield "weight", Block(place.name, place.shape, start, weight)
            for moment in MOMENTS:
                yield moment, Block(place.name, place.shape, start, torch.zeros(place.shape))

    _save(target, state(), job)
    return model


def _save(target: Path, tensors: Iterable[tuple[str, Block]], job: TrainJob) -> None:
    state = State(
        step=0, cursor=Cursor(), data_order=ORDER, tokens=0, loss=0.0, run=target.name, job_hash="",
        job=job.model_dump(mode="json"), saved_at=0.0,
    )  # fmt: skip
    store = LocalStorage(target.parent)
    saver = Saver(store, 0, 0, 1, False, lambda name, state: commit(store.folder(name), state, 0, 1))
    saver.save(target.name, tensors, False, state)
    saver.wait()
    if (error := saver.failure()) is not None:
        raise error


class _Tensors:
    """The tensors of all safetensors files of a folder, by name."""

    def __init__(self, folder: Path):
        self._folder, self._files = folder, {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    self._files |= dict.fromkeys(file.keys(), path)
            except Exception as error:  # of the library's own kind, which it does not export
                raise CheckpointError(f"a file cannot be read: {error}", path, "copy it again") from None

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str) -> torch.Tensor:
        if name not in self._files:
            raise CheckpointError(f"there is no {name} in its files", self._folder, "see that all of them are there")
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name).float()


def _write_shards(folder: Path, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """model.safetensors, or as many files as it takes, with the index that `transformers` looks for."""
    shard: dict[str, torch.Tensor] = {}
    held, total, files = 0, 0, {}

    def write() -> None:
        name = f"model-{len(set(files.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        files.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, weight in weights:
        size = weight.numel() * weight.element_size()
        if shard and held + size > SHARD_BYTES:
            write()
            held = 0
        shard[name] = weight
        held, total = held + size, total + size
    write()
    if len(set(files.values())) == 1:
        (folder / "model-00001.safetensors").rename(folder / "model.safetensors")
        return
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
