"""The peers: each function yields batches of 64 shuffled sequences, or images, as its library's documentation has it.

`prepare` converts the common corpus into the library's own format, once; it is not timed.
"""

import functools
import importlib.machinery
import io
import json
import sys
import types
import unittest.mock
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.data import corpora

BATCH = 64


def windows(folder: Path) -> np.ndarray:
    """The corpus as rows of 2,048 tokens, uint16."""
    tokens = np.memmap(corpora.text(folder), np.uint16, mode="r")
    return tokens[: len(tokens) // corpora.SEQ_LENGTH * corpora.SEQ_LENGTH].reshape(-1, corpora.SEQ_LENGTH)


def files(folder: Path) -> tuple[list[Path], list[str]]:
    path = corpora.pictures(folder)
    return sorted(path.glob("*.jpg")), json.loads((path / "captions.json").read_text())


class Litdata:
    """litdata: TokensLoader for text, its own shards of (jpeg, caption) for images."""

    def prepare_text(self, folder: Path) -> None:
        from litdata import TokensLoader, optimize

        if not (folder / "litdata").exists():
            optimize(
                fn=_litdata_tokens, inputs=[str(corpora.text(folder))], output_dir=str(folder / "litdata"),
                chunk_size=(corpora.SEQ_LENGTH + 1) * 8012, item_loader=TokensLoader(), num_workers=1,
            )  # fmt: skip

    def text(self, folder: Path) -> Iterator[int]:
        import torch
        from litdata import StreamingDataset, TokensLoader

        data = StreamingDataset(
            str(folder / "litdata"),
            item_loader=TokensLoader(block_size=corpora.SEQ_LENGTH),
            shuffle=True,
            drop_last=True,
        )
        for batch in torch.utils.data.DataLoader(data, BATCH):
            yield batch.numel()

    def prepare_images(self, folder: Path) -> None:
        from litdata import optimize

        if not (folder / "litdata-images").exists():
            paths, captions = files(folder)
            optimize(
                fn=_litdata_picture, inputs=list(zip(map(str, paths), captions, strict=True)),
                output_dir=str(folder / "litdata-images"), chunk_bytes="64MB", num_workers=1,
            )  # fmt: skip

    def images(self, folder: Path) -> Iterator[bytes]:
        from litdata import StreamingDataset

        for sample in StreamingDataset(str(folder / "litdata-images"), shuffle=True):
            yield sample["jpeg"]


def _litdata_tokens(path: str):
    import torch

    tokens = np.fromfile(path, np.uint16)
    for part in np.split(tokens, np.cumsum(corpora.lengths())[:-1]):
        yield torch.from_numpy(part)


def _litdata_picture(item: tuple[str, str]) -> dict:
    path, caption = item
    return {"jpeg": Path(path).read_bytes(), "caption": caption}


@functools.cache
def _streaming():
    """The library. It imports torchvision for data sets that are not used here; torchvision has no build for a PyTorch
    without CUDA, so that empty modules take its place."""
    for name in ("torchvision", "torchvision.datasets", "torchvision.datasets.folder", "torchvision.transforms",
                 "torchvision.transforms.functional"):  # fmt: skip
        module = unittest.mock.MagicMock(VisionDataset=object)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
    import streaming

    return streaming


class Streaming:
    """mosaicml-streaming: MDS shards; a sample is a row of 2,048 tokens."""

    predownload: int | None = None

    def prepare_text(self, folder: Path) -> None:
        if not (folder / "mds").exists():
            with _streaming().MDSWriter(out=str(folder / "mds"), columns={"tokens": "ndarray:uint16"}) as writer:
                for row in windows(folder):
                    writer.write({"tokens": np.ascontiguousarray(row)})

    def text(self, folder: Path) -> Iterator[int]:
        import torch

        data = _streaming().StreamingDataset(
            local=str(folder / "mds"), shuffle=True, batch_size=BATCH, predownload=self.predownload
        )
        for batch in torch.utils.data.DataLoader(data, BATCH):
            yield batch["tokens"].numel()

    def prepare_images(self, folder: Path) -> None:
        if not (folder / "mds-images").exists():
            with _streaming().MDSWriter(
                out=str(folder / "mds-images"), columns={"jpeg": "bytes", "caption": "str"}
            ) as writer:
                for path, caption in zip(*files(folder), strict=True):
                    writer.write({"jpeg": path.read_bytes(), "caption": caption})

    def images(self, folder: Path) -> Iterator[bytes]:
        data = _streaming().StreamingDataset(
            local=str(folder / "mds-images"), shuffle=True, batch_size=BATCH, predownload=self.predownload
        )
        for sample in data:
            yield sample["jpeg"]


class StreamingTuned(Streaming):
    """The same, told to prepare 65,536 samples ahead."""

    predownload = 65536


class Webdataset:
    """webdataset: tars, shuffled in a buffer of 1,000."""

    def prepare_text(self, folder: Path) -> None:
        import webdataset

        if not (folder / "wds").exists():
            (folder / "wds").mkdir()
            with webdataset.ShardWriter(str(folder / "wds" / "%05d.tar"), maxcount=8192, verbose=0) as writer:
                for number, row in enumerate(windows(folder)):
                    writer.write({"__key__": f"{number:08d}", "bin": row.tobytes()})

    def text(self, folder: Path) -> Iterator[int]:
        import webdataset

        data = webdataset.WebDataset(sorted(map(str, (folder / "wds").glob("*.tar"))), shardshuffle=100).shuffle(1000)
        data = data.map(lambda sample: (np.frombuffer(sample["bin"], np.uint16),)).batched(BATCH)
        for (batch,) in data:
            yield batch.size

    def prepare_images(self, folder: Path) -> None:
        import webdataset

        if not (folder / "wds-images").exists():
            (folder / "wds-images").mkdir()
            with webdataset.ShardWriter(str(folder / "wds-images" / "%05d.tar"), maxcount=4096, verbose=0) as writer:
                for path, caption in zip(*files(folder), strict=True):
                    writer.write({"__key__": path.stem, "jpg": path.read_bytes(), "txt": caption})

    def images(self, folder: Path) -> Iterator[bytes]:
        import webdataset

        tars = sorted(map(str, (folder / "wds-images").glob("*.tar")))
        for sample in webdataset.WebDataset(tars, shardshuffle=100).shuffle(1000):
            yield sample["jpg"]


class Datasets:
    """Hugging Face datasets, map style, shuffled by an index."""

    def prepare_text(self, folder: Path) -> None:
        import datasets

        if not (folder / "hf").exists():
            features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("uint16"))})
            rows = datasets.Dataset.from_generator(
                lambda: ({"tokens": row} for row in windows(folder)), features=features
            )
            rows.save_to_disk(str(folder / "hf"))

    def text(self, folder: Path) -> Iterator[int]:
        import datasets

        data = datasets.load_from_disk(str(folder / "hf")).with_format("numpy")
        order = np.random.default_rng(0).permutation(len(data))
        for start in range(0, len(data) - BATCH, BATCH):
            yield data[order[start : start + BATCH]]["tokens"].size

    def prepare_images(self, folder: Path) -> None:
        import datasets

        if not (folder / "hf-images").exists():
            paths, captions = files(folder)
            rows = {"jpeg": [path.read_bytes() for path in paths], "caption": captions}
            features = datasets.Features({"jpeg": datasets.Value("binary"), "caption": datasets.Value("string")})
            datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder / "hf-images"))

    def images(self, folder: Path) -> Iterator[bytes]:
        import datasets
        import torch

        data, worker = datasets.load_from_disk(str(folder / "hf-images")), torch.utils.data.get_worker_info()
        order = np.random.default_rng(0).permutation(len(data))
        for number in (order if worker is None else order[worker.id :: worker.num_workers]).tolist():
            yield data[number]["jpeg"]


class Grain:
    """grain: a random-access source, shuffled and batched by its MapDataset."""

    def prepare_text(self, folder: Path) -> None:
        corpora.text(folder)

    def text(self, folder: Path) -> Iterator[int]:
        import grain

        rows = windows(folder)
        data = grain.MapDataset.source(rows).seed(0).shuffle().batch(BATCH)
        for batch in data.to_iter_dataset():
            yield batch.size

    def prepare_images(self, folder: Path) -> None:
        files(folder)

    def images(self, folder: Path) -> Iterator[bytes]:
        import grain

        paths, _ = files(folder)
        for path in grain.MapDataset.source(paths).seed(0).shuffle().to_iter_dataset():
            yield io.FileIO(path).readall()


class Energon:
    """megatron-energon: tars, shuffled in a buffer of 1,000, as crude samples with a cooker."""

    def prepare_text(self, folder: Path) -> None:
        Webdataset().prepare_text(folder)
        self._index(folder / "wds")

    def text(self, folder: Path) -> Iterator[int]:
        for batch in self._samples(folder / "wds", "bin", BATCH):
            yield sum(len(row) // 2 for row in batch)

    def prepare_images(self, folder: Path) -> None:
        Webdataset().prepare_images(folder)
        self._index(folder / "wds-images")

    def images(self, folder: Path) -> Iterator[bytes]:
        for batch in self._samples(folder / "wds-images", "jpg", 1):
            yield from batch

    def _index(self, path: Path) -> None:
        from megatron.energon.flavors import BaseWebdatasetFactory

        if not (path / ".nv-meta").exists():
            tars = sorted(tar.name for tar in path.glob("*.tar"))
            BaseWebdatasetFactory.prepare_dataset(
                path, tars, split_parts_ratio=[("train", 1.0)], progress_fn=lambda done, total: done
            )
            kind = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
            (path / ".nv-meta" / "dataset.yaml").write_text(kind)

    def _samples(self, path: Path, key: str, size: int) -> Iterator[list[bytes]]:
        from megatron.energon import (
            Cooker,
            DefaultTaskEncoder,
            WorkerConfig,
            get_savable_loader,
            get_train_dataset,
            stateless,
        )

        class Encoder(DefaultTaskEncoder):
            cookers = (Cooker(stateless(lambda sample: sample)),)
            decoder = None

            @stateless
            def batch(self, samples: list[dict]) -> list[bytes]:
                return [sample[key] for sample in samples]

        workers = WorkerConfig.default_worker_config(0)
        data = get_train_dataset(
            path, worker_config=workers, batch_size=size, shuffle_buffer_size=1000, max_samples_per_sequence=100,
            task_encoder=Encoder(),
        )  # fmt: skip
        yield from get_savable_loader(data)


class GPTDatasetPeer:
    """Megatron-core's GPTDataset over its indexed files. It has no images."""

    def prepare_text(self, folder: Path) -> None:
        import torch
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        if not (folder / "gpt.idx").exists():
            tokens = np.fromfile(corpora.text(folder), np.uint16)
            builder = IndexedDatasetBuilder(str(folder / "gpt.bin"), np.uint16)
            for part in np.split(tokens, np.cumsum(corpora.lengths())[:-1]):
                builder.add_document(torch.from_numpy(part), [len(part)])
            builder.finalize(str(folder / "gpt.idx"))

    def text(self, folder: Path) -> Iterator[int]:
        import torch
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

        config = GPTDatasetConfig(
            random_seed=1, sequence_length=corpora.SEQ_LENGTH, blend=([str(folder / "gpt")], None), split="1,0,0",
            reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
            tokenizer=types.SimpleNamespace(vocab_size=corpora.VOCABULARY, eod=0, pad=0, unique_identifiers={}),
        )  # fmt: skip
        count = len(windows(folder)) - 1
        data = BlendedMegatronDatasetBuilder(GPTDataset, [count, None, None], lambda: True, config).build()[0]
        for batch in torch.utils.data.DataLoader(data, BATCH):
            yield batch["tokens"].numel()


PEERS = {
    "litdata": Litdata,
    "streaming": Streaming,
    "streaming, predownload 65536": StreamingTuned,
    "webdataset": Webdataset,
    "datasets": Datasets,
    "grain": Grain,
    "energon": Energon,
    "Megatron GPTDataset": GPTDatasetPeer,
}
